"""Kaldi's data folders: `wav.scp` and `text`, with `segments` and `utt2spk` where they are.

data/                                         (or one data folder alone)
    train_clean_100/                          subset
        wav.scp                               `19-198-0000 /corpora/19-198-0000.flac`, a recording a line
        text                                  `19-198-0000 NORTHANGER ABBEY`, an utterance a line
        segments                              `utterance recording begin end`, in seconds
        utt2spk                               `utterance speaker`

The lists are joined through sorting on disk, in whatever order they are. A line of wav.scp that is a
command is never run: what only decodes a file is read as that file.
"""

import json
import os
import shlex
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

from slam_asr.corpora import DUPLICATE, NO_AUDIO, NO_TRANSCRIPT, Candidate, Rejection, Stamp
from slam_asr.corpora.places import Unpacked, audio_path, if_present, is_file, stamps_of, visible_folders
from slam_asr.errors import UserError
from slam_asr.external_sort import ExternalSort
from slam_asr.recipe import Data
from slam_asr.storage import join, name_of, open_stream

LAYOUT = "wav.scp and text, in the folder or in one for each subset"
_LISTS = ("wav.scp", "text", "segments", "utt2spk")


class Kaldi(Unpacked):
    """The reader of one data folder, or of a folder of them."""

    kind = "Kaldi data folder"

    def __init__(self, root: str, folders: dict[str, str], data: Data) -> None:
        self.root, self.folders, self.data = root, folders, data

    @classmethod
    def find(cls, root: str | os.PathLike, data: Data | None = None) -> "Kaldi | None":
        """The data folders at a path, or None where there is none."""
        root = os.fspath(root)
        if _is_data_folder(root):
            return cls(root, {name_of(root): root}, data or Data())
        folders = {
            name: folder for name in visible_folders(root) if _is_data_folder(folder := join(root, name))
        }
        return cls(root, folders, data or Data()) if folders else None

    def subsets(self) -> list[str]:
        return sorted(self.folders)

    def stamps(self, subset: str) -> Iterator[Stamp]:
        folder = self.folders[subset]
        lists = [join(folder, name) for name in _LISTS]
        return stamps_of(lists, (source for _, source in self._recordings(folder)), self.root)

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        folder = self.folders[subset]
        with ExternalSort() as records:
            for utterance, part in self._parts(folder):
                records.add(utterance.encode(), json.dumps(part).encode())
            for key, group in groupby(records, key=itemgetter(0)):
                yield from _joined(key.decode(), [json.loads(part) for _, part in group], subset, folder)

    def _parts(self, folder: str) -> Iterator[tuple[str, list]]:
        """Utterances with what each list says of them: [list, …]."""
        if is_file(join(folder, "segments")):
            yield from self._segments(folder)
        else:
            for recording, source in self._recordings(folder):
                yield recording, ["audio", source, None, None]
        for _, utterance, text in _lines(join(folder, "text")):
            yield utterance, ["text", text]
        if is_file(join(folder, "utt2spk")):
            for _, utterance, speaker in _lines(join(folder, "utt2spk")):
                yield utterance, ["speaker", speaker]

    def _segments(self, folder: str) -> Iterator[tuple[str, list]]:
        path = join(folder, "segments")
        with ExternalSort() as records:
            # Recordings come first of what has their name, since they are added first.
            for recording, source in self._recordings(folder):
                records.add(recording.encode(), json.dumps(["", source, None, None]).encode())
            for number, utterance, rest in _lines(path):
                recording, start, duration = _segment(rest, f"{path}, line {number}")
                records.add(recording.encode(), json.dumps([utterance, recording, start, duration]).encode())
            for _, group in groupby(records, key=itemgetter(0)):
                source = ""
                for _, record in group:
                    utterance, named, start, duration = json.loads(record)
                    if utterance:
                        yield utterance, ["audio", source, start, duration]
                    else:
                        source = source or named

    def _recordings(self, folder: str) -> Iterator[tuple[str, str]]:
        path = join(folder, "wav.scp")
        for number, recording, entry in _lines(path):
            yield (
                recording,
                audio_path(audio_file(entry, f"{path}, line {number}"), path, self.data.audio_root),
            )


