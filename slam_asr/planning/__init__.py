"""Estimates the memory, time and storage that a recipe needs, without its models' weights."""
