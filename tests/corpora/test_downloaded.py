"""Corpora are read in the forms in which people download or save them, or refused in one sentence."""

import gzip
import json
import shlex
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.cli import main
from slam_asr.corpora import Candidate, Rejection
from slam_asr.corpora.detection import open_corpus
from slam_asr.corpora.splits import choose_subsets, without_tags
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from tests.conftest import make_tone, write_wav
from tests.corpora.test_kinds import cut, read_all, recipe, write_text

ROOT = Path(__file__).parents[2]
SPLITS = ("train", "dev", "test")


def tone(path: Path, frequency: int) -> Path:
    """Write a tone of 0.2 s with this frequency in Hz, so that each file's audio differs."""
    return write_wav(path, make_tone(0.2, frequency=frequency))


def build(corpus: Path, **data) -> dict[str, list]:
    """Build manifests next to a corpus; return the utterances of each split."""
    output = corpus.parent / "out"
    build_manifest(recipe(train=["train*"], dev=["dev*"], test=["test*"], **data), str(corpus), str(output))
    return {split: list(read_manifest(output / f"{split}.jsonl")) for split in SPLITS}


def build_as_documented(name: str, corpus: Path) -> dict[str, list]:
    """Run the command for a corpus in docs/how-to/corpora.md; return the utterances of each split."""
    page = (ROOT / "docs/how-to/corpora.md").read_text().replace("\\\n", " ")
    command = next(line for line in page.splitlines() if line.startswith("slam-asr") and f" {name} " in line)
    output = corpus.parent / "out"
    paths = {name: str(corpus), "work/manifests": str(output)}
    main([paths.get(word, word) for word in shlex.split(command)[1:]])
    return {split: list(read_manifest(output / f"{split}.jsonl")) for split in SPLITS}


def refusal(corpus: Path, **data) -> str:
    """Return the sentence with which a corpus is refused, after checking that no manifest is left."""
    with pytest.raises(UserError) as caught:
        build(corpus, **data)
    assert "\n" not in caught.value.args[0]
    assert not any((corpus.parent / "out" / f"{split}.jsonl").exists() for split in SPLITS)
    return str(caught.value)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def embedded(tmp_path):
    """Return a function that makes a cell with embedded audio; each call makes another tone."""
    frequencies = iter(range(200, 8000, 50))

    def cell(name: str) -> dict:
        return {"bytes": tone(tmp_path / "tone.wav", next(frequencies)).read_bytes(), "path": name}

    return cell


# Tables


@pytest.mark.real_input("B01-common-voice")
def test_common_voice_is_read_by_the_command_in_the_docs(tmp_path, capsys):
    corpus = tmp_path / "en"
    for number, split in enumerate(SPLITS):
        rows = [f"c{i}\tcv_{split}_{i}.wav\tSentence, {'ab'[i]}.\t2\t0\t\t\t\ten\t\n" for i in range(2)]
        header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale\tsegment\n"
        write_text(corpus / f"{split}.tsv", header + "".join(rows))
        for i in range(2):
            tone(corpus / "clips" / f"cv_{split}_{i}.wav", 300 + 100 * number + 10 * i)
    write_text(corpus / "validated.tsv", header)
    write_text(corpus / "clip_durations.tsv", "clip\tduration[ms]\ncv_train_0.wav\t200\n")
    write_text(corpus / "reported.tsv", "sentence_id\tsentence\tlocale\treason\na\tHello\ten\tother\n")
    utterances = build_as_documented("/data/cv-corpus/en", corpus)
    texts = {split: [u.target for u in utterances[split]] for split in SPLITS}
    assert texts == {split: ["sentence a", "sentence b"] for split in SPLITS}
    log = capsys.readouterr().out
    assert "clip_durations.tsv is not read" in log and "reported.tsv is not read" in log
    shutil.rmtree(tmp_path / "out")
    write_text(corpus / "test.tsv", "clip\tsentence\nx.wav\ty\n")
    assert "test.tsv has no column path" in refusal(
        corpus, audio_root="clips", columns__audio="path", columns__text="sentence"
    )


