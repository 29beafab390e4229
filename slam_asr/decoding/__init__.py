"""Transcripts that a trained model writes for test utterances and for recordings of any length."""
