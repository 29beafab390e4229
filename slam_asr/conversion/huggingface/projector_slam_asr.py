"""Imports from `slam_asr/models/projector.py`.

In an exported folder, a copy of that module takes the place of this file.
"""

from slam_asr.models.projector import build_projector

__all__ = ["build_projector"]
