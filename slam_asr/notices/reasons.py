"""Explains the messages of Kubernetes and Argo: what happened to a step's pod, and what to do about it.

Both give reasons only as text, so this module matches the text. Some of the messages are those that a real
Kubeflow Pipelines 2.17.0 gave; these are in the tests. The others are from the sources of Kubernetes and of
Argo.
"""

import re

from slam_asr.notices.workflow import Node, Workflow
from slam_asr.steps import STEPS

_EXPLANATIONS = {
    # Pods that Kubernetes refuses to create.
    r'service ?account "(?P<account>[^"]+)" not found': (
        "the service account {account} does not exist in the namespace {namespace}: apply the manifests to "
        "that namespace (docs/how-to/cluster-setup.md), or correct service_account in the profile"
    ),
    r"exceeded quota: (?P<quota>[^,]+),(?P<numbers>.*)": (
        "the namespace's quota {quota} is used up ({numbers}): wait for other runs to end, raise the quota, "
        "or lower steps.{key} in the profile"
    ),
    r"(?P<limit>(maximum|minimum) \w+ usage per \w+ is [^,.]+)": (
        "the namespace's LimitRange refuses the pod ({limit}): correct steps.{key} in the profile, or the "
        "LimitRange"
    ),
    r"violates PodSecurity \"(?P<level>[^\"]+)\"": (
        "the pod security level {level} of the namespace refuses the pod: use the backend of Kubeflow "
        "Pipelines 2.16 or later, or enforce `baseline` (docs/how-to/cluster-setup.md)"
    ),
    r"admission webhook \"(?P<webhook>[^\"]+)\" denied the request: (?P<words>.*)": (
        "the cluster's admission webhook {webhook} refuses the pod: {words}"
    ),
    # Pods that wait for a node.
    r"persistentvolumeclaim \"(?P<claim>[^\"]+)\" not found": (
        "for its volume | the volume {claim} does not exist in the namespace {namespace}: apply the "
        "manifests, or correct models.claim in the profile"
    ),
    r"unbound immediate PersistentVolumeClaims": (
        "for its volume | a volume has no storage: check the storage class of the claim in models.claim "
        "(`kubectl get pvc -n {namespace}`)"
    ),
    r"Insufficient (?P<resource>[\w.-]+/[\w-]+(\.[\w-]+)*)": (
        "for a GPU | no node has enough free {resource}: wait for other pods to end, or lower "
        "steps.{key}.gpus in the profile"
    ),
    r"Insufficient (?P<resource>cpu|memory|ephemeral-storage|pods)": (
        "for a node | no node has enough free {resource}: wait for other pods to end, add a node, or lower "
        "steps.{key} in the profile"
    ),
    r"untolerated taint(\(s\))? (?P<taint>\{[^}]*\})": (
        "for a node | every suitable node has a taint {taint}: name it in steps.{key}.tolerations of the "
        "profile"
    ),
    r"untolerated taint": (
        "for a node | every suitable node has a taint: name it in steps.{key}.tolerations of the profile "
        "(`kubectl describe nodes` shows taints)"
    ),
    r"didn't match Pod's node affinity/selector": (
        "for a node | no node has the labels of steps.{key}.node_selector: correct them in the profile"
    ),
    r"^(SchedulingGated|Scheduling is blocked)": (
        "in its Kueue queue | Kueue has not admitted the pod: `kubectl describe localqueue -n {namespace}` "
        "shows the queue"
    ),
    r"^Unschedulable": (
        "for a node | no node can run the pod: correct steps.{key} in the profile, or add a node"
    ),
    # Pods that cannot start on their node.
    r"(ImagePullBackOff|ErrImagePull).*(unauthorized|denied|authentication required|403|401)": (
        "for its image | the registry refuses the image to the nodes: name a secret with its login in "
        "images.pull_secrets of the profile"
    ),
    r"(ImagePullBackOff|ErrImagePull|ErrImageNeverPull|InvalidImageName|ImageInspectError)": (
        "for its image | its image cannot be pulled: push it (`make images REGISTRY=… PUSH=1`), load it into "
        "the nodes, or correct images.names in the profile"
    ),
    r"secret \"(?P<secret>[^\"]+)\" not found": (
        "for its secret | the secret {secret} does not exist in the namespace {namespace}: create it "
        "(docs/how-to/cluster-setup.md)"
    ),
    r"configmap \"(?P<name>[^\"]+)\" not found": (
        "for its configuration | the ConfigMap {name} does not exist in the namespace {namespace}: apply the "
        "manifests to it"
    ),
    r"(MountVolume|AttachVolume|Unable to attach or mount volumes)": (
        "for its volume | a volume cannot be mounted: `kubectl get events -n {namespace}` shows why"
    ),
    r"CreateContainer(Config)?Error|RunContainerError|StartError": (
        "for its container | its container cannot be created: `kubectl get events -n {namespace}` shows why"
    ),
    r"exec format error": (
        "its image was built for another processor architecture than that of its node: build the image for "
        "the node's architecture"
    ),
    r"^(ContainerCreating|PodInitializing)": "to start | its containers are being created",
    # Pods that ended.
    r"OOMKilled|exit code 137": (
        "it needed more memory than its limit (OOMKilled): raise steps.{key}.memory in the profile, or use "
        "smaller batches; `slam-asr plan` estimates what training needs"
    ),
    r"low on resource: (?P<resource>[\w-]+)": (
        "its node ran short of {resource} and evicted it: raise steps.{key}.scratch or memory in the profile"
    ),
    r"Evicted": (
        "its node evicted it, usually for lack of memory or disk: raise steps.{key}.memory or scratch in the "
        "profile"
    ),
    r"deadline|DeadlineExceeded": (
        "it ran longer than steps.{key}.timeout_hours of the profile permits (for training on several nodes: "
        "trainer.timeout_hours): raise it"
    ),
    r"pod deleted": "its pod was deleted, with its node or by somebody",
    r"(?i)preempt": "its pod was preempted by one of higher priority",
    r"(?i)node ?(lost|shutdown|is shutting down)|NodeNotReady|Terminated by node": (
        "its node was lost or shut down"
    ),
    r"exit code 143": "it was asked to end (SIGTERM), by a node that is drained or by somebody",
    r"exit code 2\b": "the program refused its input (exit code 2): `{logs}` shows its error message",
    r"exit code (?P<code>\d+)": "the program failed (exit code {code}): `{logs}` shows why",
}
"""What happened and what to do, by the pattern of a message; the first pattern that matches counts.

If the pod has not started, the text begins with what it waits for, and ` | `. Names in braces stand for the
pattern's groups, and for `namespace`, `key` and `logs` (see `explain`).
"""


