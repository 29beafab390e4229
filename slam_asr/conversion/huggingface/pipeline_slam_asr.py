"""transformers' pipeline for this model. It needs torch, transformers, and soundfile and soxr to read files.

transformers' own pipeline for speech recognition treats every model that it does not know as a CTC model.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import Pipeline
from transformers.audio_utils import load_audio


class SlamAsrPipeline(Pipeline):
    """Transcribes one recording or several; `pipeline("automatic-speech-recognition", …)` builds it.

    A recording is a path, a URL, the bytes of a file, samples at 16 kHz, or a dictionary with `array` (or
    `raw`) and `sampling_rate`. The result is a dictionary with the `text`.
    """

    # The type is `Any`, because transformers declares the `_load_` switches as None.
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _pipeline_calls_generate = False

    processor: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers took a tokenizer and a feature extractor from the processor. If a pipeline has both,
        # transformers only builds batches if both pad on the same side.
        self.feature_extractor = None

    def _sanitize_parameters(
        self, generate_kwargs: dict[str, Any] | None = None, prompt: str | None = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if options.pop("return_timestamps", None):
            raise ValueError("This model gives no time stamps: leave out return_timestamps.")
        if unknown := options.keys() - {"max_new_tokens", "num_beams"}:
            raise ValueError(f"Unknown option {min(unknown)}: options of `generate` go into generate_kwargs.")
        forward: dict[str, Any] = {"generate_kwargs": (generate_kwargs or {}) | options, "prompt": prompt}
        # An empty prompt is passed on too; the model's own prompt is used only if none is given.
        return {}, {name: value for name, value in forward.items() if value or value == ""}, {}

    def preprocess(self, recording: Any) -> dict[str, np.ndarray]:
        """Read a recording as samples [samples] at 16 kHz."""
        target = self.processor.feature_extractor.sampling_rate
        rate = target
        if isinstance(recording, Mapping):
            rate = recording["sampling_rate"]
            recording = recording["array"] if "array" in recording else recording["raw"]
        if isinstance(recording, bytes):
            recording = base64.b64encode(recording).decode()
        if isinstance(recording, str):
            recording = load_audio(recording, sampling_rate=target)
        samples = np.asarray(recording, dtype=np.float32)
        if samples.ndim > 1:
            # The shorter dimension is that of the channels.
            samples = samples.mean(axis=int(np.argmin(samples.shape)))
        if rate != target:
            import soxr  # transformers' own `load_audio` resamples with it

            samples = soxr.resample(samples, rate, target)
        return {"audio": samples}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        generate_kwargs: dict[str, Any] | None = None,
        prompt: str | None = None,
    ) -> dict[str, torch.Tensor]:
        # In a batch, `audio` is a list. The processor pads it here, because transformers would pad all inputs
        # on the same side, but audio is padded on the right and token ids on the left.
        inputs = self.processor.apply_transcription_request(model_inputs["audio"], prompt=prompt).to(
            self.device
        )
        tokens = self.model.generate(**inputs, **(generate_kwargs or {}))
        return {"tokens": tokens[:, inputs["input_ids"].shape[1] :]}

    def postprocess(self, model_outputs: dict[str, torch.Tensor]) -> dict[str, str]:
        """Return the text."""
        (text,) = self.processor.batch_decode(model_outputs["tokens"], skip_special_tokens=True)
        return {"text": text.strip()}
