"""doctor --run starts a pod for each kind of step, shows its findings, and reports why one did not start."""

import json

import pytest
import yaml

from pipelines.cluster import load_cluster
from pipelines.kubeflow.check_pipeline import CHECKED, check_pod, write_package
from pipelines.package_check import read_package
from slam_asr import __version__
from slam_asr.stages.check_pod import PodCheck
from slam_asr.steps import STEPS, TRAINING, outputs_of
from slam_asr.version import source_digest
from tests.pipelines.kubeflow.fake_kubernetes import KubernetesHandler, serving

IMAGES = {name: f"registry.example/{STEPS[name].image or name}:1" for name in STEPS}
FAULT = "✗ store s3://bucket/store: s3://bucket/store cannot be written: access is denied."


@pytest.fixture
def doctor(kubeflow, bucket, kubernetes_at, program, tmp_path):
    """Return a function that runs `doctor --run` and returns its exit code and output.

    Its argument `findings` gives the log of each pod, keyed by step.
    """
    profile = tmp_path / "profile.yaml"
    profile.write_text('namespace: team\nstorage: {store: "s3://bucket/store", secret: bucket-secret}\n')

    def run(findings, *options, forbidden=False):
        pods = {
            f"pod-{step}": (
                {"pipeline/runid": "run-1", "app.kubernetes.io/component": step},
                "Succeeded",
                f"time=x level=info msg=x argo=true\n{text}\n",
            )
            for step, text in findings.items()
        }
        with serving(KubernetesHandler, pods=pods, objects={}, forbidden=forbidden) as address:
            kubernetes_at(address)
            code, out, err = program("doctor", "--cluster", str(profile), "--run", "--poll", "0.01", *options)
        assert err == "", err
        return code, out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sandbox", "several-nodes"])
def test_each_kind_of_step_has_a_small_pod_with_its_own_settings(name, tmp_path):
    cluster = load_cluster(name)
    spec, settings = read_package(write_package(cluster, IMAGES, tmp_path / "doctor.yaml", "team"))
    # `run_view` recognises a pipeline by the beginning of the workflow's name. It takes slam-asr-doctor-… for
    # the training pipeline, slam-asr, and lists that pipeline's steps. So both must have the same steps.
    assert set(spec.root.dag.tasks) == set(CHECKED) == set(outputs_of(TRAINING))
    for step in CHECKED:
        executor, pod = spec.deployment_spec["executors"][f"exec-{step}"], settings[f"exec-{step}"]
        resources, profile = executor["container"]["resources"], cluster.steps[step]
        assert executor["container"]["image"] == IMAGES[step]
        assert resources["resourceCpuLimit"] == "200m"
        gpus = resources["accelerator"]["resourceCount"] if "accelerator" in resources else "0"
        assert gpus == ("1" if profile.gpus else "0")
        assert [t.key for t in pod.tolerations] == [t["key"] for t in profile.tolerations]
        assert dict(pod.node_selector.labels) == profile.node_selector
        assert pod.pod_metadata.labels["app.kubernetes.io/component"] == step
        assert [s.secret_name for s in pod.secret_as_volume] == [cluster.storage.secret]
        assert [p.constant for p in pod.pvc_mount] == [cluster.models.claim]
        assert pod.active_deadline_seconds == 600
        [value] = spec.root.dag.tasks[step].inputs.parameters.values()
        assert PodCheck(**json.loads(value.runtime_value.constant.string_value)) == PodCheck(
            step=step,
            namespace="team",
            version=__version__,
            source=source_digest(),
            store=cluster.storage.store,
            secret=cluster.storage.secret,
            claim=cluster.models.claim,
            hub=step not in ("build-manifest", "score"),
            gpus=int(gpus),
        )


@pytest.mark.slow
def test_two_nodes_are_a_trainjob_of_small_pods_that_the_pod_of_train_starts(tmp_path):
    package = write_package(load_cluster("several-nodes"), IMAGES, tmp_path / "doctor.yaml", "team", nodes=2)
    spec, _ = read_package(package)
    [value] = spec.root.dag.tasks["train"].inputs.parameters.values()
    check = PodCheck(**json.loads(value.runtime_value.constant.string_value))
    placement = json.loads(check.trainjob)
    assert (check.nodes, check.gpus) == (2, 1)
    assert placement["resources"] == {"cpu": "200m", "memory": "4Gi", "nvidia.com/gpu": "1"}
    assert placement["image"] == IMAGES["train"] and placement["timeout_hours"] == pytest.approx(1 / 6)
    assert "kueue.x-k8s.io/queue-name" in placement["labels"]
    executors = spec.deployment_spec["executors"]
    assert "accelerator" not in executors["exec-train"]["container"]["resources"]
    assert "accelerator" in executors["exec-decode"]["container"]["resources"]
    [value] = spec.root.dag.tasks["decode"].inputs.parameters.values()
    assert json.loads(value.runtime_value.constant.string_value)["trainjob"] == ""


