"""Selects the class that reads an encoder's checkpoint, by the checkpoint's model type."""

from pathlib import Path

from transformers import PretrainedConfig

from slam_asr.config.recipe import Encoder
from slam_asr.errors import ModelError
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.waveform import WAVEFORM_MODELS, WaveformSpec
from slam_asr.models.encoders.whisper import WhisperSpec
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_config import read_model_config


def describe_encoder(options: Encoder) -> EncoderSpec:
    """Read an encoder's configuration without its weights.

    Raises:
        ModelError: the model cannot be found, or is not a supported encoder.
    """
    folder = locate_model(options.name)
    return spec_of(folder, read_model_config(folder, "encoder"), options)


def spec_of(folder: Path, config: PretrainedConfig, options: Encoder) -> EncoderSpec:
    """Build an encoder's description from its configuration.

    Raises:
        ModelError: the configuration is not that of a supported encoder.
    """
    if config.model_type == "whisper":
        return WhisperSpec(folder, config, options)
    if config.model_type in WAVEFORM_MODELS:
        return WaveformSpec(folder, config, options)
    raise ModelError(
        f"encoder.name is {options.name}, a model of type {config.model_type}; "
        f"supported encoders: whisper, {', '.join(WAVEFORM_MODELS)}. Give one of these."
    )
