"""Is an image in its registry, and may anybody pull it? Asked by the registry's own HTTP API."""

import json
import re

import urllib3

from pipelines.kubeflow.findings import BAD, GOOD, UNKNOWN, Finding

_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)


def look_at_image(stage: str, image: str) -> Finding:
    """Look for a stage's image, without pulling it."""
    what = f"image {image}"
    registry, slash, rest = image.partition("/")
    if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
        return Finding(
            BAD,
            what,
            f"has no registry, so that nodes look for it on Docker Hub: push it (`make images REGISTRY=… PUSH=1`) and name it with its registry; it is {stage}'s.",
        )
    name, _, reference = rest.partition("@") if "@" in rest else rest.rpartition(":")
    if not name:
        name, reference = rest, "latest"
    scheme = "http" if re.match(r"(localhost|127\.)", registry) else "https"
    pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5, read=15), retries=1)
    address, headers = f"{scheme}://{registry}/v2/{name}/manifests/{reference}", {"Accept": _MANIFESTS}
    try:
        answer = pool.request("HEAD", address, headers=headers)
        if answer.status == 401:
            token = _anonymous(pool, answer.headers.get("www-authenticate", ""))
            if token is None:
                return Finding(
                    UNKNOWN,
                    what,
                    "the registry asks who pulls; not looked at. The nodes need images.pull_secrets, or credentials of their own.",
                )
            answer = pool.request("HEAD", address, headers=headers | {"Authorization": f"Bearer {token}"})
    except urllib3.exceptions.HTTPError as error:
        return Finding(UNKNOWN, what, f"its registry does not answer from here ({type(error).__name__})")
    if answer.status == 200:
        return Finding(GOOD, what, "is in its registry, and anybody may pull it")
    if answer.status in (401, 403):
        return Finding(
            UNKNOWN,
            what,
            "the registry asks who pulls; not looked at. The nodes need images.pull_secrets, or credentials of their own.",
        )
    if answer.status == 404:
        return Finding(
            BAD,
            what,
            "is not in its registry: `make images REGISTRY=… TAG=… PUSH=1`, or correct images.names.",
        )
    return Finding(UNKNOWN, what, f"the registry answers {answer.status}")


def _anonymous(pool: urllib3.PoolManager, challenge: str) -> str | None:
    """The token that a registry gives to everybody, if it does."""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if not challenge.lower().startswith("bearer") or "realm" not in asked:
        return None
    answer = pool.request("GET", asked.pop("realm"), fields=asked)
    try:
        given = json.loads(answer.data) if answer.status == 200 else {}
    except ValueError:
        return None
    return given.get("token") or given.get("access_token")
