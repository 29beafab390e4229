"""Compiled pipelines are reproducible and consistent, and contain all settings of the cluster profile.

After an intended change of a component or pipeline, write the golden files again and read the difference:

    .venv/bin/python -m tests.pipelines.test_compile && git diff tests/pipelines/golden
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from google.protobuf import json_format
from kfp import dsl
from kfp.compiler import Compiler
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import ComponentSpec, PipelineSpec

from components import images
from docs.dashboard_graph import draw
from pipelines import cli
from pipelines.cluster import Cluster, load_cluster, shipped_clusters
from pipelines.compile import compile_package
from pipelines.package_check import PackageDefect, check_package, read_package
from pipelines.placement import REGISTRY_KEYS, place
from pipelines.quantities import size_in_bytes
from pipelines.run_request import RunRequest
from slam_asr import __version__
from slam_asr.config.recipe import load_recipe
from slam_asr.steps import EVALUATION, OWN_IMAGE, PUBLISHING, STEPS, SWEEP, TRAINING, outputs_of
from slam_asr.trainjob.placement import Placement

CHECKOUT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
IMAGES = images("slam-asr/{stage}:{version}")
RESULTS = outputs_of(TRAINING)


def compile_to(output: Path, *options: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pipelines", "compile", *options, "--output", str(output)],
        cwd=CHECKOUT,
        env=os.environ | environment,
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compile_to(folder)
    return folder


@pytest.fixture
def error_of(capsys):
    """Run a command that must fail; return its one-line error."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(argv)
        assert exit_info.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        return lines[0].removeprefix("slam-asr: error: ")

    return run


def spec_of(path: Path) -> PipelineSpec:
    return json_format.ParseDict(next(yaml.safe_load_all(path.read_text(encoding="utf-8"))), PipelineSpec())


def images_of(spec: PipelineSpec) -> dict[str, str]:
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    return {
        name.removeprefix("exec-"): executor["container"]["image"] for name, executor in executors.items()
    }


@pytest.mark.slow
def test_same_source_gives_same_bytes(compiled, tmp_path):
    compile_to(tmp_path, PYTHONHASHSEED="7")
    names = sorted(str(f.relative_to(compiled)) for f in compiled.rglob("*.yaml"))
    assert names == sorted(
        ["slam-asr.yaml", "slam-asr.resources.yaml", *(f"components/{stage}.yaml" for stage in STEPS)]
    )
    for name in names:
        assert (tmp_path / name).read_bytes() == (compiled / name).read_bytes(), name


def test_training_pipeline_runs_every_step_in_its_image(compiled):
    assert images_of(spec_of(compiled / "slam-asr.yaml")) == {step: IMAGES[step] for step in RESULTS}


def test_evaluation_pipeline_opens_the_model_first_and_trains_nothing():
    spec = spec_of(GOLDEN / "evaluate.yaml")
    assert images_of(spec) == {step: IMAGES[step] for step in outputs_of(EVALUATION)}
    tasks = spec.root.dag.tasks
    assert {name: sorted(task.dependent_tasks) for name, task in tasks.items()} == {
        "open-model": [],
        "build-manifest": ["open-model"],
        "for-loop-1": ["build-manifest"],
        "for-loop-2": ["build-manifest", "for-loop-1", "open-model"],
        "score": ["for-loop-2", "open-model"],
    }
    defaults = {
        name: json_format.MessageToDict(p.default_value)
        for name, p in spec.root.input_definitions.parameters.items()
    }
    resolved = load_recipe(defaults["recipe"], defaults["recipe_overrides"])
    assert (resolved.data.train, resolved.data.dev, resolved.data.test) == (
        [],
        [],
        load_recipe("demo").data.test,
    )


def test_publishing_pipeline_tries_the_registry_first_and_publishes_last():
    spec = spec_of(GOLDEN / "publish.yaml")
    assert spec.pipeline_info.name == PUBLISHING
    assert images_of(spec) == {step: IMAGES[step] for step in outputs_of(PUBLISHING)}
    training, publishing = (
        {name: sorted(task.dependent_tasks) for name, task in graph.root.dag.tasks.items()}
        for graph in (spec_of(GOLDEN / "cpu.yaml"), spec)
    )
    assert publishing == training | {
        "open-registry": [],
        "build-manifest": ["open-registry"],
        "publish": ["convert-checkpoint", "score"],
    }
    tasks = spec.root.dag.tasks
    assert not tasks["publish"].caching_options.enable_cache
    run = tasks["publish"].inputs.parameters["run"].runtime_value.constant.string_value
    assert run == dsl.PIPELINE_JOB_ID_PLACEHOLDER


