"""Registers trained models in a model registry."""
