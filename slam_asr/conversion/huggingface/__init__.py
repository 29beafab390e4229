"""Source files that `convert-checkpoint --to huggingface` copies.

They need only torch and transformers, and soxr to resample recordings. In a folder, a copy of
`slam_asr/generation/ctc_prefix.py` takes the place of `ctc_prefix_slam_asr.py`.
"""
