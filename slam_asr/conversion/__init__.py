"""Converts checkpoints to models that can decode, and models to other formats."""
