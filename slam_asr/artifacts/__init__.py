"""The contracts between stages: what lies on disk or in the bucket, how it is written, read and checked."""