def test_only_the_steps_that_publish_get_the_secret_of_the_registry(tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("registry: {secret: registry-token}\nenvironment: {MODEL_REGISTRY_URL: http://r:8080}")
    recipe = load_recipe("demo", {"publish.registry": "kubeflow"})
    package = compile_package(load_cluster(str(profile)), tmp_path / "p.yaml", request=RunRequest(recipe))
    spec, settings = read_package(package)
    secrets = {
        label.removeprefix("exec-"): [
            (secret.secret_name, [pair.env_var for pair in secret.key_to_env], secret.optional)
            for secret in pod.secret_as_env
        ]
        for label, pod in settings.items()
    }
    expected = [("registry-token", list(REGISTRY_KEYS), True)]
    assert secrets == {name: [] for name in outputs_of(PUBLISHING)} | {
        "open-registry": expected,
        "publish": expected,
    }
    container = spec.deployment_spec["executors"]["exec-publish"]["container"]
    assert {"name": "MODEL_REGISTRY_URL", "value": "http://r:8080"} in [dict(e) for e in container["env"]]


def test_sweep_has_one_manifest_one_extraction_and_a_loop_of_trainings():
    spec = spec_of(GOLDEN / "sweep.yaml")
    assert images_of(spec) == {step: IMAGES[step] for step in outputs_of(SWEEP)}
    tasks = spec.root.dag.tasks
    assert {name: sorted(task.dependent_tasks) for name, task in tasks.items()} == {
        "plan-sweep": [],
        "build-manifest": ["plan-sweep"],
        "for-loop-1": ["build-manifest"],
        "for-loop-2": ["build-manifest", "for-loop-1", "plan-sweep"],
        "compare-runs": ["for-loop-2", "plan-sweep"],
    }
    assert tasks["for-loop-2"].iterator_policy.parallelism_limit == 2
    inside = spec.components["comp-for-loop-2"].dag.tasks
    assert sorted(inside) == ["convert-checkpoint", "for-loop-3", "score", "train", "vary-recipe"]
    # The artifact `varied_manifests` also carries the recipe of the variation to the steps in the loop.
    for name, key in (
        ("train", "manifests"),
        ("for-loop-3", "pipelinechannel--vary-recipe-varied_manifests"),
    ):
        read = inside[name].inputs.artifacts[key].task_output_artifact
        assert (read.producer_task, read.output_artifact_key) == ("vary-recipe", "varied_manifests")
    variations = json_format.MessageToDict(spec.root.input_definitions.parameters["variations"].default_value)
    assert [variation["name"] for variation in variations] == ["as it is", "slow", "fast"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--sweep", "demo/sweep.yaml", "--model", "s3://speech/m"], "both given"),
        (["--parallel", "2"], "requires --sweep"),
        (
            ["--sweep", "/no/such.yaml"],
            "The variations /no/such.yaml cannot be read (No such file or directory): check --sweep.",
        ),
    ],
)
def test_impossible_sweep_is_rejected_in_one_sentence(options, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compile", "demo", *options, "--output", str(tmp_path / "pipeline.yaml")])
    assert exit_info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", STEPS)
def test_each_component_compiles_by_itself(compiled, stage):
    spec = spec_of(compiled / "components" / f"{stage}.yaml")
    assert images_of(spec) == {stage: IMAGES[stage]}


def test_steps_of_the_training_pipeline_form_a_chain(compiled):
    tasks = spec_of(compiled / "slam-asr.yaml").root.dag.tasks
    assert {name: sorted(task.dependent_tasks) for name, task in tasks.items()} == {
        "build-manifest": [],
        "for-loop-1": ["build-manifest"],
        "train": ["build-manifest", "for-loop-1"],
        "convert-checkpoint": ["train"],
        "for-loop-2": ["build-manifest", "convert-checkpoint"],
        "score": ["convert-checkpoint", "for-loop-2"],
    }
    loops = {
        "for-loop-1": ("build-manifest", "extract-features"),
        "for-loop-2": ("convert-checkpoint", "decode"),
    }
    for loop, (before, inside) in loops.items():
        assert tasks[loop].parameter_iterator.items.input_parameter.endswith(f"{before}-Output")
        assert list(spec_of(compiled / "slam-asr.yaml").components[f"comp-{loop}"].dag.tasks) == [inside]
        del tasks[loop]
    assert [name for name, task in tasks.items() if task.caching_options.enable_cache] == []


def graphs_of(spec: PipelineSpec) -> dict[str, ComponentSpec]:
    """Return the layers of a pipeline's graph in the dashboard: the pipeline itself and its loops."""
    return {"root": spec.root} | {name: c for name, c in spec.components.items() if c.HasField("dag")}


def test_only_one_artifact_of_build_manifest_is_read_by_other_steps(compiled):
    tasks = spec_of(compiled / "slam-asr.yaml").root.dag.tasks
    read = {
        (source.task_output_artifact.producer_task, source.task_output_artifact.output_artifact_key): []
        for task in tasks.values()
        for source in task.inputs.artifacts.values()
    }
    for name, task in tasks.items():
        for source in task.inputs.artifacts.values():
            produced = source.task_output_artifact
            read[produced.producer_task, produced.output_artifact_key].append(name)
    assert {pair: sorted(readers) for pair, readers in read.items()} == {
        ("build-manifest", "manifests"): ["for-loop-1", "for-loop-2", "train"],
        ("for-loop-1", "pipelinechannel--extract-features-features"): ["train"],
        ("train", "checkpoint"): ["convert-checkpoint"],
        ("convert-checkpoint", "model"): ["for-loop-2", "score"],
        ("for-loop-2", "pipelinechannel--decode-hypotheses"): ["score"],
    }


@pytest.mark.parametrize("name", ["one-gpu-node", "publish", "evaluate", "sweep"])
def test_graph_in_the_dashboard_has_the_names_of_the_steps(name):
    spec = spec_of(GOLDEN / f"{name}.yaml")
    for graph in graphs_of(spec).values():
        artifacts: list[str] = []
        for key, task in graph.dag.tasks.items():
            component = spec.components[task.component_ref.name]
            expected = key
            if component.HasField("dag"):
                # A loop around one step has the name of that step.
                inside = list(component.dag.tasks)
                expected = inside[0] if len(inside) == 1 else "variations"
            else:
                artifacts += component.output_definitions.artifacts
            assert task.task_info.name == expected
        # The dashboard labels an artifact with its name alone, so two with the same name would look alike.
        assert "metrics" not in artifacts and len(set(artifacts)) == len(artifacts)


def test_picture_for_the_docs_shows_every_task_and_artifact():
    picture = ElementTree.fromstring(draw(GOLDEN / "one-gpu-node.yaml"))
    labels = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [label for label in labels if label in STEPS] == list(RESULTS)
    shown = {
        "manifests": "train extract-features decode",
        "statistics": "",
        "corpus_metrics": "",
        "features": "train",
        "checkpoint": "convert-checkpoint",
        "curves": "",
        "training_metrics": "",
        "model": "decode score",
        "model_metrics": "",
        "hypotheses": "score",
        "scores": "",
        "report": "",
        "summary": "",
        "word_error_rates": "",
    }
    assert sorted(label for label in labels if label not in STEPS) == sorted(shown)
    # One edge leads to each artifact, one from each artifact to each of its readers, and one to each task
    # from every task for which it waits.
    waits = sum(
        len(task.dependent_tasks) for task in spec_of(GOLDEN / "one-gpu-node.yaml").root.dag.tasks.values()
    )
    edges = [path for path in picture.iter("{http://www.w3.org/2000/svg}path") if path.get("class") == "edge"]
    assert len(edges) == len(shown) + sum(len(readers.split()) for readers in shown.values()) + waits


def test_demo_starts_eleven_drivers(compiled):
    # Kubeflow starts a driver pod for the pipeline, for each task, and for each iteration of a loop. A driver
    # takes about ten seconds. The demo has one work shard, so each of its loops has one iteration.
    spec = spec_of(compiled / "slam-asr.yaml")
    graphs = graphs_of(spec)
    assert sum(len(graph.dag.tasks) + 1 for graph in graphs.values()) == 11
    steps = {name for graph in graphs.values() for name in graph.dag.tasks if not name.startswith("for-loop")}
    assert steps == set(RESULTS)


def test_compile_first_says_which_backend_the_pipeline_needs(tmp_path, capsys):
    assert cli.main(["compile", "--output", str(tmp_path / "p.yaml")]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "needs Kubeflow Pipelines 2.16 or later: earlier ones do not know the security"
    )
    # The paths alone are on stdout, for scripts.
    assert printed.out == f"{tmp_path / 'p.yaml'}\n"
    executors = read_package(tmp_path / "p.yaml")[1].values()
    assert all(settings.HasField("security_context") for settings in executors)


def test_all_inputs_and_parameters_have_a_description(compiled):
    spec = spec_of(compiled / "slam-asr.yaml")
    # The inputs of a loop are generated by kfp; those of the steps in it are checked like all others.
    steps = [
        (name, component) for name, component in spec.components.items() if not component.HasField("dag")
    ]
    for name, component in [("pipeline", spec.root), *steps]:
        inputs = component.input_definitions
        for kind in (inputs.parameters, inputs.artifacts):
            assert [key for key, value in kind.items() if not value.description] == [], name


@pytest.mark.slow
def test_option_and_variable_set_the_images_at_compile_time(tmp_path):
    template = "registry.example/team/{stage}:{version}-gpu"
    expected = images(template)
    assert expected["train"] == f"registry.example/team/train:{__version__}-gpu" and all(
        expected[name] == expected[step.image] for name, step in STEPS.items() if step.image
    )
    compile_to(tmp_path / "by-option.yaml", "--images", template)
    compile_to(tmp_path / "by-variable.yaml", SLAM_ASR_IMAGES=template)
    assert images_of(spec_of(tmp_path / "by-option.yaml")) == {step: expected[step] for step in RESULTS}
    assert images_of(spec_of(tmp_path / "by-variable.yaml")) == {step: expected[step] for step in RESULTS}


GOLDEN_OPTIONS = {
    **{name: ["--cluster", name] for name in shipped_clusters()},
    "two-nodes": ["demo", "--cluster", "several-nodes", "--training.nodes", "2"],
    "evaluate": ["demo", "--model", "s3://speech/models/demo", "--cluster", "one-gpu-node"],
    "sweep": ["demo", "--sweep", "demo/sweep.yaml", "--parallel", "2", "--cluster", "one-gpu-node"],
    "publish": ["demo", "--publish.registry", "kubeflow", "--gate.max_wer", "25", "--cluster", "cpu"],
}
"""Options of `compile` for each golden file."""


def write_golden_files() -> None:
    for name, options in GOLDEN_OPTIONS.items():
        compile_to(GOLDEN / f"{name}.yaml", *options)
    with tempfile.TemporaryDirectory() as folder:
        compile_to(Path(folder))
        for path in Path(folder, "components").iterdir():
            shutil.copyfile(path, GOLDEN / "components" / path.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN_OPTIONS)
def test_compiled_pipeline_matches_its_golden_file(name, tmp_path):
    assert cli.main(["compile", *GOLDEN_OPTIONS[name], "--output", str(tmp_path / "pipeline.yaml")]) == 0
    assert (tmp_path / "pipeline.yaml").read_text() == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("stage", STEPS)
def test_compiled_component_matches_its_golden_file(compiled, stage):
    assert (compiled / "components" / f"{stage}.yaml").read_text() == (
        GOLDEN / "components" / f"{stage}.yaml"
    ).read_text()


EVERYTHING = """
namespace: team
service_account: runner
environment: {HTTPS_PROXY: "http://proxy:3128"}
images: {names: "registry.example/team/{stage}:7", pull_policy: Always, pull_secrets: [pull]}
storage: {store: "s3://bucket/s", secret: bucket-secret, endpoint: "http://seaweed:8333", region: somewhere}
models: {claim: model-claim, token_secret: hub, offline: true}
queue: {name: research, priority: high}
steps:
  train:
    {cpu: 500m, memory: 64Gi, gpus: 4, gpu_resource: example.com/gpu, shared_memory: 8Gi, scratch: 30Gi,
     node_selector: {disk: fast}, tolerations: [{key: gpu, value: "yes", effect: NoSchedule}],
     retries: 5, retry_after: 2m, timeout_hours: 1.5, labels: {team: speech}, annotations: {note: hello}}
"""


@pytest.fixture(scope="module")
def with_every_setting(tmp_path_factory) -> tuple[PipelineSpec, dict[str, KubernetesExecutorConfig]]:
    """Compile the training pipeline for a profile that sets nearly every key of the step `train`.

    The exceptions are `cpu_limit`, which has a test of its own, and `gpus_per_node`, which is only a check.
    """
    folder = tmp_path_factory.mktemp("everything")
    (folder / "everything.yaml").write_text(EVERYTHING)
    cluster = load_cluster(str(folder / "everything.yaml"))
    return read_package(compile_package(cluster, folder / "p.yaml", defaults={"store": "s3://bucket/s"}))


@pytest.mark.slow
def test_every_setting_for_container_and_retries_reaches_the_task(with_every_setting):
    spec, _ = with_every_setting
    container = json_format.MessageToDict(spec.deployment_spec)["executors"]["exec-train"]["container"]
    assert container["image"] == "registry.example/team/train:7"
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "SLAM_ASR_CACHE": "/var/cache/slam-asr",
        "AWS_ENDPOINT_URL": "http://seaweed:8333",
        "AWS_REGION": "somewhere",
        "HF_HUB_OFFLINE": "1",
        "HTTPS_PROXY": "http://proxy:3128",
    }
    resources = container["resources"]
    assert (resources["resourceCpuRequest"], resources["resourceCpuLimit"]) == ("500m", "500m")
    assert (resources["resourceMemoryRequest"], resources["resourceMemoryLimit"]) == ("64Gi", "64Gi")
    assert resources["accelerator"]["resourceType"] == "example.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "4"
    task = spec.root.dag.tasks["train"]
    retry = json_format.MessageToDict(task.retry_policy)
    assert retry == {
        "maxRetryCount": 5,
        "backoffDuration": "120s",
        "backoffFactor": 2.0,
        # Six attempts of 1.5 hours, and waits of 2, 4, 8, 16 and 32 minutes.
        "backoffMaxDuration": f"{6 * 5400 + 62 * 60}s",
    }
    assert not task.caching_options.enable_cache


