"""Activations that live on the host or on NVMe between forward and backward."""
