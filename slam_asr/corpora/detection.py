"""Detection of a corpus's kind from the files at its path."""

from itertools import islice

from slam_asr.config.recipe import Data
from slam_asr.corpora import AUDIO_SUFFIXES, CorpusReader
from slam_asr.corpora.archives import Archives
from slam_asr.corpora.folder import Folder
from slam_asr.corpora.huggingface import HuggingFace, Saved
from slam_asr.corpora.jsonlines import JsonLines
from slam_asr.corpora.kaldi import Kaldi
from slam_asr.corpora.lhotse import Lhotse
from slam_asr.corpora.librispeech import LibriSpeech
from slam_asr.corpora.places import absolute, is_folder, visible_files
from slam_asr.corpora.table import Table
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.storage import exists, name_of

READERS: dict[str, tuple[type[CorpusReader], ...]] = {
    "librispeech": (LibriSpeech, Archives),
    "kaldi": (Kaldi,),
    "lhotse": (Lhotse,),
    "jsonlines": (JsonLines,),
    "table": (Table,),
    "huggingface": (HuggingFace,),
    "folder": (Folder,),
}
"""The readers for each value of `data.kind`, in the order in which they are tried."""
_LAYOUTS = {kind: ", or ".join(reader.layout for reader in readers) for kind, readers in READERS.items()}
_ORDER = (LibriSpeech, Kaldi, Saved, Lhotse, JsonLines, Archives, Table, HuggingFace, Folder)
"""Readers in the order in which `auto` tries them. Kinds with unmistakable file names come first.

Otherwise, for example, `metadata.jsonl` of a Hugging Face dataset would be read as JSON lines of utterances.
"""
_UNSUPPORTED_ARCHIVES = (".zip", ".gz", ".bz2", ".xz", ".rar", ".7z")


def open_corpus(corpus: str, data: Data) -> CorpusReader:
    """Choose the reader for a corpus and open it.

    Args:
        corpus: a folder, a file or an s3:// prefix.
        data: the recipe's `data` section; its `kind` limits the choice to one kind of corpus.

    Raises:
        InputError: the path does not exist, it is empty, no reader recognises it, or a file of the corpus is
            damaged or of the wrong form.
        ConfigurationError: the corpus is not of the kind that `data.kind` names, or a column of a table is
            missing or ambiguous.
    """
    root = absolute(corpus)
    if not exists(root) and not is_folder(root):
        raise InputError(f"There is no corpus {root}: check --corpus.")
    for reader_class in _ORDER if data.kind == "auto" else READERS[data.kind]:
        if reader := reader_class.find(root, data):
            if not reader.subsets():
                raise InputError(f"{root} is empty: its files hold no utterance.")
            return reader
    if data.kind != "auto":
        raise ConfigurationError(
            f"The corpus {root} is not of data.kind {data.kind}: it must have {_LAYOUTS[data.kind]}. "
            "With data.kind: auto, the kind is detected."
        )
    raise InputError(f"The corpus {root} {_fault_of(root)}.")


def _fault_of(root: str) -> str:
    """Return why no reader recognises a corpus, as the end of a sentence, from the files at its path."""
    known = f"known layouts are {'; '.join(_LAYOUTS.values())}"
    if exists(root):
        if root.lower().endswith(_UNSUPPORTED_ARCHIVES):
            return "is an archive of an unsupported kind: unpack it, and give the folder"
        return f"is a file of an unknown kind: {known}"
    # A sample of the files is enough for a message; a corpus may have millions.
    names = [f.name for f in islice(visible_files(root), 1000)]
    if not names:
        return f"is empty, without audio and transcripts: {known}"
    if archives_inside := [n for n in names if n.lower().endswith(_UNSUPPORTED_ARCHIVES)]:
        return f"holds archives ({', '.join(archives_inside[:3])}): unpack them first"
    if audio := next((n for n in names if n.lower().endswith(AUDIO_SUFFIXES)), None):
        return f"holds audio ({name_of(audio)}, …) but no transcripts in a known layout: {known}"
    return f"holds no audio and no transcripts in a known layout: {known}"