def _is_data_folder(folder: str) -> bool:
    return is_file(join(folder, "wav.scp")) and is_file(join(folder, "text"))


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Number, first word and the rest of each line that is not blank."""
    with open_stream(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                words = line.decode("utf-8-sig").split(maxsplit=1)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number} is not UTF-8 text ({error.reason}): write it anew as UTF-8."
                ) from error
            if words:
                yield number, words[0], words[1].strip() if len(words) > 1 else ""


def _segment(rest: str, where: str) -> tuple[str, float, float | None]:
    """Recording, start and duration; an end of -1 is the recording's."""
    try:
        recording, begin, end = rest.split()[:3]
        start, stop = float(begin), float(end)
        right = start >= 0 and (stop > start or stop == -1)
    except ValueError:
        right = False
    if not right:
        raise UserError(f"{where} must be `utterance recording begin end` with 0 <= begin < end, in seconds.")
    return recording, start, None if stop == -1 else round(stop - start, 6)


def _joined(key: str, parts: list[list], subset: str, folder: str) -> Iterator[Candidate | Rejection]:
    """The utterance that the lists describe together."""
    said = {name: [part[1:] for part in parts if part[0] == name] for name in ("audio", "text", "speaker")}
    source, start, duration = said["audio"][0] if said["audio"] else ("", None, None)
    if not said["text"]:
        if said["audio"]:
            yield Rejection(key, source, NO_TRANSCRIPT, f"{key} has no line in {join(folder, 'text')}.")
        return
    if not source:
        yield Rejection(key, "", NO_AUDIO, f"{key} has no recording in {join(folder, 'wav.scp')}.")
        return
    for name in ("audio", "text"):
        for _ in said[name][1:]:
            yield Rejection(
                key, source, DUPLICATE, f"{folder} has {key} more than once among its {name} lines."
            )
    extra = {"subset": subset} | ({"speaker": said["speaker"][0][0]} if said["speaker"] else {})
    yield if_present(Candidate(key, source, said["text"][0][0], extra, start, duration))


def audio_file(entry: str, where: str) -> str:
    """The file behind an entry of wav.scp; a command is read, not run.

    Raises:
        UserError: it is a command that does more than decode a file, or a part of an archive.
    """
    if not entry:
        raise UserError(f"{where} names no file.")
    if not entry.endswith("|"):
        if entry == "-" or (entry.rpartition(":")[2].isdigit() and ".ark:" in entry):
            raise UserError(
                f"{where}: {entry[:80]} lies in an archive of Kaldi's: write the recordings as files, and name those."
            )
        return entry
    file = _decoded_file(entry)
    if file is None:
        raise UserError(
            f"{where} is a command ({entry[:80]}), and commands are not run: write its output to files, such as with "
            "`wav-copy scp:wav.scp ark,scp:…` or sox, and name those in wav.scp."
        )
    return file


_FLAC_OPTIONS = {"-c", "-d", "-s", "-cd", "-dc", "-cds", "-dcs", "-scd", "--stdout", "--decode", "--silent"}
_SOX_OUTPUT = {
    "-t": {"wav"},
    "-r": {"16k", "16000"},
    "-c": {"1"},
    "-b": {"16"},
    "-e": {"signed", "signed-integer"},
}
"""Options of sox that leave what is heard as it is, or do what is done here anyway."""


def _decoded_file(command: str) -> str | None:
    """The file whose audio, and nothing else, a command writes; None where that is not sure."""
    line = command[:-1]
    if any(mark in line for mark in "|;&<>$`\n"):
        return None
    try:
        program, *words = shlex.split(line)
    except ValueError:
        return None
    program = os.path.basename(program)
    if program == "cat":
        files = words
    elif program == "flac":
        options = [w for w in words if w in _FLAC_OPTIONS]
        short = "".join(w for w in options if not w.startswith("--"))
        decodes = ("d" in short or "--decode" in options) and ("c" in short or "--stdout" in options)
        files = [w for w in words if w not in options] if decodes else []
    elif program == "sph2pipe":
        files = words[2:] if words[:2] == ["-f", "wav"] else words
    elif program == "sox" and words[-1:] == ["-"]:
        files = _sox_input(words[:-1])
    else:
        return None
    return files[0] if len(files) == 1 and not files[0].startswith("-") else None


def _sox_input(words: list[str]) -> list[str]:
    """What is left of sox's words without options of its output that change nothing."""
    options = words[1:]
    pairs = list(zip(options[::2], options[1::2], strict=False))
    harmless = len(options) % 2 == 0 and all(value in _SOX_OUTPUT.get(option, ()) for option, value in pairs)
    return words[:1] if harmless else []
