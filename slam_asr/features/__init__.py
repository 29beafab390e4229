"""The cache of encoder outputs: computed once an utterance, shared by every run."""
