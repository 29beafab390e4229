"""JSON lines in SLAM-LLM's form: a folder of .jsonl files, or one file.

What subset a line belongs to is found in this order:

1. In a folder, the files train.jsonl, dev.jsonl and test.jsonl are those splits, whatever the
   recipe's patterns; a `subset` that their lines carry is kept for the report.
2. A line's own `subset`.
3. The file's name, such as train-clean-100.jsonl.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from slam_asr.corpora import NO_AUDIO, SPLITS, Candidate, Rejection, Stamp, stamp
from slam_asr.errors import UserError
from slam_asr.manifest import iterate_manifest
from slam_asr.storage import local_path

SUFFIX = ".jsonl"
_NOT_UTTERANCES = "rejected.jsonl"
"""What `build-manifest` sets aside, should its folder be the corpus."""


class JsonLines:
    """The reader of one folder or file."""

    kind = "JSON lines"

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root = root
        self.files = files
        self.utterances: dict[str, list[Candidate]] = {}
        for file in files:
            self._collect(file)

    @classmethod
    def find(cls, root: Path) -> "JsonLines | None":
        """The corpus at a path, or None where no .jsonl file lies there."""
        if root.is_file() and root.suffix.lower() == SUFFIX:
            return cls(root, [root])
        if not root.is_dir():
            return None
        files = sorted(f for f in root.iterdir() if f.suffix.lower() == SUFFIX and f.is_file())
        files = [f for f in files if f.name != _NOT_UTTERANCES and not f.name.startswith(".")]
        return cls(root, files) if files else None

    def subsets(self) -> list[str]:
        return sorted(self.utterances)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        for file in self.files:
            yield stamp(file.name, file.stat())
        for candidate in self.utterances[subset]:
            if os.path.isfile(candidate.source):
                yield stamp(candidate.source, os.stat(candidate.source))

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        for candidate in self.utterances[subset]:
            if os.path.isfile(candidate.source):
                yield candidate
            else:
                detail = f"There is no audio file {candidate.source}."
                yield Rejection(candidate.key, candidate.source, NO_AUDIO, detail)

    def _collect(self, file: Path) -> None:
        in_folder = self.root != file
        for number, utterance in iterate_manifest(file):
            own = utterance.extra.get("subset")
            if own is not None and not (isinstance(own, str) and own):
                raise UserError(f"{file}, line {number}: subset must be text, not {own!r}.")
            part = file.stem if (in_folder and file.stem in SPLITS) else own or file.stem
            extra = utterance.extra | {"subset": own or part}
            source = os.path.abspath(local_path(utterance.source))
            self.utterances.setdefault(part, []).append(Candidate(utterance.key, source, utterance.target, extra))
