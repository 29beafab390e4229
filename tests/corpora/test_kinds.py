"""The same speech gives the same utterances in every layout, and unreadable corpora raise clear errors.

Each function `as_…` writes the same corpus in another layout and returns its path.
"""

import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.config.recipe import Columns, Data, load_recipe
from slam_asr.corpora import Candidate, Rejection
from slam_asr.corpora.detection import open_corpus
from slam_asr.corpora.kaldi import audio_file
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.storage import join, write_bytes
from tests.conftest import make_tone, write_librispeech, write_wav

TRANSCRIPTS = {
    "train-a": {"1-1-0000": "ONE", "1-1-0001": "TWO", "1-2-0000": "THREE"},
    "dev-other": {"2-1-0000": "FOUR"},
    "test-b": {"3-1-0000": "FIVE SIX"},
}


def recipe(**data):
    return load_recipe(
        "librispeech", {f"data.{name.replace('__', '.')}": value for name, value in data.items()}
    )


@pytest.fixture
def tree(tmp_path) -> Path:
    return write_librispeech(tmp_path / "tree", TRANSCRIPTS)


@pytest.fixture
def audio(tree) -> dict[str, Path]:
    """Return the audio files of the tree, by key."""
    return {path.stem: path for path in sorted(tree.rglob("*.wav"))}


def transcripts_and_lengths(
    folder: str | Path, splits=("train", "dev", "test")
) -> dict[str, dict[str, tuple[str, int]]]:
    """Return the transcript and the number of samples of each utterance, by split and key."""
    return {
        split: {
            u.key: (u.target, len(load_utterance(u))) for u in read_manifest(join(folder, f"{split}.jsonl"))
        }
        for split in splits
    }


def rows_of(audio: dict[str, Path]) -> list[dict[str, str]]:
    return [
        {"key": key, "audio": str(audio[key]), "text": text, "split": subset, "speaker": key.split("-")[0]}
        for subset, texts in TRANSCRIPTS.items()
        for key, text in texts.items()
    ]


def as_csv(root, audio):
    return write_text(root / "all.csv", lines_of(rows_of(audio), ","))


def as_tsv_per_subset(root, audio):
    for subset in TRANSCRIPTS:
        rows = [
            {n: v for n, v in row.items() if n != "split"} for row in rows_of(audio) if row["split"] == subset
        ]
        write_text(root / f"{subset}.tsv", lines_of(rows, "\t"))
    return root


def as_parquet(root, audio):
    root.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(audio)), root / "all.parquet")
    return root / "all.parquet"


def as_folder(root, audio):
    for row in rows_of(audio):
        path = root / row["split"] / row["key"]
        write_text(path.with_suffix(".txt"), row["text"] + "\n")
        shutil.copy(row["audio"], path.with_suffix(".wav"))
    return root


def as_jsonlines(root, audio):
    rows = [
        {"key": r["key"], "source": r["audio"], "target": r["text"], "subset": r["split"]}
        for r in rows_of(audio)
    ]
    return write_text(root / "all.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def as_kaldi(root, audio):
    for subset in TRANSCRIPTS:
        rows = [row for row in rows_of(audio) if row["split"] == subset][::-1]  # the lists need not be sorted
        write_text(root / subset / "wav.scp", "".join(f"{r['key']} {r['audio']}\n" for r in rows))
        write_text(root / subset / "text", "".join(f"{r['key']}\t{r['text']}\n" for r in rows[::-1]))
        write_text(root / subset / "utt2spk", "".join(f"{r['key']} {r['speaker']}\n" for r in rows))
    return root


def cut(key, source, text, start=0.0, duration=0.5, recording_duration=0.5, **fields):
    recording = {
        "id": key,
        "sources": [{"type": "file", "channels": [0], "source": str(source)}],
        "sampling_rate": 16000,
        "num_samples": 8000,
        "duration": recording_duration,
    }
    supervision = {
        "id": f"{key}-s",
        "recording_id": key,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": text,
        "speaker": key.split("-")[0],
    }
    return {
        "id": key,
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "type": "MonoCut",
    } | fields


def as_lhotse(root, audio):
    root.mkdir()
    for subset in TRANSCRIPTS:
        rows = [row for row in rows_of(audio) if row["split"] == subset]
        seconds = {r["key"]: len(load_utterance(Utterance("", r["audio"], ""))) / 16_000 for r in rows}
        with gzip.open(root / f"libri_cuts_{subset}.jsonl.gz", "wt") as file:
            file.writelines(
                json.dumps(
                    cut(
                        r["key"],
                        r["audio"],
                        r["text"],
                        duration=seconds[r["key"]],
                        recording_duration=seconds[r["key"]],
                    )
                )
                + "\n"
                for r in rows
            )
    return root


def embedded(audio, split):
    """Return the rows of a Hugging Face dataset with embedded audio."""
    return [
        {
            "id": r["key"],
            "audio": {"bytes": Path(r["audio"]).read_bytes(), "path": Path(r["audio"]).name},
            "text": r["text"],
        }
        for r in rows_of(audio)
        if r["split"] == split
    ]


def as_saved_dataset(root, audio):
    for split in TRANSCRIPTS:
        folder = root / split
        folder.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(embedded(audio, split))
        with (
            pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        write_text(
            folder / "state.json",
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}),
        )
        write_text(folder / "dataset_info.json", "{}")
    write_text(root / "dataset_dict.json", json.dumps({"splits": list(TRANSCRIPTS)}))
    return root


