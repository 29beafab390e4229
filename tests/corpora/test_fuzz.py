"""Any table is read as the library that wrote it would read it, or refused in one sentence.

The expected result of a table is computed here from the written values, without the readers. `make soak`
tries many more tables.
"""

import csv
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slam_asr.config.recipe import Data
from slam_asr.corpora import Candidate
from slam_asr.corpora.detection import open_corpus
from slam_asr.corpora.splits import read_splits, survey
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from tests.conftest import make_tone, write_wav
from tests.corpora.test_kinds import cut, recipe
from tests.random_inputs import examples, within_a_second

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
NAMES = st.text("abcé -_.0", min_size=1, max_size=4)
SPOILT = (["a", "b"], {"a": "b"}, 7, 2.5, True, b"\xff")
FORMATS = ("csv", "tsv", "parquet", "jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b"):
        write_wav(root / f"{name}.wav", make_tone(0.2))
    return root


@st.composite
def tables(draw):
    """Draw a table as columns in any order. The columns of the roles `audio` and `text` always exist."""
    count = draw(st.integers(1, 4))

    def column(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    roles = {
        "audio": column(st.sampled_from(["a.wav", "b.wav", "gone.wav", None])),
        "text": column(st.one_of(st.none(), TEXTS)),
    }
    optional = {
        "id": st.one_of(st.none(), NAMES),
        "speaker": st.one_of(st.none(), NAMES, st.sampled_from(["N/A", "nan"])),
        "split": st.sampled_from(["train", "test", "", None]),
        "": st.integers(0, 9),
        "Unnamed: 0": st.integers(0, 9),
        "__index_level_0__": st.integers(0, 9),
        "age": st.one_of(st.none(), st.integers(-9, 2**62)),
        "score": st.one_of(st.none(), st.floats()),
        "note": st.one_of(st.none(), TEXTS),
        "tokens": st.lists(st.integers(0, 9), max_size=2),
    }
    for name in draw(st.lists(st.sampled_from(sorted(optional)), unique=True)):
        roles[name] = column(optional[name])
    names = draw(st.permutations(sorted(roles)))
    return {name: roles[name] for name in names}


def write(file: Path, columns: dict[str, list]) -> None:
    """Write a table with the library that people use for its format."""
    names, rows = list(columns), list(zip(*columns.values(), strict=True))
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    elif file.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
        file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    else:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if file.suffix == ".csv" else "\t")
        writer.writerow(names)
        writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
        file.write_text(text.getvalue(), encoding="utf-8", newline="")


Row = tuple[str, str, str | None, str, str]
"""Subset, source, transcript (None if rejected), speaker, and key (empty if made of the row's number)."""


def meaning_of(row: dict, root: Path, default_subset: str) -> Row:
    """Return what a row means to the libraries, for which blank cells and nulls are missing values."""
    audio, own = row["audio"] or "", (row.get("id") or "").strip()
    speaker = (row.get("speaker") or "").strip()
    is_read = audio in ("a.wav", "b.wav")
    return (
        (row.get("split") or "").strip() or default_subset,
        str(root / audio) if audio else "",
        (row["text"] or "") if is_read else None,
        speaker if is_read and speaker not in ("N/A", "nan") else "",
        own or audio.removesuffix(".wav"),
    )


def rows_in(root: Path) -> list[Row] | str:
    """Return the rows that the reader yields, or the sentence with which it refuses the corpus."""
    found = []
    try:
        with within_a_second():
            reader = open_corpus(str(root), Data())
            items = [(subset, item) for subset in reader.subsets() for item in reader.read(subset)]
    except UserError as error:
        assert str(error) and "\n" not in error.args[0]
        return str(error)
    for subset, item in items:
        text, extra = (item.text, item.extra) if isinstance(item, Candidate) else (None, {})
        assert not extra.keys() & {"", "Unnamed: 0", "__index_level_0__"}
        assert extra.get("subset", subset) == subset
        numbered = item.key.startswith(f"{subset}-") and item.key[-7:].isdigit()
        key = "" if numbered else item.key
        found.append((subset, item.source, text, extra.get("speaker", ""), key))
    return sorted(found, key=str)


def empty_corpus(folder: Path, suffix: str) -> Path:
    """Make a corpus with audio but without a table; return the path for its table."""
    root = folder / "corpus"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name in ("a.wav", "b.wav"):
        os.link(folder / name, root / name)
    return root / ("metadata.jsonl" if suffix == "jsonl" else f"train.{suffix}")


def write_with_usual_names(file: Path, columns: dict[str, list]) -> None:
    """Write a table. In metadata.jsonl, the column of audio is called `file_name`."""
    is_metadata = file.name == "metadata.jsonl"
    write(file, {"file_name" if is_metadata and n == "audio" else n: v for n, v in columns.items()})


