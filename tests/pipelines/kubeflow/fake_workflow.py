"""The Argo workflow of a fake run, with the nodes, phases and messages that a real Kubeflow 2.17.0 gives.

The API v1beta1 returns it as `workflow_manifest`. The tasks of the API v2beta1 are its nodes: they have no
`error`, and a node that was never reached has no `state`.
"""

import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import kfp_server_api as kfp

_TAKES = timedelta(seconds=61)
_OMITTED = "omitted: depends condition not met"


def workflow(
    name: str,
    namespace: str,
    steps: Sequence[str],
    reached: int,
    failed: bool,
    start: datetime,
    waits: str = "",
) -> dict[str, Any]:
    """Build a workflow of steps that run one after another.

    Args:
        name: name of the workflow.
        namespace: its namespace.
        steps: names of the steps.
        reached: number of steps that have ended; the next one is running, unless the last one failed.
        failed: whether the last step that ended failed.
        start: time at which the first step started; each starts a minute after the one before.
        waits: message of the next step's pod, if that waits to start.
    """
    running = not failed and reached < len(steps)
    outcome = "Failed" if failed else "Running" if running else "Succeeded"
    ended = None if running else start + len(steps) * _TAKES
    nodes = [
        _node(name, name, "Retry", outcome, start, ended),
        _node(name, f"{name}(0)", "DAG", outcome, start, ended),
        _node(name, f"{name}(0).root-driver(0)", "Pod", "Succeeded", start, start),
        _node(name, f"{name}(0).root(0)", "DAG", outcome, start, ended),
    ]
    for number, step in enumerate(steps[: reached + running]):
        phase, message = "Succeeded", ""
        if number == reached:
            phase, message = ("Pending", waits) if waits else ("Running", "")
        elif failed and number == reached - 1:
            phase, message = "Failed", "main: Error (exit code 2)"
        at, place = start + timedelta(minutes=number), f"{name}(0).root(0).{step}"
        until = None if number == reached else at + _TAKES
        nodes += [
            _node(name, f"{place}-driver(0)", "Pod", "Succeeded", at, at),
            _node(name, place, "Retry", phase, at, until),
            _node(name, f"{place}(0)", "DAG", phase, at, until),
            _node(name, f"{place}(0).executor", "Retry", phase, at, until, message),
            _node(name, f"{place}(0).executor(0)", "Pod", phase, at, until, message),
        ]
    for step in steps[reached:] if failed else []:
        for task in (f"{step}-driver", step):
            nodes.append(
                _node(name, f"{name}(0).root(0).{task}", "Skipped", "Omitted", ended, ended, _OMITTED)
            )
    return {
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": _text(start)},
        "status": {"phase": outcome, "nodes": {node["id"]: node for node in nodes}},
    }


def tasks_of(run_id: str, manifest: dict[str, Any]) -> list[kfp.V2beta1PipelineTaskDetail]:
    """Describe a workflow's nodes as the API v2beta1 does."""
    return [
        kfp.V2beta1PipelineTaskDetail(
            run_id=run_id,
            task_id=f"task-{number}",
            display_name=node["displayName"],
            create_time=manifest["metadata"]["creationTimestamp"],
            start_time=node["startedAt"],
            end_time=node["finishedAt"] or "0001-01-01T00:00:00Z",
            state=None if node["phase"] == "Omitted" else node["phase"].upper(),
        )
        for number, node in enumerate(manifest["status"]["nodes"].values())
    ]


def _node(
    workflow: str,
    name: str,
    kind: str,
    phase: str,
    started: datetime | None,
    ended: datetime | None,
    message: str = "",
) -> dict[str, Any]:
    return {
        "id": workflow if name == workflow else f"{workflow}-{zlib.crc32(name.encode())}",
        "name": name,
        "displayName": name.rpartition(".")[2],
        "type": kind,
        "templateName": "metadata-0-3-retry-system-container-impl",
        "phase": phase,
        **({"message": message} if message else {}),
        "startedAt": _text(started),
        "finishedAt": _text(ended),
    }


def _text(time: datetime | None) -> str | None:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}" if time else None