def as_hub_parquet(root, audio):
    (root / "data").mkdir(parents=True)
    for split in TRANSCRIPTS:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(embedded(audio, split)),
            root / "data" / f"{split}-00000-of-00001.parquet",
        )
    return root


def as_audiofolder(root, audio):
    for row in rows_of(audio):
        path = root / row["split"] / f"{row['key']}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row["audio"], path)
        header = "" if (path.parent / "metadata.csv").exists() else "file_name,transcription\n"
        with open(path.parent / "metadata.csv", "a", encoding="utf-8") as file:
            file.write(f"{header}{path.name},{row['text']}\n")
    return root


def as_archives(root, audio, compression="gz"):
    root.mkdir()
    for subset in TRANSCRIPTS:
        with tarfile.open(root / f"{subset}.tar.{compression}", f"w:{compression}") as archive:
            archive.add(root.parent / "tree" / subset, f"LibriSpeech/{subset}")
    return root


def as_tree(root, audio):
    return root.parent / "tree"


def lines_of(rows, separator):
    return "".join(separator.join(cells) + "\n" for cells in (list(rows[0]), *(row.values() for row in rows)))


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


LAYOUTS = {
    "LibriSpeech tree": as_tree,
    "LibriSpeech archives": as_archives,
    "table: csv": as_csv,
    "table: tsv": as_tsv_per_subset,
    "table: parquet": as_parquet,
    "folder of audio and text": as_folder,
    "JSON lines": as_jsonlines,
    "Kaldi data folder": as_kaldi,
    "Lhotse cuts": as_lhotse,
    "Hugging Face dataset": as_saved_dataset,
    "Hugging Face dataset: parquet": as_hub_parquet,
    "Hugging Face dataset: audiofolder": as_audiofolder,
}
EXPECTED = {
    split: {key: (text.lower(), 8000 + 160 * index) for index, (key, text) in enumerate(texts.items())}
    for split, texts in zip(("train", "dev", "test"), TRANSCRIPTS.values(), strict=True)
}


