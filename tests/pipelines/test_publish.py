"""The publishing pipeline, run on this machine, tries the registry first and ends with a decision."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from slam_asr.artifacts.stage_record import follow_pointer, read_record
from slam_asr.steps import PUBLISHING, outputs_of
from tests.pipelines import run_command
from tests.publishing.server import ModelRegistryServer, model_registry

CHECKOUT = Path(__file__).resolve().parents[2]
PUBLISH = ("--publish.registry", "kubeflow", "--publish.name", "tiny model")


@pytest.fixture(scope="module")
def registry():
    with model_registry() as (state, address):
        yield state, address


def run(recipe: Path, corpus: Path, output: Path, address: str, *options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"MODEL_REGISTRY_URL": address}
    command = run_command(recipe, corpus, output, *options)
    return subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def refused(
    registry, tiny_recipe, tiny_corpus, tmp_path_factory
) -> tuple[Path, str, ModelRegistryServer, str]:
    """Run the pipeline with a gate that refuses the model, as it would refuse any model with random
    weights."""
    (state, address), output = registry, tmp_path_factory.mktemp("published")
    done = run(tiny_recipe, tiny_corpus, output, address, *PUBLISH, "--gate.max_wer", "25")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout, state, address


@pytest.mark.slow
def test_run_whose_model_is_refused_succeeds_and_says_why(refused):
    output, stdout, state, _ = refused
    assert re.findall(r"^\d/8 (\S+)$", stdout, re.MULTILINE) == list(outputs_of(PUBLISHING))
    rate, report, last = re.search(
        r"^WER (\S+) % · .*\nreport: (.*/report\.html)\n(.*)\n\Z", stdout, re.MULTILINE
    ).groups()
    line = f"<p><b>Not published: WER {rate} % is above gate.max_wer 25 %.</b></p>"
    assert line in Path(report).read_text(encoding="utf-8")
    [shown_report] = output.glob("steps/*/publish/run_report")
    page_of_run = shown_report.read_text()
    costs = page_of_run[page_of_run.index("What the run took") :]
    assert line in page_of_run and all(f">{step}<" in costs for step in outputs_of(PUBLISHING))
    assert last == f"not published: WER {rate} % is above gate.max_wer 25 %"
    assert state.versions == []
    [page] = output.glob("steps/*/publish/decision")
    assert page.read_text().startswith(f"**Not published: WER {rate} % is above gate.max_wer 25 %.**")
    [metrics] = output.glob("steps/*/publish/executor_output.json")
    shown = json.loads(metrics.read_text())["artifacts"]["publication_metrics"]["artifacts"][0]["metadata"]
    assert shown == {"published": 0.0}


@pytest.mark.slow
def test_second_run_reuses_the_training_and_registers_the_accepted_model(refused, tiny_recipe, tiny_corpus):
    output, _, state, address = refused
    done = run(tiny_recipe, tiny_corpus, output, address, *PUBLISH, "--gate.max_wer", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    [version] = state.versions
    assert done.stdout.splitlines()[-1].startswith(f"published as version {version.name} of tiny model: WER ")
    assert done.stdout.count("already there, nothing to do") == 6
    [(_, artifact)] = state.artifacts
    assert read_record(artifact.uri).stage == "convert-checkpoint"
    properties = state.properties_of(version.name)
    assert read_record(properties["scores"]).metrics["wer"] == properties["wer"]
    assert properties["run"] in {folder.name for folder in (output / "store" / "run-records").iterdir()}
    assert {"train_manifest_sha256", "dev_manifest_sha256", "test_manifest_sha256"} <= properties.keys()
    alone = run(
        tiny_recipe, tiny_corpus, output, address, *PUBLISH, "--gate.max_wer", "1000", "--only", "publish"
    )
    assert alone.returncode == 0, alone.stdout + alone.stderr
    record = read_record(follow_pointer(output / "results" / "publish.json"))
    assert record.facts["version"] == version.name and len(state.versions) == 1


@pytest.mark.slow
def test_registry_that_is_down_ends_the_run_before_the_corpus_is_read(tiny_recipe, tiny_corpus, tmp_path):
    done = run(tiny_recipe, tiny_corpus, tmp_path, "http://127.0.0.1:9", *PUBLISH)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert re.search(
        r"^slam-asr: error: The Model Registry at http://127\.0\.0\.1:9 does not answer", done.stdout, re.M
    )
    assert "step open-registry stopped at the error above" in done.stderr
    assert "build-manifest" not in done.stdout
