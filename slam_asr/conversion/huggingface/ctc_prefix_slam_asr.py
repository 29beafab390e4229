"""Stands in for the copy of `slam_asr/generation/ctc_prefix.py` that an exported folder has under this name.

`ctc_prefix.py` needs only torch, so the exporter copies it instead of this file. The searches of slam-asr and
of the exported folder thus share its code.
"""

from slam_asr.generation.ctc_prefix import CtcScorer, CtcSpelling

__all__ = ["CtcScorer", "CtcSpelling"]
