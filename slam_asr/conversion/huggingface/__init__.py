"""Source files that `convert-checkpoint --to huggingface` copies.

They need only torch and transformers, and soundfile and soxr to read audio files. In a folder, a copy of
`slam_asr/generation/ctc_prefix.py` takes the place of `ctc_prefix_slam_asr.py`.
"""
