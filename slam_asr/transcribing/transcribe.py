"""`slam-asr transcribe MODEL FILES…`: what is said in any recordings, of any length."""

import contextlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slam_asr.audio import SAMPLE_RATE, AudioError, count_samples, load_audio
from slam_asr.errors import UserError
from slam_asr.progress import Meter, log_line
from slam_asr.recipe import Recipe
from slam_asr.storage import join, name_of, write_bytes
from slam_asr.transcribing.formats import FORMATS, SUFFIXES, Segment, Transcript
from slam_asr.transcribing.pauses import Stretch, divide

if TYPE_CHECKING:
    import numpy as np

    from slam_asr.decoding.model import Model

AT_ONCE = 3600.0
"""Seconds of audio in memory at a time, and never less than one file: batches are made of it."""


def transcribe(
    recipe: Recipe,
    model: str,
    files: list[str],
    format: Literal["text", "json", "srt"] = "text",
    output: str | None = None,
    longest: float = 20.0,
) -> list[Transcript]:
    """Write down what is said in audio files; those that are long are divided at pauses.

    Args:
        recipe: how to decode (its section `decoding`); that of the model unless another is named.
        model: folder that convert-checkpoint wrote, or the name of a shipped model.
        files: wav, flac, ogg, opus or mp3, local or s3://, of any length and sample rate.
        format: a line of text, a line of JSON with the times of segments, or SubRip subtitles.
        output: folder for a file beside the name of each recording; without it, transcripts are printed.
        longest: seconds that the model hears at once at most.

    Returns:
        The transcripts, in the order of the files.

    Raises:
        UserError: a file that is not there or no audio (before anything is loaded), one that is damaged (behind all others), or a
            base model that is not the one trained with.
    """
    from slam_asr.decoding.model import open_model

    if not files:
        raise UserError(
            "There is no file to transcribe: name one, such as `slam-asr transcribe MODEL recording.wav`."
        )
    if longest < 1:
        raise UserError(f"--longest is {longest:g} s but must be at least 1.")
    if format == "srt" and output is None and len(files) > 1:
        raise UserError(f"Subtitles of {len(files)} files would run together: name a folder with --output.")
    places = _places(files, output, SUFFIXES[format]) if output else {}
    sizes = [count_samples(file) / SAMPLE_RATE for file in files]
    printed = sys.stdout
    transcripts, damaged = [], []
    # What is printed is the transcripts alone; what a stage's log says goes to standard error.
    with contextlib.redirect_stdout(sys.stderr):
        transcriber = Transcriber(open_model(model), recipe, longest)
        with Meter("transcribe", total=round(sum(sizes)), unit="s") as meter:
            for group in _groups(sizes):
                recordings = {}
                for file in (files[at] for at in group):
                    try:
                        recordings[file] = load_audio(file)
                    except AudioError as error:
                        log_line(f"error: {error}")
                        damaged.append(file)
                for transcript in transcriber.transcribe(recordings, meter):
                    transcripts.append(transcript)
                    written = FORMATS[format](transcript)
                    if output:
                        write_bytes(places[transcript.file], written)
                    else:
                        print(written, end="", file=printed, flush=True)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(files)} files could not be read, first {damaged[0]}; the others are transcribed."
        )
    return transcripts


class Transcriber:
    """A loaded model, for recordings of any length.

    Args:
        model: not loaded yet.
        recipe: its section `decoding`.
        longest: seconds that are heard at once at most; no more than the encoder's window.
    """

    def __init__(self, model: "Model", recipe: Recipe, longest: float) -> None:
        from slam_asr.decoding.model import require_room
        from slam_asr.models.precision import explain_precision, pick_device
        from slam_asr.models.search import Searcher

        self.model, self.options = model, recipe.decoding
        window = model.spec.window_samples
        self.longest = min(longest, window / SAMPLE_RATE) if window else longest
        trained = model.trained
        log_line(
            f"models: {trained.encoder.name} + projector + {trained.llm.name}; {explain_precision(self.options.precision, pick_device())}"
        )
        prompt = model.prompt()
        self.head = len(prompt.main.before) + len(prompt.main.ids)
        most = model.positions(model.spec.span_of(round(self.longest * SAMPLE_RATE))) + self.head
        require_room(
            [most], lambda _: f"Audio of {self.longest:g} s", self.options.max_new_tokens, model.llm_folder
        )
        self.searcher = Searcher(model.load(self.options, with_encoder=True), prompt, self.options)
        self.prepare = model.spec.preparer()

    def transcribe(self, recordings: dict[str, "np.ndarray"], meter: Meter) -> Iterator[Transcript]:
        """What is said in each, in order; parts of all of them are decoded side by side.

        Args:
            recordings: [samples] at 16 kHz, by name.
            meter: is told of seconds.
        """
        from slam_asr.models.search import plan_batches

        parts = [
            (name, part) for name, samples in recordings.items() for part in divide(samples, self.longest)
        ]
        audio = [self.model.positions(self.model.spec.span_of(part.end - part.start)) for _, part in parts]
        positions = [n + self.head for n in audio]
        said: dict[int, Segment] = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "prepare-audio") as preparing:
            for batch in plan_batches(
                positions, self.options.max_new_tokens, self.options.beams, self.options.positions_per_batch
            ):
                inputs = list(
                    preparing.map(self.prepare, [_samples_of(recordings, *parts[i]) for i in batch])
                )
                for at, answer in zip(
                    batch, self.searcher.decode(inputs, [audio[i] for i in batch]), strict=True
                ):
                    said[at] = Segment(*parts[at][1].seconds, answer.text, answer.cut)
                # Once a batch: after the first of its parts alone, the time left would look far too long.
                meter.update(round(sum(parts[at][1].end - parts[at][1].start for at in batch) / SAMPLE_RATE))
        for name, samples in recordings.items():
            yield Transcript(
                name, len(samples) / SAMPLE_RATE, [said[at] for at, (of, _) in enumerate(parts) if of == name]
            )


def _samples_of(recordings: dict[str, "np.ndarray"], name: str, part: Stretch) -> "np.ndarray":
    return recordings[name][part.start : part.end]


def _groups(sizes: list[float]) -> Iterator[list[int]]:
    """Files, by their positions, that are in memory together."""
    group: list[int] = []
    for at in range(len(sizes)):
        if group and sum(sizes[i] for i in group) + sizes[at] > AT_ONCE:
            yield group
            group = []
        group.append(at)
    if group:
        yield group


def _places(files: list[str], output: str, suffix: str) -> dict[str, str]:
    """Where each file's transcript is written.

    Raises:
        UserError: two files would share one.
    """
    places: dict[str, str] = {}
    for file in files:
        place = join(output, Path(name_of(file)).stem + suffix)
        if place in places.values():
            raise UserError(
                f"Two files would be written to {place}: transcribe them one after the other, with another --output."
            )
        places[file] = place
    return places
