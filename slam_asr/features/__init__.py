"""Extraction and maintenance of features. Each utterance is encoded once, and every run uses the result."""
