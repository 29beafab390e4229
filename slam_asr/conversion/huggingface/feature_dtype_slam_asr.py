"""Stands in for `slam_asr/models/feature_dtype.py`: exported folders have a copy of it here."""

from slam_asr.models.feature_dtype import round_trip

__all__ = ["round_trip"]
