"""Hypotheses with their references: their files, their alignments, and the sums for the word error rate.

WER = (substitutions + deletions + insertions) / words in the references. Errors and words are summed over all
utterances before the division. jiwer finds the alignment with the fewest errors. If a hypothesis is empty,
all words of its reference are deletions; no utterance is left out. Insertions can raise the rate above 1.
Where spaces do not separate words, as in Chinese, characters are counted instead of words (CER).
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import jiwer

from slam_asr.artifacts.json_lines import write_json_lines
from slam_asr.artifacts.writing_systems import characters_of, comparable
from slam_asr.errors import InputError
from slam_asr.storage import write_atomically

HYPOTHESES, NBEST = "hypotheses.jsonl", "nbest.jsonl"
"""Names of the files with transcripts and with n-best lists, which decode and score write."""


@dataclass
class Hypothesis:
    """The reference transcript of one utterance, and the transcript that the recogniser wrote."""

    key: str
    """The utterance's key in its manifest."""
    reference: str
    hypothesis: str
    """Empty if the recogniser wrote nothing."""
    subset: str = ""
    """The part of the corpus that the utterance comes from, such as `test-other`; empty if unknown."""
    speaker: str = ""
    duration: float = 0.0
    """Length of the audio in seconds; 0 if unknown."""
    cut: bool = False
    """Whether the LLM's answer reached the maximum number of tokens and was cut there."""
    language: str = ""
    """Name or code of the language, such as `en`, if the manifest gives it; empty if unknown."""


@dataclass
class WordErrors:
    """Word errors, summed over a set of utterances. Hits, substitutions and deletions add up to `words`.

    If characters are counted instead of words, all counts except `utterances` are of characters.
    """

    utterances: int = 0
    words: int = 0
    """Words in the references."""
    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Errors per reference word, as a fraction: 0.05 means 5 %.

        Raises:
            InputError: the references contain no words, so the rate is undefined.
        """
        if not self.words:
            raise InputError(
                f"There is no error rate, because the references of these {self.utterances} utterances "
                "contain no words: check the transcripts in the test manifest."
            )
        return self.errors / self.words


class AlignedWords(NamedTuple):
    """A stretch of an alignment: successive words of one kind.

    In a stretch of substitutions, reference and hypothesis have the same number of words.
    """

    kind: str
    """`equal`, `substitute`, `delete` or `insert`."""
    reference: list[str]
    """Empty for an insertion."""
    hypothesis: list[str]
    """Empty for a deletion."""


def scored_text(text: str, characters: bool = False) -> str:
    """Return a text in the form that is scored, with a space between any two units that are counted.

    Args:
        text: a reference or a hypothesis. Case and punctuation are retained.
        characters: whether the units are characters instead of words.
    """
    text = comparable(text)
    return " ".join(characters_of(text, all_unspaced=True)) if characters else text


def align(row: Hypothesis, characters: bool = False) -> list[AlignedWords]:
    """Align reference and hypothesis by words, or by characters; return the stretches from left to right."""
    return next(align_all([row], characters))


def align_all(rows: Sequence[Hypothesis], characters: bool = False) -> Iterator[list[AlignedWords]]:
    """Align the words of several utterances in one call of jiwer; yield the stretches of each.

    Args:
        rows: the utterances.
        characters: align characters instead of words.
    """
    output = jiwer.process_words(
        [scored_text(row.reference, characters) for row in rows],
        [scored_text(row.hypothesis, characters) for row in rows],
    )
    alignments = zip(output.alignments, output.references, output.hypotheses, strict=True)
    for chunks, reference, hypothesis in alignments:
        yield [
            AlignedWords(
                chunk.type,
                reference[chunk.ref_start_idx : chunk.ref_end_idx],
                hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx],
            )
            for chunk in chunks
        ]


def write_hypotheses(path: str | Path, rows: Iterable[Hypothesis]) -> None:
    """Write utterances as JSON lines, sorted by key. The file appears only when it is complete."""
    write_json_lines(path, map(asdict, _sorted(rows)))


def write_for_slam_llm(folder: str | Path, rows: Iterable[Hypothesis]) -> None:
    """Write `decode_log_pred` and `decode_log_gt` in SLAM-LLM's format, for tools that read it.

    `decode_log_pred` contains the hypotheses and `decode_log_gt` the references. Each line is a key, a tab
    and a text.
    """
    ordered = _sorted(rows)
    for name, field in (("pred", "hypothesis"), ("gt", "reference")):
        write_atomically(
            Path(folder) / f"decode_log_{name}",
            "".join(f"{row.key}\t{comparable(getattr(row, field))}\n" for row in ordered),
        )


def _sorted(rows: Iterable[Hypothesis]) -> list[Hypothesis]:
    return sorted(rows, key=lambda row: (row.key, row.subset))


def read_hypotheses(path: str | Path) -> list[Hypothesis]:
    """Read a file that `write_hypotheses` wrote. Unknown fields are ignored.

    Raises:
        InputError: the file does not exist, or a line is not an utterance.
    """
    try:
        # Not splitlines(), which also splits at U+2028 and similar characters. JSON allows them in a string.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise InputError(
            f"There are no hypotheses at {path}: run decode first, or name the file that it wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: name the JSON lines that decode wrote.") from error
    numbered = enumerate(lines, start=1)
    return [_parse(line, f"{path}, line {number}") for number, line in numbered if line.strip()]


def _parse(line: str, where: str) -> Hypothesis:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); expected one utterance per line.") from error
    if not isinstance(values, dict):
        raise InputError(
            f"{where}: expected an object with key, reference and hypothesis, not {line[:40]!r}."
        )
    for name in ("key", "reference", "hypothesis"):
        if values.get(name) is None:
            raise InputError(
                f"{where}: {name!r} is missing; each utterance needs key, reference and hypothesis."
            )
    known = {f.name: f.type for f in fields(Hypothesis) if values.get(f.name) is not None}
    return Hypothesis(**{name: _checked(name, values[name], kind, where) for name, kind in known.items()})


def _checked(name: str, value: object, kind: Any, where: str) -> Any:
    # JSON's true and false are ints in Python, but not numbers of seconds.
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
    elif isinstance(value, kind):
        return value
    expected = {str: "text", bool: "true or false"}.get(kind, "a number of seconds")
    raise InputError(f"{where}: {name!r} must be {expected}, not {value!r}.")
