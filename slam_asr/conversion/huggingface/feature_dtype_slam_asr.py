"""Imports from `slam_asr/models/feature_dtype.py`.

In an exported folder, a copy of that module takes the place of this file.
"""

from slam_asr.models.feature_dtype import round_trip

__all__ = ["round_trip"]
