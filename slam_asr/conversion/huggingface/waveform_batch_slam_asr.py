"""Imports from `slam_asr/models/encoders/waveform_batch.py`.

In an exported folder, a copy of that module takes the place of this file.
"""

from slam_asr.models.encoders.waveform_batch import encode_waveforms, mask_first_norm

__all__ = ["encode_waveforms", "mask_first_norm"]
