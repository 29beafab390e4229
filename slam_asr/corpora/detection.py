"""Which kind of corpus lies at a path."""

from slam_asr.corpora import (
    AUDIO_SUFFIXES,
    CorpusReader,
    archives,
    folder,
    huggingface,
    jsonlines,
    kaldi,
    lhotse,
    librispeech,
    table,
)
from slam_asr.corpora.places import absolute, is_file, is_folder, visible_files
from slam_asr.errors import UserError
from slam_asr.recipe import Data
from slam_asr.storage import name_of

READERS = {
    "librispeech": (librispeech.LibriSpeech, archives.Archives),
    "kaldi": (kaldi.Kaldi,),
    "lhotse": (lhotse.Lhotse,),
    "jsonlines": (jsonlines.JsonLines,),
    "table": (table.Table,),
    "huggingface": (huggingface.HuggingFace,),
    "folder": (folder.Folder,),
}
"""Readers of each `data.kind`."""
_LAYOUTS = {
    "librispeech": f"{librispeech.LAYOUT}, or {archives.LAYOUT}",
    "kaldi": kaldi.LAYOUT,
    "lhotse": lhotse.LAYOUT,
    "jsonlines": jsonlines.LAYOUT,
    "table": table.LAYOUT,
    "huggingface": huggingface.LAYOUT,
    "folder": folder.LAYOUT,
}
_ORDER = (
    librispeech.LibriSpeech,
    kaldi.Kaldi,
    huggingface.Saved,
    lhotse.Lhotse,
    jsonlines.JsonLines,
    archives.Archives,
    table.Table,
    huggingface.HuggingFace,
    folder.Folder,
)
"""The order in which a place is tried: what is told by names that nothing else has comes first."""
_ELSEWHERE = (".zip", ".gz", ".bz2", ".xz", ".rar", ".7z")


def open_corpus(corpus: str, data: Data | None = None) -> CorpusReader:
    """The reader of what lies at a path or s3:// prefix.

    Raises:
        UserError: nothing is there, nothing that any reader knows, or not what `data.kind` says.
    """
    data = data or Data()
    root = absolute(corpus)
    if not is_file(root) and not is_folder(root):
        raise UserError(f"There is no corpus {root}: check --corpus.")
    for reader in _ORDER if data.kind == "auto" else READERS[data.kind]:
        if found := reader.find(root, data):
            if not found.subsets():
                raise UserError(f"{root} is empty: its files hold no utterance.")
            return found
    _refuse(root, data.kind)


def _refuse(root: str, kind: str) -> None:
    if kind != "auto":
        raise UserError(
            f"The corpus {root} is not what data.kind: {kind} stands for: give {_LAYOUTS[kind]}; or leave it to be found out."
        )
    wanted = f"give {_LAYOUTS['librispeech']}; {'; '.join(layout for name, layout in _LAYOUTS.items() if name != 'librispeech')}"
    if is_file(root):
        if root.lower().endswith(_ELSEWHERE):
            raise UserError(
                f"The corpus {root} is an archive of a kind that is not read: unpack it, and name the folder."
            )
        raise UserError(f"The corpus {root} is a file of an unknown kind: {wanted}.")
    names = [f.name for f, _ in zip(visible_files(root), range(1000), strict=False)]
    if not names:
        raise UserError(f"The corpus {root} is empty, without audio and transcripts: {wanted}.")
    if packed := [n for n in names if n.lower().endswith(_ELSEWHERE)]:
        raise UserError(f"The corpus {root} holds archives ({', '.join(packed[:3])}): unpack them first.")
    if audio := next((n for n in names if n.lower().endswith(AUDIO_SUFFIXES)), None):
        raise UserError(
            f"The corpus {root} holds audio ({name_of(audio)}, …) but no transcripts laid out in a known way: {wanted}."
        )
    raise UserError(f"The corpus {root} holds no audio and no transcripts laid out in a known way: {wanted}.")
