"""Each usable utterance is in the manifest of one split, once; or no manifest is written."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.stage_record import read_record
from slam_asr.audio import load_audio
from slam_asr.config.recipe import load_recipe
from slam_asr.corpora import audio_check
from slam_asr.errors import UserError
from slam_asr.runtime.external_sort import ExternalSort
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.storage import sha256_of_file
from tests.conftest import make_tone, write_librispeech, write_wav

MANIFESTS = ["dev.jsonl", "test.jsonl", "train.jsonl"]
FILES = sorted(
    [*MANIFESTS, "recipe.yaml", "rejected.jsonl", "stage.json", "statistics.html", "statistics.json"]
)
ROOT = Path(__file__).parents[2]


def recipe(**data):
    return load_recipe("librispeech", {f"data.{name}": value for name, value in data.items()})


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Write a corpus of 20 train, 2 dev and 3 test utterances."""
    return write_librispeech(
        tmp_path / "corpus",
        {
            "train-a": {
                f"{s}-{c}-{n:04d}": f"TRAIN {s} {n}" for s in (1, 2) for c in (7, 8) for n in range(5)
            },
            "dev-other": {f"3-7-{n:04d}": f"DEV {n}" for n in range(2)},
            "test-b": {f"4-7-{n:04d}": f"TEST  {n}" for n in range(3)},
        },
    )