def with_plain_keys(splits):
    """Replace keys by their last part, because in some layouts the keys are paths."""
    return {
        split: {key.rpartition("/")[2]: value for key, value in utterances.items()}
        for split, utterances in splits.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_detected_and_gives_the_same_speech(tmp_path, audio, layout, capsys):
    corpus = LAYOUTS[layout](tmp_path / "corpus", audio)
    record = build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    assert f"build-manifest: {layout.partition(':')[0]} {corpus}" in capsys.readouterr().out
    assert with_plain_keys(transcripts_and_lengths(tmp_path / "out")) == EXPECTED
    assert record.metrics["rejected"] == 0


@pytest.mark.parametrize(
    "layout",
    [
        "LibriSpeech tree",
        "LibriSpeech archives",
        "folder of audio and text",
        "table: tsv",
        "Hugging Face dataset",
    ],
)
def test_corpus_and_results_may_be_in_object_storage(tmp_path, audio, layout, bucket):
    local = LAYOUTS[layout](tmp_path / "corpus", audio)
    for file in (f for f in local.rglob("*") if f.is_file()):
        content = file.read_bytes()
        if file.suffix == ".tsv":  # make its audio paths relative to the table
            content = content.replace(str(tmp_path / "tree").encode(), b"audio")
        write_bytes(f"s3://bucket/corpus/{file.relative_to(local)}", content)
    for path in audio.values():
        if layout == "table: tsv":
            write_bytes(f"s3://bucket/corpus/audio/{path.relative_to(tmp_path / 'tree')}", path.read_bytes())
    build_manifest(recipe(), "s3://bucket/corpus", "s3://bucket/out")
    shutil.rmtree(tmp_path / "tree")
    assert with_plain_keys(transcripts_and_lengths("s3://bucket/out")) == EXPECTED
    sources = [u.source for u in read_manifest("s3://bucket/out/train.jsonl")]
    assert all(source.startswith("s3://bucket/") for source in sources)


def test_only_the_kind_that_the_recipe_names_is_accepted(tmp_path, audio):
    root = as_kaldi(tmp_path / "corpus", audio)
    assert open_corpus(str(root), Data(kind="kaldi")).kind == "Kaldi data folder"
    for kind in ("librispeech", "table", "folder", "jsonlines", "lhotse", "huggingface"):
        with pytest.raises(UserError, match=f"is not of data.kind {kind}: it must have"):
            open_corpus(str(root), Data(kind=kind))


# Archives


def test_an_archive_is_unpacked_once_and_only_if_the_recipe_needs_it(tmp_path, audio):
    root = as_archives(tmp_path / "corpus", audio)
    # This archive is not opened, so its content does not matter.
    shutil.copy(root / "train-a.tar.gz", root / "train-other-500.tar.gz")
    only_train_a = recipe(train=["train-a"])
    build_manifest(only_train_a, str(root), str(tmp_path / "out"))
    unpacked = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "audio").rglob("*.wav")}
    assert {f.parts[-4] for f in unpacked} == set(TRANSCRIPTS)
    (tmp_path / "out" / "stage.json").unlink()
    build_manifest(only_train_a, str(root), str(tmp_path / "out"))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "audio").rglob("*.wav")} == unpacked
    assert {
        json.loads(line)["source"].split("/")[0]
        for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    } == {"audio"}


