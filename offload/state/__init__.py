"""Saving and loading: checkpoints, export, and the engine's public class that offers them."""
