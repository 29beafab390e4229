"""The owner of a TrainJob: the run's Argo workflow. When the workflow is deleted, Kubernetes deletes the job.

The step itself deletes its job at the end, but it cannot do so if it is killed without notice, for example
because its node is lost or memory runs out. The owner is the workflow and not the step's pod, because the
next attempt at the step runs in another pod and continues to follow the job.
"""

import os
from typing import Any

from kubernetes.client import ApiException
from urllib3.exceptions import HTTPError

from slam_asr.progress import log_line

POD_NAME = "KFP_POD_NAME"
"""Environment variable with the name of the step's own pod; Kubeflow Pipelines sets it."""
TRAINER_API = ("trainer.kubeflow.org", "v1alpha1")
"""Group and version of the API for TrainJobs and their runtimes."""


def owner_of_this_step(core_api: Any, namespace: str) -> dict[str, str] | None:
    """Return a reference to the controller of this step's pod or, if the pod has none, to the pod itself.

    The reference does not block the owner's deletion, because that would need a right to the owner's
    finalizers.

    Args:
        core_api: client of the Kubernetes API.
        namespace: namespace of the step's pod, in which the job must be too. Otherwise, Kubernetes would take
            the owner for deleted, and delete the job at once.

    Returns:
        The reference. None outside Kubeflow Pipelines; None also if the pod cannot be read, which is logged.
    """
    name = os.environ.get(POD_NAME)
    if not name:
        return None
    try:
        pod = core_api.read_namespaced_pod(name, namespace)
    except (ApiException, HTTPError) as error:
        reason = getattr(error, "reason", None) or error
        log_line(
            f"the pod {name} of this step cannot be read ({reason}), so the TrainJob gets no owner: "
            "if the step is killed, delete the job by hand"
        )
        return None
    for owner in pod.metadata.owner_references or []:
        if owner.controller:
            return {"apiVersion": owner.api_version, "kind": owner.kind, "name": owner.name, "uid": owner.uid}
    return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.metadata.uid}


def add_owner(custom_api: Any, namespace: str, job: str, owner: dict[str, str]) -> None:
    """Add an owner to another run's job, so that the job survives the deletion of that run's workflow.

    Args:
        custom_api: client of the Kubernetes API for custom objects.
        namespace: namespace of the job.
        job: name of the TrainJob.
        owner: reference to the owner, as from `owner_of_this_step`.

    Raises:
        ApiException: the API refuses a request.
        HTTPError: the API does not answer.
    """
    metadata = custom_api.get_namespaced_custom_object(*TRAINER_API, namespace, "trainjobs", job)["metadata"]
    owners = metadata.get("ownerReferences") or []
    # A job without an owner needs none: no workflow's deletion deletes it.
    if owners and owner["uid"] not in [known["uid"] for known in owners]:
        # The patch replaces the complete list of owners. With the resource version, the API refuses the patch
        # if the job has changed since it was read, so no other owner is lost.
        change = {"ownerReferences": [*owners, owner], "resourceVersion": metadata.get("resourceVersion")}
        custom_api.patch_namespaced_custom_object(
            *TRAINER_API, namespace, "trainjobs", job, {"metadata": change}
        )
