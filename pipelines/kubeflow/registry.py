"""Check through a registry's HTTP API whether images exist and can be pulled without a login."""

import json
import re
from collections.abc import Collection, Iterable

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
    "credentials of their own"
)
_NO_REGISTRY = (
    "cannot be found by the nodes, except on Docker Hub, because the name has no registry: "
    "load with `make images LOAD=kind`, or push with `make images REGISTRY=… PUSH=1` and give --images "
    "build/images.yaml."
)


def check_images(images: Iterable[str], loaded: Collection[str] | None = None) -> list[Finding]:
    """Check that images exist, without pulling them. Images with the same result share a finding.

    Args:
        images: names of the images, each with a tag or a digest; without either, the tag is `latest`.
        loaded: names of the images that the cluster's nodes have already; None if that is unknown.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    for image in images:
        alike.setdefault(_check_image(image, loaded), []).append(image)
    return [Finding(sign, _subject(sign, names), detail) for (sign, detail), names in alike.items()]


def _subject(sign: str, images: list[str]) -> str:
    """Name the images of a finding; of several good ones, only the number is of interest."""
    if len(images) == 1:
        return f"image {images[0]}"
    return f"{len(images)} images" if sign == GOOD else f"images {', '.join(images)}"


def _check_image(image: str, loaded: Collection[str] | None) -> tuple[str, str]:
    """Return the sign and the detail of the finding about an image; the detail fits several images too."""
    registry, _, rest = image.partition("/")
    # A node puts its default registry before a name without one. On Docker Hub, a name without a slash is in
    # `library`.
    prefixes = ("", "docker.io/", "docker.io/library/", "localhost/")
    if {prefix + image for prefix in prefixes} & set(loaded or ()):
        return GOOD, "loaded into the nodes"
    if not has_registry(image):
        return UNKNOWN if loaded is None else BAD, _NO_REGISTRY
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
                return UNKNOWN, _LOGIN_REQUIRED
            answer = pool.request("HEAD", address, headers=headers | {"Authorization": f"Bearer {token}"})
    except urllib3.exceptions.HTTPError as error:
        return UNKNOWN, f"could not be checked, because the registry does not answer ({type(error).__name__})"
    if answer.status == 200:
        return GOOD, "found, and can be pulled without a login"
    if answer.status in (401, 403):
        return UNKNOWN, _LOGIN_REQUIRED
    if answer.status == 404:
        return BAD, (
            "not found in the registry: push with `make images REGISTRY=… TAG=… PUSH=1`, or correct "
            "images.names."
        )
    return UNKNOWN, f"could not be checked: the registry answers {answer.status}"


def has_registry(image: str) -> bool:
    """Return whether an image's name begins with a registry."""
    # Docker's own rule: the first part of a name is a registry if it looks like a host or has a port.
    first, slash, _ = image.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == "localhost")


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
