"""The contracts between stages: files on disk or in a bucket, and how they are written, read and checked."""
