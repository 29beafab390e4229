"""A manifest is read back as it was written. A wrong line is refused with its file and number."""

import json
import threading

import pytest

from slam_asr.artifacts.json_lines import write_json_lines
from slam_asr.artifacts.manifest import Utterance, iterate_manifest, read_manifest
from slam_asr.errors import UserError
from slam_asr.runtime.external_sort import ExternalSort
from slam_asr.storage import read_bytes, write_bytes
from tests.utterances import write_manifest

GOOD = {"key": "a", "source": "/x.wav", "target": "hello"}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    return str(caught.value)


def test_written_utterances_are_read_back(tmp_path):
    written = [
        Utterance(
            "b",
            "/audio/b.flac",
            "tea for two",
            1.5,
            16000,
            "ab" * 32,
            {"subset": "test-other", "speaker": "19"},
        ),
        Utterance("a", "s3://bucket/a.flac", "", extra={"nested": {"z": [1, None, "é"]}, "none": None}),
        Utterance("c", "/audio/c.flac", "line\u2028separator and \x85 next line"),
    ]
    write_manifest(tmp_path / "m.jsonl", written)
    assert list(read_manifest(tmp_path / "m.jsonl")) == sorted(written, key=lambda u: u.key)


def test_transcripts_are_written_as_readable_text(tmp_path):
    write_manifest(tmp_path / "m.jsonl", [Utterance("a", "/a.wav", "naïve café")])
    assert "naïve café" in (tmp_path / "m.jsonl").read_text()


def test_extra_fields_keep_their_values_and_order(tmp_path):
    row = GOOD | {"zebra": 1, "apple": {"b": 1.0, "a": None}, "subset": "dev-clean"}
    utterances = read_manifest(write_lines(tmp_path / "in.jsonl", row))
    write_manifest(tmp_path / "out.jsonl", utterances)
    assert (tmp_path / "out.jsonl").read_text() == json.dumps(row) + "\n"
    assert utterances[0].subset == "dev-clean"
    assert utterances[0].speaker == ""


def test_a_slam_llm_file_is_read_without_conversion(tmp_path):
    line = (
        '{"key": "1001-134707-0000_ASR", "source": "/data/1001-134707-0000.wav", "target": "1 LITTLE RECKS"}'
    )
    (utterance,) = read_manifest(write_lines(tmp_path / "m.jsonl", line))
    assert utterance == Utterance("1001-134707-0000_ASR", "/data/1001-134707-0000.wav", "1 LITTLE RECKS")


def test_relative_sources_are_resolved_against_the_manifests_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [GOOD | {"key": "a", "source": "wav/a.wav"}, GOOD | {"key": "b", "source": "../b.wav"}]
    write_lines(tmp_path / "data" / "m.jsonl", *rows)
    monkeypatch.chdir(tmp_path)
    sources = [u.source for u in read_manifest("data/m.jsonl")]
    assert sources == [str(tmp_path / "data/wav/a.wav"), str(tmp_path / "b.wav")]


