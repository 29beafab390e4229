"""The feature store: shards of encoder outputs, and indexes with which they are found."""