def refusal(*args, **options) -> str:
    with pytest.raises(UserError) as caught:
        build_manifest(*args, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def assert_no_manifest(folder: Path) -> None:
    names = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    assert names in ([], ["rejected.jsonl"])


def rejections(folder: Path) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert all(set(row) == {"key", "source", "reason", "detail"} for row in rows)
    return [(row["key"], row["reason"]) for row in rows]


def test_every_utterance_is_in_its_split_with_the_properties_of_its_file(corpus, tmp_path):
    record = build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == FILES
    counts = {}
    for name in MANIFESTS:
        utterances = read_manifest(record.file(name))
        counts[name] = len(utterances)
        assert [u.key for u in utterances] == sorted(u.key for u in utterances)
        for u in utterances:
            assert os.path.isabs(u.source)
            assert round(u.duration * 16_000) == len(load_audio(u.source))
            assert (u.sample_rate, u.sha256) == (16_000, sha256_of_file(u.source))
            assert (u.speaker, u.extra["chapter"]) == tuple(u.key.split("-")[:2])
    assert counts == {"train.jsonl": 20, "dev.jsonl": 2, "test.jsonl": 3}
    assert [u.target for u in read_manifest(record.file("test.jsonl"))] == ["test 0", "test 1", "test 2"]
    assert record.summary == "20 train, 2 dev, 3 test utterances, 0.00 h; 0 rejected"
    assert record.metrics["train_utterances"] == 20
    assert record.metrics["rejected"] == 0
    assert record.facts["subsets"] == {"train": ["train-a"], "dev": ["dev-other"], "test": ["test-b"]}


def test_the_statistics_match_the_manifests(corpus, tmp_path):
    record = build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    statistics = json.loads(record.file("statistics.json").read_text())
    for split in ("train", "dev", "test"):
        utterances = read_manifest(record.file(f"{split}.jsonl"))
        durations = [u.duration for u in utterances]
        measures = statistics["splits"][split]
        assert measures["utterances"] == len(utterances)
        assert measures["hours"] == pytest.approx(sum(durations) / 3600, abs=1e-6)
        assert measures["mean_duration"] == pytest.approx(np.mean(durations), abs=1e-4)
        assert (measures["min_duration"], measures["max_duration"]) == pytest.approx(
            (min(durations), max(durations))
        )
        assert measures["words"] == len(" ".join(u.target for u in utterances).split())
        assert measures["characters"] == len("".join(u.target for u in utterances))
        assert measures["speakers"] == len({u.speaker for u in utterances})
        assert list(measures["subsets"]) == sorted({u.subset for u in utterances})
        assert sum(measures["durations"]) == len(utterances)
        assert measures["durations"][0] == sum(d < 1 for d in durations)
    assert statistics["rejected"] == {"total": 0, "by_reason": {}}
    characters = "".join(
        u.target for split in ("train", "dev", "test") for u in read_manifest(record.file(f"{split}.jsonl"))
    )
    assert statistics["alphabet"] == {c: characters.count(c) for c in set(characters)}


def test_the_page_shows_rejected_utterances_and_escapes_their_text(corpus, tmp_path, monkeypatch):
    # An example on the page begins with a path. A long path must not push the text out of the example.
    monkeypatch.setattr("slam_asr.pages.corpus._MAX_EXAMPLE", 1000)
    (corpus / "train-a/1/7/1-7-0000.wav").unlink()
    transcripts = corpus / "train-a/1/7/1-7.trans.txt"
    transcripts.write_text(transcripts.read_text() + "<script>alert(1)</script> \u200b<b>EVIL</b>\n")
    record = build_manifest(recipe(max_rejected=0.5, text="as-is"), str(corpus), str(tmp_path / "out"))
    page = record.file("statistics.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "Transcript without audio" in page and "no audio file 1-7-0000 next to it" in page
    assert "http" not in page.replace("http-equiv", "")
    # The transcript without audio and the line of HTML are rejected, and 24 of 25 utterances remain.
    for number in (2, 24):
        assert f'<dd class="number">{number}</dd>' in page


def test_sorting_through_disk_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    build_manifest(recipe(), str(corpus), str(tmp_path / "memory"))
    monkeypatch.setattr(
        "slam_asr.corpora.manifests.ExternalSort", functools.partial(ExternalSort, run_bytes=1000)
    )
    build_manifest(recipe(), str(corpus), str(tmp_path / "disk"))
    for name in (n for n in FILES if n != "stage.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()


def test_the_saved_recipe_equals_the_given_one(corpus, tmp_path):
    original = recipe(text="upper")
    record = build_manifest(original, str(corpus), str(tmp_path / "out"))
    assert load_recipe(str(record.file("recipe.yaml"))) == original
    assert read_manifest(record.file("test.jsonl"))[0].target == "TEST 0"


def test_the_bytes_do_not_depend_on_the_number_of_threads(corpus, tmp_path, monkeypatch):
    (corpus / "train-a/1/7/1-7-0000.wav").write_bytes(b"no audio")
    outputs = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(audio_check, "usable_cores", lambda threads=threads: threads)
        build_manifest(recipe(max_rejected=0.1), str(corpus), str(tmp_path / f"out{threads}"))
        outputs.append({n: (tmp_path / f"out{threads}" / n).read_bytes() for n in FILES if n != "stage.json"})
    assert outputs[0] == outputs[1] == outputs[2]


def test_unusable_utterances_are_rejected_with_a_reason(corpus, tmp_path):
    train = corpus / "train-a"
    (train / "1/7/1-7-0000.wav").unlink()
    write_wav(train / "1/7/1-7-0009.wav")
    (train / "1/7/1-7-0001.wav").write_bytes((train / "1/7/1-7-0001.wav").read_bytes()[:5000])
    write_wav(train / "1/7/1-7-0002.wav", np.zeros(0, np.float32))
    write_wav(train / "1/7/1-7-0003.wav", make_tone(0.05))
    write_wav(train / "1/7/1-7-0004.wav", make_tone(2.0))
    nan = make_tone(1.0)
    nan[7] = np.nan
    write_wav(train / "1/8/1-8-0000.wav", nan, subtype="FLOAT")
    transcripts = train / "2/7/2-7.trans.txt"
    transcripts.write_text(
        transcripts.read_text().replace("2-7-0000 TRAIN 2 0", "2-7-0000  ") + "2-7-0001 AGAIN\n"
    )
    record = build_manifest(recipe(max_rejected=0.5, max_duration=1.9), str(corpus), str(tmp_path / "out"))
    expected = [
        ("1-7-0000", "transcript without audio"),
        ("1-7-0001", "unreadable audio"),
        ("1-7-0002", "empty audio"),
        ("1-7-0003", "too short"),
        ("1-7-0004", "too long"),
        ("1-7-0009", "audio without transcript"),
        ("1-8-0000", "non-finite samples"),
        ("2-7-0000", "blank transcript"),
        ("2-7-0001", "duplicate key"),
    ]
    assert rejections(tmp_path / "out") == expected
    keys = {u.key for u in read_manifest(record.file("train.jsonl"))}
    assert keys & {key for key, _ in expected} == {"2-7-0001"}, "the first of the two lines is used"
    assert len(keys) == 13
    statistics = json.loads(record.file("statistics.json").read_text())
    assert statistics["rejected"] == {
        "total": 9,
        "by_reason": {reason: 1 for _, reason in sorted(expected, key=str)},
    }
    assert record.metrics["rejected"] == 9
    assert record.summary.endswith("; 9 rejected")


def test_the_limits_on_the_duration_are_inclusive(corpus, tmp_path):
    write_wav(corpus / "train-a/1/7/1-7-0000.wav", make_tone(0.1))
    write_wav(corpus / "train-a/1/7/1-7-0001.wav", make_tone(3.0))
    write_wav(corpus / "train-a/1/7/1-7-0002.wav", make_tone(3.0, 44_100), 44_100)
    record = build_manifest(recipe(max_duration=3.0), str(corpus), str(tmp_path / "out"))
    assert rejections(tmp_path / "out") == []
    assert record.metrics["train_utterances"] == 20


def test_conversions_to_16_khz_and_mono_are_counted(corpus, tmp_path):
    write_wav(corpus / "train-a/1/7/1-7-0000.wav", make_tone(1.0, 8_000), 8_000)
    write_wav(corpus / "train-a/1/7/1-7-0001.wav", make_tone(1.0, channels=2))
    record = build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    narrow, stereo = read_manifest(record.file("train.jsonl"))[:2]
    assert (narrow.sample_rate, narrow.duration) == (8_000, 1.0)
    assert (stereo.sample_rate, stereo.duration) == (16_000, 1.0)
    statistics = json.loads(record.file("statistics.json").read_text())
    assert statistics["converted"] == {"to_16_khz": 1, "to_mono": 1}


def test_too_many_rejections_stop_the_stage_and_leave_only_their_list(corpus, tmp_path):
    for n in range(4):
        (corpus / f"train-a/1/7/1-7-000{n}.wav").write_bytes(b"no audio")
    (corpus / "train-a/1/8/1-8-0000.wav").unlink()
    message = refusal(recipe(max_rejected=0.19), str(corpus), str(tmp_path / "out"))
    assert "5 of 25 utterances" in message
    assert "4 unreadable audio, 1 transcript without audio" in message
    assert "1-7-0000, 1-7-0001, 1-7-0002" in message
    assert str(tmp_path / "out" / "rejected.jsonl") in message
    assert "--data.max_rejected" in message
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["rejected.jsonl"]
    assert len(rejections(tmp_path / "out")) == 5
    build_manifest(recipe(max_rejected=0.2), str(corpus), str(tmp_path / "out"))


def test_a_failed_run_removes_the_manifests_of_an_earlier_one(corpus, tmp_path):
    build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    for path in (corpus / "train-a/1/7").glob("*.wav"):
        path.write_bytes(b"no audio")
    refusal(recipe(), str(corpus), str(tmp_path / "out"), overwrite=True)
    assert_no_manifest(tmp_path / "out")


def test_train_utterances_are_held_out_by_their_keys_if_dev_has_no_subset(corpus, tmp_path, capsys):
    shutil.rmtree(corpus / "dev-other")
    first = build_manifest(recipe(dev_fraction=0.2), str(corpus), str(tmp_path / "one"))
    line = re.search(
        r"no subset for dev \(dev-other\); (\d+) of 20 train utterances", capsys.readouterr().out
    )
    dev = {u.key for u in read_manifest(first.file("dev.jsonl"))}
    assert len(dev) == int(line[1]) >= 1
    assert dev.isdisjoint(u.key for u in read_manifest(first.file("train.jsonl")))
    shutil.rmtree(corpus / "train-a/2")
    second = build_manifest(recipe(dev_fraction=0.2), str(corpus), str(tmp_path / "two"))
    assert {u.key for u in read_manifest(second.file("dev.jsonl"))} == {k for k in dev if k.startswith("1-")}


def test_the_error_for_an_utterance_in_two_splits_names_it(corpus, tmp_path):
    shutil.copytree(corpus / "train-a/1/7", corpus / "test-b/1/7")
    message = refusal(recipe(), str(corpus), str(tmp_path / "out"))
    assert "1-7-0000 is in train and in test" in message
    assert_no_manifest(tmp_path / "out")


def test_an_utterance_in_two_subsets_of_one_split_is_used_once(corpus, tmp_path):
    shutil.copytree(corpus / "train-a/1/7", corpus / "train-b/1/7")
    record = build_manifest(recipe(max_rejected=0.5), str(corpus), str(tmp_path / "out"))
    assert record.metrics["train_utterances"] == 20
    assert {reason for _, reason in rejections(tmp_path / "out")} == {"duplicate key"}


def test_a_warning_names_test_utterances_with_the_audio_of_train_utterances(corpus, tmp_path, capsys):
    shutil.copy(corpus / "train-a/1/7/1-7-0000.wav", corpus / "test-b/4/7/4-7-0001.wav")
    build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    assert (
        "warning: 1 dev and test utterances have the same audio as train utterances: 4-7-0001"
        in capsys.readouterr().out
    )


def test_an_empty_split_is_refused(corpus, tmp_path):
    (corpus / "test-b/4/7/4-7.trans.txt").write_text("".join(f"4-7-000{n} \t \n" for n in range(3)))
    message = refusal(recipe(max_rejected=1.0), str(corpus), str(tmp_path / "out"))
    assert "No utterance is left for test (3 blank transcript" in message
    assert_no_manifest(tmp_path / "out")


def test_a_corpus_with_one_train_utterance_is_refused_because_dev_needs_it(tmp_path):
    write_librispeech(tmp_path / "c", {"train-a": {"1-1-0000": "ONE"}, "test-a": {"2-1-0000": "TWO"}})
    assert "No utterance is left for train" in refusal(recipe(), str(tmp_path / "c"), str(tmp_path / "out"))
    assert_no_manifest(tmp_path / "out")


def test_extra_fields_of_json_lines_are_copied(corpus, tmp_path):
    first = build_manifest(recipe(text="upper"), str(corpus), str(tmp_path / "one"))
    lines = first.file("train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"accent": "none", "duration": 99.0} for line in lines]
    first.file("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    second = build_manifest(recipe(), first.folder, str(tmp_path / "two"))
    assert second.metrics == first.metrics
    train = read_manifest(second.file("train.jsonl"))
    assert {u.extra["accent"] for u in train} == {"none"}
    assert {u.subset for u in train} == {"train-a"}
    assert all(u.duration < 1 for u in train), "durations are measured again"
    assert train[0].target == "train 1 0"


def test_one_file_of_json_lines_may_have_all_subsets(corpus, tmp_path):
    first = build_manifest(recipe(), str(corpus), str(tmp_path / "one"))
    path = tmp_path / "everything.jsonl"
    path.write_text("".join(first.file(name).read_text() for name in MANIFESTS))
    second = build_manifest(recipe(), str(path), str(tmp_path / "two"))
    assert [second.file(n).read_bytes() for n in MANIFESTS] == [first.file(n).read_bytes() for n in MANIFESTS]


def test_the_error_for_a_file_without_a_test_subset_lists_its_subsets(corpus, tmp_path):
    first = build_manifest(recipe(), str(corpus), str(tmp_path / "one"))
    shutil.copy(first.file("train.jsonl"), tmp_path / "all.jsonl")
    message = refusal(recipe(), str(tmp_path / "all.jsonl"), str(tmp_path / "two"))
    assert "data.test is test-*" in message
    assert "train-a" in message


def test_a_key_in_two_json_lines_files_is_refused(corpus, tmp_path):
    first = build_manifest(recipe(), str(corpus), str(tmp_path / "one"))
    with open(first.file("test.jsonl"), "a", encoding="utf-8") as file:
        file.write(first.file("train.jsonl").read_text().splitlines()[0] + "\n")
    assert "1-7-0000 is in train and in test" in refusal(recipe(), first.folder, str(tmp_path / "two"))


def test_a_missing_corpus_is_refused(tmp_path):
    assert "There is no corpus" in refusal(recipe(), str(tmp_path / "none"), str(tmp_path / "out"))


def test_a_corpus_missing_from_the_bucket_is_refused(bucket, tmp_path):
    assert "There is no corpus s3://bucket/corpus" in refusal(
        recipe(), "s3://bucket/corpus", str(tmp_path / "out")
    )


@pytest.mark.parametrize(("name", "expected"), [("corpus.xml", "unknown kind"), ("corpus.zip", "unpack it")])
def test_a_file_of_an_unknown_kind_is_refused(tmp_path, name, expected):
    (tmp_path / name).write_text("x")
    message = refusal(recipe(), str(tmp_path / name), str(tmp_path / "out"))
    assert str(tmp_path / name) in message
    assert expected in message


def test_the_error_for_a_folder_that_is_not_a_corpus_names_the_cause(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    assert "is empty" in refusal(recipe(), str(folder), str(tmp_path / "out"))
    (folder / "notes.txt").touch()
    assert "no audio and no transcripts" in refusal(recipe(), str(folder), str(tmp_path / "out"))
    (folder / "dev-clean.zip").touch()
    assert "archives (dev-clean.zip)" in refusal(recipe(), str(folder), str(tmp_path / "out"))
    (folder / "dev-clean.zip").unlink()
    (folder / "train.jsonl").touch()
    assert "hold no utterance" in refusal(recipe(), str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_any_audio_is_refused(corpus, tmp_path):
    for path in corpus.rglob("*.wav"):
        path.unlink()
    refused = refusal(recipe(), str(corpus), str(tmp_path / "out"))
    assert "holds transcripts but no audio (missing files: 25," in refused
    assert_no_manifest(tmp_path / "out")


def test_a_corpus_without_any_transcript_is_refused(corpus, tmp_path):
    for path in corpus.rglob("*.trans.txt"):
        path.unlink()
    assert "but no transcripts" in refusal(recipe(), str(corpus), str(tmp_path / "out"))


def test_the_corpus_is_never_overwritten(corpus, tmp_path):
    first = build_manifest(recipe(), str(corpus), str(tmp_path / "one"))
    before = first.file("train.jsonl").read_bytes()
    for source in (first.folder, str(first.file("train.jsonl"))):
        assert "corpus's own folder" in refusal(recipe(), source, first.folder, overwrite=True)
    assert first.file("train.jsonl").read_bytes() == before
    assert read_record(first.folder) is not None


def test_a_manifest_that_the_stage_did_not_write_is_not_replaced(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("precious")
    assert "was not written by build-manifest" in refusal(recipe(), str(corpus), str(tmp_path / "out"))
    assert (tmp_path / "out" / "train.jsonl").read_text() == "precious"


def test_an_unchanged_corpus_is_not_read_again_and_a_changed_one_is_noticed(corpus, tmp_path, monkeypatch):
    build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(audio_check, "read_clip", None)
        build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    write_wav(corpus / "train-a/1/7/1-7-0000.wav", make_tone(2.0))
    assert "changed: listing" in refusal(recipe(), str(corpus), str(tmp_path / "out"))
    assert "changed: data, listing" in refusal(recipe(text="upper"), str(corpus), str(tmp_path / "out"))
    record = build_manifest(recipe(), str(corpus), str(tmp_path / "out"), overwrite=True)
    assert read_manifest(record.file("train.jsonl"))[0].duration == 2.0


def test_a_killed_run_leaves_no_record_and_can_be_repeated(corpus, tmp_path):
    program = textwrap.dedent("""
        import sys, time
        from slam_asr.corpora import audio_check
        from slam_asr.stages.build_manifest import build_manifest
        from slam_asr.config.recipe import load_recipe

        read_clip, seen = audio_check.read_clip, []

        def slow(*args, **options):
            seen.append(args)
            if len(seen) > 10:
                print("half-way", flush=True)
                time.sleep(60)
            return read_clip(*args, **options)

        audio_check.read_clip = slow
        build_manifest(load_recipe("librispeech"), *sys.argv[1:])
    """)
    command = [sys.executable, "-c", program, str(corpus), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert any("half-way" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert_no_manifest(tmp_path / "out")
    assert build_manifest(recipe(), str(corpus), str(tmp_path / "out")).metrics["train_utterances"] == 20


def test_an_interrupt_leaves_no_record_and_does_not_read_the_remaining_files(corpus, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(audio_check, "usable_cores", lambda: 1)

    def interrupted(path, *_):
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(audio_check, "read_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_manifest(recipe(), str(corpus), str(tmp_path / "out"))
    assert len(seen) < 25
    assert_no_manifest(tmp_path / "out")


def test_the_stage_runs_in_a_script_without_a_main_guard_and_in_a_daemon_thread(corpus, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from slam_asr.stages.build_manifest import build_manifest\n"
        "from slam_asr.config.recipe import load_recipe\n"
        "build_manifest(load_recipe('librispeech'), *sys.argv[1:])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    failed = []

    def body():
        try:
            build_manifest(recipe(), str(corpus), str(tmp_path / "thread"))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(60)
    assert failed == []
    assert read_record(tmp_path / "thread") is not None


@pytest.mark.slow
def test_real_librispeech_is_built_without_rejections(libri_mini, tmp_path):
    record = build_manifest(recipe(), str(libri_mini), str(tmp_path / "out"))
    assert record.metrics["rejected"] == 0
    assert record.metrics["train_utterances"] + record.metrics["dev_utterances"] == 589
    assert record.metrics["test_utterances"] == 50
    assert record.metrics["dev_utterances"] == pytest.approx(0.05 * 589, rel=0.25)
    hours = sum(record.facts["hours"].values())
    assert hours == pytest.approx(2.0522, abs=1e-4)
    for u in read_manifest(record.file("test.jsonl"))[:5]:
        assert round(u.duration * 16_000) == len(load_audio(u.source))
        assert u.target == u.target.lower()


def test_a_recipe_without_train_data_reads_only_its_test_subsets(corpus, tmp_path):
    complete = build_manifest(recipe(), str(corpus), str(tmp_path / "complete"))
    for file in (corpus / "train-a").rglob("*.wav"):
        file.write_bytes(b"no audio, which is never read")
    done = build_manifest(recipe(train=[], dev=[]), str(corpus), str(tmp_path / "test"))
    assert (tmp_path / "test" / "test.jsonl").read_bytes() == Path(complete.file("test.jsonl")).read_bytes()
    assert [(tmp_path / "test" / f"{name}.jsonl").read_bytes() for name in ("train", "dev")] == [b"", b""]
    assert done.summary.startswith("3 test utterances, ")
    assert done.facts["dev_held_out_of_train"] is False


def test_subsets_named_train_and_dev_are_ignored_if_the_recipe_has_no_train_data(tmp_path):
    corpus = write_librispeech(
        tmp_path / "c",
        {name: {f"{s}-1-0000": "A B"} for s, name in enumerate(("train", "dev", "test"), start=1)},
    )
    done = build_manifest(recipe(train=[], dev=[]), str(corpus), str(tmp_path / "m"))
    assert done.facts["utterances"] == {"test": 1}
