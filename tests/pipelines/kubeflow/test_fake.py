"""The fake server answers like the real one, in everything on which the tests of the commands depend."""

import json
from pathlib import Path
from typing import Any

import pytest
import urllib3

from tests.pipelines.kubeflow.fake import STEPS, TOKEN

RECORDINGS = Path(__file__).resolve().parents[4] / "shared" / "recordings"
recorded = pytest.mark.skipif(not RECORDINGS.is_dir(), reason="needs the recordings in ../shared")


@pytest.fixture
def send(kubeflow):
    """Send a request to the fake server; return the status and the body."""

    def request(
        method: str, path: str, body: dict[str, Any] | None = None, token: str = TOKEN
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"}
        answer = urllib3.request(method, f"{kubeflow.address}{path}", json=body, headers=headers)
        return answer.status, answer.json()

    return request


@pytest.fixture
def failed_run(kubeflow, send) -> str:
    """The id of a run whose first step failed."""
    _, experiment = send("POST", "/apis/v2beta1/experiments", {"display_name": "x", "namespace": "team"})
    request = {"display_name": "run", "experiment_id": experiment["experiment_id"]}
    _, run = send("POST", "/apis/v2beta1/runs", request)
    kubeflow.fails_at, kubeflow.polls[run["run_id"]] = STEPS[0], 2
    return run["run_id"]


def tasks_of(run: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the state and the error of each task that is a step."""
    details = run["run_details"]["task_details"]
    return {
        t["display_name"]: (t.get("state"), t.get("error")) for t in details if t["display_name"] in STEPS
    }


def nodes_of(manifest: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return type, phase and message of a workflow's nodes, keyed by path without the workflow's name."""
    return {
        node["name"].partition(".")[2]: (node["type"], node["phase"], node.get("message"))
        for node in manifest["status"]["nodes"].values()
        if "." in node["name"]
    }


@recorded
def test_failed_run_has_the_nodes_and_tasks_of_a_real_one(send, failed_run):
    real_run = json.loads((RECORDINGS / "run-step-failed-exit-1.v2beta1.json").read_text())
    real = json.loads((RECORDINGS / "run-step-failed-exit-1.v1beta1.json").read_text())
    _, run = send("GET", f"/apis/v2beta1/runs/{failed_run}")
    # The real run failed before its loops started, so it has no tasks for the steps in the loops.
    assert tasks_of(run).items() >= tasks_of(real_run).items()
    assert tasks_of(run)["build-manifest"] == ("FAILED", None) and tasks_of(run)["train"] == (None, None)
    _, answer = send("GET", f"/apis/v1beta1/runs/{failed_run}")
    manifest = json.loads(answer["pipeline_runtime"]["workflow_manifest"])
    found, expected = nodes_of(manifest), nodes_of(real["pipeline_runtime"]["workflow_manifest"])
    expected = {name: node for name, node in expected.items() if name in found}
    assert {"root(0).train", "root(0).build-manifest(0).executor(0)"} <= expected.keys()
    replaced = json.loads(json.dumps(found).replace("exit code 2", "exit code 1"))
    assert {name: tuple(replaced[name]) for name in expected} == expected
    assert manifest["metadata"]["namespace"] == "team"


@recorded
def test_unknown_run_is_refused_as_the_real_server_does(send):
    real = json.loads((RECORDINGS / "run-unknown.404.json").read_text())
    for version in ("v1beta1", "v2beta1"):
        status, body = send("GET", f"/apis/{version}/runs/unknown")
        assert status == 404 and body.keys() == real.keys() and body["code"] == real["code"]


def test_only_a_server_for_several_users_has_namespaces_and_asks_for_a_token(kubeflow, send, failed_run):
    def runs(query: str = "", **options: str) -> tuple[int, Any]:
        status, body = send("GET", f"/apis/v2beta1/runs{query}", **options)
        return status, [run["run_id"] for run in body.get("runs") or []]

    assert runs("?namespace=team") == (200, [failed_run]) and runs("?namespace=other") == (200, [])
    assert runs()[0] == 400 and runs("?namespace=team", token="old")[0] == 401
    assert send("GET", "/apis/v2beta1/healthz", token="old")[0] == 200
    kubeflow.multi_user = False
    kubeflow.namespaces[failed_run] = "kubeflow"
    assert runs("?namespace=other", token="old") == runs() == (200, [failed_run])


def test_second_pipeline_of_a_name_is_refused_without_a_reason(send):
    for namespace, status in (("team", 200), ("other", 200), ("team", 409)):
        answer = send("POST", "/apis/v2beta1/pipelines", {"display_name": "p", "namespace": namespace})
        assert answer[0] == status
    assert answer[1]["message"] == ""
