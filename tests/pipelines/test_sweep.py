"""A sweep in kfp's real local runner shares manifest and features, and compares all variations."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.pipelines.test_local import run, table


@pytest.fixture(scope="module")
def swept(tiny_recipe, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    variations = folder / "variations.yaml"
    variations.write_text(
        yaml.safe_dump(
            [
                {"name": "as it is"},
                {"training.learning_rate": "1e-2", "decoding.parts": 2},
                {"name": "more tokens", "decoding.max_new_tokens": 8},
            ],
            sort_keys=False,
        )
    )
    done = run(tiny_recipe, tiny_corpus, folder / "run", "--sweep", str(variations))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, variations, done


@pytest.mark.slow
def test_variations_share_manifest_and_features_and_are_compared_on_one_page(swept):
    folder, _, done = swept
    store = folder / "run" / "store"
    # Two of the three differ only in decoding, so they share a training run.
    assert {
        stage: len(list((store / stage).glob("*/stage.json")))
        for stage in ("build-manifest", "train", "convert-checkpoint", "vary-recipe", "score", "compare-runs")
    } == {
        "build-manifest": 1,
        "train": 2,
        "convert-checkpoint": 2,
        "vary-recipe": 3,
        "score": 3,
        "compare-runs": 1,
    }
    assert done.stdout.count("train: already there, nothing to do") == 1
    page = Path(re.search(r"^comparison: (.*)$", done.stdout, re.MULTILINE)[1])
    runs = json.loads((page.parent / "runs.json").read_text())["runs"]
    assert sorted(run["name"] for run in runs) == ["as it is", "learning_rate=1e-2 parts=2", "more tokens"]
    assert {run["name"]: run["changes"] for run in runs}[
        "learning_rate=1e-2 parts=2"
    ] == "decoding.parts 2, training.learning_rate 1e-2"
    for row in runs:
        numbers = json.loads((Path(row["folder"]) / "wer.json").read_text())
        assert (numbers["title"], numbers["all"]["wer"]) == (row["name"], row["wer"])
    assert [row["wer"] for row in runs] == sorted(row["wer"] for row in runs)
    assert re.search(r"^best: (.*), WER (.*) %$", done.stdout, re.MULTILINE).groups() == (
        runs[0]["name"],
        f"{runs[0]['wer']:.2f}",
    )
    [steps] = (folder / "run" / "steps").iterdir()
    before, _, after = page.read_text(encoding="utf-8").rpartition("</main>")
    shown = (steps / "compare-runs" / "report").read_text(encoding="utf-8")
    assert shown.startswith(before) and shown.endswith(after) and "What the run took" in shown
    assert (steps / "compare-runs" / "summary").stat().st_size


@pytest.mark.slow
def test_single_run_reuses_the_training_of_the_sweep(swept, tiny_recipe, tiny_corpus):
    folder, *_ = swept
    done = run(
        tiny_recipe,
        tiny_corpus,
        folder / "alone",
        "--store",
        str(folder / "run" / "store"),
        "--training.learning_rate",
        "1e-2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cached = {stage for stage, (time, _) in table(done.stdout).items() if time.startswith("(cached)")}
    assert {"build-manifest", "train", "convert-checkpoint"} <= cached
