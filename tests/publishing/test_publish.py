"""A model is registered only if it passes the gate, only once, and with the facts that later runs compare."""

import json

import pytest
from mr_openapi import ModelVersionState

from slam_asr import cli
from slam_asr.artifacts import model_folder
from slam_asr.artifacts.run_records import RUN
from slam_asr.artifacts.stage_record import read_record
from slam_asr.errors import ClusterError, ConfigurationError, InputError, UserError
from slam_asr.publishing import connection, kubeflow_registry
from slam_asr.publishing.registry import Version
from slam_asr.stages.publish import DECISION, PAGE, REPORT, check_registry, publish
from slam_asr.storage import sha256_of_bytes
from tests.publishing.server import TOKEN

BETTER = {"gate__better_than": "registered"}


def test_a_published_version_has_the_models_address_its_wer_and_the_digests_of_its_data(
    registry, trained, recipe_with, tmp_path
):
    model, scores = trained("good", wrong=10)
    record = publish(recipe_with(gate__max_wer=25.0), model, scores, str(tmp_path / "out"), run="run-7")
    [version] = registry.versions
    assert record.summary == (
        f"published as version {version.name} of demo: WER 5.00 % is not above gate.max_wer 25 %"
    )
    assert record.metrics == {"published": 1.0}
    assert [m.name for m in registry.models] == ["demo"]
    assert version.description == "WER 5.00 % is not above gate.max_wer 25 %"
    [(parent, artifact)] = registry.artifacts
    assert (parent, artifact.name, artifact.uri) == (version.id, "demo", model)
    assert artifact.model_format_version == str(model_folder.FORMAT)
    numbers = read_record(scores).metrics
    config = json.loads((tmp_path / "good" / "model" / "config.json").read_text())
    properties = registry.properties_of(version.name)
    assert properties.pop("slam_asr")
    assert properties == {
        "wer": 5.0,
        "wer_low": numbers["wer 95 % low"],
        "wer_high": numbers["wer 95 % high"],
        "utterances": 60,
        "recipe": "demo",
        "recipe_sha256": sha256_of_bytes(config["recipe"].encode()),
        "train_manifest_sha256": "a1",
        "dev_manifest_sha256": "b2",
        "test_manifest_sha256": "c3",
        "scores": scores,
        "fingerprint": version.name,
        "run": "run-7",
    }
    decision = json.loads(record.file(DECISION).read_text())
    assert decision["decision"] == record.summary and decision["published"] is True
    assert decision["properties"]["run"] == "run-7" and decision["version"] == version.name
    page = record.file(PAGE).read_text()
    assert page.startswith(f"**Published as version {version.name} of demo: WER 5.00 %")
    assert f"- scores: `{scores}`\n" in page
    report, copy = read_record(scores).file(REPORT).read_text(), record.file(REPORT).read_text()
    heading, line = "</h1>\n", f"<p><b>Published{record.summary.removeprefix('published')}.</b></p>\n"
    assert line in copy and copy == report.replace(heading, heading + line)


def test_version_names_the_run_by_the_id_that_its_notice_and_records_use(
    registry, trained, recipe_with, tmp_path, monkeypatch
):
    monkeypatch.setenv(RUN, "run-8")
    publish(recipe_with(), *trained("good", wrong=10), str(tmp_path / "out"), run="id-of-kfp")
    assert registry.properties_of(registry.versions[0].name)["run"] == "run-8"


def test_model_above_the_limit_is_refused_without_failing(registry, trained, recipe_with, tmp_path):
    model, scores = trained("bad", wrong=1)
    record = publish(recipe_with(gate__max_wer=25.0, **BETTER), model, scores, str(tmp_path / "out"))
    assert record.summary == "not published: WER 50.00 % is above gate.max_wer 25 %"
    assert record.metrics == {"published": 0.0}
    assert registry.models == registry.versions == registry.artifacts == []
    decision = json.loads(record.file(DECISION).read_text())
    assert decision["published"] is False and decision["version"] is None
    assert record.file(PAGE).read_text().startswith("**Not published: WER 50.00 % is above")


def test_model_at_the_limit_passes(registry, trained, recipe_with, tmp_path):
    model, scores = trained("even", wrong=1)
    publish(recipe_with(gate__max_wer=50.0), model, scores, str(tmp_path / "out"))
    assert len(registry.versions) == 1


