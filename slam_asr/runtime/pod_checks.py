"""Checks of what a pod can reach and use: host names, object storage, the models' folder, and GPUs.

Each check returns a finding. If something is wrong, its sentence says what, where, and what to do.
"""

import contextlib
import importlib.util
import os
import secrets
import socket
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from slam_asr.errors import StorageError, UserError
from slam_asr.findings import BAD, GOOD, Finding
from slam_asr.storage import delete, exists, join, parent_of, read_bytes, walk, write_bytes
from slam_asr.storage.client import client


def storage_address() -> str:
    """Return the address that requests to object storage go to; empty if no client can be created."""
    from botocore.exceptions import BotoCoreError

    # `check_store` explains why there is no client.
    with contextlib.suppress(UserError, BotoCoreError):
        return str(client().meta.endpoint_url)
    return ""


def check_name(address: str, purpose: str, remedy: str) -> Finding:
    """Check that the host of an address can be looked up or, if a proxy is set for it, the proxy's host.

    Args:
        address: URL.
        purpose: what answers at the address, for the message.
        remedy: what to do if the host cannot be looked up, for the message.
    """
    url = urlsplit(address)
    host = url.hostname or ""
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        # A proxy may be given as a bare host:port.
        host = urlsplit(proxy if "://" in proxy else f"//{proxy}").hostname or ""
        purpose, remedy = f"the proxy to {purpose}", f"correct {url.scheme.upper()}_PROXY in the profile"
    try:
        # Only the name is looked up. If the server does not answer, later requests fail with a message of
        # their own.
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a valid name"
        return Finding(
            BAD,
            f"name {host}",
            f"{purpose} cannot be looked up in this pod ({reason}): {remedy}, or check the cluster's DNS and "
            "network policies (`kubectl get networkpolicy`).",
        )
    return Finding(GOOD, f"name {host}", f"resolves ({purpose})")


def check_store(store: str, remedy: str) -> Finding:
    """Check that this pod may write, read, list and remove an object in the store.

    Args:
        store: folder or s3:// prefix.
        remedy: where the pod's access rights come from; this ends the message about a failure.
    """
    subject = f"store {store}"
    # Random, because the pods of several steps check the same store at once.
    path = join(store, f".doctor-{secrets.token_hex(8)}", "object")
    content = b"slam-asr checks what it may do here\n"
    try:
        write_bytes(path, content)
        if read_bytes(path) != content:
            raise StorageError(f"{path} does not contain what was written to it: look for a cache or proxy.")
        if "object" not in [info.name for info in walk(parent_of(path))]:
            raise StorageError(f"{path} was written but is not listed: the store must list objects at once.")
        delete(path)
        if exists(path):
            raise StorageError(f"{path} cannot be removed: switch off the bucket's object lock.")
    except (UserError, OSError) as error:
        with contextlib.suppress(UserError, OSError):
            delete(path)
        return Finding(BAD, subject, f"{str(error).rstrip('.')}; {remedy}.")
    return Finding(GOOD, subject, "can be written, read and listed, and objects can be removed")


def check_folder(folder: Path, subject: str, remedy: str, if_refused: str) -> Finding:
    """Check that this process's user may write to a folder.

    Args:
        folder: the folder.
        subject: what the folder is for, as the finding's subject.
        remedy: what to do if the folder cannot be written, for the message.
        if_refused: what to do if the user lacks the right, for the message.
    """
    user = os.geteuid()
    try:
        # Not `os.access`, which knows neither quotas nor the rights that a file server grants.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"slam-asr checks whether it can write here\n")
            file.flush()
    except PermissionError as error:
        return Finding(
            BAD, subject, f"user {user} is not allowed to write to {folder} ({error.strerror}): {if_refused}."
        )
    except OSError as error:
        return Finding(BAD, subject, f"{folder} cannot be written ({error.strerror}): {remedy}.")
    return Finding(GOOD, subject, f"user {user} may write to it")


def check_gpus(expected: int, key: str) -> Finding:
    """Check that torch sees as many GPUs as the pod requests.

    Args:
        expected: number of GPUs that the pod requests.
        key: the step's key in the cluster profile, such as `steps.train`, for the message.
    """
    if importlib.util.find_spec("torch") is None:
        return Finding(BAD, "GPUs", f"the image has no torch: set {key}.gpus to 0.")
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return Finding(
            BAD,
            "GPUs",
            "torch in this image is a build for CPUs: build the image with `make images TORCH=cuda`, or set "
            f"{key}.gpus to 0.",
        )
    count = torch.cuda.device_count()
    if count < expected:
        return Finding(
            BAD,
            "GPUs",
            f"torch sees {count} of {expected}: check the node's driver and device plugin (`kubectl describe "
            f"node`), and that {key}.gpu_resource names such GPUs.",
        )
    return Finding(GOOD, "GPUs", f"torch sees {count}: {torch.cuda.get_device_name(0)}")
