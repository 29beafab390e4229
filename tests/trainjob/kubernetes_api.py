"""A small HTTP server that imitates the part of the Kubernetes API that Kubeflow Trainer's SDK uses."""

import http.server
import json
import re

GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {"numProcPerNode": "auto"}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {"spec": {"containers": [{"name": "node", "image": "pytorch"}]}}
                            },
                        },
                    }
                ]
            }
        },
    },
}
EVENT = {
    "metadata": {"name": "e"},
    "involvedObject": {"kind": "Pod", "name": "node-0"},
    "type": "Warning",
    "reason": "FailedScheduling",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    "firstTimestamp": "2026-01-02T03:04:05Z",
}


class FakeCluster:
    """The state of the server: the jobs that exist, and the states that they go through."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict] = {}
        """The jobs that exist, by name."""
        self.created: list[dict] = []
        """The job in each request to create one, in order."""
        self.deleted: list[str] = []
        """The names in the requests to delete a job."""
        self.logs = {"node-0": "first line\n\nsecond line\n", "node-1": "of node 1\n"}
        self.states = ["Pending", "Running", "Running", "Complete"]
        """The job's state at each request for it. The last state remains."""
        self.forbidden = False
        """Whether requests about TrainJobs are refused with the status 403."""
        self.runtimes = {"torch-distributed": RUNTIME}
        self.refusal: tuple[int, str] | None = None
        """Status and message with which the server refuses to create a job."""
        self.pod_status: dict[int, dict] = {}
        """Status of a node's pod, if it does not follow from the job's state. If it is empty, the node has no
        pod."""
        self.objects: dict[str, dict] = {}
        """Other objects by their path, such as the pod of the step itself."""
        self.used_rights: set[tuple[str, str]] = set()
        """Verb and resource of each request."""
        self.patches: list[dict] = []
        """The requests to change a job."""
        self.when_complete = lambda name: None
        """Function that is called when a request finds a job complete."""
        self.requests = 0
        """Number of requests for the job since it was created."""
        self.now = "Pending"
        """The job's state at the last request for it."""

    def read_job(self, name: str) -> dict | None:
        """Return a job in its next state; None if no such job exists."""
        job = self.jobs.get(name)
        if job is None:
            return None
        self.now = self.states[min(self.requests, len(self.states) - 1)]
        self.requests += 1
        if self.now == "Complete":
            self.when_complete(name)
        if self.now not in ("Complete", "Failed"):
            return job
        ended = {
            "type": self.now,
            "status": "True",
            "lastTransitionTime": "2026-01-02T03:04:05Z",
            "reason": "x",
            "message": "x",
        }
        return job | {"status": {"conditions": [ended]}}

    def pods(self) -> list[dict]:
        """Return the pods of two nodes, in the phase that belongs to the job's state."""
        phase = "Succeeded" if self.now == "Complete" else self.now
        return [
            {
                "metadata": {
                    "name": f"node-{n}",
                    "creationTimestamp": "2026-01-02T03:04:05Z",
                    "labels": {
                        "jobset.sigs.k8s.io/replicatedjob-name": "node",
                        "batch.kubernetes.io/job-completion-index": str(n),
                    },
                },
                "spec": {"containers": [{"name": "node", "image": "x"}]},
                "status": self.pod_status.get(n, {"phase": phase}),
            }
            for n in range(2)
            if self.pod_status.get(n) != {}
        ]


def listing(kind: str, items: list[dict]) -> dict:
    return {"kind": kind, "apiVersion": "v1", "metadata": {}, "items": items}


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """Answers a request from the server's attribute `fake`, a `FakeCluster`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def note(self, verb: str, path: str) -> None:
        """Record the right that a request needs."""
        found = re.match(rf"(?:/api/v1|{GROUP})(?:/namespaces/[^/]+)?/(\w+)(/[^/?]+)?(/\w+)?", path)
        verb = "list" if verb == "get" and not found[2] else verb
        self.server.fake.used_rights.add((verb, found[1] + (found[3] or "")))

    def do_GET(self) -> None:
        fake, path = self.server.fake, self.path.partition("?")[0]
        self.note("get", path)
        if path in fake.objects:
            return self.send(200, fake.objects[path])
        if fake.forbidden and path.startswith(GROUP):
            return self.send(403, {"message": "forbidden: no right"})
        if found := re.fullmatch(rf"{GROUP}/clustertrainingruntimes/(.+)", path):
            if runtime := fake.runtimes.get(found[1]):
                return self.send(200, runtime)
            return self.send(404, {"message": "the server could not find the requested resource"})
        if found := re.fullmatch(rf"{GROUP}/namespaces/team/trainjobs/(.+)", path):
            job = fake.read_job(found[1])
            return self.send(200, job) if job else self.send(404, {"message": "no such job"})
        if found := re.fullmatch(r"/api/v1/namespaces/team/pods/(.+)/log", path):
            return self.send(200, fake.logs[found[1]], "text/plain")
        if path == "/api/v1/namespaces/team/pods":
            return self.send(200, listing("PodList", fake.pods()))
        if path == "/api/v1/namespaces/team/events":
            return self.send(200, listing("EventList", [EVENT]))
        if path.endswith("/kubeflow-trainer-public"):
            name, version = "kubeflow-trainer-public", {"kubeflow_trainer_version": "2.1.0"}
            return self.send(200, {"metadata": {"name": name}, "data": version})
        return self.send(404, {"message": f"nothing at {path}"})

    def do_PATCH(self) -> None:
        self.note("patch", self.path)
        patch = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.headers["content-type"] == "application/merge-patch+json"
        self.server.fake.patches.append(patch)
        self.send(200, {})

    def do_POST(self) -> None:
        self.note("create", self.path)
        job = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.fake.refusal:
            status, message = self.server.fake.refusal
            return self.send(status, {"kind": "Status", "message": message})
        self.server.fake.created.append(job)
        job = job | {
            "metadata": job["metadata"] | {"namespace": "team", "creationTimestamp": "2026-01-02T03:04:05Z"}
        }
        self.server.fake.jobs[job["metadata"]["name"]] = job
        self.server.fake.requests = 0
        self.send(201, job)

    def do_DELETE(self) -> None:
        self.note("delete", self.path.partition("?")[0])
        self.rfile.read(int(self.headers.get("content-length") or 0))
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.fake.deleted.append(name)
        existed = self.server.fake.jobs.pop(name, None)
        self.send(200 if existed else 404, {"kind": "Status", "status": "Success"})

    def send(self, status: int, content: object, kind: str = "application/json") -> None:
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
