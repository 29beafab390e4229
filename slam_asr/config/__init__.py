"""Typed recipes, and the checks of their values."""