@pytest.mark.parametrize("suffix", FORMATS)
@examples(30)
@given(columns=tables())
def test_a_table_of_any_columns_is_read_as_it_was_written(folder, suffix, columns):
    file = empty_corpus(folder, suffix)
    write_with_usual_names(file, columns)
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    default_subset = "corpus" if suffix == "jsonl" else "train"
    expected = [meaning_of(row, file.parent, default_subset) for row in rows]
    found = rows_in(file.parent)
    if "id" in columns and any(not key for *_, key in expected):
        assert "has no key" in found
    else:
        assert found == sorted(expected, key=str)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@examples(20)
@given(data=st.data(), columns=tables())
def test_a_column_of_a_type_that_does_not_fit_its_role_is_refused(folder, suffix, data, columns):
    role = data.draw(st.sampled_from(["audio", "text", "id", "split"]))
    values = [v for v in SPOILT if suffix == "parquet" or not isinstance(v, bytes)]
    value = data.draw(st.sampled_from(values))
    columns |= {role: [value] * len(columns["text"])}
    file = empty_corpus(folder, suffix)
    write_with_usual_names(file, columns)
    found = rows_in(file.parent)
    is_number = isinstance(value, int | float)
    if (role in ("id", "split") and is_number) or (role == "audio" and isinstance(value, bytes)):
        # A number may be a name, and bytes may be an audio file's content.
        assert isinstance(found, list) or "has no key" in found
    else:
        assert f"--data.columns.{'key' if role == 'id' else role}" in found or "has no key" in found


# Keys


@examples(40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["train", "test"]),
            st.sampled_from(["0", "1", None]),
            st.sampled_from("xy"),
            st.integers(0, 1),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_keys_are_unique_whatever_names_repeat(folder, utterances):
    """Each of `utterances` is a tuple: subset, id, name of the audio, and content of the audio."""
    file = empty_corpus(folder, "parquet")
    rows = [
        {"split": subset, "id": own, "audio": {"path": name, "bytes": bytes([audio])}, "text": "t"}
        for subset, own, name, audio in utterances
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    reader = open_corpus(str(file), Data())
    subsets = {split: [split] if split in reader.subsets() else [] for split in ("train", "dev", "test")}
    different = {split: {row[1:] for row in utterances if row[0] == split} for split in ("train", "test")}
    if different["train"] & different["test"]:
        with pytest.raises(UserError, match="is in train and in test"):
            survey(reader, subsets)
        return
    repeated = survey(reader, subsets).repeated
    items = list(read_splits(reader, subsets, Data(), repeated))
    keys = [item.key for item in items if isinstance(item, Candidate)]
    assert len(keys) == len(set(keys)) == len(different["train"]) + len(different["test"])
    assert len(items) == len(utterances)


# Files that end early


def test_json_lines_that_are_cut_at_any_byte_are_read_up_to_the_cut_or_refused(folder):
    file = empty_corpus(folder, "jsonl").with_name("train.jsonl")
    lines = [json.dumps({"key": k, "source": "a.wav", "target": "é"}, ensure_ascii=False) for k in "pq"]
    content = "".join(line + "\n" for line in lines).encode()
    first = len(lines[0].encode())
    for end in range(1, len(content) + 1):
        file.write_bytes(content[:end])
        found = rows_in(file.parent)
        if end in (first, first + 1):
            assert [row[4] for row in found] == ["p"]
        elif end >= len(content) - 1:
            assert [row[4] for row in found] == ["p", "q"]
        else:
            assert f"line {1 if end < first else 2} is not JSON" in found


def test_a_line_of_metadata_that_is_cut_at_any_byte_is_refused(folder):
    file = empty_corpus(folder, "jsonl")
    line = json.dumps({"file_name": "a.wav", "text": "é"}, ensure_ascii=False).encode()
    for end in range(1, len(line) + 1):
        file.write_bytes(line[:end])
        found = rows_in(file.parent)
        assert isinstance(found, list) == (end == len(line)), found


def test_a_compressed_lhotse_file_that_is_truncated_at_any_byte_is_refused(folder):
    file = empty_corpus(folder, "csv").with_name("cuts_train.jsonl.gz")
    content = gzip.compress(json.dumps(cut("c", "a.wav", "x", duration=0.2)).encode() + b"\n", mtime=0)
    for end in range(1, len(content) + 1):
        file.write_bytes(content[:end])
        found = rows_in(file.parent)
        assert isinstance(found, list) == (end == len(content)), found


@examples(20)
@given(data=st.data())
def test_a_parquet_file_that_ends_early_is_refused(folder, data):
    file = empty_corpus(folder, "parquet")
    write(file, {"audio": ["a.wav"] * 3, "text": ["one", "two", "three"]})
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert "cannot be read as parquet" in rows_in(file.parent)


def test_a_refused_table_leaves_no_manifest(folder, tmp_path):
    file = empty_corpus(folder, "parquet")
    write(file, {"audio": ["a.wav", "b.wav"], "text": [["one"], ["two"]], "split": ["train", "test"]})
    with pytest.raises(UserError, match="holds list, not text"):
        build_manifest(recipe(), str(file), str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.jsonl"))
