"""Draw a compiled pipeline as Kubeflow's dashboard shows it.

Nodes and edges follow the dashboard's own rules (frontend/src/lib/v2/StaticFlow.ts of kubeflow/pipelines):
each task and each of its artifacts is a node. Edges lead from a task to its artifacts, from an artifact to
the tasks that read it, and from a task to the tasks that wait for it. The arrangement is our own: tasks one
below the other, artifacts that later tasks read on the left, artifacts for people on the right. If no later
task reads any of a task's artifacts, these are divided between the two sides.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import yaml

WIDTH, HEIGHT = 150, 30
"""Size of a node in pixels."""
_GAP, _ROW = 16, 78
"""Pixels between two nodes of a row, and from one row to the next."""
_FRAME = 10
"""Pixels between a loop's task and its frame."""

_STYLE = """
  .page { fill: #f1f1f1; } .node { fill: #ffffff; stroke: #e3e3e3; } .expand { fill: #fff; stroke: #d0d3d6; }
  .frame { fill: none; stroke: #b9bdc2; stroke-dasharray: 4 3; } text { fill: #3c4043; text-anchor: middle; }
  .edge { fill: none; stroke: #b3b3b3; stroke-width: 1.2; marker-end: url(#tip); }
  .list { fill: none; stroke: #1a73e8; stroke-width: 1.6; } .folder { fill: #f9a825; }
"""


@dataclass
class _Task:
    """A task of the graph, with its artifacts."""

    name: str
    is_loop: bool
    artifacts: dict[str, str]
    """Label of each artifact, keyed by the artifact's key."""
    waits_for: set[str]
    """Keys of the tasks that must end before this one starts."""
    reads: set[tuple[str, str]] = field(default_factory=set)
    """Artifacts that the task reads: the key of the task that made each, and the artifact's key."""


def draw(package: Path) -> str:
    """Draw the outermost layer of a compiled pipeline as an SVG image."""
    spec = next(yaml.safe_load_all(package.read_text(encoding="utf-8")))
    tasks = _tasks(spec)
    read = {pair for task in tasks.values() for pair in task.reads}
    nodes: list[str] = []
    places: dict[tuple[str, str], tuple[float, float]] = {}
    for row, (key, task) in enumerate(tasks.items()):
        top = 40 + 2 * row * _ROW
        places[key, ""] = (0, top)
        nodes += _task_node(task, top)
        for artifact, x in _columns(task, key, read):
            places[key, artifact] = (x, top + _ROW)
            nodes += _artifact_node(task.artifacts[artifact], x, top + _ROW)
    edges = [_edge(places[start], places[end]) for start, end in _edges(tasks)]
    left = min(x for x, _ in places.values()) - WIDTH / 2 - 40
    right = max(x for x, _ in places.values()) + WIDTH / 2 + 30
    bottom = max(y for _, y in places.values()) + HEIGHT + 30
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:g} 0 {right - left:g} {bottom:g}" '
            'role="img" aria-labelledby="t d" '
            'font-family="Roboto, system-ui, \'Liberation Sans\', sans-serif" font-size="11.5">',
            f'<title id="t">The graph of {escape(spec["pipelineInfo"]["name"])} in the dashboard</title>',
            f'<desc id="d">{escape(_described(tasks))}</desc>',
            f"<style>{_STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="#b3b3b3"/></marker></defs>',
            f'<rect class="page" x="{left:g}" y="0" width="{right - left:g}" height="{bottom:g}"/>',
            *edges,
            *nodes,
            "</svg>",
        ]
    )


