"""Stands in for `slam_asr/models/projector.py`: exported folders have a copy of it here."""

from slam_asr.models.projector import build_projector

__all__ = ["build_projector"]