@pytest.mark.real_input("B04-pandas-index")
def test_an_index_of_pandas_in_csv_is_ignored(tmp_path):
    for split in ("train", "test"):
        for i in range(3):
            tone(tmp_path / "two" / f"{split}{i}.wav", 300 + 40 * i + 10 * (split == "test"))
        rows = "".join(f"{i},{i},{split}{i}.wav,hello {i}\n" for i in range(3))
        write_text(tmp_path / "two" / f"{split}.csv", ",Unnamed: 0.1,path,text\n" + rows)
    utterances = build(tmp_path / "two")
    assert sorted(u.key for u in utterances["train"] + utterances["dev"]) == ["train0", "train1", "train2"]
    assert [(u.key, u.extra) for u in utterances["test"]] == [
        (f"test{i}", {"subset": "test"}) for i in range(3)
    ]


def test_an_index_of_pandas_in_parquet_is_ignored_but_named_columns_are_copied(tmp_path):
    write_wav(tmp_path / "a.wav")
    row = {"path": "a.wav", "text": "x", "__index_level_0__": 7, "Unnamed: 0": 3, "": 4, "age": 30}
    write_parquet(tmp_path / "train.parquet", [row])
    (candidate,) = read_all(tmp_path / "train.parquet")
    assert (candidate.key, candidate.extra) == ("a", {"subset": "train", "age": 30})


def test_two_columns_of_one_name_are_refused(tmp_path):
    write_text(tmp_path / "train.csv", "path,text,text\na.wav,one,two\n")
    with pytest.raises(UserError, match="two columns called text: rename one"):
        read_all(tmp_path / "train.csv")


@pytest.mark.real_input("B14-text-is-a-list")
@pytest.mark.parametrize(
    ("column", "value", "role"),
    [
        ("text", ["hello", "1"], "text"),
        ("text", 7, "text"),
        ("text", {"en": "hello"}, "text"),
        ("id", ["a"], "key"),
        ("split", {"name": "train"}, "split"),
        ("audio", [0.0, 0.5], "audio"),
        ("audio", {"src": "a.wav"}, "audio"),
    ],
)
def test_a_column_of_another_type_than_its_role_is_refused(tmp_path, column, value, role):
    row = {"audio": "a.wav", "text": "hello", "id": "a"} | {column: value}
    write_wav(tmp_path / "corpus" / "a.wav")
    for name in ("train", "test"):
        write_parquet(tmp_path / "corpus" / f"{name}.parquet", [row])
    message = refusal(tmp_path / "corpus")
    assert f"--data.columns.{role}" in message
    assert column in message and type(value).__name__ in message


@pytest.mark.real_input("B28-decoded-arrays")
def test_decoded_samples_are_refused_as_such(tmp_path):
    samples = {"array": [0.0, 0.1, 0.2], "sampling_rate": 16_000, "path": "train0.wav"}
    for name in ("train", "test"):
        write_parquet(tmp_path / "corpus" / f"{name}.parquet", [{"audio": samples, "text": "hello"}])
    message = refusal(tmp_path / "corpus")
    assert "the column audio holds decoded samples" in message and "`cast_column`" in message


def test_a_missing_value_is_not_read_as_a_name(tmp_path):
    write_wav(tmp_path / "a.wav")
    rows = [
        {"path": "a.wav", "text": "x", "id": 7.0, "speaker": 0.0, "split": float("nan")},
        {"path": "a.wav", "text": None, "id": None, "speaker": None, "split": 1.0},
        {"path": "a.wav", "text": "y", "id": 8.0, "speaker": float("nan"), "split": 1.0},
    ]
    write_parquet(tmp_path / "train.parquet", rows)
    found = {c.key: (c.text, c.extra) for c in read_all(tmp_path / "train.parquet")}
    assert found == {
        "7": ("x", {"subset": "train", "speaker": "0"}),
        "a": ("", {"subset": "1"}),
        "8": ("y", {"subset": "1"}),
    }


@pytest.mark.parametrize("name", ["N/A", "nan", "None", "<NA>", " "])
def test_a_text_that_means_a_missing_value_is_no_speaker(tmp_path, name):
    write_wav(tmp_path / "a.wav")
    write_text(tmp_path / "train.csv", f"path,text,speaker\na.wav,NA,{name}\n")
    (candidate,) = read_all(tmp_path / "train.csv")
    assert (candidate.text, candidate.extra) == ("NA", {"subset": "train"})