def _tasks(spec: dict[str, Any]) -> dict[str, _Task]:
    """Return the tasks of the outermost layer by their keys, each after all that it waits for."""
    unsorted = {}
    for key, task in spec["root"]["dag"]["tasks"].items():
        component = spec["components"][task["componentRef"]["name"]]
        selectors = component.get("dag", {}).get("outputs", {}).get("artifacts", {})
        inputs = task.get("inputs", {})
        unsorted[key] = _Task(
            task["taskInfo"]["name"],
            "parameterIterator" in task,
            {
                # A loop's output has a name such as `pipelinechannel--decode-hypotheses`. The dashboard shows
                # the name that the output has inside the loop: `hypotheses`.
                artifact: selectors[artifact]["artifactSelectors"][0]["outputArtifactKey"]
                if artifact in selectors
                else artifact
                for artifact in component.get("outputDefinitions", {}).get("artifacts", {})
            },
            set(task.get("dependentTasks", []))
            | {
                value["taskOutputParameter"]["producerTask"]
                for value in inputs.get("parameters", {}).values()
                if "taskOutputParameter" in value
            },
            {
                (
                    value["taskOutputArtifact"]["producerTask"],
                    value["taskOutputArtifact"]["outputArtifactKey"],
                )
                for value in inputs.get("artifacts", {}).values()
                if "taskOutputArtifact" in value
            },
        )
    tasks: dict[str, _Task] = {}
    # Each round adds the tasks whose predecessors were added; a pipeline has no cycle, so the loop ends.
    while len(tasks) < len(unsorted):
        tasks |= {k: t for k, t in unsorted.items() if k not in tasks and t.waits_for <= tasks.keys()}
    return tasks


def _edges(tasks: dict[str, _Task]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Yield each edge as two nodes: a task's key and an artifact's, which is empty for the task itself."""
    for key, task in tasks.items():
        yield from (((key, ""), (key, artifact)) for artifact in task.artifacts)
        yield from ((pair, (key, "")) for pair in sorted(task.reads))
        yield from (((other, ""), (key, "")) for other in sorted(task.waits_for))


def _columns(task: _Task, key: str, read: set[tuple[str, str]]) -> Iterator[tuple[str, float]]:
    """Yield each artifact with its x coordinate. The middle is left free for the edge to the next task."""
    passed_on = [artifact for artifact in task.artifacts if (key, artifact) in read]
    others = [artifact for artifact in task.artifacts if (key, artifact) not in read]
    if not passed_on:
        passed_on, others = others[: len(others) // 2], others[len(others) // 2 :]
    step = WIDTH + _GAP
    yield from ((artifact, -step * (n + 0.5)) for n, artifact in enumerate(reversed(passed_on)))
    yield from ((artifact, step * (n + 0.5)) for n, artifact in enumerate(others))


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (to_x, to_y) = (start[0], start[1] + HEIGHT), end
    bend = min(40.0, (to_y - y) / 2)
    rows = round((end[1] - start[1]) / _ROW)
    # An edge to a task further down passes to the left of the nodes between.
    bow = 0 if rows <= 2 else WIDTH * 1.6 + 22 * rows
    bend = bend if rows <= 2 else _ROW
    return (
        f'<path class="edge" d="M{x:g} {y:g}C{x - bow:g} {y + bend:g} {to_x - bow:g} {to_y - bend:g} '
        f'{to_x:g} {to_y:g}"/>'
    )


def _box(x: float, top: float) -> str:
    return f'<rect class="node" x="{x - WIDTH / 2:g}" y="{top:g}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>'


def _label(text: str, x: float, top: float) -> str:
    return f'<text x="{x + 10:g}" y="{top + 19:g}">{escape(text)}</text>'


def _task_node(task: _Task, top: float) -> Iterator[str]:
    if task.is_loop:
        yield (
            f'<rect class="frame" x="{-WIDTH / 2 - _FRAME:g}" y="{top - _FRAME:g}" '
            f'width="{WIDTH + 2 * _FRAME}" height="{HEIGHT + 2 * _FRAME}" rx="4"/>'
        )
    yield _box(0, top)
    left = -WIDTH / 2 + 9
    yield f'<path class="list" d="M{left:g} {top + 9:g}h13v13h-13zM{left + 3:g} {top + 13:g}h7m-7 5h7"/>'
    yield _label(task.name, 0, top)
    if task.is_loop:
        yield f'<circle class="expand" cx="{WIDTH / 2 + _FRAME:g}" cy="{top + HEIGHT / 2:g}" r="6"/>'


def _artifact_node(label: str, x: float, top: float) -> Iterator[str]:
    yield _box(x, top)
    yield f'<path class="folder" d="M{x - WIDTH / 2 + 8:g} {top + 9:g}h6l2 2h7v10h-15z"/>'
    yield _label(label, x, top)


def _described(tasks: dict[str, _Task]) -> str:
    steps = [f"{task.name} ({', '.join(task.artifacts.values())})" for task in tasks.values()]
    return f"The steps from top to bottom, each with its artifacts: {', '.join(steps)}."