def test_a_model_that_is_published_twice_has_one_version(registry, trained, recipe_with, tmp_path):
    model, scores = trained("good", wrong=10)
    first = publish(recipe_with(**BETTER), model, scores, str(tmp_path / "one"), run="1")
    posts = [r for r in registry.requests if r.startswith("POST")]
    for output in ("one", "two"):
        again = publish(recipe_with(**BETTER), model, scores, str(tmp_path / output), run="2")
        assert again.facts["version"] == first.facts["version"] and again.facts["published"]
    assert [r for r in registry.requests if r.startswith("POST")] == posts
    assert len(registry.models) == len(registry.versions) == len(registry.artifacts) == 1


@pytest.mark.slow
def test_only_a_significantly_better_model_replaces_the_registered_one(
    registry, trained, recipe_with, tmp_path
):
    def summary_of(name, wrong):
        return publish(
            recipe_with(**BETTER), *trained(name, wrong), str(tmp_path / name / "published")
        ).summary

    assert summary_of("first", 3).startswith("published as version ")
    first = registry.versions[0].name
    # A lower rate that may be chance is not enough, and a higher rate is refused too.
    assert summary_of("similar", 4) == (
        f"not published: 12.50 % is not significantly better than 16.67 % of the registered version {first} "
        "(p = 0.422)"
    )
    assert "is not significantly better than 16.67 %" in summary_of("worse", 1)
    better = summary_of("better", 30)
    assert (
        f"1.67 % is significantly better than 16.67 % of the registered version {first} (p < 0.001)" in better
    )
    assert len(registry.versions) == 2
    # Models are compared with the newest version that is not archived.
    assert f"than 1.67 % of the registered version {registry.versions[1].name} " in summary_of("late", 3)
    registry.versions[1].state = ModelVersionState.ARCHIVED
    assert f"of the registered version {first} " in summary_of("later", 3)


def test_newest_version_that_is_not_archived_is_found_on_any_page(registry):
    opened = connection.open_registry("kubeflow", "many")
    assert opened.newest() is None
    for number in range(5):
        opened.register(f"v{number}", "s3://b/m", "", {"scores": f"s3://b/{number}"})
    assert opened.newest() == Version("v4", "s3://b/4")
    for version in registry.versions[1:]:
        version.state = ModelVersionState.ARCHIVED
    assert opened.newest() == Version("v0", "s3://b/0")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("none", "does not name its scores"),
        ("gone", "the model cannot be compared with the registered version v1: /nowhere contains no"),
        ("other", "the registered version v1 was measured on other utterances (30 are the same)"),
    ],
)
def test_model_that_cannot_be_compared_is_not_published(
    change, reason, registry, trained, recipe_with, tmp_path
):
    scores = {"none": "", "gone": "/nowhere", "other": trained("other", 2, utterances=30)[1]}[change]
    connection.open_registry("kubeflow", "demo").register("v1", "s3://b/m", "", {"scores": scores})
    record = publish(recipe_with(**BETTER), *trained("new", wrong=30), str(tmp_path / "out"))
    assert record.summary.startswith("not published: ") and reason in record.summary
    assert len(registry.versions) == 1


def test_version_without_its_artifact_is_completed(registry, trained, recipe_with, tmp_path):
    model, scores = trained("good", wrong=10)
    registry.fails_at = "/artifacts"
    with pytest.raises(ClusterError, match=r"reports an error of its own \(500 .*run the same command again"):
        publish(recipe_with(), model, scores, str(tmp_path / "out"))
    assert (len(registry.versions), len(registry.artifacts)) == (1, 0)
    registry.fails_at = ""
    publish(recipe_with(), model, scores, str(tmp_path / "out"))
    assert (len(registry.versions), len(registry.artifacts)) == (1, 1)
    assert registry.artifacts[0][1].uri == model


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (401, r"refuses access \(401 .*put a valid token into MODEL_REGISTRY_TOKEN"),
        (403, r"refuses access \(403 "),
        (503, r"reports an error of its own \(503 "),
        ("html", "does not answer like a Model Registry .*: check MODEL_REGISTRY_URL"),
        ("api", r"does not know the requests of the client model-registry 0\.3\.\d+ \(404\)"),
        ("down", r"does not answer \(.*\): start it, or check MODEL_REGISTRY_URL"),
    ],
)
def test_a_fault_of_the_registry_is_reported_in_one_sentence_before_anything_is_read(
    fault, sentence, registry, recipe_with, tmp_path, monkeypatch, capsys
):
    if fault == "api":
        registry.versions_of_api = ("v9",)
    elif fault == "down":
        monkeypatch.setenv("MODEL_REGISTRY_URL", "http://127.0.0.1:9")
    else:
        registry.faults = [fault]
    with pytest.raises(ClusterError, match=f"^The Model Registry at http://127.0.0.1:.* {sentence}") as error:
        publish(recipe_with(), "no model", "no report", str(tmp_path / "out"))
    assert "\n" not in error.value.args[0] and not (tmp_path / "out").exists()
    assert capsys.readouterr() == ("", "")


