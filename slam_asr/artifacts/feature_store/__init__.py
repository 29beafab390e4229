"""The feature store: shards of encoder outputs, and the indexes that make them findable."""
