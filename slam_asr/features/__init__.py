"""Extraction and maintenance of features: each utterance is encoded once, and every run uses the result."""
