"""Two recognisers on the same utterances.

Invariants: exchanged, the difference changes its sign and nothing else; utterances of one side alone are named and counted, never
dropped in silence; SLAM-LLM's files and ours say the same.
"""

import json
import random

import pytest

from slam_asr.cli import run
from slam_asr.errors import UserError
from slam_asr.scoring.compare import compare
from slam_asr.scoring.metrics import score
from slam_asr.scoring.wer import Hypothesis, write_hypotheses

WORDS = ["the", "cat", "sat", "on", "a", "mat", "with", "its", "hat", "and", "that", "was", "that"]


def spoken(count: int = 120) -> list[tuple[str, str, str]]:
    chance = random.Random(1)
    return [
        (
            f"u{n:03d}",
            " ".join(chance.choices(WORDS, k=chance.randint(3, 12))),
            chance.choice(["clean", "other"]),
        )
        for n in range(count)
    ]


def written(errs: float, seed: int) -> list[Hypothesis]:
    """What a recogniser writes that gets that share of words wrong."""
    chance = random.Random(seed)
    return [
        Hypothesis(
            key, text, " ".join("wrong" if chance.random() < errs else word for word in text.split()), subset
        )
        for key, text, subset in spoken()
    ]


@pytest.fixture
def outputs(tmp_path):
    for name, rows in (("good", written(0.1, 2)), ("bad", written(0.3, 3))):
        write_hypotheses(tmp_path / name / "hypotheses.jsonl", rows)
    return str(tmp_path / "good"), str(tmp_path / "bad")


def test_the_better_one_is_named_and_its_rates_are_those_of_the_report(outputs, tmp_path, capsys):
    rows = run("compare", [*outputs, "--output", str(tmp_path / "difference.json")])
    assert [row.subset for row in rows] == ["clean", "other", "all"]
    everything = rows[-1]
    assert everything.first == round(100 * score(written(0.1, 2)).wer, 2)
    assert everything.difference == pytest.approx(everything.first - everything.second, abs=0.011)
    assert everything.low < everything.difference < everything.high < 0
    assert everything.verdict == "the first is better"
    assert json.loads((tmp_path / "difference.json").read_text())["compared"][-1]["p"] == everything.p
    assert "the first is better" in capsys.readouterr().out


def test_exchanged_they_differ_by_sign_alone(outputs):
    here, there = compare(*outputs), compare(*outputs[::-1])
    assert [row.difference for row in here] == [-row.difference for row in there]
    assert [row.p for row in here] == [row.p for row in there]


def test_one_with_itself_differs_in_nothing(outputs):
    assert {(row.difference, row.p, row.verdict) for row in compare(outputs[0], outputs[0])} == {
        (0.0, 1.0, "may be chance")
    }


def test_slam_llms_files_say_the_same(outputs, tmp_path):
    rows = written(0.3, 3)
    for name, texts in (
        ("pred", {r.key: r.hypothesis for r in rows}),
        ("gt", {r.key: r.reference for r in rows}),
    ):
        (tmp_path / f"decode_log_{name}").write_text(
            "".join(f"{key}\t{text}\n" for key, text in texts.items())
        )
    assert compare(outputs[0], str(tmp_path / "decode_log_pred"))[-1] == compare(*outputs)[-1]


def test_utterances_of_one_side_are_named_or_counted(outputs, tmp_path, capsys):
    write_hypotheses(tmp_path / "few.jsonl", written(0.3, 3)[5:])
    with pytest.raises(UserError, match=r"good holds 5 utterances that .*few.jsonl lacks, first u000"):
        compare(outputs[0], str(tmp_path / "few.jsonl"))
    assert compare(outputs[0], str(tmp_path / "few.jsonl"), common=True)[-1].utterances == 115
    assert f"left out: 5 utterances that only {outputs[0]} holds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        ("a\tone\nb\ttwo\n", "a\tone\n", r"1 utterances that have no reference, first b"),
        ("a\tone\n", "a\tone\nb\ttwo\n", r"1 utterances that have no hypothesis, first b"),
        ("a one\n", "a\tone\n", r"line 1 has no tab"),
        ("a\tone\na\ttwo\n", "a\tone\n", r"line 2 names a a second time"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, outputs, pred, gt, message):
    (tmp_path / "x_pred").write_text(pred)
    (tmp_path / "x_gt").write_text(gt)
    with pytest.raises(UserError, match=message):
        compare(str(tmp_path / "x_pred"), outputs[0])


def test_other_references_are_refused(outputs, tmp_path):
    rows = written(0.3, 3)
    rows[7].reference += " more"
    write_hypotheses(tmp_path / "other.jsonl", rows)
    with pytest.raises(UserError, match=r"other references for 1 of 120 utterances, first u007"):
        compare(outputs[0], str(tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such", "/no/such"], "There are no hypotheses at /no/such"),
        (["one"], "Missing: --second"),
        (["a", "b", "c"], "a follows no option"),
    ],
)
def test_what_is_not_there_is_a_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        run("compare", arguments)
