"""The pipeline of `doctor --run`: for each kind of step, a small pod checks what such a step needs.

A pod has its step's image, account, secrets, volumes, node selector, tolerations and queue, but few resources
and at most one GPU.
"""

import copy
import json
from dataclasses import asdict
from pathlib import Path

from kfp import dsl
from kfp.compiler import Compiler

from pipelines.cluster import Cluster
from pipelines.package_check import check_package
from pipelines.placement import place, placement
from slam_asr import __version__
from slam_asr.stages.check_pod import PodCheck
from slam_asr.steps import STEPS
from slam_asr.version import source_digest

NAME = "slam-asr-doctor"
DESCRIPTION = "Check in a pod of each step whether it has what it needs: `python -m pipelines doctor --run`."
CHECKED = tuple(name for name, step in STEPS.items() if not step.settings_of)
"""Steps with settings of their own, which are the steps of the training pipeline.

`run_view` must list the same steps for this pipeline. It recognises a pipeline by the beginning of the
workflow's name, so it takes `slam-asr-doctor-…` for a workflow of the training pipeline, `slam-asr`.
"""
_MINUTES = 10
"""Time limit in minutes of a pod, a TrainJob and each of its pods."""


# The base image is a placeholder: `place` gives each task the image of its step.
@dsl.component(base_image="python", install_kfp_package=False)
def check_pod(request: str, findings: dsl.Output[dsl.Markdown]) -> None:
    """Check from inside a pod what a step needs there.

    Args:
        request: A `PodCheck` in JSON.
        findings: One line for each check.
    """
    import json
    from pathlib import Path

    try:
        from slam_asr.stages.check_pod import check_pod as run
    except ImportError:
        submitter = json.loads(request)["version"]
        lines = [
            f"✗ image: it has no slam_asr, or one that is older than yours, {submitter}: build and push the "
            "images again with `make images REGISTRY=… TAG=… PUSH=1`."
        ]
        print(lines[0])
    else:
        lines = [finding.line() for finding in run(request)]
    # An empty line between two findings, because Markdown joins the lines of a paragraph.
    Path(findings.path).write_text("\n\n".join(lines), encoding="utf-8")


def write_package(
    cluster: Cluster, images: dict[str, str], output: Path, namespace: str, nodes: int = 1
) -> Path:
    """Write the pipeline's YAML for a cluster, and check its consistency.

    Args:
        cluster: the profile.
        images: image of each step.
        output: the file.
        namespace: namespace of the runs, for the pods' messages.
        nodes: number of pods of a TrainJob that the step `train` starts; with 1, it starts no TrainJob.

    Returns:
        `output`.

    Raises:
        PackageDefect: the compiled pipeline is inconsistent.
    """
    pods = small(cluster)
    trainjob = placement(pods, images["train"]) if nodes > 1 else ""
    source = source_digest()

    def request(step: str) -> str:
        check = PodCheck(
            step=step,
            namespace=namespace,
            version=__version__,
            source=source,
            store=cluster.storage.store,
            secret=cluster.storage.secret,
            claim=cluster.models.claim,
            # The steps with torch load the models.
            hub=STEPS[step].torch != "none" and not cluster.models.offline,
            gpus=pods.steps[step].gpus,
            nodes=nodes,
            trainjob=trainjob if step == "train" else "",
        )
        return json.dumps(asdict(check))

    @dsl.pipeline(name=NAME, display_name="SLAM-ASR: doctor", description=DESCRIPTION)
    def doctor() -> None:
        for step in CHECKED:
            # kfp names a task, its executor and its node in the workflow after the component, and `status`
            # and `logs` know steps by these names.
            component = copy.deepcopy(check_pod)
            component.name = component.component_spec.name = step
            task = component(request=request(step))
            task.set_caching_options(False)
            place(pods, images, step, task, by_trainjob=step == "train" and nodes > 1)

    output.parent.mkdir(parents=True, exist_ok=True)
    Compiler().compile(doctor, str(output))
    check_package(output, images)
    return output


def small(cluster: Cluster) -> Cluster:
    """Return the profile with few resources for each step, one GPU at most, no retries and a short limit."""
    copied = copy.deepcopy(cluster)
    for name in CHECKED:
        step = copied.steps[name]
        step.gpus = min(1, step.gpus)
        # All pods fit at once on a node of two cores. With a GPU, importing torch takes most of the memory.
        step.cpu, step.memory = "200m", "4Gi" if step.gpus else "1Gi"
        step.shared_memory, step.scratch = "", "1Gi"
        step.retries, step.timeout_hours = 0, _MINUTES / 60
    copied.trainer.timeout_hours = _MINUTES / 60
    return copied
