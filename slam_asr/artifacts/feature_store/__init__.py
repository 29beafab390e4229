"""The feature store: shards of encoder outputs, and the indexes that locate each utterance in them."""
