"""Reader for JSON lines in SLAM-LLM's format: a folder of .jsonl files, or one file.

A line's subset is decided by the first of these rules that applies:

1. In a folder, the files train.jsonl, dev.jsonl and test.jsonl are the splits of those names, regardless of
   the recipe's patterns. The field `subset` of their lines is then used only in reports.
2. A line that has the field `subset` belongs to that subset.
3. All other lines belong to the subset that the file is named after, such as train-clean-100.jsonl.
"""

import os
from collections.abc import Iterator

from slam_asr.artifacts.manifest import iterate_manifest
from slam_asr.config.recipe import Data
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
from slam_asr.errors import InputError

SUFFIX = ".jsonl"
LAYOUT = ".jsonl files with key, source and target on each line"
_REJECTIONS = "rejected.jsonl"
"""File in the output folder of `build-manifest`, which may serve as a corpus. It lists no utterances."""


class JsonLines(Unpacked):
    """The reader of a .jsonl file, or of a folder of such files."""

    kind = "JSON lines"

    def __init__(self, root: str | os.PathLike, files: list[str]) -> None:
        self.root = os.fspath(root)
        self.files = {file: self._subsets_of(file) for file in files}

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "JsonLines | None":
        """Open the .jsonl files at a path; None if there are none. All are read for the names of subsets.

        Raises:
            InputError: a line is not an utterance.
        """
        root = os.fspath(root)
        if root.lower().endswith(SUFFIX) and is_file(root):
            return cls(root, [root])
        files = [f for f in files_in(root, (SUFFIX,)) if name_of(f) != _REJECTIONS]
        return cls(root, files) if files else None

    def subsets(self) -> list[str]:
        return sorted(set().union(*self.files.values()))

    def stamps(self, subset: str) -> Iterator[Stamp]:
        return stamps_of(self.files, (c.source for c in self._candidates(subset)), self.root)

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        return map(if_present, self._candidates(subset))

    def _subsets_of(self, file: str) -> set[str]:
        return {subset for subset, _ in self._lines(file)}

    def _candidates(self, subset: str) -> Iterator[Candidate]:
        for file in (f for f, subsets in self.files.items() if subset in subsets):
            for line_subset, candidate in self._lines(file):
                if line_subset == subset:
                    yield candidate

    def _lines(self, file: str) -> Iterator[tuple[str, Candidate]]:
        """Yield each utterance of a file as a pair (subset, candidate)."""
        stem = stem_of(file)
        file_is_split = self.root != file and stem in SPLITS
        for number, utterance in iterate_manifest(file):
            own = utterance.extra.get("subset")
            if own is not None and not (isinstance(own, str) and own):
                raise InputError(f"{file}, line {number}: subset must be text, not {own!r}.")
            subset = stem if file_is_split else own or stem
            # Only a segment's duration is used. A complete file is measured again when its audio is checked.
            yield (
                subset,
                Candidate(
                    utterance.key,
                    audio_path(utterance.source, file, ""),
                    utterance.target,
                    utterance.extra | {"subset": own or subset},
                    utterance.start,
                    None if utterance.start is None else utterance.duration,
                ),
            )
