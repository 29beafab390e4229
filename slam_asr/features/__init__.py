"""The cache of encoder outputs: computed once per utterance, shared by every run."""
