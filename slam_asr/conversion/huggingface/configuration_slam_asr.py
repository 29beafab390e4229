"""The configuration that joins a speech encoder, a projector and an LLM. It needs only transformers."""

from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig


class SlamAsrConfig(PreTrainedConfig):
    """The configuration of the joined model. transformers turns every such class into a dataclass.

    Args:
        encoder_name: the encoder's name on the hub, or its folder; None if it is in the subfolder `encoder`.
        llm_name: the LLM's name on the hub, or its folder; None if it is in the subfolder `llm`.
        encoder_dtype: dtype in which the encoder computes. `dtype` is that of projector and LLM.
        encoder_width: values per encoder frame.
        llm_width: values per LLM position.
        projector: `kind` (linear, cov1d-linear or q-former), `downsampling`, `hidden`, `queries`, `layers`.
        frames: for Whisper, whether `all` frames of its window are used or only those of the `speech`.
        long_audio: for Whisper, whether audio beyond its window is `cut`, or `split` into several windows.
        feature_dtype: bf16, fp16, fp32 or fp8: the encoder's outputs are rounded to it, as in training.
        lora_scale: factor of the LoRA adapter's output, alpha / rank; None without an adapter.
        audio_token_id: token id that marks an LLM position of the audio.
        drop_blanks: the LLM does not read positions at which CTC gives the blank at least this probability;
            0 if it reads all.
        ctc_tokens: token ids that CTC distinguishes, the blank's first; empty if the model has no CTC head.
        ctc_sharpness: factor of CTC's logits.
        ctc_first_tokens: for each of `ctc_tokens`, the token that stands for it at the beginning of an
            answer, where no space precedes a word; -1 if none exists. Empty if answers begin with a space.
        ctc_weight: CTC's share of the scores in `generate`, from 0 to 0.9; the LLM has the rest.
    """

    model_type = "slam_asr"

    encoder_name: str | None = None
    llm_name: str | None = None
    encoder_dtype: str = "float32"
    encoder_width: int = 0
    llm_width: int = 0
    projector: dict[str, Any] = field(default_factory=dict)
    frames: str = "all"
    long_audio: str = "cut"
    feature_dtype: str = "fp32"
    lora_scale: float | None = None
    audio_token_id: int = 0
    drop_blanks: float = 0.0
    ctc_tokens: list[int] = field(default_factory=list)
    ctc_sharpness: float = 1.0
    ctc_first_tokens: list[int] = field(default_factory=list)
    ctc_weight: float = 0.0
