"""Does a compiled pipeline hang together? What would otherwise show only when it runs.

kfp's own check of the YAML knows the keys, but not whether a task that is named exists. Here every
producer, output, parameter, component and image is looked up, and each step has its settings of
Kubernetes.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2


class PackageDefect(Exception):
    """The compiled pipeline contradicts itself: a defect of this project, not of its user."""


def read_package(
    path: Path,
) -> tuple[
    pipeline_spec_pb2.PipelineSpec, dict[str, kubernetes_executor_config_pb2.KubernetesExecutorConfig]
]:
    """The two documents of a compiled pipeline: its specification, and each executor's settings of Kubernetes.

    Raises:
        PackageDefect: a key that does not exist, or a value of the wrong type.
    """
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
    """Look up everything that a compiled pipeline refers to.

    Args:
        path: its YAML.
        images: the image of each stage.

    Raises:
        PackageDefect: naming all that is missing.
    """
    spec, settings = read_package(path)
    executors = dict(spec.deployment_spec["executors"].items())
    complaints = list(_complaints_of_dag(spec, "root", spec.root))
    for name, component in spec.components.items():
        if component.HasField("dag"):
            complaints += _complaints_of_dag(spec, name, component)
        elif component.executor_label not in executors:
            complaints.append(f"{name} has no executor {component.executor_label}")
    for label, executor in executors.items():
        stage = label.removeprefix("exec-")
        if executor["container"]["image"] != images.get(stage):
            complaints.append(f"{label} runs in {executor['container']['image']}, not in {images.get(stage)}")
        if label not in settings:
            complaints.append(f"{label} has no settings of Kubernetes")
    complaints += [
        f"settings of Kubernetes for {label}, which does not exist"
        for label in settings
        if label not in executors
    ]
    if complaints:
        raise PackageDefect(f"{path}: {'; '.join(complaints)}")


def _complaints_of_dag(
    spec: pipeline_spec_pb2.PipelineSpec, name: str, component: pipeline_spec_pb2.ComponentSpec
) -> Iterator[str]:
    """What is missing of what a graph's tasks, and its outputs, refer to."""
    tasks = component.dag.tasks
    given = component.input_definitions
    for task_name, task in tasks.items():
        where = f"{name}.{task_name}"
        wanted = spec.components.get(task.component_ref.name)
        if wanted is None:
            yield f"{where} uses the component {task.component_ref.name}, which does not exist"
            continue
        yield from (
            f"{where} waits for {other}, which does not exist"
            for other in task.dependent_tasks
            if other not in tasks
        )
        items = task.parameter_iterator.items.input_parameter
        if items and items not in task.inputs.parameters:
            yield f"{where} goes over {items}, which it is not given"
        for kind in ("parameters", "artifacts"):
            inputs, known = getattr(task.inputs, kind), getattr(wanted.input_definitions, kind)
            yield from (
                f"{where} is given {key}, which {task.component_ref.name} does not take"
                for key in inputs
                if key not in known
            )
            for key, definition in known.items():
                optional = definition.is_optional or (
                    kind == "parameters" and definition.HasField("default_value")
                )
                if key not in inputs and not optional and key != task.parameter_iterator.item_input:
                    yield f"{where} lacks its input {key}"
            for key, source in inputs.items():
                yield from _complaints_of_source(spec, tasks, given, f"{where}.{key}", kind, source)
    for kind, key_of in (("parameters", "output_parameter_key"), ("artifacts", "output_artifact_key")):
        for key, output in getattr(component.dag.outputs, kind).items():
            selectors = output.artifact_selectors if kind == "artifacts" else [output.value_from_parameter]
            for selector in selectors:
                yield from _complaints_of_output(
                    spec,
                    tasks,
                    f"{name}'s output {key}",
                    kind,
                    selector.producer_subtask,
                    getattr(selector, key_of),
                )


def _complaints_of_source(spec, tasks, given, where: str, kind: str, source) -> Iterator[str]:
    """What is missing behind one input of a task: a producer and its output, or an input of the graph."""
    single = kind.removesuffix("s")
    produced = getattr(source, f"task_output_{single}", None)
    if produced is not None and produced.producer_task:
        yield from _complaints_of_output(
            spec, tasks, where, kind, produced.producer_task, getattr(produced, f"output_{single}_key")
        )
    passed = getattr(source, f"component_input_{single}")
    if passed and passed not in getattr(given, kind):
        yield f"{where} comes from {passed}, which the graph is not given"


def _complaints_of_output(spec, tasks, where: str, kind: str, producer: str, key: str) -> Iterator[str]:
    """What is missing of an output of a task."""
    if producer not in tasks:
        yield f"{where} comes from {producer}, which does not exist"
        return
    component = spec.components.get(tasks[producer].component_ref.name)
    if component is None or key not in getattr(component.output_definitions, kind):
        yield f"{where} comes from {producer}'s output {key}, which does not exist"
