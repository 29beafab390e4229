"""JSON lines in SLAM-LLM's form: a folder of .jsonl files, or one file.

What subset a line belongs to is found in this order:

1. In a folder, the files train.jsonl, dev.jsonl and test.jsonl are those splits, whatever the
   recipe's patterns; a `subset` that their lines carry is kept for the report.
2. A line's own `subset`.
3. The file's name, such as train-clean-100.jsonl.
"""

import os
from collections.abc import Iterator

from slam_asr.corpora import SPLITS, Candidate, Rejection, Stamp
from slam_asr.corpora.places import (
    Unpacked,
    audio_path,
    files_in,
    if_present,
    is_file,
    name_of,
    stamps_of,
    stem_of,
)
from slam_asr.errors import UserError
from slam_asr.manifest import iterate_manifest
from slam_asr.recipe import Data

SUFFIX = ".jsonl"
LAYOUT = ".jsonl files with key, source and target on each line"
_NOT_UTTERANCES = "rejected.jsonl"
"""What `build-manifest` sets aside, should its folder be the corpus."""


class JsonLines(Unpacked):
    """The reader of one folder or file."""

    kind = "JSON lines"

    def __init__(self, root: str | os.PathLike, files: list[str]) -> None:
        self.root = os.fspath(root)
        self.files = {file: self._subsets_of(file) for file in files}

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "JsonLines | None":
        """The corpus at a path, or None where no .jsonl file lies there.

        Raises:
            UserError: a line is no utterance; all are read for it.
        """
        root = os.fspath(root)
        if root.lower().endswith(SUFFIX) and is_file(root):
            return cls(root, [root])
        files = [f for f in files_in(root, (SUFFIX,)) if name_of(f) != _NOT_UTTERANCES]
        return cls(root, files) if files else None

    def subsets(self) -> list[str]:
        return sorted(set().union(*self.files.values()))

    def stamps(self, subset: str) -> Iterator[Stamp]:
        return stamps_of(self.files, (c.source for c in self._candidates(subset)), self.root)

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        return map(if_present, self._candidates(subset))

    def _subsets_of(self, file: str) -> set[str]:
        return {part for part, _ in self._lines(file)}

    def _candidates(self, subset: str) -> Iterator[Candidate]:
        for file in (f for f, subsets in self.files.items() if subset in subsets):
            for part, candidate in self._lines(file):
                if part == subset:
                    yield candidate

    def _lines(self, file: str) -> Iterator[tuple[str, Candidate]]:
        """Each utterance of a file, with the subset that it belongs to."""
        stem = stem_of(file)
        named_by_file = self.root != file and stem in SPLITS
        for number, utterance in iterate_manifest(file):
            own = utterance.extra.get("subset")
            if own is not None and not (isinstance(own, str) and own):
                raise UserError(f"{file}, line {number}: subset must be text, not {own!r}.")
            part = stem if named_by_file else own or stem
            yield (
                part,
                Candidate(
                    utterance.key,
                    audio_path(utterance.source, file, ""),
                    utterance.target,
                    utterance.extra | {"subset": own or part},
                    utterance.start,
                    None if utterance.start is None else utterance.duration,
                ),
            )