def test_an_incompletely_unpacked_archive_is_unpacked_again(tmp_path, audio):
    root = as_archives(tmp_path / "corpus", audio)
    build_manifest(recipe(), str(root), str(tmp_path / "out"))
    for marker in (tmp_path / "out" / "audio").glob(".*.unpacked"):
        marker.unlink()
    stray = write_wav(tmp_path / "out" / "audio/LibriSpeech/train-a/1/1/1-1-0009.wav")
    (tmp_path / "out" / "stage.json").unlink()
    build_manifest(recipe(), str(root), str(tmp_path / "out"))
    assert not stray.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../../../evil.wav",
        "/evil.wav",
        "LibriSpeech/../../x/evil.wav",
        "train-a/../../evil.wav",
        "LibriSpeech/train-a/../evil.wav/x.wav",
    ],
)
def test_no_member_of_an_archive_is_written_outside_the_folder(tmp_path, audio, name):
    root = as_archives(tmp_path / "corpus", audio, "xz")
    content = audio["1-1-0000"].read_bytes()
    with tarfile.open(root / "all.tar", "w") as archive:
        archive.add(tmp_path / "tree", "LibriSpeech")
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE):
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = (
                kind,
                len(content) * (kind == tarfile.REGTYPE),
                "/etc/passwd",
            )
            archive.addfile(member, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
        link = tarfile.TarInfo("LibriSpeech/train-a/1/1/1-1-0005.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = {p for p in tmp_path.rglob("*") if "out" not in p.parts}
    build_manifest(recipe(), str(root / "all.tar"), str(tmp_path / "deep" / "out"))
    after = {p for p in tmp_path.rglob("*") if "deep" not in p.parts}
    assert after == before
    assert not Path("/evil.wav").exists()
    assert not [p for p in (tmp_path / "deep").rglob("*") if "evil" in str(p) or p.is_symlink()]
    assert with_plain_keys(transcripts_and_lengths(tmp_path / "deep" / "out")) == EXPECTED


def test_damaged_archives_and_archives_of_other_content_are_refused(tmp_path, audio):
    root = as_archives(tmp_path / "corpus", audio)
    content = (root / "train-a.tar.gz").read_bytes()
    (root / "train-a.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"train-a\.tar\.gz cannot be unpacked .*download it again"):
        build_manifest(recipe(), str(root), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(audio["1-1-0000"], "x.wav")
    with pytest.raises(UserError, match=r"other\.tar holds no LibriSpeech tree"):
        build_manifest(recipe(), str(tmp_path / "other.tar"), str(tmp_path / "out"))


# Tables


def table(path: Path, *rows: dict) -> str:
    return str(
        write_text(
            path,
            lines_of(
                [{k: str(v) for k, v in row.items()} for row in rows], "\t" if path.suffix == ".tsv" else ","
            ),
        )
    )


def read_all(corpus, **data) -> list[Candidate | Rejection]:
    reader = open_corpus(str(corpus), Data(**data))
    return [item for subset in reader.subsets() for item in reader.read(subset)]


def test_the_recipe_may_name_columns_and_rows_may_be_segments(tmp_path):
    write_wav(tmp_path / "clips" / "long.wav", make_tone(3.0))
    path = table(
        tmp_path / "t.csv",
        {
            "Datei": "long.wav",
            "Satz": "erster",
            "text": "x",
            "von": 0.5,
            "dauer": 1.0,
            "accent": "none",
            "sha256": "x",
        },
        {
            "Datei": "long.wav",
            "Satz": "zweiter",
            "text": "x",
            "von": 1.5,
            "dauer": 1.25,
            "accent": "",
            "sha256": "x",
        },
    )
    columns = Columns(audio="Datei", text="Satz", start="von", duration="dauer")
    first, second = read_all(path, columns=columns, audio_root="clips")
    assert first == Candidate(
        "long-0.50",
        str(tmp_path / "clips/long.wav"),
        "erster",
        {"subset": "t", "text": "x", "accent": "none"},
        0.5,
        1.0,
    )
    assert (second.key, second.start, second.duration) == ("long-1.50", 1.5, 1.25)


def test_quotes_and_commas_in_cells_are_preserved(tmp_path):
    write_wav(tmp_path / "x.wav")
    (tmp_path / "t.csv").write_text('id,path,sentence\na,x.wav,"He said, ""yes""\nand left"\n')
    assert [c.text for c in read_all(tmp_path / "t.csv")] == ['He said, "yes"\nand left']
    (tmp_path / "t.tsv").write_text(
        'id\tpath\tsentence\na\tx.wav\t"He said\nb\tx.wav\t"He said ""yes"""\nc\tx.wav\tplain "so" there\n'
    )
    assert [c.text for c in read_all(tmp_path / "t.tsv")] == ['"He said', 'He said "yes"', 'plain "so" there']
    (tmp_path / "s.csv").write_text("id;path;sentence\na;x.wav;one\n")
    assert [c.text for c in read_all(tmp_path / "s.csv")] == ["one"]


@pytest.mark.parametrize(
    ("header", "row", "columns", "expected"),
    [
        (
            "path,words",
            "x.wav,a",
            {},
            r"no column with a usual name for its text: name it with --data\.columns\.text; "
            r"it has the columns path, words",
        ),
        ("clip,text", "x.wav,a", {}, r"for its audio: name it with --data\.columns\.audio"),
        (
            "path,file,text",
            "x.wav,x.wav,a",
            {},
            r"2 columns that may be its audio, path and file: name one with --data\.columns\.audio",
        ),
        ("path,text,sentence", "x.wav,a,a", {}, r"may be its text, text and sentence"),
        ("path,text", "x.wav,a", {"text": "Text"}, r"no column Text, which data\.columns\.text names"),
        (
            "path,text",
            "x.wav,a",
            {"key": "path"},
            r"column path cannot be both data\.columns\.audio and data\.columns\.key",
        ),
        ("path,text", "x.wav,a,b", {}, r"line 2 has 3 cells, but the header has 2"),
        ("path,text,s", "x.wav,a,soon", {"start": "s"}, r"row 2: s must be a number of seconds, not 'soon'"),
        ("path,text,s", "x.wav,a,-1", {"start": "s"}, r"row 2: s must be a number of seconds, not '-1'"),
        ("path,text", 'x.wav,"a', {}, r"t\.csv, line 2, cannot be read as a table"),
        ("", "", {}, "it has no columns"),
    ],
)
def test_the_error_for_an_unreadable_table_names_a_remedy(tmp_path, header, row, columns, expected):
    write_wav(tmp_path / "x.wav")
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(UserError, match=expected) as caught:
        read_all(tmp_path / "t.csv", columns=Columns(**columns))
    assert "\n" not in caught.value.args[0]


def test_a_subsets_stamps_do_not_depend_on_tables_without_its_rows(tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "train.csv").write_text("audio,text\na.wav,one\n")
    (tmp_path / "test.csv").write_text("audio,text\na.wav,two\n")
    before = list(open_corpus(str(tmp_path), Data()).stamps("train"))
    (tmp_path / "test.csv").write_text("audio,text\na.wav,two\na.wav,three\n")
    assert list(open_corpus(str(tmp_path), Data()).stamps("train")) == before


def test_a_row_without_an_id_is_named_after_its_file(tmp_path):
    write_wav(tmp_path / "x.wav")
    (tmp_path / "t.csv").write_text("path,text,id\nx.wav,a, \n")
    assert [c.key for c in read_all(tmp_path / "t.csv")] == ["x"]


def test_the_error_for_a_damaged_table_or_another_encoding_names_the_file(tmp_path):
    (tmp_path / "t.csv").write_bytes("path,text\nx.wav,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.csv is not UTF-8"):
        read_all(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UserError, match=r"t\.parquet cannot be read as parquet"):
        read_all(tmp_path / "t.parquet")


def test_embedded_audio_is_written_to_files_with_safe_names(tmp_path, audio):
    content = audio["1-1-0000"].read_bytes()
    keys = ["../../../evil", "a/b c", "é\u2028\U0001f600", "k" * 2000, "/root/x"]
    rows = [
        {"id": k, "audio": {"bytes": content, "path": k + ".wav"}, "text": "x", "split": "train"}
        for k in keys
    ]
    rows += [
        {
            "id": "t",
            "audio": {"bytes": audio["1-1-0001"].read_bytes(), "path": None},
            "text": "x",
            "split": "test",
        }
    ]
    rows += [{"id": "none", "audio": {"bytes": None, "path": None}, "text": "x", "split": "test"}]
    (tmp_path / "corpus").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "corpus" / "x.parquet")
    before = set(tmp_path.rglob("*"))
    build_manifest(
        recipe(dev_fraction=0.1, max_rejected=0.5), str(tmp_path / "corpus"), str(tmp_path / "deep" / "out")
    )
    assert {p for p in tmp_path.rglob("*") if "deep" not in p.parts} == before
    splits = transcripts_and_lengths(tmp_path / "deep" / "out")
    assert sorted(splits["train"] | splits["dev"]) == sorted(keys)
    assert len(list((tmp_path / "deep" / "out" / "audio").rglob("*.wav"))) == 2, "the same audio is one file"
    assert "has no audio" in (tmp_path / "deep" / "out" / "rejected.jsonl").read_text()


# Kaldi


@pytest.mark.parametrize(
    ("entry", "file"),
    [
        ("/a/x.wav", "/a/x.wav"),
        ("flac -c -d -s /a/x.flac |", "/a/x.flac"),
        ("/usr/bin/flac -cds '/a b/x.flac' |", "/a b/x.flac"),
        ("sox /a/x.flac -t wav - |", "/a/x.flac"),
        ("sox x.flac -t wav -r 16k -b 16 -c 1 - |", "x.flac"),
        ("cat x.wav |", "x.wav"),
        ("sph2pipe -f wav x.sph |", "x.sph"),
    ],
)
def test_a_command_that_only_decodes_a_file_is_replaced_by_the_file(entry, file):
    assert audio_file(entry, "wav.scp, line 1") == file


@pytest.mark.parametrize(
    "entry",
    [
        "touch /tmp/evil |",
        "flac -c -d -s x.flac | sox - -t wav - speed 1.1 |",
        "sox x.flac -t wav - speed 1.1 |",
        "cat x.wav; rm -rf / |",
        "cat $(evil) |",
        "sox -r 8000 x.raw -t wav - |",
        "sox x.flac -t wav -r 8000 - |",
        "sph2pipe -f wav -c 2 x.sph |",
        "cat a.wav b.wav |",
        "flac -s x.flac |",
        "cat 'x |",
        "|",
        "data/raw.ark:1234",
        "-",
        "ffmpeg -i x.mp3 -f wav - |",
    ],
)
def test_any_other_command_is_refused(entry):
    with pytest.raises(UserError, match=r"wav\.scp, line 1"):
        audio_file(entry, "wav.scp, line 1")


def test_segments_of_a_recording_are_utterances(tmp_path):
    write_wav(tmp_path / "x" / "rec.wav", make_tone(4.0))
    write_text(tmp_path / "x" / "wav.scp", "r cat rec.wav |\nunused rec.wav\n")
    write_text(
        tmp_path / "x" / "segments", "b r 1.5 2.75\na r 0.0 1.25\nc r 3 -1\nlost q 0 1\nsilent r 0 1\n"
    )
    write_text(tmp_path / "x" / "text", "a first\nb second\nc third\nd nowhere\nlost words\na again\n")
    items = read_all(tmp_path / "x")
    candidates = {c.key: (c.text, c.start, c.duration, c.source) for c in items if isinstance(c, Candidate)}
    source = str(tmp_path / "x" / "rec.wav")
    assert candidates == {
        "a": ("first", 0.0, 1.25, source),
        "b": ("second", 1.5, 1.25, source),
        "c": ("third", 3.0, None, source),
    }
    assert [(r.key, r.reason) for r in items if isinstance(r, Rejection)] == [
        ("a", "duplicate key"),
        ("d", "transcript without audio"),
        ("lost", "transcript without audio"),
        ("silent", "audio without transcript"),
    ]
    sentences = {r.key: r.detail for r in items if isinstance(r, Rejection)}
    assert sentences["d"] == f"d has no line in {tmp_path / 'x' / 'segments'}."
    assert sentences["lost"] == f"lost has no recording in {tmp_path / 'x' / 'wav.scp'}."


@pytest.mark.parametrize("line", ["a r 1 0.5", "a r x 1", "a r", "a r -1 1"])
def test_the_error_for_an_invalid_segment_names_its_line(tmp_path, line):
    write_text(tmp_path / "x" / "wav.scp", "r rec.wav\n")
    write_text(tmp_path / "x" / "segments", f"ok r 0 1\n{line}\n")
    write_text(tmp_path / "x" / "text", "a first\n")
    with pytest.raises(UserError, match=r"segments, line 2 must be `utterance recording begin end`"):
        read_all(tmp_path / "x")


# Lhotse


def test_a_cut_may_have_several_supervisions_but_must_be_part_of_one_file(tmp_path):
    source = write_wav(tmp_path / "x.wav", make_tone(4.0))
    two = cut("c2", source, "", start=1.0, duration=3.0, recording_duration=4.0)
    two["supervisions"] = [
        {"id": f"c2-{i}", "start": i, "duration": 1.0, "text": f"part {i}", "speaker": "s"} for i in (0, 1)
    ]
    stereo = cut("c3", source, "x")
    stereo["recording"]["sources"][0]["channels"] = [0, 1]
    command = cut("c4", source, "x")
    command["recording"]["sources"][0] |= {"type": "command", "source": "touch /tmp/evil"}
    slow = cut("c5", source, "x")
    slow["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 0.9}}]
    cuts = [
        cut("c1", source, "complete", duration=4.0, recording_duration=4.0),
        two,
        stereo,
        command,
        slow,
        {"id": "c6", "type": "MixedCut", "tracks": []},
        cut("c7", source, "", supervisions=[]),
    ]
    write_text(tmp_path / "cuts_train.jsonl", "".join(json.dumps(c) + "\n" for c in cuts))
    items = read_all(tmp_path / "cuts_train.jsonl")
    assert {c.key: (c.text, c.start, c.duration) for c in items if isinstance(c, Candidate)} == {
        "c1": ("complete", None, None),
        "c2-0": ("part 0", 1.0, 1.0),
        "c2-1": ("part 1", 2.0, 1.0),
    }
    reasons = {r.key: r.reason for r in items if isinstance(r, Rejection)}
    assert reasons == dict.fromkeys(("c3", "c4", "c5", "c6"), "mixed, multi-channel or transformed cut") | {
        "c7": "audio without transcript"
    }


def test_the_error_for_truncated_cuts_names_the_file(tmp_path):
    content = gzip.compress(
        "".join(json.dumps(cut(f"c{i}", f"{i * 7919}.wav", "x")) + "\n" for i in range(2000)).encode()
    )
    (tmp_path / "cuts_train.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cuts_train\.jsonl\.gz, line \d+ cannot be read"):
        read_all(tmp_path / "cuts_train.jsonl.gz")
    write_text(
        tmp_path / "cuts_dev.jsonl",
        json.dumps(cut("a", "x.wav", "x"))
        + '\n{"id": "b", "type": "MonoCut", "recording": {"sources": [{"type": "file"}]}}\n',
    )
    with pytest.raises(UserError, match=r"cuts_dev\.jsonl, line 2 is not a Lhotse cut"):
        read_all(tmp_path / "cuts_dev.jsonl")


# Folders of audio and text


def test_a_folder_pairs_audio_and_text_and_rejects_files_without_a_partner(tmp_path):
    for name in ("a", "a.b", "deep/c"):
        write_wav(tmp_path / "x" / f"{name}.wav")
        write_text(tmp_path / "x" / f"{name}.txt", f"says {name}\n")
    write_wav(tmp_path / "x" / "alone.wav")
    write_text(tmp_path / "x" / "notes.txt", "no audio")
    write_wav(tmp_path / "x" / "._a.wav")
    items = read_all(tmp_path / "x")
    assert {c.key: (c.text, c.extra["subset"]) for c in items if isinstance(c, Candidate)} == {
        "a": ("says a\n", "x"),
        "a.b": ("says a.b\n", "x"),
        "deep/c": ("says deep/c\n", "deep"),
    }
    assert {(r.key, r.reason) for r in items if isinstance(r, Rejection)} == {
        ("alone", "audio without transcript"),
        ("notes", "transcript without audio"),
    }


def test_file_names_that_are_not_utf8_give_escaped_keys(tmp_path):
    for name in (b"a\xff", "é".encode()):
        path = os.fsdecode(os.fsencode(tmp_path / "x") + b"/" + name)
        write_text(Path(path + ".txt"), "one")
        shutil.copy(write_wav(tmp_path / "tone.wav"), path + ".wav")
    write_wav(tmp_path / "x" / "b" / "t.wav", make_tone(0.5))
    write_text(tmp_path / "x" / "b" / "t.txt", "two")
    build_manifest(recipe(train=["x"], test=["b"]), str(tmp_path / "x"), str(tmp_path / "out"))
    assert sorted(
        key for utterances in transcripts_and_lengths(tmp_path / "out").values() for key in utterances
    ) == [
        "a\\xff",
        "b/t",
        "é",
    ]


# All kinds


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_file_is_noticed(tmp_path, audio, layout):
    corpus = LAYOUTS[layout](tmp_path / "corpus", audio)
    build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    before = (tmp_path / "out" / "stage.json").read_bytes()
    build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    assert (tmp_path / "out" / "stage.json").read_bytes() == before, "an unchanged corpus needs no work"
    source = read_manifest(tmp_path / "out" / "train.jsonl")[0].source
    # If the audio was unpacked into the result, the file in the corpus that contains it is changed.
    is_unpacked = source.startswith(str(tmp_path / "out"))
    changed = (
        Path(source)
        if not is_unpacked
        else next(
            f
            for f in sorted(
                corpus.rglob("*train-a*/*.arrow" if layout == "Hugging Face dataset" else "*train-a*")
            )
            if f.is_file()
        )
    )
    os.utime(changed, (1, 1))
    with pytest.raises(UserError, match="changed: listing"):
        build_manifest(recipe(), str(corpus), str(tmp_path / "out"))


def test_a_subset_named_validation_is_dev(tmp_path, audio):
    rows = [
        {"path": str(audio[k]), "text": k, "split": s}
        for k, s in (("1-1-0000", "train"), ("2-1-0000", "validation"), ("3-1-0000", "test"))
    ]
    record = build_manifest(recipe(), table(tmp_path / "t.csv", *rows), str(tmp_path / "out"))
    assert record.facts["utterances"] == {"train": 1, "dev": 1, "test": 1}


def test_segments_have_their_own_durations_and_are_loaded_with_them(tmp_path):
    write_wav(tmp_path / "long.wav", make_tone(10.0, 44_100), 44_100)
    rows = [
        {
            "id": f"u{i}",
            "path": "long.wav",
            "text": f"word {i}",
            "split": "test" if i == 3 else "train",
            "s": 2.5 * i,
            "d": d,
        }
        for i, d in enumerate((1.0, 0.77777, 2.0, 2.9))
    ]
    with_columns = recipe(columns__start="s", columns__duration="d", max_duration=2.8)
    build_manifest(with_columns, table(tmp_path / "t.csv", *rows), str(tmp_path / "out"))
    by_key = {
        u.key: u
        for split in ("train", "dev", "test")
        for u in read_manifest(tmp_path / "out" / f"{split}.jsonl")
    }
    assert {key: u.start for key, u in by_key.items()} == {"u0": 0.0, "u1": 2.5, "u2": 5.0, "u3": 7.5}
    assert [round(by_key[f"u{i}"].duration, 3) for i in range(4)] == [1.0, 0.778, 2.0, 2.5], (
        "cut at the file's end"
    )
    assert all(round(u.duration * 16_000) == len(load_utterance(u)) for u in by_key.values())


def test_different_segments_of_a_recording_in_train_and_test_cause_no_warning(tmp_path, capsys):
    write_wav(tmp_path / "long.wav", make_tone(4.0))
    rows = [
        {"id": f"u{i}", "path": "long.wav", "text": "x", "split": split, "s": start, "d": 0.5}
        for i, (split, start) in enumerate((("train", 0.5), ("train", 0.0), ("test", 1.0)))
    ]
    columns = {"columns__start": "s", "columns__duration": "d"}
    build_manifest(recipe(**columns), table(tmp_path / "t.csv", *rows), str(tmp_path / "out"))
    assert "same audio" not in capsys.readouterr().out
    rows[2] |= {"s": 0.0, "d": 1.0}  # begins as u1 does, but is longer; u0 is held out for dev
    build_manifest(recipe(**columns), table(tmp_path / "t.csv", *rows), str(tmp_path / "longer"))
    assert "same audio" not in capsys.readouterr().out
    rows[2] |= {"s": 0.0, "d": 0.5}
    build_manifest(recipe(**columns), table(tmp_path / "t.csv", *rows), str(tmp_path / "two"))
    assert "1 dev and test utterances have the same audio as train utterances" in capsys.readouterr().out


def test_the_recipe_may_normalise_transcripts_as_whisper_does(tmp_path, audio):
    rows = [
        {"path": str(audio[k]), "text": f'"Mr. Smith didn\'t pay $20 -- {n}"', "split": s}
        for n, (k, s) in enumerate({"1-1-0000": "train", "2-1-0000": "dev", "3-1-0000": "test"}.items())
    ]
    (tmp_path / "t.tsv").write_text(lines_of(rows, "\t"))
    record = build_manifest(recipe(text="whisper"), str(tmp_path / "t.tsv"), str(tmp_path / "out"))
    assert [u.target for u in read_manifest(record.file("train.jsonl"))] == ["mister smith did not pay $20 0"]
