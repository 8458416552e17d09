"""Host arena, device budget, NVMe store, transfers, a simulated tier with modelled bandwidth."""
