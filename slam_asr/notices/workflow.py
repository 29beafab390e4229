"""A run's Argo workflow, which alone says why a step waits or has failed.

Kubeflow's API v2beta1 gives no reasons: `error` stays empty, and a step counts as RUNNING while its pod waits
for a node. The deprecated v1beta1 API of the same server returns the workflow itself, whose nodes have the
messages of Kubernetes and of Argo (seen on Kubeflow Pipelines 2.17.0).
"""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from slam_asr.steps import EVERY_PIPELINE, STEPS

_CONSEQUENCES = ("No more retries left", "retry exceeded workflow deadline", "omitted:", "child '")
"""Beginnings of messages that give no reason, but only say that something else failed."""


@dataclass(frozen=True)
class Node:
    """One node of the workflow: a pod, or a group of pods."""

    id: str
    name: str
    """Path of the node: names of tasks joined by dots, some with an attempt or an iteration in brackets."""
    kind: str
    """Argo's type: Pod, Retry, DAG, TaskGroup or Skipped."""
    phase: str
    """Pending, Running, Succeeded, Failed, Error, Skipped or Omitted."""
    message: str
    started: datetime | None
    ended: datetime | None
    template: str
    """Name of the template, which is part of the pod's name."""
    parameters: dict[str, str]
    """Values of the node's inputs."""

    @property
    def path(self) -> list[str]:
        """The names of the tasks on the path, without their brackets."""
        return [re.sub(r"\(.*", "", part) for part in self.name.split(".")]

    @property
    def task(self) -> str:
        """The task of this pod: the step that an executor runs, or the task that a driver prepares."""
        *parents, last = self.path
        name = parents[-1] if last == "executor" and parents else last.removesuffix("-driver")
        # If several tasks use the same component, kfp adds numbers to their names: `decode-2`.
        return name if name in STEPS else re.sub(r"-\d+$", "", name)

    @property
    def is_executor(self) -> bool:
        """Whether this is a pod that runs a step, and not the driver that prepares it."""
        return self.kind == "Pod" and self.path[-1] == "executor"

    @property
    def place(self) -> str:
        """Path of the step without attempt numbers. All attempts at one step share it."""
        # `(index:item)` is an iteration of a loop, and `(number)` an attempt. Only iterations are retained.
        return re.sub(r"\(\d+\)", "", self.name).removesuffix(".executor")

    @property
    def reason(self) -> str:
        """The message; empty if it only says that something else failed."""
        return "" if self.message.startswith(_CONSEQUENCES) else self.message


