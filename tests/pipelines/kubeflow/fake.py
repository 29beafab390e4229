"""An HTTP server that imitates Kubeflow Pipelines.

It builds its answers with the classes of the real client, saves what it receives, and checks the token. A
test can make it answer late, with an error, with a truncated answer or with a login page.
"""

import email
import http.server
import json
import re
import time
import urllib.parse
from datetime import UTC, datetime
from typing import Any

import kfp_server_api as kfp

from tests.pipelines.kubeflow.fake_workflow import tasks_of, workflow

TOKEN = "a-token-that-nobody-may-see"
START = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
STEPS = ("build-manifest", "extract-features", "train", "convert-checkpoint", "decode", "score")


class FakeKubeflow:
    """State of the fake Kubeflow Pipelines API."""

    def __init__(self, multi_user: bool = True) -> None:
        self.multi_user = multi_user
        self.version = "2.17.0"
        self.token: str | None = TOKEN
        self.pipelines: dict[str, kfp.V2beta1Pipeline] = {}
        self.versions: dict[str, kfp.V2beta1PipelineVersion] = {}
        self.packages: dict[str, bytes] = {}
        self.experiments: dict[str, kfp.V2beta1Experiment] = {}
        self.runs: dict[str, kfp.V2beta1Run] = {}
        self.namespaces: dict[str, str] = {}
        """The namespace in which each run's pods are: a single-user server puts all of them into its own."""
        self.recorded: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        """Recorded runs by id: the answers of v2beta1 and of v1beta1."""
        self.archive: dict[str, bytes] = {}
        """Objects that the dashboard can read, by bucket and key."""
        self.terminated: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.retried: list[str] = []
        self.schedules: dict[str, kfp.V2beta1RecurringRun] = {}
        self.schedules_created: list[dict[str, Any]] = []
        self.retry_refusal: tuple[int, dict[str, str]] | None = None
        self.unknown_versions: set[str] = set()
        """Ids of versions that were deleted."""
        self.faults: list[str] = []
        """Kinds of the next answers, in order: 503, 500, proxy, slow, cut, html, 401, 403 or ok."""
        self.requests: list[str] = []
        """Method and path of each request so far."""
        self.fails_at: str | None = None
        """The step at which runs fail."""
        self.waits = ""
        """Message of the first step's pod, if it never starts."""
        self.polls: dict[str, int] = {}
        """For each run, how often its state was requested again after the first time; sets its progress."""

    def workflow_of(self, run_id: str) -> dict[str, Any]:
        """Return a run's workflow. Each request for its state, except the first, advances the run a step."""
        reached, failed = max(0, self.polls.get(run_id, 0)), False
        if self.fails_at and reached > STEPS.index(self.fails_at):
            reached, failed = STEPS.index(self.fails_at) + 1, True
        reached = 0 if self.waits else min(reached, len(STEPS))
        return workflow(
            f"slam-asr-{run_id}", self.namespaces[run_id], STEPS, reached, failed, START, self.waits
        )

    def run_at(self, run_id: str) -> kfp.V2beta1Run:
        """Return a run in its state at the latest request."""
        run, manifest = self.runs[run_id], self.workflow_of(run_id)
        run.run_details = kfp.V2beta1RunDetails(task_details=tasks_of(run_id, manifest))
        run.state = manifest["status"]["phase"].upper()
        return run

    def namespace_of(self, asked: str | None) -> str | None:
        """Return the namespace of an object: the requested one, or None on a single-user server."""
        return asked if self.multi_user else None


def refusal(code: int, message: str) -> dict[str, Any]:
    """Build the body of an answer that refuses a request: gRPC's code, and the server's message."""
    return {"code": code, "message": message, "details": []}