def test_dates_are_ignored_even_those_that_only_pandas_can_convert(tmp_path):
    write_wav(tmp_path / "a.wav")
    columns = {
        "path": ["a.wav"],
        "text": ["x"],
        "recorded": pyarrow.array([1], pyarrow.timestamp("ns")),
        "year": pyarrow.array([9_000_000_000_000_000], pyarrow.timestamp("s")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    (candidate,) = read_all(tmp_path / "train.parquet")
    assert candidate.extra == {"subset": "train"}


def test_a_line_of_metadata_may_lack_fields_that_other_lines_have(tmp_path):
    for split in ("train", "test"):
        write_wav(tmp_path / split / "0.wav")
        lines = [{"file_name": "0.wav"}, {"file_name": "0.wav", "text": "x", "speaker": "s"}]
        write_text(tmp_path / split / "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = [(c.text, c.extra.get("speaker")) for c in read_all(tmp_path)]
    assert found == [("", None), ("x", "s")] * 2


# Keys


@pytest.mark.real_input("B05-same-names-in-splits")
def test_files_of_the_same_name_in_several_splits_are_different_utterances(tmp_path):
    corpus = tmp_path / "audiofolder"
    for number, split in enumerate(("train", "validation", "test")):
        rows = "".join(f"000{i}.wav,hello {split} {i}\n" for i in range(2))
        write_text(corpus / split / "metadata.csv", "file_name,transcription\n" + rows)
        for i in range(2):
            tone(corpus / split / f"000{i}.wav", 300 + 100 * number + 10 * i)
    found = {s: [(u.key, u.target) for u in utterances] for s, utterances in build(corpus).items()}
    assert found == {
        split: [(f"{folder}/000{i}", f"hello {folder} {i}") for i in range(2)]
        for split, folder in (("train", "train"), ("dev", "validation"), ("test", "test"))
    }


@pytest.mark.real_input("B05-same-names-in-splits")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("000{}.wav", ["train/0000", "train/0001"]),
        ("audio.wav", ["train-train-00000-of-00001-0000001", "train-train-00000-of-00001-0000002"]),
    ],
)
def test_names_of_embedded_audio_may_repeat(tmp_path, embedded, capsys, name, keys):
    for split in ("train", "validation", "test"):
        rows = [{"audio": embedded(name.format(i)), "text": f"{split} {i}"} for i in range(2)]
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
    utterances = build(tmp_path / "hub")
    assert [u.key for u in utterances["train"]] == keys
    assert [[u.target for u in utterances[split]] for split in ("dev", "test")] == [
        [f"{split} {i}" for i in range(2)] for split in ("validation", "test")
    ]
    assert "the same path stands for different audio" in capsys.readouterr().out


def test_the_same_audio_of_the_same_name_in_two_splits_is_still_refused(tmp_path, embedded):
    cell = embedded("0.wav")
    for split in ("train", "test"):
        rows = [{"audio": embedded("1.wav"), "text": "x"}, {"audio": cell, "text": "y"}]
        write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", rows)
    assert "0 is in train and in test" in refusal(tmp_path / "hub")


@pytest.mark.real_input("B26-ids-of-sentences")
def test_an_id_that_several_rows_with_different_audio_share_is_not_used_as_the_key(
    tmp_path, embedded, capsys
):
    for split, first in (("train", 500), ("test", 400)):
        rows = [
            {"id": first + i // 2, "audio": embedded(f"{split}{i}.wav"), "transcription": f"hello {i // 2}"}
            for i in range(4)
        ]
        write_parquet(tmp_path / "fleurs" / f"{split}-00000-of-00001.parquet", rows)
    utterances = build(tmp_path / "fleurs", max_rejected=0.05)
    assert [(u.key, u.extra["id"]) for u in utterances["test"]] == [
        (f"test{i}", 400 + i // 2) for i in range(4)
    ]
    log = capsys.readouterr().out
    assert "the column id has the same value for different audio" in log and "--data.columns.key" in log


def test_a_column_that_the_recipe_names_is_always_the_key(tmp_path):
    for split in ("train", "test"):
        rows = [f"{split}{i // 2},{split}{i}.wav,hello\n" for i in range(4)]
        write_text(tmp_path / "c" / f"{split}.csv", "id,path,text\n" + "".join(rows))
        for i in range(4):
            tone(tmp_path / "c" / f"{split}{i}.wav", 300 + 10 * i + 5 * (split == "test"))
    utterances = build(tmp_path / "c", columns__key="id", max_rejected=0.5)
    assert [u.key for u in utterances["test"]] == ["test0", "test1"]
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert reasons == ["duplicate key"] * 4


# Datasets of the hub


@pytest.mark.real_input("B10-hub-configurations")
def test_each_configuration_has_its_own_subsets(tmp_path, embedded):
    for configuration in ("clean", "other"):
        for split in ("train.100", "test"):
            name = f"{configuration}-{split}"
            rows = [{"audio": embedded(name), "text": name, "id": name}]
            write_parquet(tmp_path / "c" / configuration / f"{split}-00000-of-00001.parquet", rows)
    options = recipe(train=["train*"], dev=[], test=["test*"], kind="huggingface")
    reader = open_corpus(str(tmp_path / "c"), options.data)
    assert choose_subsets(reader, options.data) == {
        "train": ["clean/train.100", "other/train.100"],
        "dev": [],
        "test": ["clean/test", "other/test"],
    }
    assert [c.text for c in reader.read("clean/test")] == ["clean-test"]
    one = recipe(train=["clean/train*"], dev=[], test=["other/test"], kind="huggingface")
    assert choose_subsets(reader, one.data) == {
        "train": ["clean/train.100"],
        "dev": [],
        "test": ["other/test"],
    }


@pytest.mark.parametrize(
    ("names", "subsets"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"], ["test-0", "train-0"]),
        (["train/0000.parquet", "test/0000.parquet"], ["test", "train"]),
        (["en/train/0000.parquet", "en/test/0000.parquet"], ["test", "train"]),
        (["en/train/0000.parquet", "de/train/0000.parquet"], ["de/train", "en/train"]),
        (["train/train-00000.parquet", "test/test-00000.parquet"], ["test", "train"]),
    ],
)
def test_the_folders_of_hub_datasets_name_splits_and_configurations(tmp_path, names, subsets):
    for name in names:
        write_parquet(tmp_path / name, [{"path": "a.wav", "text": "x"}])
    assert open_corpus(str(tmp_path), recipe().data).subsets() == subsets


@pytest.mark.real_input("B11-hub-names-with-digest")
def test_a_digest_in_the_names_of_shards_is_not_part_of_the_split(tmp_path, embedded):
    digest = "a1b2c3d4e5f6a7b8"
    for split in ("train", "validation", "test"):
        for shard in range(2):
            rows = [{"audio": embedded(f"{split}{shard}"), "text": split}]
            write_parquet(tmp_path / "c" / "data" / f"{split}-0000{shard}-of-00002-{digest}.parquet", rows)
    assert open_corpus(str(tmp_path / "c"), recipe().data).subsets() == ["test", "train", "validation"]


# Folders of audio and text


def timit(corpus: Path, numbers: str) -> Path:
    for split in ("TRAIN", "TEST"):
        for i in range(2):
            path = tone(
                corpus / split / "DR1" / "FCJF0" / f"SX{i}.WAV", 300 + 100 * i + 10 * (split == "TEST")
            )
            write_text(path.with_suffix(".TXT"), f"{numbers} She had your dark suit.\n")
    return corpus


@pytest.mark.real_input("B15-timit", "B33-small b")
def test_timit_is_read_without_its_numbers_of_samples(tmp_path):
    utterances = build_as_documented("/data/TIMIT", timit(tmp_path / "c", "0 3200"))
    assert [(u.key, u.target) for u in utterances["test"]] == [
        (f"TEST/DR1/FCJF0/SX{i}", "she had your dark suit.") for i in range(2)
    ]
    shutil.rmtree(tmp_path / "out")
    assert "begins with `0 3100`" in refusal(timit(tmp_path / "c", "0 3100"))


@pytest.mark.parametrize("text", ["0 0 7 one", "0 3200"])
def test_numbers_that_were_spoken_remain(tmp_path, text):
    write_text(tone(tmp_path / "c" / "a.wav", 300).with_suffix(".txt"), text)
    assert [c.text for c in read_all(tmp_path / "c")] == [text]


@pytest.mark.real_input("B29-link-to-itself")
@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/again", "."),
        ("train/above", ".."),
        ("all", "."),
        ("train/itself", "itself"),
        ("train/itself.wav", "itself.wav"),
        ("train/b", "../../elsewhere"),
    ],
)
def test_a_link_to_a_folder_above_is_not_followed(tmp_path, link, target):
    for split in ("train", "test"):
        path = tone(tmp_path / "c" / split / f"{split}.wav", 300 + 10 * (split == "test"))
        write_text(path.with_suffix(".txt"), "hello")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to("../c/train")
    (tmp_path / "c" / link).symlink_to(target)
    assert [item.key for item in read_all(tmp_path / "c")] == ["test/test", "train/train"]


# Kaldi and Lhotse


def kaldi(folder: Path, entry: str) -> Path:
    write_text(folder / "wav.scp", f"a {entry}\n")
    write_text(folder / "text", "a hello\n")
    return folder


@pytest.mark.real_input("B24-kaldi-commands")
def test_sph2pipe_to_pcm_is_read_as_the_file(tmp_path):
    (item,) = read_all(kaldi(tmp_path, "sph2pipe -f wav -p /data/a.sph |"))
    assert item.source == "/data/a.sph"


@pytest.mark.real_input("B24-kaldi-commands")
@pytest.mark.parametrize(
    "entry", ["/data/wav.ark:17", "/data/wav.ark:17[0:100]", "-", "ffmpeg -i x -f wav - |"]
)
def test_the_error_for_other_entries_advises_to_write_files(tmp_path, entry):
    with pytest.raises(UserError, match=r"wav\.scp, line 1 .*wav-copy \"\$entry\" \"wav/\$id\.wav\""):
        read_all(kaldi(tmp_path, entry))


@pytest.mark.real_input("B33-small a")
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_places_in_kaldi_archives_are_refused_in_other_lists_too(tmp_path, suffix):
    content = {
        ".jsonl": json.dumps({"key": "a", "source": "/data/wav.ark:123", "target": "x"}),
        ".csv": "path,text\n/data/wav.ark:123,x",
    }[suffix]
    write_text(tmp_path / f"train{suffix}", content + "\n")
    with pytest.raises(
        UserError, match=r"wav\.ark:123 is in a Kaldi archive: write each recording to a file"
    ):
        read_all(tmp_path)


@pytest.mark.parametrize("times", ["0 inf", "nan 1", "0 1e400"])
def test_a_segment_with_a_time_that_is_not_finite_is_refused(tmp_path, times):
    write_text(kaldi(tmp_path, "a.wav") / "segments", f"a a {times}\n")
    with pytest.raises(UserError, match="segments, line 1 must be"):
        read_all(tmp_path)


@pytest.mark.real_input("B25-lhotse")
def test_recordings_and_supervisions_without_cuts_are_refused(tmp_path):
    recording = {"id": "r", "sources": [], "sampling_rate": 16_000, "num_samples": 1, "duration": 1.0}
    supervision = {"id": "s", "recording_id": "r", "start": 0.0, "duration": 1.0, "text": "hello"}
    for name, line in (("recordings", recording), ("supervisions", supervision)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"x_{name}_train.jsonl.gz").write_bytes(gzip.compress(json.dumps(line).encode() + b"\n"))
        with pytest.raises(UserError, match=rf"has Lhotse's {name}, not cuts: .*`lhotse cut simple -r"):
            read_all(folder)


@pytest.mark.real_input("B25-lhotse")
def test_resampled_cuts_are_read(tmp_path):
    source = write_wav(tmp_path / "a.wav", make_tone(0.5))
    resampled, slow = cut("a", source, "hello"), cut("b", source, "hello")
    resampled["recording"]["transforms"] = [{"name": "Resample", "kwargs": {"target_sampling_rate": 16_000}}]
    slow["recording"]["transforms"] = [*resampled["recording"]["transforms"], {"name": "Speed", "kwargs": {}}]
    write_text(tmp_path / "cuts_train.jsonl", "".join(json.dumps(c) + "\n" for c in (resampled, slow)))
    read, rejected = read_all(tmp_path / "cuts_train.jsonl")
    assert isinstance(read, Candidate) and (read.key, read.source) == ("a", str(source))
    assert isinstance(rejected, Rejection) and "transforms" in rejected.detail


@pytest.mark.parametrize("value", [["a"], {"a": 1}])
def test_a_cut_whose_text_is_not_text_is_refused(tmp_path, value):
    line = cut("a", "a.wav", "x")
    line["supervisions"][0]["text"] = value
    write_text(tmp_path / "cuts_train.jsonl", json.dumps(line) + "\n")
    with pytest.raises(UserError, match=r"line 1 is not a Lhotse cut .*its text is of type"):
        read_all(tmp_path / "cuts_train.jsonl")


# All kinds


@pytest.mark.real_input("B27-gigaspeech-tags")
def test_tags_are_logged_and_may_be_dropped_or_converted_to_punctuation(tmp_path, embedded, capsys):
    texts = ["HELLO THERE <COMMA> YOU <PERIOD>", "<MUSIC>"]
    for split in ("train", "dev", "test"):
        rows = [{"audio": embedded(f"{split}{i}"), "text": text} for i, text in enumerate(texts)]
        write_parquet(tmp_path / "c" / f"{split}.parquet", rows)
    assert [u.target for u in build(tmp_path / "c")["test"]] == [text.lower() for text in texts]
    log = capsys.readouterr().out
    assert (
        "warning: 6 of 6 transcripts have tags (<COMMA>, <PERIOD>, <MUSIC>)" in log and "--data.tags" in log
    )
    shutil.rmtree(tmp_path / "out")
    utterances = build(tmp_path / "c", tags="punctuation", max_rejected=0.5)
    assert [u.target for u in utterances["test"]] == ["hello there, you."]
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "text", "expected"),
    [
        ("keep", "a <noise> b", "a <noise> b"),
        ("drop", "a <noise> b <comma>", "a b"),
        ("punctuation", "<sil> who <QUESTIONMARK> me <ExclamationPoint>", "who? me!"),
        ("drop", "3 < 4 and 5 > 4", "3 < 4 and 5 > 4"),
    ],
)
def test_tags_are_words_in_brackets(tags, text, expected):
    assert " ".join(without_tags(text, tags).split()) == expected


