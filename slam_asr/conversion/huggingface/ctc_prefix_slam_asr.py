"""Imports from `slam_asr/generation/ctc_prefix.py`.

In an exported folder, a copy of that module takes the place of this file.
"""

from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling

__all__ = ["CtcScorer", "CtcSpelling"]
