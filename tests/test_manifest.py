"""Manifests: what is read is what was written, and what is no manifest is refused by file and line."""

import json

import pytest

from slam_asr.errors import UserError
from slam_asr.manifest import Utterance, read_manifest, write_manifest

GOOD = {"key": "a", "source": "/x.wav", "target": "hello"}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_manifest(path)
    return str(caught.value)


def test_what_was_written_is_read_back(tmp_path):
    written = [
        Utterance(
            "b", "/audio/b.flac", "tea for two", 1.5, 16000, "ab" * 32, {"subset": "test-other", "speaker": "19"}
        ),
        Utterance("a", "s3://bucket/a.flac", "", extra={"nested": {"z": [1, None, "é"]}, "none": None}),
        Utterance("c", "/audio/c.flac", "line\u2028separator and \x85 next line"),
    ]
    write_manifest(tmp_path / "m.jsonl", written)
    assert read_manifest(tmp_path / "m.jsonl") == sorted(written, key=lambda u: u.key)


def test_text_stays_readable_in_the_file(tmp_path):
    write_manifest(tmp_path / "m.jsonl", [Utterance("a", "/a.wav", "naïve café")])
    assert "naïve café" in (tmp_path / "m.jsonl").read_text()


def test_the_same_utterances_give_the_same_bytes_in_whatever_order(tmp_path):
    utterances = [Utterance(f"{i:02d}", f"/{i}.wav", str(i), i + 0.0000625) for i in range(20)]
    write_manifest(tmp_path / "one.jsonl", utterances)
    write_manifest(tmp_path / "two.jsonl", reversed(utterances))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_free_fields_keep_their_values_and_order(tmp_path):
    row = GOOD | {"zebra": 1, "apple": {"b": 1.0, "a": None}, "subset": "dev-clean"}
    utterances = read_manifest(write_lines(tmp_path / "in.jsonl", row))
    write_manifest(tmp_path / "out.jsonl", utterances)
    assert (tmp_path / "out.jsonl").read_text() == json.dumps(row) + "\n"
    assert utterances[0].subset == "dev-clean"
    assert utterances[0].speaker == ""


def test_a_slam_llm_file_is_read_as_it_is(tmp_path):
    line = '{"key": "1001-134707-0000_ASR", "source": "/data/1001-134707-0000.wav", "target": "1 LITTLE RECKS"}'
    (utterance,) = read_manifest(write_lines(tmp_path / "m.jsonl", line))
    assert utterance == Utterance("1001-134707-0000_ASR", "/data/1001-134707-0000.wav", "1 LITTLE RECKS")


def test_relative_sources_are_found_beside_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    rows = [GOOD | {"key": "a", "source": "wav/a.wav"}, GOOD | {"key": "b", "source": "../b.wav"}]
    write_lines(tmp_path / "data" / "m.jsonl", *rows)
    monkeypatch.chdir(tmp_path)
    sources = [u.source for u in read_manifest("data/m.jsonl")]
    assert sources == [str(tmp_path / "data/wav/a.wav"), str(tmp_path / "b.wav")]


def test_uris_are_left_as_they_are(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", GOOD | {"source": "s3://bucket/x.wav"})
    assert read_manifest(path)[0].source == "s3://bucket/x.wav"


def test_blank_lines_carriage_returns_and_a_byte_order_mark_do_no_harm(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n\n")
    assert [u.key for u in read_manifest(path)] == ["a"]


def test_a_file_name_that_is_not_utf8_survives(tmp_path):
    utterances = [Utterance("a", "/audio/\udcff.wav", "x")]
    write_manifest(tmp_path / "m.jsonl", utterances)
    assert read_manifest(tmp_path / "m.jsonl") == utterances


def test_a_failed_write_leaves_the_older_manifest(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Utterance("a", "/a.wav", "x")])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_manifest(path, [Utterance("b", "/b.wav", "x"), Utterance("c", "/c.wav", "x", extra={"bad": object()})])
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{'key': 'b'}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "holds list"),
        ('"text"', "holds str"),
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
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, bad, says):
    message = refusal(write_lines(tmp_path / "m.jsonl", GOOD, "", bad))
    assert message.startswith(f"{tmp_path / 'm.jsonl'}, line 3")
    assert says in message


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"key": "\xff"}\n')
    assert "line 2 is not JSON" in refusal(tmp_path / "m.jsonl")


def test_a_repeated_key_is_refused_with_both_lines(tmp_path):
    message = refusal(write_lines(tmp_path / "m.jsonl", GOOD, GOOD | {"key": "b"}, GOOD))
    assert "line 3" in message
    assert "key a" in message
    assert "line 1" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    assert "holds no utterance" in refusal(tmp_path / "m.jsonl")


def test_a_missing_manifest_is_refused_with_the_stage_that_writes_one(tmp_path):
    message = refusal(tmp_path / "nowhere.jsonl")
    assert "nowhere.jsonl" in message
    assert "slam-asr build-manifest" in message


def test_a_folder_is_refused_with_a_file_to_name_instead(tmp_path):
    assert str(tmp_path / "train.jsonl") in refusal(tmp_path)