NAMESPACE_REQUIRED = 400, refusal(3, "Invalid input error: a namespace is required in multi-user mode")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests to Kubeflow Pipelines from the state in `server.fake`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_DELETE(self) -> None:
        self._answer("DELETE")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        fake, (path, _, query) = self.server.fake, self.path.partition("?")
        fake.requests.append(f"{method} {path}")
        fault = fake.faults.pop(0) if fake.faults else "ok"
        if fault == "slow":
            time.sleep(0.6)
        if path == "/artifacts/get":
            options = dict(urllib.parse.parse_qsl(query))
            content = fake.archive.get(f"{options['bucket']}/{options['key']}")
            return self._send(404, b"no such object") if content is None else self._send(200, content)
        if fault == "html":
            return self._send(200, b"<html><form action=/login></form></html>", "text/html; charset=utf-8")
        if fault == "proxy":
            return self._send(503, b"upstream connect error\n", "text/plain")
        if fault in ("503", "401", "403", "500"):
            return self._send(int(fault), json.dumps({"message": f"fault {fault}"}).encode())
        # A single-user server knows no users, and the health check is for probes, which have no token.
        known = self.headers.get("authorization") == f"Bearer {fake.token}"
        if fake.token and fake.multi_user and not known and not path.endswith("/healthz"):
            return self._send(401, json.dumps(refusal(16, "Unauthenticated: Request header error")).encode())
        status, answer = self._route(method, path, dict(urllib.parse.parse_qsl(query)), body)
        content = json.dumps(kfp.ApiClient().sanitize_for_serialization(answer)).encode()
        self._send(status, content[: len(content) // 2] if fault == "cut" else content, length=len(content))

    def _send(
        self, status: int, content: bytes, kind: str = "application/json", length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        if length is not None and length != len(content):
            self.close_connection = True

    def _route(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        """Return the status and the content of the answer to a request."""
        fake: FakeKubeflow = self.server.fake
        if match := re.fullmatch(r"/apis/v1beta1/runs/([^/]+)", path):
            return self._workflow(match[1])
        if path == "/apis/v1beta1/healthz":
            return 200, kfp.ApiClient().sanitize_for_serialization(
                {"commit_sha": "unknown", "tag_name": fake.version, "multi_user": fake.multi_user}
            )
        resource, _, rest = path.removeprefix("/apis/v2beta1/").partition("/")
        if resource == "healthz":
            return 200, kfp.V2beta1GetHealthzResponse(multi_user=fake.multi_user)
        handlers = {
            "pipelines": self._pipelines,
            "experiments": self._experiments,
            "runs": self._runs,
            "recurringruns": self._recurring_runs,
        }
        if resource in handlers:
            return handlers[resource](method, rest, query, body)
        return 404, refusal(5, f"nothing at {path}")

    def _workflow(self, run_id: str) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        if run_id in fake.recorded:
            answer = fake.recorded[run_id][1]
            of_run, manifest = answer["run"], answer["pipeline_runtime"]["workflow_manifest"]
        elif run_id in fake.runs:
            of_run, manifest = {"id": run_id}, fake.workflow_of(run_id)
        else:
            return 404, refusal(5, f"Run {run_id} not found")
        return 200, {"run": of_run, "pipeline_runtime": {"workflow_manifest": json.dumps(manifest)}}

    def _pipelines(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        if path == "upload_version":
            return self._upload_version(query, body)
        if path:
            pipeline_id, _, rest = path.partition("/")
            assert rest == "versions", path
            known = [v for v in fake.versions.values() if v.pipeline_id == pipeline_id]
            # One per page, to test paging.
            index = int(query.get("page_token") or 0)
            next_page = str(index + 1) if index + 1 < len(known) else ""
            return 200, kfp.V2beta1ListPipelineVersionsResponse(
                pipeline_versions=known[index : index + 1], next_page_token=next_page
            )
        if method == "POST":
            request = json.loads(body)
            name, namespace = request["display_name"], fake.namespace_of(request.get("namespace"))
            if any((p.display_name, p.namespace) == (name, namespace) for p in fake.pipelines.values()):
                # The server gives no reason.
                return 409, refusal(6, "")
            created = kfp.V2beta1Pipeline(
                pipeline_id=f"pipeline-{len(fake.pipelines) + 1}", display_name=name, namespace=namespace
            )
            fake.pipelines[created.pipeline_id] = created
            return 200, created
        name = re.search(
            r'"stringValue"\s*:\s*"([^"]+)"|"string_value"\s*:\s*"([^"]+)"', query.get("filter", "")
        )
        # Without a namespace, a multi-user server looks among the shared pipelines only.
        matching = [
            p
            for p in fake.pipelines.values()
            if (not name or p.display_name in name.groups())
            and p.namespace == fake.namespace_of(query.get("namespace"))
        ]
        return 200, kfp.V2beta1ListPipelinesResponse(pipelines=matching, total_size=len(matching))

    def _upload_version(self, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        pipeline_id, name = query["pipelineid"], query["name"]
        if any((v.pipeline_id, v.display_name) == (pipeline_id, name) for v in fake.versions.values()):
            return 409, refusal(6, "")
        number = f"version-{len(fake.versions) + 1}"
        created = kfp.V2beta1PipelineVersion(
            pipeline_id=pipeline_id, pipeline_version_id=number, display_name=name
        )
        fake.versions[number], fake.packages[number] = created, self._file(body)
        return 200, created

    def _experiments(self, method: str, _: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        request = json.loads(body) if method == "POST" else query
        if fake.multi_user and not request.get("namespace"):
            return NAMESPACE_REQUIRED
        namespace = fake.namespace_of(request.get("namespace"))
        if method == "POST":
            created = kfp.V2beta1Experiment(
                experiment_id=f"experiment-{len(fake.experiments) + 1}",
                namespace=namespace,
                **{k: v for k, v in request.items() if k in ("display_name", "description")},
            )
            fake.experiments[created.experiment_id] = created
            return 200, created
        return 200, kfp.V2beta1ListExperimentsResponse(
            experiments=[
                e
                for e in fake.experiments.values()
                if e.display_name in query.get("filter", "") and e.namespace == namespace
            ]
        )

    def _runs(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        run_id, _, action = path.partition(":")
        if action == "terminate":
            fake.terminated.append(run_id)
            return 200, {}
        if run_id in fake.recorded:
            if not action:
                return 200, fake.recorded[run_id][0]
            if fake.retry_refusal:
                return fake.retry_refusal
            fake.retried.append(run_id)
            return 200, {}
        if run_id:
            if run_id not in fake.runs:
                return 404, refusal(5, f"Run {run_id} not found")
            if action:
                fake.retried.append(run_id)
                fake.fails_at = None
                return 200, {}
            fake.polls[run_id] = fake.polls.get(run_id, -1) + 1
            return 200, fake.run_at(run_id)
        if method == "POST":
            return self._create_run(json.loads(body))
        if fake.multi_user and not query.get("namespace"):
            return NAMESPACE_REQUIRED
        namespace = fake.namespace_of(query.get("namespace")) or "kubeflow"
        newest = reversed(fake.runs.values())
        found = [run for run in newest if fake.namespaces[run.run_id] == namespace]
        return 200, kfp.V2beta1ListRunsResponse(runs=found)

    def _create_run(self, request: dict[str, Any]) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        version = request.get("pipeline_version_reference") or {}
        if version.get("pipeline_version_id") in fake.unknown_versions:
            return 404, {"message": "pipeline version not found"}
        fake.created.append(request)
        run = kfp.V2beta1Run(
            run_id=f"run-{len(fake.runs) + 1}",
            display_name=request["display_name"],
            description=request.get("description"),
            experiment_id=request.get("experiment_id"),
            runtime_config=request.get("runtime_config"),
            pipeline_version_reference=version,
            state="PENDING",
            created_at=START,
        )
        fake.runs[run.run_id] = run
        # A run is created in the namespace of its experiment. This server lacks the experiments of recorded
        # runs.
        experiment = fake.experiments.get(request.get("experiment_id", ""))
        fake.namespaces[run.run_id] = (experiment.namespace if experiment else "") or "kubeflow"
        return 200, run

    def _recurring_runs(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        fake: FakeKubeflow = self.server.fake
        if method == "POST" and not path:
            request = json.loads(body)
            # The server reads five fields as second, minute, hour, day and month, without the weekday.
            fields = request["trigger"]["cron_schedule"]["cron"].split()
            if len(fields) not in (5, 6):
                return 400, refusal(3, f"Expected 5 or 6 fields, found {len(fields)}")
            fake.schedules_created.append(request)
            enabled = request.get("mode") == "ENABLE"
            created = kfp.V2beta1RecurringRun(
                recurring_run_id=f"schedule-{len(fake.schedules) + 1}",
                namespace=fake.experiments[request["experiment_id"]].namespace,
                status="ENABLED" if enabled else "DISABLED",
                **{k: request[k] for k in ("display_name", "experiment_id", "trigger", "mode", "no_catchup")},
            )
            fake.schedules[created.recurring_run_id] = created
            return 200, created
        if not path:
            if fake.multi_user and not query.get("namespace"):
                return NAMESPACE_REQUIRED
            namespace = fake.namespace_of(query.get("namespace"))
            known = [s for s in fake.schedules.values() if s.namespace == namespace]
            # One per page, to test paging.
            index = int(query.get("page_token") or 0)
            return 200, kfp.V2beta1ListRecurringRunsResponse(
                recurring_runs=known[index : index + 1],
                total_size=len(known),
                next_page_token=str(index + 1) if index + 1 < len(known) else "",
            )
        name, _, action = path.partition(":")
        if name not in fake.schedules:
            return 404, refusal(5, f"Recurring run {name} not found")
        if method == "DELETE":
            del fake.schedules[name]
        else:
            fake.schedules[name].mode = action.upper()
            fake.schedules[name].status = f"{action.upper()}D"
        return 200, {}

    def _file(self, body: bytes) -> bytes:
        message = email.message_from_bytes(
            b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        return next(part.get_payload(decode=True) for part in message.get_payload())
