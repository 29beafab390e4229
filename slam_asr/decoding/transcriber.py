"""Transcribes recordings of any length with a loaded model: the entry point for Python programs.

Each recording is divided at pauses (`pauses.py`). The segments of several recordings are decoded in common
batches.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from slam_asr.artifacts.shipped import default_model
from slam_asr.artifacts.transcript import Piece, Segment, Transcript
from slam_asr.audio import SAMPLE_RATE, AudioError, count_samples, read_clip
from slam_asr.config.recipe import Recipe
from slam_asr.cores import usable_cores
from slam_asr.decoding.pauses import divide
from slam_asr.models.grouping import cut_at_budget
from slam_asr.progress import Meter, log_line

if TYPE_CHECKING:
    import numpy as np

    from slam_asr.decoding.model import Model
    from slam_asr.models.searcher import Answer

MAX_SECONDS_IN_MEMORY = 3600.0
"""Maximum seconds of audio in memory at a time. Only a single longer file exceeds it."""


def load_transcriber(
    model: str | None = None, recipe: Recipe | None = None, max_segment_seconds: float = 20.0
) -> "Transcriber":
    """Load a model for transcription.

    ```python
    from slam_asr.decoding.transcriber import load_transcriber

    transcriber = load_transcriber()
    print(transcriber.transcribe("recording.m4a").text)
    ```

    Args:
        model: name of a shipped model, or a folder or s3:// prefix that convert-checkpoint wrote. By default,
            the best of the shipped models.
        recipe: how to decode (its section `decoding`), and where the base models are; by default, the recipe
            that the model was trained with.
        max_segment_seconds: maximum length in seconds of the segments that recordings are divided into. The
            encoder's window limits it further.

    Raises:
        ModelError: a base model does not exist or is not the one that the model was trained with, or weights
            are missing or damaged.
        ConfigurationError: as for `Transcriber`; or the recipe names an encoder or LLM that the model
            replaces by its own.
        UserError: the model does not exist.
    """
    from slam_asr.decoding.model import open_model

    opened = open_model(model or default_model(), recipe)
    return Transcriber(opened, recipe or opened.trained, max_segment_seconds)


class Transcriber:
    """A loaded model that transcribes recordings; `load_transcriber` builds it.

    Args:
        model: a located model; its weights are loaded here.
        recipe: how to decode (its section `decoding`).
        max_segment_seconds: as for `load_transcriber`.

    Raises:
        ModelError: weights are missing or damaged.
        ConfigurationError: this machine cannot compute in the recipe's precision, a segment of maximum length
            leaves too few LLM positions for its answer, or the recipe requests CTC's scores and the model has
            no CTC head.
    """

    def __init__(self, model: "Model", recipe: Recipe, max_segment_seconds: float) -> None:
        from slam_asr.models.precision import explain_precision, pick_device
        from slam_asr.models.searcher import Searcher

        self.model, self.options = model, recipe.decoding
        model.require_ctc_head(self.options)
        explain_precision(self.options.precision, pick_device())  # raises if it cannot be used
        window = model.spec.window_samples
        self.max_segment_seconds = min(max_segment_seconds, (window or math.inf) / SAMPLE_RATE)
        prompt = model.prompt()
        self._prompt_positions = prompt.main.positions
        longest = model.positions(model.spec.span_of(round(self.max_segment_seconds * SAMPLE_RATE)))
        # This check comes before the weights are loaded.
        name = f"Audio of {self.max_segment_seconds:g} s"
        model.require_capacity([longest + self._prompt_positions], self.options, lambda _: name)
        self._searcher = Searcher(model.load(self.options, with_encoder=True), prompt, self.options)
        self._prepare = model.spec.preparer()

    def transcribe(self, file: str) -> Transcript:
        """Transcribe one audio file.

        Args:
            file: audio file or video of any usual format, local or s3://, of any length and sample rate.

        Raises:
            InputError: the file does not exist, is not audio or is damaged.
            ConfigurationError: the file needs PyAV, and that is not installed.
        """
        (transcript,) = self.transcribe_files([file])
        return transcript

    def transcribe_files(
        self,
        files: Sequence[str],
        seconds: Sequence[float] | None = None,
        meter: Meter | None = None,
        on_error: Callable[[str, AudioError], None] | None = None,
    ) -> Iterator[Transcript]:
        """Transcribe audio files. Their segments share batches, so this is faster than one file at a time.

        Args:
            files: as for `transcribe`.
            seconds: duration of each file, if known; by default, it is read from the files' headers. Files
                that only ffmpeg reads are then decoded once more, to measure it.
            meter: counts seconds of audio.
            on_error: called with a damaged file and its error; the file is then skipped. Without it, the
                error is raised.

        Yields:
            A transcript per file, in the order of `files`.

        Raises:
            InputError: a file does not exist or is not audio (raised before any is transcribed if `seconds`
                is None), or is damaged.
            ConfigurationError: a file needs PyAV, and that is not installed.
        """
        if seconds is None:
            seconds = [count_samples(file) / SAMPLE_RATE for file in files]
        # An hour of audio at 16 kHz in float32 takes 230 MB.
        for group in cut_at_budget(range(len(files)), seconds, MAX_SECONDS_IN_MEMORY):
            recordings = []
            for file in (files[index] for index in group):
                try:
                    recordings.append((file, _read(file)))
                except AudioError as error:
                    if on_error is None:
                        raise
                    on_error(file, error)
            yield from self.transcribe_recordings(recordings, meter)

    def transcribe_recordings(
        self, recordings: "Sequence[tuple[str, np.ndarray]]", meter: Meter | None = None
    ) -> Iterator[Transcript]:
        """Transcribe audio in memory.

        Args:
            recordings: name and audio of each recording; the audio is float32 [samples] at 16 kHz, with full
                scale 1.
            meter: counts seconds of audio.

        Yields:
            A transcript per recording, in the same order.
        """
        from slam_asr.models.searcher import plan_batches

        divided = [self.pieces(samples) for _, samples in recordings]
        pieces = [piece for of_recording in divided for piece in of_recording]
        positions, options = [self.positions(piece) for piece in pieces], self.options
        limits = options.max_new_tokens, options.beams, options.positions_per_batch
        # Batches contain pieces of similar length, of any recording, so answers do not come in order.
        segments: dict[int, Segment] = {}
        for batch in plan_batches(positions, *limits):
            for i, answer in zip(batch, self.decode([pieces[i] for i in batch]), strict=True):
                segments[i] = Segment(pieces[i].start, pieces[i].end, answer.text, answer.cut)
            if meter is not None:
                # The meter is updated once per batch: all of its segments are finished at the same time.
                meter.update(round(sum(len(pieces[i].samples) for i in batch) / SAMPLE_RATE))
        in_order = (segments[i] for i in range(len(pieces)))
        for (name, samples), of_recording in zip(recordings, divided, strict=True):
            yield Transcript(name, len(samples) / SAMPLE_RATE, list(islice(in_order, len(of_recording))))

    def pieces(self, samples: "np.ndarray") -> list[Piece]:
        """Divide a recording at pauses.

        Args:
            samples: float32 [samples] at 16 kHz, with full scale 1.

        Returns:
            The pieces in order, without overlap; an empty list for silence. They are views of `samples`.
        """
        pieces = []
        for part in divide(samples, self.max_segment_seconds):
            start, end = part.start / SAMPLE_RATE, part.stop / SAMPLE_RATE
            positions = self.model.positions(self.model.spec.span_of(part.stop - part.start))
            pieces.append(Piece(samples[part], start, end, positions))
        return pieces

    def positions(self, piece: Piece) -> int:
        """Return the number of LLM positions of a piece's audio and the prompt."""
        return piece.positions + self._prompt_positions

    def decode(self, pieces: Sequence[Piece]) -> "list[Answer]":
        """Decode a batch of pieces, of any recordings; return an answer for each, in the same order."""
        # Threads are enough: torch and NumPy release the GIL while they compute.
        inputs = list(self._pool.map(self._prepare, [piece.samples for piece in pieces]))
        return self._searcher.decode(inputs, [piece.positions for piece in pieces])

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(usable_cores(), "prepare-audio")


def _read(file: str) -> "np.ndarray":
    """Decode a recording; log if it has no signal, or if its channels are averaged.

    Raises:
        AudioError: as for `load_audio`.
    """
    clip = read_clip(file)
    if clip.silent:
        log_line(
            f"{file} holds no signal: all of its samples have the same value, so its transcript is empty"
        )
    elif clip.channels > 1:
        log_line(f"the {clip.channels} channels of {file} are averaged")
    return clip.samples
