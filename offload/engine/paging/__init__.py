"""Pages of weights: which are on the device, how they come, and which goes next."""
