"""Reader for Kaldi data folders: `wav.scp` and `text`, and optionally `segments`, `utt2spk` and
`reco2file_and_channel`.

    data/                         (or a single data folder)
        train_clean_100/          subset
            wav.scp               `19-198-0000 /corpora/19-198-0000.flac`, one recording per line
            text                  `19-198-0000 NORTHANGER ABBEY`, one utterance per line
            segments              `utterance recording begin end`, in seconds; a channel from 0 may follow
            reco2file_and_channel `recording file A`, the channel of the recording, if its file has several
            utt2spk               `utterance speaker`

The lines of a list may be in any order; the lists are joined by sorting on disk. Commands in wav.scp are
never run. A command that only decodes a file is replaced by that file; any other command is an error.
"""

import json
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

from slam_asr.artifacts.writing_systems import comparable
from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate, Item, Reason, Rejection
from slam_asr.corpora.places import IN_ARCHIVE, WRITE_TO_FILES, ListedCorpus, audio_path, visible_folders
from slam_asr.errors import InputError
from slam_asr.runtime.external_sort import ExternalSort
from slam_asr.storage import exists, join, name_of, open_stream

_CHANNELS = "reco2file_and_channel"
_LISTS = ("wav.scp", "text", "segments", "utt2spk", _CHANNELS)

_Field = list[Any]
"""What a line of a list says of an utterance or a recording: the field's name, and then its values.

The fields are ["audio", source, start, duration, channel] with times in seconds, ["text", transcript],
["speaker", name], ["recorded", channel] with a recording's channel in the original file, and ["segment",
utterance, start, duration, channel]. Channels are counted from 0.
"""


class Kaldi(ListedCorpus):
    """The reader of a data folder, or of a folder that contains data folders."""

    kind = "Kaldi data folder"
    layout = "wav.scp and text, in the folder or in a subfolder per subset"

    def __init__(self, root: str, folders: dict[str, str], data: Data) -> None:
        self.root, self.by_subset, self.data = root, folders, data

    @classmethod
    def find(cls, root: str, data: Data) -> "Kaldi | None":
        """Open the data folders at a path; return None if the path has none."""
        if _is_data_folder(root):
            return cls(root, {name_of(root): root}, data)
        inner = {name: join(root, name) for name in visible_folders(root)}
        folders = {name: folder for name, folder in inner.items() if _is_data_folder(folder)}
        return cls(root, folders, data) if folders else None

    def lists(self, subset: str) -> list[str]:
        return [join(self.by_subset[subset], name) for name in _LISTS]

    def sources(self, subset: str) -> Iterator[str]:
        return (source for _, source in self._sources(self.by_subset[subset]))

    def items(self, subset: str) -> Iterator[Item]:
        folder = self.by_subset[subset]
        segmented = exists(join(folder, "segments"))
        for key, fields in _grouped(self._fields(folder, segmented)):
            yield from _joined(key, fields, subset, folder, segmented)

    def _fields(self, folder: str, segmented: bool) -> Iterator[tuple[str, _Field]]:
        """Yield the fields of all utterances, each with its utterance's key, list by list."""
        yield from self._segments(folder) if segmented else self._recordings(folder)
        for _, utterance, text in _lines(join(folder, "text")):
            yield utterance, ["text", text]
        if exists(join(folder, "utt2spk")):
            for _, utterance, speaker in _lines(join(folder, "utt2spk")):
                yield utterance, ["speaker", speaker]

    def _segments(self, folder: str) -> Iterator[tuple[str, _Field]]:
        """Join `segments` with the lists of recordings; yield "audio" and "recorded" fields of utterances."""
        segments = _segments_in(join(folder, "segments"))
        # The sort is stable, so a recording's own fields come before its segments.
        for _, fields in _grouped(chain(self._recordings(folder), segments)):
            # If the recording is unknown, its source remains empty, and `_joined` rejects the segment.
            source = ""
            recorded = None
            for name, *values in fields:
                if name == "audio":
                    source = source or values[0]
                elif name == "recorded":
                    recorded = values[0] if recorded is None else recorded
                else:
                    utterance, *segment = values
                    yield utterance, ["audio", source, *segment]
                    if recorded is not None:
                        yield utterance, ["recorded", recorded]

    def _recordings(self, folder: str) -> Iterator[tuple[str, _Field]]:
        """Yield the "audio" and "recorded" fields of all recordings."""
        for recording, source in self._sources(folder):
            yield recording, ["audio", source, None, None, None]
        for recording, channel in self._channels(folder):
            yield recording, ["recorded", channel]

    def _channels(self, folder: str) -> Iterator[tuple[str, int]]:
        """Yield the recordings whose channel is known, each with its channel, counted from 0."""
        path = join(folder, _CHANNELS)
        if not exists(path):
            return
        for _, recording, rest in _lines(path):
            name = rest.split()[-1].upper() if rest else ""
            # Channels are A and B, or 1 and 2, as in NIST's formats for scoring, for which the list is made.
            if len(name) == 1 and "A" <= name <= "Z":
                yield recording, ord(name) - ord("A")
            elif name.isdecimal() and int(name) > 0:
                yield recording, int(name) - 1

    def _sources(self, folder: str) -> Iterator[tuple[str, str]]:
        """Yield the recordings, each with the path or URI of its audio file."""
        path = join(folder, "wav.scp")
        for number, recording, entry in _lines(path):
            file = audio_file(entry, f"{path}, line {number}")
            yield recording, audio_path(file, path, self.data.audio_root)


