"""Sweeps: several trainings by variations of one recipe, over one manifest and one feature store, and the page that compares them."""
