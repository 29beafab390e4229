"""Checks the consistency of a compiled pipeline, to find errors that would otherwise appear when it runs.

kfp's own check validates the keys of the YAML, but not its references. This module looks up every
producer, output, parameter, component and image, and checks that each step has Kubernetes settings.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import yaml
from google.protobuf import json_format
from google.protobuf.message import Message
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import ComponentSpec, PipelineSpec, PipelineTaskSpec

Kind = Literal["parameter", "artifact"]
_KINDS: tuple[Kind, ...] = ("parameter", "artifact")


class PackageDefect(Exception):
    """The compiled pipeline is inconsistent: a defect of this project, not an error of its user."""


def read_package(path: Path) -> tuple[PipelineSpec, dict[str, KubernetesExecutorConfig]]:
    """Read a compiled pipeline: its specification, and the Kubernetes settings by executor label.

    Raises:
        PackageDefect: a key is unknown, or a value has the wrong type.
    """
    # kfp writes the second document only if there are Kubernetes settings.
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    platforms = documents[1]["platforms"] if len(documents) > 1 else {}
    executors = platforms.get("kubernetes", {}).get("deploymentSpec", {}).get("executors", {})
    try:
        spec = json_format.ParseDict(documents[0], PipelineSpec())
        settings = {
            name: json_format.ParseDict(values, KubernetesExecutorConfig())
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
    defects = list(_Graph(spec, "root", spec.root).defects())
    for name, component in spec.components.items():
        if component.HasField("dag"):
            defects += _Graph(spec, name, component).defects()
        elif component.executor_label not in executors:
            defects.append(f"{name} has no executor {component.executor_label}")
    for label, executor in executors.items():
        step = label.removeprefix("exec-")  # kfp names an executor after its component
        if executor["container"]["image"] != images.get(step):
            defects.append(f"{label} runs in {executor['container']['image']}, not in {images.get(step)}")
        if label not in settings:
            defects.append(f"{label} has no Kubernetes settings")
    unknown = [label for label in settings if label not in executors]
    defects += [f"Kubernetes settings for {label}, which does not exist" for label in unknown]
    if defects:
        raise PackageDefect(f"{path}: {'; '.join(defects)}")


class _Graph:
    """The pipeline, or a group of tasks within it: checks what its tasks and outputs refer to."""

    def __init__(self, spec: PipelineSpec, name: str, component: ComponentSpec) -> None:
        self.components, self.name, self.inputs = spec.components, name, component.input_definitions
        self.tasks, self.outputs = component.dag.tasks, component.dag.outputs

    def defects(self) -> Iterator[str]:
        for name, task in self.tasks.items():
            yield from self._defects_of_task(f"{self.name}.{name}", task)
        for key, output in self.outputs.parameters.items():
            yield from self._defects_of_output(key, "parameter", output.value_from_parameter)
        for key, output in self.outputs.artifacts.items():
            for selector in output.artifact_selectors:
                yield from self._defects_of_output(key, "artifact", selector)

    def _defects_of_output(self, output: str, kind: Kind, selector: Message) -> Iterator[str]:
        where, key = f"{self.name}'s output {output}", getattr(selector, f"output_{kind}_key")
        yield from self._defects_of_reference(where, kind, selector.producer_subtask, key)

    def _defects_of_task(self, where: str, task: PipelineTaskSpec) -> Iterator[str]:
        name = task.component_ref.name
        used = self.components.get(name)
        if used is None:
            yield f"{where} uses the component {name}, which does not exist"
            return
        missing = [other for other in task.dependent_tasks if other not in self.tasks]
        yield from (f"{where} waits for {other}, which does not exist" for other in missing)
        # A loop over a constant list has `raw` here, and nothing to look up.
        items = task.parameter_iterator.items.input_parameter
        if items and items not in task.inputs.parameters:
            yield f"{where} iterates over {items}, which is not among its inputs"
        for kind in _KINDS:
            inputs, known = getattr(task.inputs, f"{kind}s"), getattr(used.input_definitions, f"{kind}s")
            unknown = [key for key in inputs if key not in known]
            yield from (f"{where} passes {key}, which {name} does not accept" for key in unknown)
            for key, definition in known.items():
                has_default = kind == "parameter" and definition.HasField("default_value")
                # A loop itself provides its item, so the task does not list it among its inputs.
                given = key in inputs or key == task.parameter_iterator.item_input
                if not (given or definition.is_optional or has_default):
                    yield f"{where} lacks its input {key}"
            for key, source in inputs.items():
                yield from self._defects_of_source(f"{where}.{key}", kind, source)

    def _defects_of_source(self, where: str, kind: Kind, source: Message) -> Iterator[str]:
        """Check the source of one input of a task: another task's output, or an input of the graph."""
        # If the field is not set, protobuf returns an empty message, whose producer is "".
        produced = getattr(source, f"task_output_{kind}")
        if produced.producer_task:
            key = getattr(produced, f"output_{kind}_key")
            yield from self._defects_of_reference(where, kind, produced.producer_task, key)
        passed = getattr(source, f"component_input_{kind}")
        if passed and passed not in getattr(self.inputs, f"{kind}s"):
            yield f"{where} comes from {passed}, which is not among the graph's inputs"

    def _defects_of_reference(self, where: str, kind: Kind, producer: str, key: str) -> Iterator[str]:
        """Check that a task and its output exist."""
        if producer not in self.tasks:
            yield f"{where} comes from {producer}, which does not exist"
            return
        component = self.components.get(self.tasks[producer].component_ref.name)
        if component is None or key not in getattr(component.output_definitions, f"{kind}s"):
            yield f"{where} comes from {producer}'s output {key}, which does not exist"
