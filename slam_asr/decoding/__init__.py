"""From a model and speech to transcripts and their word error rate."""
