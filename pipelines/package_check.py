"""Checks the consistency of a compiled pipeline, to find errors that would otherwise appear when it runs.

kfp's own check validates the keys of the YAML, but not its references. This module looks up every
producer, output, parameter, component and image, and checks that each step has Kubernetes settings.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import yaml
from google.protobuf import json_format
from google.protobuf.message import Message
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

Kind = Literal["parameters", "artifacts"]
_KINDS: tuple[Kind, ...] = ("parameters", "artifacts")


class PackageDefect(Exception):
    """The compiled pipeline is inconsistent: a defect of this project, not an error of its user."""


def read_package(
    path: Path,
) -> tuple[
    pipeline_spec_pb2.PipelineSpec, dict[str, kubernetes_executor_config_pb2.KubernetesExecutorConfig]
]:
    """Read a compiled pipeline: its specification, and the Kubernetes settings by executor label.

    Raises:
        PackageDefect: a key is unknown, or a value has the wrong type.
    """
    # kfp writes the second document only if there are Kubernetes settings.
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    platforms = documents[1]["platforms"] if len(documents) > 1 else {}
    executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    try:
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        settings = {
            name: json_format.ParseDict(values, kubernetes_executor_config_pb2.KubernetesExecutorConfig())
            for name, values in executors.items()
        }
    except json_format.ParseError as error:
        raise PackageDefect(f"{path}: {error}") from error
    return spec, settings


def check_package(path: Path, images: dict[str, str]) -> None:
    """Check a compiled pipeline's references, required inputs, images and Kubernetes settings.

    Args:
        path: the pipeline's YAML.
        images: expected image of each step.

    Raises:
        PackageDefect: something is missing or wrong; the message lists every defect.
    """
    spec, settings = read_package(path)
    executors = dict(spec.deployment_spec["executors"].items())
    defects = list(_dag_defects(spec, "root", spec.root))
    for name, component in spec.components.items():
        if component.HasField("dag"):
            defects += _dag_defects(spec, name, component)
        elif component.executor_label not in executors:
            defects.append(f"{name} has no executor {component.executor_label}")
    for label, executor in executors.items():
        step = label.removeprefix("exec-")  # kfp names an executor after its component
        if executor["container"]["image"] != images.get(step):
            defects.append(f"{label} runs in {executor['container']['image']}, not in {images.get(step)}")
        if label not in settings:
            defects.append(f"{label} has no Kubernetes settings")
    defects += [
        f"Kubernetes settings for {label}, which does not exist"
        for label in settings
        if label not in executors
    ]
    if defects:
        raise PackageDefect(f"{path}: {'; '.join(defects)}")


def _dag_defects(
    spec: pipeline_spec_pb2.PipelineSpec, name: str, component: pipeline_spec_pb2.ComponentSpec
) -> Iterator[str]:
    """Check the references of a graph's tasks and outputs."""
    tasks = component.dag.tasks
    graph_inputs = component.input_definitions
    for task_name, task in tasks.items():
        where = f"{name}.{task_name}"
        used = spec.components.get(task.component_ref.name)
        if used is None:
            yield f"{where} uses the component {task.component_ref.name}, which does not exist"
            continue
        yield from (
            f"{where} waits for {other}, which does not exist"
            for other in task.dependent_tasks
            if other not in tasks
        )
        # A loop over a constant list has `raw` here, and nothing to look up.
        items = task.parameter_iterator.items.input_parameter
        if items and items not in task.inputs.parameters:
            yield f"{where} iterates over {items}, which is not among its inputs"
        for kind in _KINDS:
            inputs, known = getattr(task.inputs, kind), getattr(used.input_definitions, kind)
            yield from (
                f"{where} passes {key}, which {task.component_ref.name} does not accept"
                for key in inputs
                if key not in known
            )
            for key, definition in known.items():
                optional = definition.is_optional or (
                    kind == "parameters" and definition.HasField("default_value")
                )
                # A loop itself provides its item, so the task does not list it among its inputs.
                if key not in inputs and not optional and key != task.parameter_iterator.item_input:
                    yield f"{where} lacks its input {key}"
            for key, source in inputs.items():
                yield from _source_defects(spec, tasks, graph_inputs, f"{where}.{key}", kind, source)
    for kind in _KINDS:
        for key, output in getattr(component.dag.outputs, kind).items():
            selectors = output.artifact_selectors if kind == "artifacts" else [output.value_from_parameter]
            for selector in selectors:
                yield from _output_defects(
                    spec,
                    tasks,
                    f"{name}'s output {key}",
                    kind,
                    selector.producer_subtask,
                    getattr(selector, f"output_{kind.removesuffix('s')}_key"),
                )


def _source_defects(
    spec: pipeline_spec_pb2.PipelineSpec,
    tasks: Mapping[str, pipeline_spec_pb2.PipelineTaskSpec],
    graph_inputs: pipeline_spec_pb2.ComponentInputsSpec,
    where: str,
    kind: Kind,
    source: Message,
) -> Iterator[str]:
    """Check the source of one input of a task: another task's output, or an input of the graph."""
    single = kind.removesuffix("s")
    # If the field is not set, protobuf returns an empty message, whose producer is "".
    produced = getattr(source, f"task_output_{single}")
    if produced.producer_task:
        yield from _output_defects(
            spec, tasks, where, kind, produced.producer_task, getattr(produced, f"output_{single}_key")
        )
    passed = getattr(source, f"component_input_{single}")
    if passed and passed not in getattr(graph_inputs, kind):
        yield f"{where} comes from {passed}, which is not among the graph's inputs"


def _output_defects(
    spec: pipeline_spec_pb2.PipelineSpec,
    tasks: Mapping[str, pipeline_spec_pb2.PipelineTaskSpec],
    where: str,
    kind: Kind,
    producer: str,
    key: str,
) -> Iterator[str]:
    """Check that a task and its output exist."""
    if producer not in tasks:
        yield f"{where} comes from {producer}, which does not exist"
        return
    component = spec.components.get(tasks[producer].component_ref.name)
    if component is None or key not in getattr(component.output_definitions, kind):
        yield f"{where} comes from {producer}'s output {key}, which does not exist"
