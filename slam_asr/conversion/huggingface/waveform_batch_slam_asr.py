"""Stands in for `slam_asr/models/encoders/waveform_batch.py`: exported folders have a copy of it here."""

from slam_asr.models.encoders.waveform_batch import encode_waveforms, mask_first_norm

__all__ = ["encode_waveforms", "mask_first_norm"]