def _is_data_folder(folder: str) -> bool:
    return exists(join(folder, "wav.scp")) and exists(join(folder, "text"))


def _grouped(fields: Iterable[tuple[str, _Field]]) -> Iterator[tuple[str, Iterator[_Field]]]:
    """Sort fields on disk by their keys; yield each key with its fields, in the order in which they were."""
    with ExternalSort() as records:
        for key, field in fields:
            records.add(key.encode(), json.dumps(field).encode())
        for encoded, group in groupby(records, key=itemgetter(0)):
            yield encoded.decode(), (json.loads(field) for _, field in group)


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """Yield the number (from 1), first word and remainder of each line that is not blank."""
    with open_stream(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                words = line.decode("utf-8-sig").split(maxsplit=1)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {number} is not UTF-8 text ({error.reason}): convert it to UTF-8."
                ) from error
            if words:
                # Different programs may have written the lists, with the same key in two Unicode forms.
                yield number, comparable(words[0]), words[1].strip() if len(words) > 1 else ""


def _segments_in(path: str) -> Iterator[tuple[str, _Field]]:
    """Yield each line of `segments`: recording, and ["segment", utterance, start, duration, channel].

    The duration is None if the end is -1, which means the recording's end. The channel is None if the line
    has none, or -1.

    Raises:
        InputError: a line has another form, or its times are invalid.
    """
    for number, utterance, rest in _lines(path):
        try:
            recording, begin, end, *rest_of_line = rest.split()
            start, stop = float(begin), float(end)
            channel = int(rest_of_line[0]) if rest_of_line else -1
            valid = 0 <= start < math.inf and (start < stop < math.inf or stop == -1) and channel >= -1
        except ValueError:
            valid = False
        if not valid:
            raise InputError(
                f"{path}, line {number} must be `utterance recording begin end` with 0 <= begin < end, in "
                "seconds; a channel, counted from 0, may follow."
            )
        # Rounded to microseconds, because 3.3 - 1.1 is 2.1999999999999997 in floating point.
        duration = None if stop == -1 else round(stop - start, 6)
        yield comparable(recording), ["segment", utterance, start, duration, None if channel < 0 else channel]


