"""Estimate the memory, time and storage that a recipe takes, from its models' configurations alone."""
