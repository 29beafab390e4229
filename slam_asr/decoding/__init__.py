"""Decoding of test utterances: transcripts from a trained model, and their word error rate."""
