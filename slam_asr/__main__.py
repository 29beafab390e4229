"""`python -m slam_asr` is `slam-asr`."""

from slam_asr.cli import main

main()
