"""Servers that speak HTTP as Kubeflow Pipelines and Kubernetes do, with their own clients' models.

They keep what they are sent, check the token, and can be told to fail: slowly, with 503, with half an answer, with
a login page.
"""

import email
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import kfp_server_api as kfp

TOKEN = "a-token-that-nobody-may-see"
START = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
STEPS = ("build-manifest", "extract-features", "train", "convert-checkpoint", "decode", "score")


class FakeKubeflow:
    """The API's state."""

    def __init__(self, multi_user: bool = True) -> None:
        self.multi_user = multi_user
        self.token: str | None = TOKEN
        self.pipelines: dict[str, kfp.V2beta1Pipeline] = {}
        self.versions: dict[str, kfp.V2beta1PipelineVersion] = {}
        self.packages: dict[str, bytes] = {}
        self.experiments: dict[str, kfp.V2beta1Experiment] = {}
        self.runs: dict[str, kfp.V2beta1Run] = {}
        self.created: list[dict[str, Any]] = []
        self.retried: list[str] = []
        self.faults: list[str] = []
        """What the next answers are to be, first come first served: 503, slow, cut, html, 401, 403, or ok."""
        self.asked: list[str] = []
        self.fails_at: str | None = None
        self.looks: dict[str, int] = {}

    def run_at(self, run_id: str, look: int) -> kfp.V2beta1Run:
        """A run as it is at the n-th look: one step further each time."""
        run = self.runs[run_id]
        details, failed = [], False
        for number, step in enumerate(STEPS):
            state = "SUCCEEDED" if number < look else "RUNNING" if number == look else "PENDING"
            if failed:
                break
            if step == self.fails_at and number < look:
                state, failed = "FAILED", True
            started = START + timedelta(minutes=number)
            details.append(
                kfp.V2beta1PipelineTaskDetail(
                    run_id=run_id,
                    task_id=f"task-{number}",
                    display_name=step,
                    state=state,
                    create_time=started,
                    start_time=started if state != "PENDING" else None,
                    end_time=started + timedelta(seconds=61)
                    if state in ("SUCCEEDED", "FAILED")
                    else datetime(1, 1, 1, tzinfo=UTC),
                    error=kfp.GoogleRpcStatus(message="exit code 2") if state == "FAILED" else None,
                )
            )
            details.append(
                kfp.V2beta1PipelineTaskDetail(
                    run_id=run_id,
                    task_id=f"driver-{number}",
                    display_name=f"{step}-driver",
                    state="SUCCEEDED",
                )
            )
        run.run_details = kfp.V2beta1RunDetails(task_details=details)
        run.state = "FAILED" if failed else "SUCCEEDED" if look >= len(STEPS) else "RUNNING"
        return run


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for `server.fake`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        fake, (path, _, query) = self.server.fake, self.path.partition("?")
        fake.asked.append(f"{method} {path}")
        fault = fake.faults.pop(0) if fake.faults else "ok"
        if fault == "slow":
            time.sleep(0.6)
        if fault == "html":
            return self._send(200, b"<html><form action=/login></form></html>", "text/html; charset=utf-8")
        if fault in ("503", "401", "403", "500"):
            return self._send(int(fault), json.dumps({"message": f"fault {fault}"}).encode())
        if fake.token and self.headers.get("authorization") != f"Bearer {fake.token}":
            return self._send(401, b'{"message": "unauthenticated"}')
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
        fake: FakeKubeflow = self.server.fake
        path = path.removeprefix("/apis/v2beta1")
        if path == "/healthz":
            return 200, kfp.V2beta1GetHealthzResponse(multi_user=fake.multi_user)
        if path == "/pipelines/upload":
            made = kfp.V2beta1Pipeline(
                pipeline_id="pipeline-1", display_name=query["name"], namespace=query.get("namespace")
            )
            fake.pipelines[made.pipeline_id] = made
            return 200, made
        if path == "/pipelines/upload_version":
            number = f"version-{len(fake.versions) + 1}"
            made = kfp.V2beta1PipelineVersion(
                pipeline_id=query["pipelineid"], pipeline_version_id=number, display_name=query["name"]
            )
            fake.versions[number], fake.packages[number] = made, self._file(body)
            return 200, made
        if path == "/pipelines":
            wanted = re.search(
                r'"stringValue"\s*:\s*"([^"]+)"|"string_value"\s*:\s*"([^"]+)"', query.get("filter", "")
            )
            found = [p for p in fake.pipelines.values() if not wanted or p.display_name in wanted.groups()]
            return 200, kfp.V2beta1ListPipelinesResponse(pipelines=found, total_size=len(found))
        if found := re.fullmatch(r"/pipelines/([^/]+)/versions", path):
            known = [v for v in fake.versions.values() if v.pipeline_id == found[1]]
            # One a page, so that paging is seen to work.
            at = int(query.get("page_token") or 0)
            following = str(at + 1) if at + 1 < len(known) else ""
            return 200, kfp.V2beta1ListPipelineVersionsResponse(
                pipeline_versions=known[at : at + 1], next_page_token=following
            )
        if path == "/experiments":
            if method == "POST":
                made = kfp.V2beta1Experiment(
                    experiment_id=f"experiment-{len(fake.experiments) + 1}",
                    **{
                        k: v
                        for k, v in json.loads(body).items()
                        if k in ("display_name", "namespace", "description")
                    },
                )
                fake.experiments[made.experiment_id] = made
                return 200, made
            return 200, kfp.V2beta1ListExperimentsResponse(
                experiments=[
                    e for e in fake.experiments.values() if e.display_name in query.get("filter", "")
                ]
            )
        if path == "/runs" and method == "POST":
            asked = json.loads(body)
            fake.created.append(asked)
            run = kfp.V2beta1Run(
                run_id=f"run-{len(fake.runs) + 1}",
                display_name=asked["display_name"],
                state="PENDING",
                created_at=START,
            )
            fake.runs[run.run_id] = run
            return 200, run
        if path == "/runs":
            return 200, kfp.V2beta1ListRunsResponse(runs=list(reversed(fake.runs.values())))
        if found := re.fullmatch(r"/runs/([^/:]+)(:retry)?", path):
            if found[1] not in fake.runs:
                return 404, {"message": "no such run"}
            if found[2]:
                fake.retried.append(found[1])
                fake.fails_at = None
                return 200, {}
            fake.looks[found[1]] = fake.looks.get(found[1], -1) + 1
            return 200, fake.run_at(found[1], fake.looks[found[1]])
        return 404, {"message": f"nothing at {path}"}

    def _file(self, body: bytes) -> bytes:
        message = email.message_from_bytes(
            b"content-type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + body
        )
        return next(part.get_payload(decode=True) for part in message.get_payload())


