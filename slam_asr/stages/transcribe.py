"""The command `slam-asr transcribe FILES…`: turns recordings into text, JSON or subtitles."""

import contextlib
import sys
from pathlib import Path
from typing import Literal

from slam_asr.artifacts.model_folder import shipped_models
from slam_asr.artifacts.shipped import default_model
from slam_asr.artifacts.transcript import FORMATS, SUFFIXES, Transcript
from slam_asr.audio import SAMPLE_RATE, AudioError, Fault, count_samples
from slam_asr.config.recipe import Recipe
from slam_asr.config.schema import nearest
from slam_asr.decoding.transcriber import Transcriber
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.progress import Meter, log_line
from slam_asr.storage import is_s3, join, local_path, name_of, require_writable, write_bytes


def transcribe(
    recipe: Recipe,
    files: list[str],
    model: str | None = None,
    format: Literal["text", "json", "srt", "vtt"] = "text",
    output: str | None = None,
    longest: float = 20.0,
) -> list[Transcript]:
    """Transcribe audio files; long ones are divided at pauses.

    Args:
        recipe: how to decode (its section `decoding`), and where the base models are (`encoder.name`,
            `llm.name`); on the command line, the recipe that the model was trained with, unless another is
            named.
        files: audio files or videos of any usual format, local or s3://, of any length and sample rate.
        model: folder that convert-checkpoint wrote, or the name of a shipped model. By default, the best of
            the shipped models.
        format: a line of text, a line of JSON with the times of segments, or subtitles as SubRip or WebVTT.
        output: folder for the transcripts, one file per recording and named after it. If not given, they are
            printed.
        longest: maximum length of a segment in seconds. Longer segments give the LLM more context, but models
            work best at the lengths that they were trained on. The encoder's window, if it has one, is
            another limit.

    Returns:
        The transcripts, in the order of the files.

    Raises:
        InputError: a file does not exist or is not audio (raised before anything is loaded), or is damaged
            (raised after all others are transcribed).
        ConfigurationError: options contradict each other, two transcripts would have the same path, a file
            needs PyAV, which is not installed, or the recipe does not fit this machine or the model.
        ModelError: the model or a base model is missing or damaged, or a base model is not the one that the
            model was trained with.
        StorageError: the output prefix in object storage cannot be written; a local output folder raises an
            OSError instead (both before anything is loaded).
    """
    from slam_asr.decoding.model import open_model

    _check(files, format, output, longest)
    paths = _output_paths(files, output, SUFFIXES[format]) if output else {}
    # Every file's length is determined before a model is loaded, so that a missing file is reported at once.
    seconds = [_seconds(file) for file in files]
    printed = sys.stdout
    transcripts: list[Transcript] = []
    damaged: list[str] = []

    def skip(file: str, error: AudioError) -> None:
        log_line(f"error: {error}")
        damaged.append(file)

    # Standard output carries transcripts only: logs go to standard error.
    with contextlib.redirect_stdout(sys.stderr):
        opened = open_model(model or default_model(), recipe)
        log_line(opened.describe(recipe.decoding.precision))
        transcriber = Transcriber(opened, recipe, longest)
        with Meter("transcribe", total=round(sum(seconds)), unit="s") as meter:
            for transcript in transcriber.transcribe_files(files, seconds, meter, skip):
                transcripts.append(transcript)
                text = FORMATS[format](transcript)
                if output:
                    write_bytes(paths[transcript.file], text)
                else:
                    print(text, end="", file=printed, flush=True)
    if damaged:
        number, others = len(damaged), "; the others are transcribed" if transcripts else ""
        raise InputError(f"{number} of {len(files)} files could not be read, first {damaged[0]}{others}.")
    return transcripts


def _seconds(file: str) -> float:
    try:
        return count_samples(file) / SAMPLE_RATE
    except AudioError as error:
        if error.reason != Fault.MISSING:
            raise
        # The error's own sentence says to build the manifest again, but this command has no manifest.
        if not is_s3(file) and local_path(file).is_dir():
            raise InputError(
                f"{file} is a folder and holds no model (no config.json): name audio files."
            ) from error
        # The command also accepts a model before the files, so this may be the mistyped name of one.
        hint = nearest(file, list(shipped_models()))
        raise InputError(f"There is no audio file {file}{hint or ': check the path.'}") from error


def _check(files: list[str], format: str, output: str | None, longest: float) -> None:
    """Refuse missing, invalid and contradictory options.

    Raises:
        ConfigurationError: no file is given, segments would be too short, or subtitles would be mixed.
    """
    if not files:
        raise ConfigurationError(
            "No file to transcribe is given: name one, such as `slam-asr transcribe recording.m4a`."
        )
    if longest < 1:
        raise ConfigurationError(f"--longest is {longest:g} s but must be at least 1.")
    if format in ("srt", "vtt") and output is None and len(files) > 1:
        raise ConfigurationError(
            f"Subtitles of {len(files)} files cannot be printed one after the other: "
            "name a folder with --output."
        )


def _output_paths(files: list[str], output: str, suffix: str) -> dict[str, str]:
    """Return the path of each file's transcript.

    Raises:
        ConfigurationError: two transcripts would have the same path.
        OSError: the local output folder cannot be written.
        StorageError: the output prefix in object storage cannot be written.
    """
    paths: dict[str, str] = {}
    for file in files:
        path = join(output, Path(name_of(file)).stem + suffix)
        if path in paths.values():
            raise ConfigurationError(
                f"Two files would be written to {path}: transcribe one of them separately, "
                "with another --output."
            )
        paths[file] = path
    require_writable(output)
    return paths
