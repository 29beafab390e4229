"""The page that compares runs shows the numbers of their reports, and it fetches and executes nothing."""

import json
import shutil
import subprocess
import sys

import pytest

from slam_asr.artifacts.hypotheses import Hypothesis, write_hypotheses
from slam_asr.config.recipe import Recipe
from slam_asr.config.variations import Variation
from slam_asr.errors import UserError
from slam_asr.scoring.controls import EMPTY, empty_output
from slam_asr.scoring.report import write_report
from slam_asr.stages.compare import compare
from slam_asr.stages.compare_runs import compare_runs
from tests.scoring.test_report import DECODING, TRAINING, Page

WORDS = ["the", "old", "mill", "stood", "by", "the", "river", "and", "turned"]


def write_run(folder, title: str, wrong: int, steps: int = 2000, count: int = 40):
    """Write the report of a training run whose first `wrong` utterances have one error each."""
    rows = [
        Hypothesis(
            f"u-{n}",
            " ".join(WORDS),
            " ".join(WORDS if n >= wrong else ["a", *WORDS[1:]]),
            ("test-clean", "test-other")[n % 2],
            str(n % 7),
            3.0,
        )
        for n in range(count)
    ]
    curve = [{"step": step, "loss": (wrong + 1) / step, "accuracy": 0.5} for step in range(1, steps + 1)]
    write_report(
        folder,
        Recipe(name=title),
        rows,
        {EMPTY: empty_output(rows)},
        TRAINING | {"steps": steps, "curve": curve},
        DECODING,
    )
    write_hypotheses(folder / "hypotheses.jsonl", rows)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / name, name, wrong, steps)
        for name, wrong, steps in (("much <worse>", 30, 2000), ("best", 3, 1500), ("near", 4, 2000))
    ]


def test_the_page_has_the_numbers_of_the_reports(runs, tmp_path):
    variations = [Variation("much <worse>", {"training.learning_rate": 0.1}).as_json()]
    record = compare_runs(runs, str(tmp_path / "out"), "a sweep", variations)
    rows = json.loads(record.file("runs.json").read_text())["runs"]
    assert [row["name"] for row in rows] == ["best", "near", "much <worse>"]
    assert [row["wer"] for row in rows] == [round(100 * wrong / (40 * len(WORDS)), 2) for wrong in (3, 4, 30)]
    pairwise = compare(runs[1], runs[0])[-1]
    assert (rows[2]["worse_by"], rows[2]["p"]) == (pairwise.second - pairwise.first, pairwise.p) and rows[2][
        "p"
    ] < 0.001 < 0.05 < rows[1]["p"]
    text = record.file("runs.html").read_text()
    page = Page(text)
    [table] = page.tables
    assert [row[1] for row in table[1:]] == [f"{row['wer']:.2f}" for row in rows]
    assert "training.learning_rate 0.1" in table[3][0] and table[1][-2] == "1 500"
    assert "may be chance" in text and "<worse>" not in text
    assert not any(
        name in ("script", "link", "img", "iframe") and "data:" not in values.get("href", "")
        for name, values in page.tags
    )
    assert record.metrics == {"best wer": rows[0]["wer"]} | {f"wer {row['name']}": row["wer"] for row in rows}
    assert "&lt;worse&gt;" in record.file("runs.md").read_text()


def test_the_order_of_the_runs_does_not_matter(runs, tmp_path):
    first = compare_runs(runs, str(tmp_path / "{fingerprint}"))
    assert compare_runs(runs[::-1], str(tmp_path / "{fingerprint}")).folder == first.folder


def test_a_run_tested_on_other_utterances_has_no_p(runs, tmp_path):
    other = write_run(tmp_path / "other", "other", 20, count=38)
    record = compare_runs([*runs, other], str(tmp_path / "out"))
    rows = {row["name"]: row for row in json.loads(record.file("runs.json").read_text())["runs"]}
    assert rows["other"]["p"] is None and rows["near"]["p"] is not None
    assert "tested on other utterances" in record.file("runs.html").read_text()


def test_runs_with_equal_titles_are_distinguished_by_folder(runs, tmp_path):
    twin = shutil.copytree(runs[1], tmp_path / "twin")
    record = compare_runs([runs[1], str(twin)], str(tmp_path / "out"))
    assert sorted(record.facts["order"]) == ["best (best)", "best (twin)"]


@pytest.mark.parametrize(
    ("choose", "sentence"),
    [
        (lambda r: r[:1], "names 1 folder that score wrote"),
        (lambda r: [r[0], r[0]], "twice"),
        (lambda r: [r[0], "/no/such"], "/no/such contains no wer.json"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path, choose, sentence):
    with pytest.raises(UserError, match=sentence):
        compare_runs(choose(runs), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_line_compares_runs(runs, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "slam_asr",
            "compare-runs",
            "--runs",
            json.dumps(runs),
            "--output",
            str(tmp_path / "out"),
            "--title",
            "by hand",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "best best, WER 0.83 %" in done.stdout + done.stderr
