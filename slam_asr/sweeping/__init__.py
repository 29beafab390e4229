"""Sweeps: train variations of a recipe on one manifest and feature store, and compare them on one page."""
