"""Turns audio and a prompt into the model's inputs. This file needs only torch and transformers."""

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin
from transformers.audio_utils import make_list_of_audio, make_list_of_audio_chat_template
from transformers.utils import logging

SAMPLES_PER_FRAME = 320
"""Samples per encoder frame at 16 kHz."""

logger = logging.get_logger(__name__)


class SlamAsrProcessor(ProcessorMixin):
    """Prepares utterances: audio of any length at 16 kHz, and the prompt around it.

    Args:
        feature_extractor: Whisper's, or that of WavLM, HuBERT and wav2vec 2.0.
        tokenizer: the LLM's, with a token for the audio.
        chat_template: turns a conversation that contains one audio into the text that the model was trained
            with.
        audio_token: stands for one LLM position of the audio.
        default_transcription_prompt: the prompt that the model was trained with.
        add_special_tokens: whether the tokenizer adds its bos token to the first piece of text.
        positions: how audio becomes LLM positions: `downsampling` and `queries` of the projector, whose
            queries are 0 unless it is a q-former; and `frames` and `long_audio` of the encoder.
        normalize: whether waveforms are normalised over their samples.
    """

    def __init__(  # noqa: PLR0913 (each parameter is a key of the file)
        self,
        feature_extractor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        audio_token: str = "<|audio|>",
        default_transcription_prompt: str = "",
        add_special_tokens: bool = True,
        positions: dict[str, Any] | None = None,
        normalize: bool = False,
    ) -> None:
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        self.default_transcription_prompt = default_transcription_prompt
        self.add_special_tokens, self.normalize = add_special_tokens, normalize
        self.positions = positions or {}
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "input_features", "audio_lengths"]

    @property
    def window_samples(self) -> int | None:
        """Samples of Whisper's window; None if the encoder has none."""
        return getattr(self.feature_extractor, "n_samples", None)

    def __call__(self, text: Any = None, audio: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare a batch.

        Args:
            text: for each utterance, a text in which `audio_token` marks where the audio is.
            audio: for each utterance, its samples at 16 kHz, a path or a URL.
            kwargs: `sampling_rate`, if given, must be the encoder's.

        Returns:
            Tensors on the CPU: `input_ids` and `attention_mask` [utterances, positions], padded on the left;
            `input_features`, spectrograms [windows, bins, columns] or waveforms [utterances, samples]; and
            `audio_lengths` [utterances] in samples.

        Raises:
            ValueError: a text does not contain `audio_token` exactly once, the numbers of texts and audios
                differ, or an audio has another sampling rate or several channels.
        """
        rate = self.feature_extractor.sampling_rate
        if kwargs.get("sampling_rate") not in (None, rate):
            raise ValueError(
                f"The audio has {kwargs['sampling_rate']} samples per second: resample it to {rate}."
            )
        texts = [text] if isinstance(text, str) else list(text)
        waves = [
            torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
            for wave in make_list_of_audio(self.feature_extractor.fetch_audio(audio))
        ]
        if len(texts) != len(waves) or any(t.count(self.audio_token) != 1 for t in texts):
            raise ValueError(f"Give one text with one {self.audio_token} for each audio.")
        if any(wave.ndim != 1 for wave in waves):
            raise ValueError("Audio must have one channel: average its channels.")
        lengths = [len(wave) for wave in waves]
        rows = [self._token_ids(t, self._positions_of(n)) for t, n in zip(texts, lengths, strict=True)]
        ids = [torch.tensor(row) for row in rows]
        data = {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id, padding_side="left"),
            "attention_mask": pad_sequence(
                [torch.ones_like(row) for row in ids], batch_first=True, padding_side="left"
            ),
            "input_features": self._features(waves),
            "audio_lengths": torch.tensor(lengths),
        }
        return BatchFeature(data)

    def _token_ids(self, text: str, positions: int) -> list[int]:
        """Tokenise what is before and after the audio separately, as in training."""
        before, after = text.split(self.audio_token)
        before_ids = self._encode(before, start=True) if before else []
        return [*before_ids, *[self.audio_token_id] * positions, *self._encode(after, start=not before_ids)]

    def _encode(self, text: str, start: bool) -> list[int]:
        # Only the first piece of text gets a bos token, as in training, even if that piece follows the audio.
        special = start and self.add_special_tokens
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special)
        # Some tokenizers append eos to every text, but an answer must follow here.
        return ids[:-1] if special and ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _positions_of(self, samples: int) -> int:
        """Return the number of LLM positions of an utterance."""
        options, window = self.positions, self.window_samples
        if options["queries"]:
            return options["queries"]
        if window is None:
            # Training reserves this number of positions. The encoder may give one frame less, and the model
            # fills a missing position with zeros.
            return samples // SAMPLES_PER_FRAME // options["downsampling"]
        frames = self._windows_of(samples) * window // SAMPLES_PER_FRAME
        if options["frames"] == "speech":
            frames = min(math.ceil(samples / SAMPLES_PER_FRAME), frames)
        return frames // options["downsampling"]

    def _windows_of(self, samples: int) -> int:
        """Return the number of Whisper's windows for an utterance."""
        assert self.window_samples is not None, "only Whisper has windows"
        split = self.positions["long_audio"] == "split"
        return max(1, math.ceil(samples / self.window_samples)) if split else 1

    def _features(self, waves: list[torch.Tensor]) -> torch.Tensor:
        size = self.window_samples
        if size is None:
            if self.normalize:
                # fairseq's epsilon; the feature extractor's is smaller, which matters for quiet audio.
                waves = [functional.layer_norm(wave, wave.shape, eps=1e-5) for wave in waves]
            return pad_sequence(waves, batch_first=True)
        windows = [
            wave[size * i : size * (i + 1)].numpy()
            for wave in waves
            for i in range(self._windows_of(len(wave)))
        ]
        longest = max(map(len, waves)) if self.positions["long_audio"] != "split" else 0
        if longest > size:
            logger.warning(
                f"Audio after the first {size // self.feature_extractor.sampling_rate} s is ignored."
            )
        return self.feature_extractor(
            windows, sampling_rate=self.feature_extractor.sampling_rate, return_tensors="pt"
        )["input_features"]

    def apply_transcription_request(
        self, audio: Any, prompt: str | list[str] | None = None, tokenize: bool = True, **kwargs: Any
    ) -> Any:
        """Prepare audio with the prompt that the model was trained with.

        Args:
            audio: one utterance or several: samples at 16 kHz, paths or URLs.
            prompt: another prompt, or one for each utterance.
            tokenize: if False, the prompts' texts are returned instead.
            kwargs: further arguments of `apply_chat_template`.

        Returns:
            The inputs of the model's `generate`.

        Raises:
            ValueError: no audio is given, or the number of prompts differs from that of utterances.
        """
        items = [
            item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else item
            for item in make_list_of_audio_chat_template(audio)
        ]
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt] * len(items)
        if not items or len(prompts) != len(items):
            raise ValueError(
                f"There are {len(items)} audios and {len(prompts)} prompts: give at least one audio, and as "
                "many prompts as audios, or one text for all."
            )
        conversations: Any = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "path" if isinstance(item, str) else "audio": item},
                        {"type": "text", "text": self.default_transcription_prompt if p is None else p},
                    ],
                }
            ]
            for item, p in zip(items, prompts, strict=True)
        ]
        return self.apply_chat_template(
            conversations, tokenize=tokenize, add_generation_prompt=True, return_dict=True, **kwargs
        )


__all__ = ["SlamAsrProcessor"]
