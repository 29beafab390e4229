"""Reader for JSON lines in SLAM-LLM's format: a folder of .jsonl files, or one file.

The first of these rules that applies decides the subset of a line:

1. In a folder, the files train.jsonl, dev.jsonl and test.jsonl are the splits of those names, regardless of
   the recipe's patterns. The field `subset` of their lines is then used only in reports.
2. A line that has the field `subset` belongs to that subset.
3. All other lines belong to the subset that the file is named after, such as train-clean-100.jsonl.
"""

from collections.abc import Iterator

from slam_asr.artifacts.manifest import iterate_manifest
from slam_asr.config.recipe import Data
from slam_asr.corpora import SPLITS, Candidate
from slam_asr.corpora.places import ListedCorpus, audio_path, files_at, stem_of
from slam_asr.errors import InputError
from slam_asr.storage import name_of

SUFFIX = ".jsonl"
_REJECTIONS = "rejected.jsonl"
"""`build-manifest` writes this file to its output folder, which may serve as a corpus. The file is not read,
because it lists rejections, not utterances."""


class JsonLines(ListedCorpus):
    """The reader of a .jsonl file, or of a folder of such files."""

    kind = "JSON lines"
    layout = ".jsonl files with key, source and target on each line"

    def __init__(self, root: str, files: list[str]) -> None:
        self.root, self.files = root, files
        self.by_subset: dict[str, list[str]] = {}
        for file in files:
            for subset in {subset for subset, _ in self._lines(file)}:
                self.by_subset.setdefault(subset, []).append(file)

    @classmethod
    def find(cls, root: str, data: Data) -> "JsonLines | None":
        """Open the .jsonl files at a path; return None if the path has none.

        All lines are read for the names of subsets.

        Raises:
            InputError: a line is not an utterance.
        """
        files = [file for file in files_at(root, (SUFFIX,)) if file == root or name_of(file) != _REJECTIONS]
        return cls(root, files) if files else None

    def items(self, subset: str) -> Iterator[Candidate]:
        for file in self.by_subset[subset]:
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
            source, channel = audio_path(utterance.source, file, ""), utterance.audio_channel
            extra = utterance.extra | {"subset": own or subset}
            # Only a segment's duration is used. A complete file is measured again when its audio is checked.
            start, duration = utterance.start, None if utterance.start is None else utterance.duration
            text = utterance.target
            yield subset, Candidate(utterance.key, source, text, extra, start, duration, channel=channel)