def _joined(key: str, fields: Iterable[_Field], subset: str, folder: str, segmented: bool) -> Iterator[Item]:
    """Build an utterance from its fields, or a rejection if its audio or text is missing.

    Each line that repeats the utterance's audio or text gives a further rejection.
    """
    values: defaultdict[str, list[_Field]] = defaultdict(list)
    for name, *field in fields:
        values[name].append(field)
    source, start, duration, channel = values["audio"][0] if values["audio"] else ("", None, None, None)
    if not values["text"]:
        if values["audio"]:
            detail = f"{key} has no line in {join(folder, 'text')}."
            yield Rejection(key, source, Reason.NO_TRANSCRIPT, detail)
        return
    if not source:
        unlisted = segmented and not values["audio"]
        lacks, name = ("line", "segments") if unlisted else ("recording", "wav.scp")
        yield Rejection(key, "", Reason.NO_AUDIO, f"{key} has no {lacks} in {join(folder, name)}.")
        return
    for name in ("audio", "text"):
        for _ in values[name][1:]:
            detail = f"{folder} has {key} more than once among its {name} lines."
            yield Rejection(key, source, Reason.DUPLICATE, detail)
    extra = {"subset": subset} | ({"speaker": values["speaker"][0][0]} if values["speaker"] else {})
    # reco2file_and_channel gives the channel in the original file. The channel may have been extracted since,
    # so a file with one channel is accepted. A channel in `segments` must exist in the file, as for Kaldi's
    # extract-segments.
    of_several = channel is None and bool(values["recorded"])
    if of_several:
        channel = values["recorded"][0][0]
    candidate = Candidate(key, source, values["text"][0][0], extra, start, duration, channel=channel)
    candidate.channel_of_several = of_several
    yield candidate


def audio_file(entry: str, where: str) -> str:
    """Return the audio file that an entry of wav.scp names, or that its command decodes. No command is run.

    Raises:
        InputError: the entry is empty, or means standard input, a place in an archive, or a command that does
            more than decode a file.
    """
    if not entry:
        raise InputError(f"{where} has no file.")
    if entry.endswith("|"):
        if file := _decoded_file(entry):
            return file
        raise InputError(f"{where} is a command ({entry[:80]}), and commands are not run: {WRITE_TO_FILES}.")
    if entry == "-" or IN_ARCHIVE.search(entry):
        place = "standard input" if entry == "-" else f"{entry[:80]}, in a Kaldi archive"
        raise InputError(f"{where} is {place}: {WRITE_TO_FILES}.")
    return entry


_FLAC_OPTIONS = {"-c", "-d", "-s", "-cd", "-dc", "-cds", "-dcs", "-scd", "--stdout", "--decode", "--silent"}
_SOX_OUTPUT = {"-t wav", "-r 16k", "-r 16000", "-c 1", "-b 16", "-e signed", "-e signed-integer"}
"""Output options of sox that are accepted.

They leave the audio unchanged, or convert it as `slam_asr.audio` does anyway.
"""


def _decoded_file(command: str) -> str | None:
    """Return the file that a command decodes; None if the command may do more than decode one file."""
    line = command[:-1]
    # A command with shell syntax may do anything, whatever its program is.
    if any(character in line for character in "|;&<>$`\n"):
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
        # An unknown option remains among the files, so that the last line refuses the command.
        files = [w for w in words if w not in options] if decodes else []
    elif program == "sph2pipe":
        # -p requests PCM samples, which a reader of the file gets anyway.
        files = [w for w in (words[2:] if words[:2] == ["-f", "wav"] else words) if w != "-p"]
    elif program == "sox" and words[-1:] == ["-"]:
        files = _sox_input(words[:-1])
    else:
        return None
    return files[0] if len(files) == 1 and not files[0].startswith("-") else None


def _sox_input(words: list[str]) -> list[str]:
    """Return the input file among sox's arguments; empty if an output option may change the audio."""
    options = words[1:]
    pairs = {f"{option} {value}" for option, value in zip(options[::2], options[1::2], strict=False)}
    harmless = len(options) % 2 == 0 and pairs <= _SOX_OUTPUT
    return words[:1] if harmless else []