@pytest.mark.slow
def test_findings_of_each_pod_are_shown_and_change_the_exit_code(doctor, kubeflow):
    fine = "✓ image: was pulled, and has your version of slam_asr\nanother line"
    code, out = doctor(dict.fromkeys(CHECKED, fine) | {"decode": f"{fine}\n{FAULT}"})
    for step in CHECKED:
        assert f"✓ {step}: image: was pulled, and has your version of slam_asr" in out.splitlines(), out
    assert "✗ decode: " + FAULT.removeprefix("✗ ") in out.splitlines()
    assert "another line" not in out and f"{kubeflow.address}/#/runs/details/run-1" in out
    # doctor itself reports other problems, such as images that no registry has, but none about a pod.
    assert code == 1 and out.count("✗ decode: ") == 1 and "pod: " not in out
    assert kubeflow.terminated == [] and len(kubeflow.runs) == 1
    [package] = kubeflow.packages.values()
    assert next(yaml.safe_load_all(package))["pipelineInfo"]["name"] == "slam-asr-doctor"
    assert kubeflow.created[0]["service_account"] == "slam-asr-runner"


@pytest.mark.slow
def test_pod_that_does_not_start_is_given_up_with_its_reason_and_the_run_is_stopped(doctor, kubeflow):
    kubeflow.waits = "ImagePullBackOff: Back-off pulling image"
    code, out = doctor({}, "--patience", "0")
    assert code == 1 and kubeflow.terminated == ["run-1"]
    assert (
        "✗ build-manifest: pod: did not start: it waits for its image: its image cannot be pulled: push it "
        "(`make images REGISTRY=… PUSH=1`), load it into the nodes, or correct images.names" in out
    ), out


@pytest.mark.slow
def test_pod_that_fails_is_named_with_the_command_that_shows_why(doctor, kubeflow):
    kubeflow.fails_at = "train"
    code, out = doctor({})
    assert code == 1
    assert (
        "✗ train: pod: the program refused its input (exit code 2): "
        "`python -m pipelines logs run-1 --step train` shows its error message" in out
    ), out


@pytest.mark.slow
def test_run_that_somebody_deletes_is_a_problem(doctor, kubeflow):
    run_at = kubeflow.run_at

    def deleted_afterwards(run_id):
        run = run_at(run_id)
        del kubeflow.runs[run_id]
        return run

    kubeflow.run_at, kubeflow.waits = deleted_afterwards, "Unschedulable: no node"
    code, out = doctor({})
    assert code == 1 and "✗ run: somebody deleted it before it ended: start doctor again" in out, out


@pytest.mark.slow
def test_findings_that_cannot_be_read_are_in_the_dashboard(doctor, kubeflow):
    _, out = doctor({}, forbidden=True)
    page = f"{kubeflow.address}/#/runs/details/run-1"
    assert (
        f"– decode: pod: its findings are only in the dashboard, at {page}: You are not allowed to list "
        "pods in the namespace team (403): ask for the role `view` there, or renew your login." in out
    ), out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--run", "--nodes", "0"], "--nodes is 0: a TrainJob needs at least 1 pod."),
        (["--nodes", "2"], "--nodes is 2, but a TrainJob is only started with --run: add it."),
        (["--run", "--patience", "-1"], "--patience is -1: give a number of seconds, 0 or more."),
        (["--run", "--poll", "-1"], "--poll is -1: give a number of seconds, 0 or more."),
    ],
)
def test_impossible_options_of_a_run_are_one_sentence(kubeflow, program, options, sentence):
    assert program("doctor", *options) == (2, "", f"{sentence}\n")
    assert kubeflow.requests == []


@pytest.mark.parametrize(
    "command", [["status"], ["status", "run-1"], ["resume", "run-1"], ["submit", "demo"]]
)
def test_negative_seconds_are_refused_before_any_request(kubeflow, program, command):
    sentence = "--poll is -1: give a number of seconds, 0 or more.\n"
    code, out, err = program(*command, "--poll", "-1")
    assert (code, out) == (2, "") and err.endswith(sentence)
    assert kubeflow.requests == []


@pytest.mark.slow
def test_component_runs_under_kfps_runner_and_writes_its_findings(tmp_path, monkeypatch):
    from kfp import local

    monkeypatch.chdir(tmp_path)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path))
    check = PodCheck(
        step="decode", version=__version__, source=source_digest(), store=str(tmp_path / "store")
    )
    task = check_pod(request=json.dumps(vars(check)))
    with open(task.outputs["findings"].path, encoding="utf-8") as file:
        first, second = file.read().split("\n\n")
    assert first == f"✓ image: was pulled, and has your version of slam_asr, {__version__}"
    assert second == f"✓ store {tmp_path}/store: can be written, read and listed, and objects can be removed"