def test_a_server_that_accepts_a_connection_but_never_answers_is_reported(recipe_with, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(kubeflow_registry, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MODEL_REGISTRY_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"does not answer \(no answer in time\): start it"):
            check_registry(recipe_with(), str(tmp_path / "out"))


def test_the_token_comes_from_the_environment_and_is_never_shown(
    registry, trained, recipe_with, tmp_path, monkeypatch, capsys
):
    registry.token = TOKEN
    with pytest.raises(ClusterError, match="refuses access"):
        check_registry(recipe_with(), str(tmp_path / "checked"))
    monkeypatch.setenv("MODEL_REGISTRY_TOKEN", TOKEN)
    assert check_registry(recipe_with(), str(tmp_path / "checked")).summary.endswith(": no version yet")
    record = publish(recipe_with(), *trained("good", wrong=10), str(tmp_path / "out"))
    assert check_registry(recipe_with(), str(tmp_path / "checked")).summary.endswith(
        f": newest version {registry.versions[0].name}"
    )
    written = "".join(f.read_text() for f in (tmp_path / "out").iterdir()) + "".join(capsys.readouterr())
    assert record.facts["published"] and TOKEN not in written


@pytest.mark.parametrize("address", ["", "registry:8080", "http://host/api", "http://user:pw@host"])
def test_address_that_the_client_cannot_use_is_refused(address, recipe_with, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_REGISTRY_URL", address)
    with pytest.raises(
        ConfigurationError, match=r"MODEL_REGISTRY_URL is .*: set it to the registry's address"
    ):
        check_registry(recipe_with(), str(tmp_path / "out"))


def test_registry_whose_package_is_not_installed_is_refused(recipe_with, tmp_path, monkeypatch):
    monkeypatch.setattr(connection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'slam-asr\[registry\]'"):
        check_registry(recipe_with(), str(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match="pip install 'mlflow-skinny'"):
        check_registry(recipe_with(publish__registry="mlflow"), str(tmp_path / "out"))


def test_report_of_another_model_and_a_folder_without_a_model_are_refused(
    registry, trained, recipe_with, tmp_path
):
    (model, scores), (_, others) = trained("a", wrong=10), trained("bb", wrong=10)
    with pytest.raises(InputError, match="is the report of another model than"):
        publish(recipe_with(), model, others, str(tmp_path / "out"))
    for damaged in (None, "{", '{"model_type": "slam_asr"}'):
        folder = scores if damaged is None else model
        if damaged:
            (tmp_path / "a" / "model" / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="holds no model folder with a record"):
            publish(recipe_with(), folder, scores, str(tmp_path / "out"))
    assert registry.versions == []


@pytest.mark.slow
def test_command_takes_the_model_first_and_the_models_recipe_by_default(registry, trained, tmp_path):
    model, scores = trained("good", wrong=10)
    output = ("--report", scores, "--output", str(tmp_path / "out"), "--publish.registry", "kubeflow")
    record = cli.run("publish", [model, *output, "--publish.name", "by hand", "--gate.max_wer", "1"])
    assert record.summary == "not published: WER 5.00 % is above gate.max_wer 1 %"
    record = cli.run("publish", [model, *output, "--publish.name", "by hand", "--overwrite", "true"])
    assert record.facts["published"] and [m.name for m in registry.models] == ["by hand"]
    with pytest.raises(UserError, match=r"--training\.seed has no effect on a model"):
        cli.run("publish", [model, *output, "--training.seed", "3"])
    with pytest.raises(ConfigurationError, match=r"publish\.registry is none"):
        cli.run("publish", [model, *output[:4]])
