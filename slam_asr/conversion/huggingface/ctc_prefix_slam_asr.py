"""Stands in for `slam_asr/generation/ctc_prefix.py`: exported folders have a copy of it here."""

from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling

__all__ = ["CtcScorer", "CtcSpelling"]
