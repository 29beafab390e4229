"""The log names the nodes that do not run yet, and the reason."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from kubernetes.client import ApiClient

from slam_asr.trainjob import follow
from slam_asr.trainjob.request import TrainJobClient
from slam_asr.trainjob.waiting import waiting_nodes
from tests.trainjob.jobs import PLACEMENT, UNSCHEDULABLE, create

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_the_node_that_waits_is_named_while_the_others_run(kubernetes, capsys):
    create()
    kubernetes.states = ["Running", "Running", "Running", "Complete"]
    kubernetes.pod_status = {1: UNSCHEDULABLE}
    follow.FollowedTrainJob(TrainJobClient(PLACEMENT), "a-job").follow(0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "nodes run" in line]
    assert lines == [
        "TrainJob a-job: 1 of 2 nodes run; node-1 waits: Unschedulable: 0/1 nodes are available: "
        "1 Insufficient cpu."
    ]


def waiting_container(reason: str, message: str | None = None) -> dict:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"name": "node", "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def event(kind: str, name: str, reason: str, message: str, **fields: str) -> dict:
    involved = {"kind": kind, "name": name}
    return {"metadata": {"name": "e"}, "involvedObject": involved, "reason": reason, "message": message} | (
        {"type": "Warning", "eventTime": "2026-01-02T03:04:06.000001Z"} | fields
    )


FORBIDDEN = 'Error creating: pods "j-node-0-1-" is forbidden: exceeded quota: team, requested: cpu=8'


@pytest.mark.parametrize(
    ("status", "events", "reason"),
    [
        (UNSCHEDULABLE, [], "Unschedulable: 0/1 nodes are available: 1 Insufficient cpu."),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ErrImagePull", "no such  host")]},
            [],
            "ErrImagePull: no such host",
        ),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ContainerCreating")]},
            [event("Pod", "j-1", "FailedMount", 'secret "hub" not found')],
            'FailedMount: secret "hub" not found',
        ),
        (
            {"phase": "Pending", "containerStatuses": [waiting_container("ContainerCreating")]},
            [event("Pod", "j-1", "Pulling", "pulling", type="Normal"), event("Pod", "j-2", "BackOff", "x")],
            "ContainerCreating",
        ),
        # The scheduler's events have no `firstTimestamp`, so the SDK drops them.
        (
            {"phase": "Pending"},
            [event("Pod", "j-1", "FailedScheduling", "0/1 nodes")],
            "FailedScheduling: 0/1 nodes",
        ),
        # The SDK does not return the events of the Job.
        (None, [event("Job", "j-node-0", "FailedCreate", FORBIDDEN)], f"FailedCreate: {FORBIDDEN}"),
        (
            None,
            [event("Workload", "trainjob-j-4f2a1", "Pending", "insufficient quota for cpu", type="Normal")],
            "Pending: insufficient quota for cpu",
        ),
        # This event is of an earlier job of the same name.
        (
            None,
            [event("Job", "j-node-0", "FailedCreate", "old", eventTime="2026-01-02T03:04:04.000001Z")],
            "it has no pod yet",
        ),
        (None, [event("Job", "other-node-0", "FailedCreate", "x")], "it has no pod yet"),
        ({"phase": "Running"}, [event("Pod", "j-1", "Unhealthy", "x")], None),
    ],
)
def test_the_reason_why_a_node_waits_comes_from_its_pod_or_from_events(status, events, reason):
    index = {"batch.kubernetes.io/job-completion-index": "1"}
    metadata = {"name": "j-1", "labels": index, "creationTimestamp": "2026-01-02T03:04:06Z"}
    pods = [{"metadata": metadata, "status": status}] if status else []
    of_node_0 = {"name": "j-0", "labels": {"batch.kubernetes.io/job-completion-index": "0"}}
    pods.append({"metadata": metadata | of_node_0, "status": {"phase": "Running"}})
    waits = waiting_nodes(Listing(pods, events), "team", "j", 2, CREATED)
    assert waits == ({reason: ["node-1"]} if reason else {})


class Listing:
    """Returns the given pods and events as the Kubernetes client does, in its own types."""

    def __init__(self, pods: list[dict], events: list[dict]) -> None:
        self.pods, self.events = pods, events

    def _typed(self, items: list[dict], kind: str):
        response = SimpleNamespace(data=json.dumps({"items": items}))
        return ApiClient().deserialize(response, kind)

    def list_namespaced_pod(self, namespace: str, label_selector: str):
        assert namespace == "team" and "jobset-name=j," in label_selector
        return self._typed(self.pods, "V1PodList")

    def list_namespaced_event(self, namespace: str):
        return self._typed(self.events, "CoreV1EventList")


def test_nodes_that_wait_for_the_same_reason_are_listed_together():
    pods = [
        {
            "metadata": {
                "name": f"j-{n}",
                "labels": {"batch.kubernetes.io/job-completion-index": str(n)},
                "creationTimestamp": "2026-01-02T03:04:06Z",
            },
            "status": UNSCHEDULABLE,
        }
        for n in range(20)
    ]
    [(reason, nodes)] = waiting_nodes(Listing(pods, []), "team", "j", 20, CREATED).items()
    assert reason.startswith("Unschedulable") and len(nodes) == 20
    assert follow.listed(nodes) == "node-0, node-1, node-2, node-3, node-4, node-5 and 14 others"
    assert follow.listed(nodes[:2]) == "node-0 and node-1" and follow.listed(nodes[:1]) == "node-0"
