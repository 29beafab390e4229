"""Comparing two recognisers on the same utterances.

Invariants: exchanging the two changes only the sign of the difference; utterances that only one side has are
reported and counted, never dropped silently; SLAM-LLM's files give the same result as this project's.
"""

import json
import random

import pytest

from slam_asr.artifacts.hypotheses import Hypothesis, write_hypotheses
from slam_asr.artifacts.word_errors import measure
from slam_asr.cli import run
from slam_asr.errors import UserError
from slam_asr.stages.compare import compare

WORDS = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "hat", "and", "that", "was", "that"]


def references(count: int = 120) -> list[tuple[str, str, str]]:
    chance = random.Random(1)
    return [
        (
            f"u{n:03d}",
            " ".join(chance.choices(WORDS, k=chance.randint(3, 12))),
            chance.choice(["clean", "other"]),
        )
        for n in range(count)
    ]


def hypotheses(error_rate: float, seed: int) -> list[Hypothesis]:
    """Return the output of a recogniser that gets this share of words wrong."""
    chance = random.Random(seed)
    return [
        Hypothesis(
            key,
            text,
            " ".join("wrong" if chance.random() < error_rate else word for word in text.split()),
            subset,
        )
        for key, text, subset in references()
    ]


@pytest.fixture
def outputs(tmp_path):
    for name, rows in (("good", hypotheses(0.1, 2)), ("bad", hypotheses(0.3, 3))):
        write_hypotheses(tmp_path / name / "hypotheses.jsonl", rows)
    return str(tmp_path / "good"), str(tmp_path / "bad")


def test_the_better_recogniser_is_named_and_the_rates_are_those_of_the_report(outputs, tmp_path, capsys):
    rows = run("compare", [*outputs, "--output", str(tmp_path / "difference.json")])
    assert [row.subset for row in rows] == ["clean", "other", "all"]
    total = rows[-1]
    assert total.first == round(100 * measure(hypotheses(0.1, 2)).total().wer, 2)
    assert total.difference == pytest.approx(total.first - total.second, abs=0.011)
    assert total.low < total.difference < total.high < 0
    assert total.verdict == "the first is better"
    assert json.loads((tmp_path / "difference.json").read_text())["compared"][-1]["p"] == total.p
    assert "the first is better" in capsys.readouterr().out


def test_exchanging_the_two_changes_only_the_sign(outputs):
    forward, reverse = compare(*outputs), compare(*outputs[::-1])
    assert [row.difference for row in forward] == [-row.difference for row in reverse]
    assert [row.p for row in forward] == [row.p for row in reverse]


def test_a_recogniser_does_not_differ_from_itself(outputs):
    assert {(row.difference, row.p, row.verdict) for row in compare(outputs[0], outputs[0])} == {
        (0.0, 1.0, "may be chance")
    }


def test_slam_llms_files_give_the_same_result(outputs, tmp_path):
    rows = hypotheses(0.3, 3)
    for name, texts in (
        ("pred", {r.key: r.hypothesis for r in rows}),
        ("gt", {r.key: r.reference for r in rows}),
    ):
        (tmp_path / f"decode_log_{name}").write_text(
            "".join(f"{key}\t{text}\n" for key, text in texts.items())
        )
    assert compare(outputs[0], str(tmp_path / "decode_log_pred"))[-1] == compare(*outputs)[-1]


def test_utterances_of_only_one_side_are_refused_or_counted(outputs, tmp_path, capsys):
    write_hypotheses(tmp_path / "few.jsonl", hypotheses(0.3, 3)[5:])
    with pytest.raises(UserError, match=r"good has 5 utterances that .*few.jsonl lacks, first u000"):
        compare(outputs[0], str(tmp_path / "few.jsonl"))
    assert compare(outputs[0], str(tmp_path / "few.jsonl"), common=True)[-1].utterances == 115
    assert f"left out: 5 utterances that only {outputs[0]} has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        ("a\tone\nb\ttwo\n", "a\tone\n", r"1 utterances with no reference, first b"),
        ("a\tone\n", "a\tone\nb\ttwo\n", r"1 utterances with no hypothesis, first b"),
        ("a one\n", "a\tone\n", r"line 1 has no tab"),
        ("a\tone\na\ttwo\n", "a\tone\n", r"line 2 repeats the key a"),
        ("a\tcaf\udce9\n", "a\tcafe\n", r"x_pred is not UTF-8 text"),
    ],
)
def test_files_of_slam_llm_that_are_wrong_or_do_not_match_are_refused(tmp_path, outputs, pred, gt, message):
    (tmp_path / "x_pred").write_text(pred, encoding="utf-8", errors="surrogateescape")
    (tmp_path / "x_gt").write_text(gt, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        compare(str(tmp_path / "x_pred"), outputs[0])


def test_a_single_utterance_has_no_interval(tmp_path, capsys):
    for name in ("a", "b"):
        write_hypotheses(tmp_path / f"{name}.jsonl", [Hypothesis("u", "one two", "one")])
    compare(*(str(tmp_path / f"{name}.jsonl") for name in "ab"), output=str(tmp_path / "out.json"))
    assert "nan" not in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())["compared"]
    assert (row["low"], row["high"], row["p"]) == (None, None, 1.0)


def test_different_references_are_refused(outputs, tmp_path):
    rows = hypotheses(0.3, 3)
    rows[7].reference += " more"
    write_hypotheses(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match=r"different references for 1 of 120 utterances, first u007"):
        compare(outputs[0], str(tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such", "/no/such"], "/no/such contains no hypotheses"),
        (["one"], "Missing: SECOND"),
        (["a", "b", "c"], "c follows no option"),
    ],
)
def test_missing_files_and_missing_or_surplus_arguments_are_reported(arguments, message):
    with pytest.raises(UserError, match=message):
        run("compare", arguments)
