"""Estimates the memory, time and storage that a recipe needs, from its models' configurations alone."""
