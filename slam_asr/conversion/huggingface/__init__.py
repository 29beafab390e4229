"""Source files that `convert-checkpoint --to huggingface` copies.

They need only torch and transformers, and soxr to resample recordings.
"""
