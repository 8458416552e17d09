"""Parameters larger than the device budget, by tiles."""
