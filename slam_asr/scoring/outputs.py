"""Readers of recognisers' output: this project's hypotheses, or files in the format of SLAM-LLM."""

import unicodedata
from pathlib import Path

from slam_asr.artifacts.hypotheses import HYPOTHESES, Hypothesis, read_hypotheses
from slam_asr.errors import InputError
from slam_asr.storage import exists, fetch, join

PREDICTIONS, REFERENCES = "_pred", "_gt"
"""Endings of the names of SLAM-LLM's files: hypotheses and references."""


def read_output(path: str) -> list[Hypothesis]:
    """Read the utterances of a recogniser's output.

    Args:
        path: local path or s3:// URI of a folder that decode or score wrote, of the hypotheses in it, or of
            SLAM-LLM's `…_pred`, with its `…_gt` next to it. Each line of the last two is key, tab, text.

    Raises:
        InputError: the path does not exist, or its content is in none of these formats.
    """
    if path.endswith(PREDICTIONS):
        return _read_pair(path)
    file = next(filter(exists, (join(path, HYPOTHESES), path)), None)
    if file is None:
        raise InputError(
            f"{path} contains no hypotheses: name a folder that decode or score wrote, a hypotheses.jsonl, "
            f"or SLAM-LLM's …{PREDICTIONS} file."
        )
    return read_hypotheses(fetch(file))


def _read_pair(path: str) -> list[Hypothesis]:
    references = path.removesuffix(PREDICTIONS) + REFERENCES
    for file in (path, references):
        if not exists(file):
            raise InputError(
                f"There is no {file}: SLAM-LLM's decoding writes {PREDICTIONS} and {REFERENCES} next to each "
                "other, and both are needed."
            )
    hypotheses, reference_lines = _read_lines(fetch(path)), _read_lines(fetch(references))
    for file, lines, other_lines, lack in (
        (path, hypotheses, reference_lines, "no reference"),
        (references, reference_lines, hypotheses, "no hypothesis"),
    ):
        if unpaired := sorted(lines.keys() - other_lines.keys()):
            raise InputError(
                f"{file} has {len(unpaired)} utterances with {lack}, first {unpaired[0]}: "
                "both files must contain the same utterances."
            )
    return [Hypothesis(key, reference_lines[key], hypotheses[key]) for key in reference_lines]


def _read_lines(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: convert it, for example with iconv.") from error
    # `splitlines` would also split at characters such as U+2028, which a transcript may contain.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, text = line.partition("\t")
        # Two programs may write the same key in different Unicode forms (NFC and NFD).
        key = unicodedata.normalize("NFC", key)
        if not tab or key in texts:
            what = f"repeats the key {key}" if tab else "has no tab between key and text"
            raise InputError(
                f"{path}, line {number} {what}: expected lines of key, tab, text, one per utterance."
            )
        texts[key] = text
    return texts
