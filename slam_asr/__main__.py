"""`python -m slam_asr` is the same as `slam-asr`."""

from slam_asr.cli import main

main()
