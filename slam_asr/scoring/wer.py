"""Word error rate: how many words of the references a recogniser got wrong.

WER = (substitutions + deletions + insertions) / words in the references, over all utterances
together, on the alignment of fewest errors (jiwer). An utterance without a hypothesis counts with
all its words as deletions; none is ever left out. Insertions can take the rate above 1.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import jiwer

from slam_asr.errors import UserError
from slam_asr.storage import write_atomically


@dataclass
class Hypothesis:
    """What was said in one utterance, and what the recogniser wrote."""

    key: str
    """The utterance's name in its manifest."""
    reference: str
    hypothesis: str
    """Empty where the recogniser gave nothing."""
    subset: str = ""
    """Test subset, such as `test-other`."""
    speaker: str = ""
    duration: float = 0.0
    """Seconds; 0 where unknown."""
    cut: bool = False
    """Whether the recogniser was still talking where answers end."""


@dataclass
class WordErrors:
    """Counts over a set of utterances: hits + substitutions + deletions = words."""

    utterances: int = 0
    words: int = 0
    """Words in the references."""
    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Errors per reference word, as a fraction: 0.05 is what is published as 5 %.

        Raises:
            UserError: the references hold no words, so there is no rate.
        """
        if not self.words:
            raise UserError(
                f"There is no word error rate: the references of these {self.utterances} utterances hold no words. "
                "Check the transcripts in the test manifest."
            )
        return self.errors / self.words


class AlignedWords(NamedTuple):
    """A stretch of an alignment. Of a substitution both sides are equally long."""

    kind: str
    """`equal`, `substitute`, `delete` or `insert`."""
    reference: list[str]
    """Empty for an insertion."""
    hypothesis: list[str]
    """Empty for a deletion."""


def normalise(text: str) -> str:
    """The text as it is scored: any run of white space is one space; case and punctuation count."""
    return " ".join(text.split())


def align(row: Hypothesis) -> list[AlignedWords]:
    """Which words of the reference and the hypothesis stand for each other, left to right."""
    output = _process([row])
    reference, hypothesis = output.references[0], output.hypotheses[0]
    return [
        AlignedWords(
            chunk.type,
            reference[chunk.ref_start_idx : chunk.ref_end_idx],
            hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx],
        )
        for chunk in output.alignments[0]
    ]


def write_hypotheses(path: str | Path, rows: Iterable[Hypothesis]) -> None:
    """Write utterances as JSON lines, sorted by key, atomically."""
    ordered = sorted(rows, key=lambda row: (row.key, row.subset))
    write_atomically(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in ordered))


def write_for_slam_llm(folder: str | Path, rows: Iterable[Hypothesis]) -> None:
    """Write `decode_log_pred` and `decode_log_gt` as SLAM-LLM's decoding does: lines of key, tab, text, for the tools that read those."""
    ordered = sorted(rows, key=lambda row: (row.key, row.subset))
    for name, texts in (
        ("pred", [row.hypothesis for row in ordered]),
        ("gt", [row.reference for row in ordered]),
    ):
        write_atomically(
            Path(folder) / f"decode_log_{name}",
            "".join(f"{row.key}\t{normalise(text)}\n" for row, text in zip(ordered, texts, strict=True)),
        )


def read_hypotheses(path: str | Path) -> list[Hypothesis]:
    """Read what `write_hypotheses` wrote. Fields that are not ours are passed over.

    Raises:
        UserError: there is no such file, or a line is not an utterance.
    """
    try:
        # Not splitlines(): JSON leaves U+2028 and its like inside a line.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise UserError(
            f"There are no hypotheses at {path}: run decode first, or name the file it wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: name the JSON lines that decode wrote.") from error
    return [
        _parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]


def _parse(line: str, where: str) -> Hypothesis:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); one utterance a line is expected.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"{where}: an object with key, reference and hypothesis is expected, not {line[:40]!r}."
        )
    known = {}
    for field in fields(Hypothesis):
        value = values.get(field.name)
        if field.name in ("key", "reference", "hypothesis") and value is None:
            raise UserError(
                f"{where}: there is no {field.name!r}; each utterance needs key, reference and hypothesis."
            )
        if value is not None:
            known[field.name] = _checked(field.name, value, field.type, where)
    return Hypothesis(**known)


def _checked(name: str, value: object, kind: type, where: str) -> str | float | bool:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and value >= 0:
            return float(value)
    elif isinstance(value, kind):
        return value
    expected = {str: "text", bool: "true or false"}.get(kind, "a number of seconds")
    raise UserError(f"{where}: {name!r} must be {expected}, not {value!r}.")


def _process(rows: Sequence[Hypothesis]) -> jiwer.WordOutput:
    return jiwer.process_words(
        [normalise(r.reference) for r in rows], [normalise(r.hypothesis) for r in rows]
    )