def test_uris_are_left_unchanged(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", GOOD | {"source": "s3://bucket/x.wav"})
    assert read_manifest(path)[0].source == "s3://bucket/x.wav"


def test_blank_lines_carriage_returns_and_a_byte_order_mark_are_ignored(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n\n")
    assert [u.key for u in read_manifest(path)] == ["a"]


def test_a_file_name_that_is_not_utf8_is_read_back_unchanged(tmp_path):
    utterances = [Utterance("a", "/audio/\udcff.wav", "x")]
    write_manifest(tmp_path / "m.jsonl", utterances)
    assert list(read_manifest(tmp_path / "m.jsonl")) == utterances


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "m.jsonl"
    write_json_lines(path, [{"key": "a"}])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json_lines(path, [{"key": "b"}, {"key": "c", "bad": object()}])
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("{'key': 'b'}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "is of type list: it must be an object"),
        ('"text"', "is of type str"),
        ({"key": "b", "source": "/x.wav"}, "has no target"),
        ({"target": "b"}, "has no key and no source"),
        (GOOD | {"key": 7}, "key must be text, not 7"),
        (GOOD | {"key": " "}, "key must be text"),
        (GOOD | {"key": "b", "source": ""}, "source must be text"),
        (GOOD | {"key": "b", "target": None}, "target must be text, not null"),
        ('{"key": "b", "source": "/x", "target": "\\ud800"}', "lone surrogate"),
        (GOOD | {"key": "b", "duration": "3"}, 'duration must be a number of seconds above 0, not "3"'),
        (GOOD | {"key": "b", "duration": -1}, "duration must be"),
        (GOOD | {"key": "b", "duration": float("nan")}, "duration must be"),
        (GOOD | {"key": "b", "duration": True}, "duration must be"),
        (GOOD | {"key": "b", "sample_rate": 16000.5}, "sample_rate must be a whole number"),
        (GOOD | {"key": "b", "sha256": 12}, "sha256 must be text"),
        (
            GOOD | {"key": "b", "start": -0.5, "duration": 1},
            "start must be a number of seconds, 0 or more, not -0.5",
        ),
        (GOOD | {"key": "b", "start": 1.5}, "has a start but no duration"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(tmp_path, bad, expected):
    message = refusal(write_lines(tmp_path / "m.jsonl", GOOD, "", bad))
    assert message.startswith(f"{tmp_path / 'm.jsonl'}, line 3")
    assert expected in message


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"key": "\xff"}\n')
    assert "line 2 is not JSON" in refusal(tmp_path / "m.jsonl")


def test_a_repeated_key_is_refused_with_both_line_numbers(tmp_path):
    message = refusal(write_lines(tmp_path / "m.jsonl", GOOD, GOOD | {"key": "b"}, GOOD))
    assert "line 3" in message
    assert "key a" in message
    assert "line 1" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    assert "holds no utterance" in refusal(tmp_path / "m.jsonl")


def test_the_error_for_a_missing_manifest_names_the_stage_that_writes_one(tmp_path):
    message = refusal(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in message
    assert "slam-asr build-manifest" in message


def test_the_error_for_a_folder_names_a_file_in_it(tmp_path):
    assert str(tmp_path / "train.jsonl") in refusal(tmp_path)


def utterances(count: int) -> list[Utterance]:
    return [
        Utterance(f"k{i * 7919 % count:05d}", f"/{i}.wav", f"text {i}\u2028", 1.0 + i) for i in range(count)
    ]


def small_runs(*arguments):
    return ExternalSort(*arguments, run_bytes=2000)


def test_a_segment_is_read_back_with_its_start(tmp_path):
    written = [Utterance("a", "/x.wav", "x", 2.5, start=0.0), Utterance("b", "/x.wav", "x", 2.5, start=2.5)]
    write_manifest(tmp_path / "m.jsonl", written)
    assert list(read_manifest(tmp_path / "m.jsonl")) == written


def test_the_external_sort_is_stable_over_several_merges(monkeypatch):
    monkeypatch.setattr("slam_asr.runtime.external_sort._MAX_RUNS", 3)
    with small_runs() as ordered:
        for i in range(500):
            ordered.add(b"%d" % (i % 5), b"%05d" % i)
        once, twice = list(ordered), list(ordered)
    assert once == twice == sorted(once)
    assert len(once) == 500


def test_keys_are_sorted_by_their_characters():
    keys = ["é", "z", "\U0001f600", "\ufffd", "a/b", "a b", "..", "../../x", "k" * 2000]
    with small_runs() as ordered:
        for key in keys:
            ordered.add(key.encode(), b"")
        assert [key.decode() for key, _ in ordered] == sorted(keys)


def test_a_manifest_behaves_as_a_sequence_of_its_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, utterances(50))
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n \n\n", 3))
    read, expected = read_manifest(path), sorted(utterances(50), key=lambda u: u.key)
    assert len(read) == 50
    assert list(read) == [u for _, u in iterate_manifest(path)] == expected
    assert (read[0], read[-1], read[7:12], read[::-9]) == (
        expected[0],
        expected[-1],
        expected[7:12],
        expected[::-9],
    )
    assert list(reversed(read)) == expected[::-1]
    with pytest.raises(IndexError):
        read[50]


def test_a_manifest_can_be_shared_by_threads(tmp_path):
    write_manifest(tmp_path / "m.jsonl", utterances(200))
    read = read_manifest(tmp_path / "m.jsonl")
    assert read[3].key == "k00003"
    for _ in range(20):
        fresh, keys = read_manifest(tmp_path / "m.jsonl"), []
        threads = [
            threading.Thread(target=lambda f=fresh, k=keys: k.extend(f[i].key for i in range(200)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(keys) == sorted([f"k{i:05d}" for i in range(200)] * 4)


def test_relative_paths_remain_valid_after_a_change_of_the_working_directory(tmp_path, monkeypatch):
    write_lines(tmp_path / "m.jsonl", GOOD | {"source": "x.wav"})
    monkeypatch.chdir(tmp_path)
    read = read_manifest("m.jsonl")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert read[0].source == str(tmp_path / "x.wav")
    assert [u.source for u in read] == [str(tmp_path / "x.wav")]


def test_a_manifest_in_object_storage_has_the_same_bytes_as_a_local_one(tmp_path, bucket):
    uri = "s3://bucket/corpus/m.jsonl"
    sources = {"a": "wav/a.wav", "b": "../b.wav", "c": "/data/c.wav", "d": "s3://other/d.wav"}
    write_manifest(uri, [Utterance(key, source, "x") for key, source in reversed(sources.items())])
    write_manifest(tmp_path / "m.jsonl", [Utterance(key, source, "x") for key, source in sources.items()])
    assert read_bytes(uri) == (tmp_path / "m.jsonl").read_bytes()
    expected = ["s3://bucket/corpus/wav/a.wav", "s3://bucket/b.wav", "/data/c.wav", "s3://other/d.wav"]
    read = read_manifest(uri)
    assert [u.source for u in read] == [read[i].source for i in range(4)] == expected
    with pytest.raises(UserError, match=r"no manifest s3://bucket/none\.jsonl.*build-manifest"):
        read_manifest("s3://bucket/none.jsonl")
    write_bytes("s3://bucket/bad.jsonl", b"{}\n")
    with pytest.raises(UserError, match=r"s3://bucket/bad\.jsonl, line 1 has no key"):
        read_manifest("s3://bucket/bad.jsonl")


def test_keys_with_equal_hashes_are_not_mistaken_for_repeated_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("slam_asr.artifacts.manifest.hash", lambda _: 7, raising=False)
    write_manifest(tmp_path / "m.jsonl", utterances(20))
    assert len(read_manifest(tmp_path / "m.jsonl")) == 20
    with open(tmp_path / "m.jsonl", "ab") as file:
        file.write(b'{"key": "k00004", "source": "x", "target": ""}\n')
    assert "line 21: key k00004 is already used in line 5" in refusal(tmp_path / "m.jsonl")


def test_a_line_that_changed_since_the_check_is_refused(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", GOOD, GOOD | {"key": "b"})
    read = read_manifest(path)
    path.write_text("no longer the manifest that it was, and of another length\n" * 5)
    with pytest.raises(UserError, match=r"utterance 2 \(changed since it was first read\)"):
        read[1]