def explain(message: str, step: str, namespace: str, run_id: str) -> str:
    """Explain what a message means, and what to do.

    Args:
        message: message of Kubernetes or Argo about a step's pod.
        step: name of the step, for the keys in the profile.
        namespace: namespace of the run.
        run_id: id of the run, for the command that shows its logs.

    Returns:
        The explanation, without a full stop; or, if no pattern matches, the message itself, cut to 300
        characters.
    """
    found = _find(message)
    if found is None:
        return _short(message)
    _, sentence, groups = found
    return sentence.format(
        namespace=namespace,
        # Some steps use the settings of another one.
        key=(STEPS[step].settings_of or step if step in STEPS else step).replace("-", "_"),
        logs=f"python -m pipelines logs {run_id} --step {step}",
        **groups,
    )


def waits_for(message: str) -> str:
    """Return what a pod with this message waits for, such as `for a node`; empty if that is unknown."""
    found = _find(message)
    return found[0] if found else ""


def explain_wait(message: str, step: str, namespace: str, run_id: str) -> str:
    """Explain what a pod waits for, and what to do; the arguments are those of `explain`."""
    reason, purpose = explain(message, step, namespace, run_id), waits_for(message)
    # The scheduler's first sentence has the reason; those after it are about preemption.
    own_words = message.removeprefix("Unschedulable: ").split(". ")[0][:200]
    return f"{purpose}: {reason} ({own_words})" if purpose else reason


def failure_of(workflow: Workflow, run_id: str) -> tuple[str, str]:
    """Return the first step that failed, and why it failed.

    Args:
        workflow: the run's workflow.
        run_id: id of the run, for the commands in the reason.

    Returns:
        The name of the step, and the reason without a full stop, which is empty if Argo gave none. If no step
        failed, but a driver did: the task that it was to prepare, and the reason. Both are empty if nothing
        failed.
    """
    for nodes in workflow.attempts().values():
        last = nodes[-1]
        if last.phase in ("Failed", "Error"):
            why = explain(last.reason, last.task, workflow.namespace, run_id) if last.reason else ""
            return last.task, why
    for driver in workflow.failed_drivers():
        return driver.task, why_driver_failed(driver, workflow.namespace, run_id)
    return "", ""


def why_driver_failed(node: Node, namespace: str, run_id: str) -> str:
    """Explain why a driver failed. A driver is a pod of Kubeflow's own that prepares a task."""
    # All steps of a pipeline with a notice are in one group, which kfp names `exit-handler-1`.
    subject = "the pipeline" if node.task in ("root", "exit-handler") else f"the step {node.task}"
    cause = node.reason or "it gave no reason"
    # If the driver's own program failed, Argo reports only the exit code, and the reason is in the pod's log.
    if _find(cause) and not re.search(r"exit code [12]\b", cause):
        return explain(cause, node.task, namespace, run_id)
    return (
        f"Kubeflow's driver could not prepare {subject} ({_short(cause)}): `python -m pipelines doctor` "
        f"checks what it needs, and `python -m pipelines logs {run_id} --all` shows its log"
    )


def _find(message: str) -> tuple[str, str, dict[str, str]] | None:
    """Return what the pod waits for, the sentence, and the pattern's groups; None if no pattern matches."""
    for pattern, text in _EXPLANATIONS.items():
        if match := re.search(pattern, message):
            waits, _, sentence = text.rpartition(" | ")
            return waits, sentence, {k: " ".join((v or "").split()) for k, v in match.groupdict().items()}
    return None


def _short(message: str) -> str:
    return message[:300].rstrip(". ")