@pytest.mark.slow
def test_every_setting_for_the_pod_reaches_the_task(with_every_setting):
    settings = json_format.MessageToDict(with_every_setting[1]["exec-train"])
    assert settings["emptyDirMounts"] == [
        {"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "8Gi"},
        {"volumeName": "scratch", "mountPath": "/var/cache/slam-asr", "sizeLimit": "30Gi"},
    ]
    assert settings["nodeSelector"] == {"labels": {"disk": "fast"}}
    assert settings["tolerations"] == [
        {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    ]
    assert settings["activeDeadlineSeconds"] == "5400"
    assert settings["imagePullPolicy"] == "Always"
    assert [s["secretName"] for s in settings["imagePullSecret"]] == ["pull"]
    assert settings["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
    assert [(s["secretName"], s["mountPath"]) for s in settings["secretAsVolume"]] == [
        ("bucket-secret", "/var/run/secrets/slam-asr/s3")
    ]
    assert [(s["secretName"], s["keyToEnv"][0]["envVar"]) for s in settings["secretAsEnv"]] == [
        ("hub", "HF_TOKEN")
    ]
    assert [m["mountPath"] for m in settings["pvcMount"]] == ["/var/cache/slam-asr/models"]
    assert settings["podMetadata"]["annotations"] == {"note": "hello"}
    labels = settings["podMetadata"]["labels"]
    assert (
        labels.items()
        >= {
            "kueue.x-k8s.io/queue-name": "research",
            "kueue.x-k8s.io/priority-class": "high",
            "team": "speech",
        }.items()
    )


def test_every_step_has_resources_retries_a_time_limit_and_the_secret(compiled):
    spec, settings = read_package(compiled / "slam-asr.yaml")
    executors = json_format.MessageToDict(spec.deployment_spec)["executors"]
    loops = [c.dag.tasks for c in spec.components.values() if c.HasField("dag")]
    tasks = {
        name: task
        for dag in (spec.root.dag.tasks, *loops)
        for name, task in dag.items()
        if not name.startswith("for-loop")
    }
    assert sorted(tasks) == sorted(RESULTS)
    for stage in RESULTS:
        assert tasks[stage].retry_policy.max_retry_count > 0
        assert not tasks[stage].caching_options.enable_cache
        assert settings[f"exec-{stage}"].active_deadline_seconds > 0
        assert settings[f"exec-{stage}"].security_context.run_as_non_root
        assert [s.secret_name for s in settings[f"exec-{stage}"].secret_as_volume] == ["slam-asr-s3"]
        assert "resourceMemoryLimit" in executors[f"exec-{stage}"]["container"]["resources"]
    gpus = {s for s in RESULTS if "accelerator" in executors[f"exec-{s}"]["container"]["resources"]}
    assert gpus == {"extract-features", "train", "decode"}


@pytest.mark.parametrize(
    ("steps", "by_trainjob", "resources", "timeout"),
    [
        ("{cpu: '8'}", False, ("8", "8", "8Gi", "8Gi"), 24),
        ("{cpu: '8', cpu_limit: '12'}", False, ("8", "12", "8Gi", "8Gi"), 24),
        ("{cpu: '8', cpu_limit: none}", False, ("8", None, "8Gi", "8Gi"), 24),
        # This step only watches a TrainJob, whose time limit is trainer.timeout_hours.
        ("{cpu: '8', gpus: 4, timeout_hours: 1}", True, ("100m", "1", "512Mi", "512Mi"), 14 * 24 + 1),
        ("{cpu: '8', cpu_limit: none}", True, ("100m", None, "512Mi", "512Mi"), 14 * 24 + 1),
    ],
)
def test_cpu_limit_and_multi_node_training_determine_the_resources_of_a_step(
    tmp_path, steps, by_trainjob, resources, timeout
):
    (tmp_path / "mine.yaml").write_text(f"steps: {{score: {steps}, train: {steps}}}")
    cluster = load_cluster(str(tmp_path / "mine.yaml"))

    @dsl.pipeline
    def one_step():
        place(cluster, IMAGES, "train", nothing(), by_trainjob)

    Compiler().compile(one_step, str(tmp_path / "one.yaml"))
    spec, settings = read_package(tmp_path / "one.yaml")
    [executor] = json_format.MessageToDict(spec.deployment_spec)["executors"].values()
    keys = ("resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit")
    assert tuple(executor["container"]["resources"].get(key) for key in keys) == resources
    assert settings["exec-nothing"].active_deadline_seconds == timeout * 3600
    limit = json_format.MessageToDict(spec.root.dag.tasks["nothing"].retry_policy)["backoffMaxDuration"]
    # Four attempts, and waits of 30, 60 and 120 seconds.
    assert limit == f"{4 * timeout * 3600 + 210}s"


@dsl.component(base_image="x", install_kfp_package=False)
def nothing():
    pass


@pytest.mark.slow
def test_multi_node_training_gives_the_gpus_to_its_nodes(tmp_path):
    cluster = load_cluster("several-nodes")
    spec, settings = read_package(
        compile_package(
            cluster, tmp_path / "p.yaml", request=RunRequest(load_recipe("demo", {"training.nodes": 2}))
        )
    )
    assert (
        "accelerator"
        not in json_format.MessageToDict(spec.deployment_spec)["executors"]["exec-train"]["container"][
            "resources"
        ]
    )
    assert "kueue.x-k8s.io/queue-name" not in settings["exec-train"].pod_metadata.labels
    trainjob = json.loads(
        spec.root.dag.tasks["train"].inputs.parameters["trainjob"].runtime_value.constant.string_value
    )
    placement = Placement(**trainjob)
    assert placement.resources == {"cpu": "64", "memory": "384Gi", "nvidia.com/gpu": "8"}
    assert placement.labels["kueue.x-k8s.io/queue-name"] == "slam-asr"
    assert (placement.image, placement.storage_secret) == (
        f"slam-asr/train:{__version__}",
        "mlpipeline-minio-artifact",
    )
    one, _ = read_package(compile_package(cluster, tmp_path / "one.yaml"))
    assert one.root.dag.tasks["train"].inputs.parameters["trainjob"].runtime_value.constant.string_value == ""


@pytest.mark.slow
def test_parameters_reproduce_the_recipe(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text('name: own\nllm: {name: x/y, prompt: "a {b}\\n c"}\ntraining: {max_steps: 7}')
    for source, changes in (("demo", ["--training.max_steps", "7"]), (str(own), [])):
        package = tmp_path / "pipeline.yaml"
        cli.main(["compile", source, *changes, "--output", str(package), "--corpus", "s3://b/c"])
        parameters = spec_of(package).root.input_definitions.parameters
        defaults = {name: json_format.MessageToDict(p.default_value) for name, p in parameters.items()}
        assert defaults["corpus"] == "s3://b/c"
        expected = load_recipe(source, {"training.max_steps": 7})
        assert load_recipe(defaults["recipe"], defaults["recipe_overrides"]) == expected


@pytest.mark.slow
def test_image_list_sets_the_images(tmp_path):
    digests = {stage: f"registry.example/{stage}@sha256:{'0' * 64}" for stage in OWN_IMAGE}
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(digests))
    cli.main(["compile", "--images", str(tmp_path / "images.yaml"), "--output", str(tmp_path / "all")])
    assert images_of(spec_of(tmp_path / "all" / "slam-asr.yaml")) == {
        step: digests[STEPS[step].image or step] for step in RESULTS
    }
    assert images_of(spec_of(tmp_path / "all" / "components" / "train.yaml")) == {"train": digests["train"]}


def test_kubernetes_resources_contain_the_same_pipeline(compiled):
    pipeline, version = yaml.safe_load_all((compiled / "slam-asr.resources.yaml").read_text())
    spec, platform = yaml.safe_load_all((compiled / "slam-asr.yaml").read_text())
    assert (pipeline["apiVersion"], pipeline["kind"]) == ("pipelines.kubeflow.org/v2beta1", "Pipeline")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "slam-asr"
    assert version["spec"]["pipelineSpec"] == spec
    assert version["spec"]["platformSpec"] == platform


@pytest.mark.parametrize(
    ("change", "defect"),
    [
        ("producerTask: train", "convert-checkpoint.checkpoint comes from trian, which does not exist"),
        (
            "outputArtifactKey: checkpoint",
            "convert-checkpoint.checkpoint comes from train's output trian, which does not exist",
        ),
        (
            "componentInputParameter: corpus",
            "build-manifest.corpus comes from trian, which is not among the graph's inputs",
        ),
        ("name: comp-decode", "decode uses the component trian, which does not exist"),
        ("image: slam-asr/decode:", "exec-decode runs in trian"),
        (
            "exec-convert-checkpoint:\n          activeDeadline",
            "exec-convert-checkpoint has no Kubernetes settings",
        ),
    ],
)
def test_inconsistent_pipeline_is_rejected(compiled, tmp_path, change, defect):
    text = (compiled / "slam-asr.yaml").read_text()
    assert change in text
    key, _, rest = change.partition(": ")
    broken = text.replace(change, f"{key}: trian" if rest else change.replace("exec-", "exec-un"))
    (tmp_path / "broken.yaml").write_text(broken)
    with pytest.raises(PackageDefect) as error:
        check_package(tmp_path / "broken.yaml", IMAGES)
    assert defect in str(error.value)
    check_package(compiled / "slam-asr.yaml", IMAGES)


@pytest.mark.parametrize("change", ["executorLabel: exec-train", "activeDeadlineSeconds"])
def test_unknown_key_is_rejected(compiled, tmp_path, change):
    (tmp_path / "broken.yaml").write_text(
        (compiled / "slam-asr.yaml").read_text().replace(change, f"un{change}")
    )
    with pytest.raises(PackageDefect, match="no field named"):
        check_package(tmp_path / "broken.yaml", IMAGES)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--cluster", "one-gpu-nod"],
            "No cluster profile named one-gpu-nod, and no such file; did you mean one-gpu-node?",
        ),
        (
            ["--images", "/no/such.yaml"],
            "The image list /no/such.yaml cannot be read (No such file or directory): "
            "`make images` writes one.",
        ),
        (
            ["--images", "Registry/{stage} x"],
            "'Registry/build-manifest x' cannot be the image of build-manifest",
        ),
        (
            ["--corpus", "/data"],
            "--corpus is /data, a path on this machine, which the cluster's pods cannot read",
        ),
        (["--store", "runs"], "--store is runs, a path on this machine"),
        (
            ["demo", "--training.processes", "9"],
            "Recipe demo: training.processes is 9, "
            "but the cluster one-gpu-node gives each pod of train 8 GPUs",
        ),
        (
            ["demo", "--features.processes", "9"],
            "Recipe demo: features.processes is 9, "
            "but the cluster one-gpu-node gives each pod of extract-features 8 GPUs (steps.extract_features",
        ),
        (
            ["demo", "--decoding.processes", "9"],
            "Recipe demo: decoding.processes is 9, "
            "but the cluster one-gpu-node gives each pod of decode 1 GPU (steps.decode.gpus)",
        ),
        (["demi"], "No recipe named demi, and no such file; did you mean demo?"),
    ],
)
def test_what_cannot_run_is_rejected_at_compile_time(error_of, tmp_path, argv, sentence):
    assert error_of("compile", *argv, "--output", str(tmp_path / "out")).startswith(sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        ("namespaces: x", "Cluster {}: unknown key namespaces; did you mean namespace?"),
        (
            "steps: {train: {gpu: 1}}",
            "Cluster {}: unknown key steps.train.gpu; did you mean steps.train.gpus?",
        ),
        (
            "steps: {train: {gpus: 9, gpus_per_node: 8}}",
            "Cluster mine: steps.train.gpus is 9, but a node has 8",
        ),
        (
            "steps: {train: {gpus: many}}",
            "Cluster {}: steps.train.gpus: Expected a whole number. Got value: many.",
        ),
        (
            "steps: {train: {cpu: 1500m, cpu_limit: '1'}}",
            "Cluster mine: steps.train.cpu_limit is '1' but must be none, or cores such as 2 or 500m, not "
            "fewer than steps.train.cpu (1500m).",
        ),
        (
            "steps: {train: {cpu_limit: unlimited}}",
            "Cluster mine: steps.train.cpu_limit is 'unlimited' but must be none, or cores",
        ),
        (
            "trainer: {timeout_hours: -1}",
            "Cluster mine: trainer.timeout_hours is -1.0 but must be 0 or more.",
        ),
        (
            "steps: {train: {memory: much}}",
            "Cluster mine: steps.train.memory is 'much' but must be a size such as 16Gi.",
        ),
        (
            "steps: {train: {memory: 8Gi, shared_memory: 8Gi}}",
            "Cluster mine: steps.train.shared_memory (8Gi) counts against steps.train.memory (8Gi)",
        ),
        (
            "steps: {train: {tolerations: [{keys: x}]}}",
            "Cluster mine: steps.train.tolerations has an unknown key keys; did you mean key?",
        ),
        (
            "environment: {AWS_SECRET_ACCESS_KEY: x}",
            "Cluster mine: environment.AWS_SECRET_ACCESS_KEY looks like a credential",
        ),
        (
            "storage: {endpoint: 'http://me:word@host'}",
            "Cluster mine: storage.endpoint is 'http://…@host' but must be http://host:port",
        ),
        (
            "on_exit: {format: slack, secret: 'https://hooks.example/T0'}",
            "Cluster mine: on_exit.secret must be a name of letters, digits, dots and dashes: put the "
            "webhook's URL into a secret, and name that secret and its key here.",
        ),
        ("prices: {gpu_hour: -1}", "Cluster mine: prices.gpu_hour is -1.0 but must be 0 or more."),
        ("storage: {store: /data}", "Cluster mine: storage.store is '/data' but must be an s3:// prefix."),
        ("run_as_user: 0", "Cluster mine: run_as_user is 0 but must be above 0: steps do not run as root."),
        ("[]", "Cluster {} must contain keys and values, such as `namespace:`; it contains list."),
        ("", "Cluster {} must contain keys and values, such as `namespace:`; it is empty."),
    ],
)
def test_mistake_in_a_profile_is_one_sentence(error_of, tmp_path, profile, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(profile)
    assert error_of("compile", "--cluster", str(path), "--output", str(tmp_path / "out")).startswith(
        sentence.replace("{}", str(path))
    )


def test_sizes_are_read_in_kubernetes_notation():
    assert [size_in_bytes(s) for s in ("5", "1.5Gi", "2M", "1Ti")] == [5, 1.5 * 2**30, 2e6, 2**40]


def test_profile_requests_no_gpus_by_default():
    assert all(Cluster().steps[stage].gpus == 0 for stage in RESULTS)


def test_retries_are_not_cut_off_by_the_bound_on_their_duration(compiled):
    # Argo gives up on a step once `backoffMaxDuration` has passed since its first start, even with
    # retries left.
    specification, platforms = yaml.safe_load_all((compiled / "slam-asr.yaml").read_text())
    limits = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    components = {"root": specification["root"], **specification["components"]}
    checked = 0
    for component in components.values():
        for task in component.get("dag", {}).get("tasks", {}).values():
            policy, name = task.get("retryPolicy"), task["componentRef"]["name"]
            label = components[name].get("executorLabel")
            if not policy or label is None:
                continue
            attempt = int(limits[label]["activeDeadlineSeconds"])
            retries, wait = policy["maxRetryCount"], int(policy["backoffDuration"][:-1])
            waits = sum(wait * policy["backoffFactor"] ** n for n in range(retries))
            assert int(policy["backoffMaxDuration"][:-1]) >= (retries + 1) * attempt + waits, name
            checked += 1
    assert checked >= 6


if __name__ == "__main__":
    write_golden_files()
