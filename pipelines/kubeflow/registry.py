"""Check through a registry's HTTP API whether an image exists and can be pulled without a login."""

import json
import re
from collections.abc import Collection

import urllib3

from slam_asr.findings import BAD, GOOD, UNKNOWN, Finding

_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
"""Accepted kinds of manifests. A registry may answer 404 for an image of a kind that is not accepted."""


_LOGIN_REQUIRED = (
    "could not be checked, because the registry requires a login: the nodes need images.pull_secrets, or "
    "credentials of their own."
)


def check_image(step: str, image: str, loaded: Collection[str] | None = None) -> Finding:
    """Check that a step's image exists, without pulling it.

    Args:
        step: name of the step, for the message.
        image: name of the image, with a tag or a digest; without either, the tag is `latest`.
        loaded: names of the images that the cluster's nodes have already; None if that is unknown.
    """
    subject = f"image {image}"
    registry, slash, rest = image.partition("/")
    # A node puts its default registry before a name without one. On Docker Hub, a name without a slash is in
    # `library`.
    prefixes = ("", "docker.io/", "docker.io/library/", "localhost/")
    if {prefix + image for prefix in prefixes} & set(loaded or ()):
        return Finding(GOOD, subject, "is loaded into the nodes")
    if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
        return Finding(
            UNKNOWN if loaded is None else BAD,
            subject,
            f"the image of {step} has no registry in its name, so nodes look for it on Docker Hub: "
            "load it into the nodes (`make images LOAD=kind`), or push it (`make images REGISTRY=… PUSH=1`) "
            "and name it with its registry.",
        )
    name, _, reference = rest.partition("@") if "@" in rest else rest.rpartition(":")
    # If the name has neither a tag nor a digest, rpartition returns all of it as the last part.
    if not name:
        name, reference = rest, "latest"
    # Docker does the same: it speaks plain HTTP to a registry on its own machine.
    scheme = "http" if re.match(r"(localhost|127\.)", registry) else "https"
    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=15), retries=1)
    address, headers = f"{scheme}://{registry}/v2/{name}/manifests/{reference}", {"Accept": _MANIFESTS}
    try:
        answer = pool.request("HEAD", address, headers=headers)
        if answer.status == 401:
            token = _anonymous_token(pool, answer.headers.get("www-authenticate", ""))
            if token is None:
                return Finding(UNKNOWN, subject, _LOGIN_REQUIRED)
            answer = pool.request("HEAD", address, headers=headers | {"Authorization": f"Bearer {token}"})
    except urllib3.exceptions.HTTPError as error:
        return Finding(UNKNOWN, subject, f"its registry does not answer ({type(error).__name__})")
    if answer.status == 200:
        return Finding(GOOD, subject, "exists, and can be pulled without a login")
    if answer.status in (401, 403):
        return Finding(UNKNOWN, subject, _LOGIN_REQUIRED)
    if answer.status == 404:
        return Finding(
            BAD,
            subject,
            "does not exist: push it with `make images REGISTRY=… TAG=… PUSH=1`, or correct images.names.",
        )
    return Finding(UNKNOWN, subject, f"the registry answers {answer.status}")


def _anonymous_token(pool: urllib3.PoolManager, challenge: str) -> str | None:
    """Return the token that the registry gives to anonymous users, or None if it gives none.

    Args:
        pool: sends the request.
        challenge: the header WWW-Authenticate of the registry's answer 401, which names the token server.
    """
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if not challenge.lower().startswith("bearer") or "realm" not in fields:
        return None
    answer = pool.request("GET", fields.pop("realm"), fields=fields)
    try:
        content = json.loads(answer.data) if answer.status == 200 else {}
    except ValueError:
        return None
    return content.get("token") or content.get("access_token")