class KubernetesHandler(http.server.BaseHTTPRequestHandler):
    """Pods and their logs, for `server.pods`: name → (labels, phase, log); other objects by their path, for `server.objects`."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        if self.server.forbidden:
            return self._send(403, json.dumps({"kind": "Status", "message": "forbidden"}).encode())
        if path in self.server.objects:
            status, content = self.server.objects[path]
            return self._send(status, json.dumps(content).encode())
        if not path.endswith("/pods") and "/pods/" not in path:
            return self._send(404, json.dumps({"kind": "Status", "code": 404}).encode())
        if found := re.fullmatch(r"/api/v1/namespaces/[^/]+/pods/([^/]+)/log", path):
            assert options["container"] == "main"
            return self._send(200, self.server.pods[found[1]][2].encode(), "text/plain")
        key, _, value = options["labelSelector"].partition("=")
        items = [
            {
                "metadata": {
                    "name": name,
                    "labels": labels,
                    "creationTimestamp": f"2026-01-02T03:04:0{number}Z",
                },
                "status": {
                    "phase": phase,
                    "conditions": [{"type": "PodScheduled", "status": "False", "message": log}]
                    if phase == "Pending"
                    else [],
                },
            }
            for number, (name, (labels, phase, log)) in enumerate(self.server.pods.items())
            if labels.get(key) == value
        ]
        self._send(
            200, json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).encode()
        )

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class RegistryHandler(http.server.BaseHTTPRequestHandler):
    """A registry that gives everybody a token for what is public: `server.manifests`, name/reference → status."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        found = re.fullmatch(r"/v2/(.+)/manifests/(.+)", self.path)
        if self.headers.get("authorization") != f"Bearer for-{found[1]}":
            self.send_response(401)
            address = f"http://127.0.0.1:{self.server.server_address[1]}/token"
            self.send_header(
                "www-authenticate",
                f'Bearer realm="{address}",service="registry",scope="repository:{found[1]}:pull"',
            )
        else:
            self.send_response(self.server.manifests.get(f"{found[1]}:{found[2]}", 404))
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
        content = json.dumps({"token": f"for-{query['scope'].split(':')[1]}"}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(handler: type, **attributes: Any) -> Iterator[str]:
    """A server of this machine → its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(attributes)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