@dataclass(frozen=True)
class Workflow:
    """The workflow of one run."""

    name: str
    """Empty if the workflow was deleted before Kubeflow saved it."""
    namespace: str
    nodes: tuple[Node, ...]
    created: datetime | None
    log_archive: dict[str, Any]
    """Argo's settings for the bucket in which it archives logs; empty if it archives no logs."""

    def archived_log(self, node: Node) -> tuple[str, str] | None:
        """Return (bucket, key) of a pod's archived log; None if logs are not archived in a bucket."""
        bucket, key = self.log_archive.get("bucket"), self.log_archive.get("keyFormat")
        if not bucket or not key or self.created is None:
            return None
        names = {"workflow.namespace": self.namespace, "workflow.name": self.name}
        date = {f"workflow.creationTimestamp.{part}": self.created.strftime(f"%{part}") for part in "Ymd"}
        for name, value in (names | date | {"pod.name": self.pod_name(node)}).items():
            key = key.replace("{{" + name + "}}", value)
        return bucket, f"{key}/main.log"

    def pod_name(self, node: Node) -> str:
        """Return the name of a node's pod: the node's id, into which Argo inserts the template's name."""
        return f"{self.name}-{node.template}-{node.id.removeprefix(f'{self.name}-')}"

    @property
    def pipeline(self) -> str:
        """The name of the pipeline, with which the workflow's name begins; empty if it is not one of ours."""
        # The longest match counts, because the name of one pipeline may begin with the name of another.
        matching = [name for name in EVERY_PIPELINE if self.name.startswith(f"{name}-")]
        return max(matching, key=len, default="")

    def failed_drivers(self) -> list[Node]:
        """Return the drivers whose last attempt failed, the latest first.

        A driver prepares a task, and runs in a pod of its own.
        """
        drivers = [node for node in self.nodes if node.kind == "Pod" and not node.is_executor]
        # They are in the order of their start, so the last attempt at each place remains.
        last = {node.place: node for node in sorted(drivers, key=_order)}
        failed = [node for node in last.values() if node.phase in ("Failed", "Error")]
        return sorted(failed, key=_order, reverse=True)

    def attempts(self) -> dict[str, list[Node]]:
        """Return the pods of each step in the order of their start, keyed by the step's place."""
        found: dict[str, list[Node]] = {}
        for node in sorted(self.nodes, key=_order):
            if node.is_executor and node.task in STEPS:
                found.setdefault(node.place, []).append(node)
        return found

    @property
    def has_finished_steps(self) -> bool:
        """Whether a step has succeeded."""
        return any(nodes[-1].phase == "Succeeded" for nodes in self.attempts().values())

    def phase_of(self, task: str) -> str:
        """Return the phase of a task that is a group of steps; empty if the workflow has no such task."""
        # With retries, each attempt is a node of kind DAG, and a node of kind Retry has the final phase.
        phases = {node.kind: node.phase for node in self.nodes if node.path[-1] == task}
        return phases.get("Retry") or phases.get("DAG", "")

    def omitted(self) -> set[str]:
        """Return the names of steps that were never reached, because an earlier step failed."""
        return {node.task for node in self.nodes if node.phase == "Omitted" and node.task in STEPS}

    def max_attempts(self, place: str) -> int | None:
        """Return the maximum number of attempts at the step at this place; None if it is not known."""
        for node in self.nodes:
            if node.kind == "Retry" and node.place == place and "retry-max-count" in node.parameters:
                return int(node.parameters["retry-max-count"]) + 1
        return None


def workflow_of(answer: dict[str, Any]) -> Workflow | None:
    """Return the workflow in an answer of `GET /apis/v1beta1/runs/ID`; None if it has none."""
    manifest = (answer.get("pipeline_runtime") or {}).get("workflow_manifest")
    return None if manifest is None else parse_workflow(manifest)


def parse_workflow(manifest: str) -> Workflow | None:
    """Parse a workflow in JSON.

    Returns:
        The workflow; None if the text is not a workflow.
    """
    try:
        content = json.loads(manifest or "{}")
        metadata, status = content.get("metadata") or {}, content.get("status") or {}
        repository = (status.get("artifactRepositoryRef") or {}).get("artifactRepository") or {}
        return Workflow(
            name=metadata.get("name") or "",
            namespace=metadata.get("namespace") or "",
            nodes=tuple(map(_node, (status.get("nodes") or {}).values())),
            created=_time(metadata.get("creationTimestamp")),
            log_archive=(repository.get("s3") or {}) if repository.get("archiveLogs") else {},
        )
    except (ValueError, TypeError, AttributeError):
        return None


def _node(content: dict[str, Any]) -> Node:
    inputs = (content.get("inputs") or {}).get("parameters") or []
    return Node(
        id=content.get("id") or "",
        name=content.get("name") or "",
        kind=content.get("type") or "",
        phase=content.get("phase") or "",
        message=" ".join((content.get("message") or "").split()),
        started=_time(content.get("startedAt")),
        ended=_time(content.get("finishedAt")),
        template=content.get("templateName") or "",
        parameters={p["name"]: str(p.get("value", "")) for p in inputs if "name" in p},
    )


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _order(node: Node) -> tuple[datetime, str]:
    # Nodes that have not started sort last.
    return node.started or datetime.max.replace(tzinfo=UTC), node.name