def test_a_speaker_that_is_null_is_unknown(tmp_path):
    write_wav(tmp_path / "a.wav")
    line = {"key": "a", "source": "a.wav", "target": "x", "speaker": None, "subset": None}
    write_text(tmp_path / "m.jsonl", json.dumps(line) + "\n")
    (utterance,) = read_manifest(tmp_path / "m.jsonl")
    assert (utterance.speaker, utterance.subset) == ("", "")


@pytest.mark.real_input("B31-file-uri")
def test_escapes_in_a_file_uri_are_decoded(tmp_path):
    source = write_wav(tmp_path / "with space 100%.wav").absolute()
    uris = [source.as_uri(), source.as_uri().replace("file://", "file:"), f"file://localhost{source}"]
    lines = [json.dumps({"key": str(i), "source": uri, "target": "x"}) for i, uri in enumerate(uris)]
    write_text(tmp_path / "train.jsonl", "\n".join(lines) + "\n")
    assert [item.source for item in read_all(tmp_path)] == [str(source)] * 3
    assert all(isinstance(item, Candidate) for item in read_all(tmp_path))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"file_name": "a.wav", "text": "half \ud800"}, "half a character"),
        ({"file_name": "a\0b.wav", "text": "x"}, "holds transcripts but no audio"),
        ({"file_name": "~nobody-has-this-name/a.wav", "text": "x"}, "holds transcripts but no audio"),
    ],
)
def test_names_and_texts_that_cannot_be_saved_are_refused(tmp_path, line, expected):
    write_wav(tmp_path / "c" / "a.wav")
    for split in ("train", "test"):
        write_text(tmp_path / "c" / split / "metadata.jsonl", json.dumps(line) + "\n")
        shutil.copy(tmp_path / "c" / "a.wav", tmp_path / "c" / split)
    assert expected in refusal(tmp_path / "c")
