"""A real Kubeflow, used as people use it: with `python -m pipelines`, and with kubectl only to delete pods.

The environment variable SLAM_ASR_CLUSTER names the profile; without it, these tests are skipped.
docs/how-to/cluster-test.md describes what else they need.
"""

import copy
import functools
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster import load_cluster, shipped_clusters
from slam_asr.storage import delete, join, read_bytes, upload, walk

CHECKOUT = Path(__file__).resolve().parents[2]
PROFILE, IMAGES = "SLAM_ASR_CLUSTER", "SLAM_ASR_CLUSTER_IMAGES"
STEPS = ("build-manifest", "extract-features", "train", "convert-checkpoint", "decode", "score")
CHECKPOINTS = ["--training.checkpoint_every", "5"]
"""Recipe keys of the runs that are compared: the demo takes 40 steps, and a checkpoint every few steps lets
an interrupted training run resume in the middle. Checkpoints change no loss."""
PATIENCE = 3600.0
"""Maximum time in seconds until a run has the state that a test needs. On two cores, an earlier and larger
demo took 17 minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests without a cluster."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(3 * PATIENCE))
            if not os.environ.get(PROFILE):
                item.add_marker(pytest.mark.skip(reason=f"needs a cluster: set {PROFILE} to its profile"))


@dataclass
class Answer:
    """The exit code of a command, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return (self.out.splitlines() or [""])[-1]


@dataclass
class RealCluster:
    """A cluster, and the commands with which a person uses it."""

    profile: str
    folder: Path
    store: str
    """Prefix in the bucket for everything that the tests write."""
    images: str = field(default_factory=lambda: os.environ.get(IMAGES, ""))

    @property
    def corpus(self) -> str:
        return join(self.store, "corpus")

    def command(self, *arguments: str, profile: str = "") -> Answer:
        """Run `python -m pipelines …` to its end, with the cluster's profile."""
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *arguments, "--cluster", profile or self.profile],
            cwd=CHECKOUT,
            # Programs start cold, as they do for users (see tests/warm).
            env={name: value for name, value in os.environ.items() if name != "SLAM_ASR_WARM"},
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    def doctor(self, *options: str) -> Answer:
        return self.command("doctor", *options, *self._images())

    def submit(self, *options: str, store: str = "store", corpus: str = "", profile: str = "") -> Answer:
        """Submit the demo, with its results in a folder of the tests' own prefix."""
        named = () if "--images" in options else self._images()
        places = ["--corpus", corpus or self.corpus, "--store", join(self.store, store)]
        return self.command("submit", "demo", *places, *named, *options, profile=profile)

    def changed_profile(self, change: Callable[[dict[str, Any]], None]) -> str:
        """Write a changed copy of the profile, and return its path."""
        source = shipped_clusters().get(self.profile) or Path(self.profile)
        values = copy.deepcopy(yaml.safe_load(source.read_bytes()) or {})
        change(values)
        path = self.folder / f"profile-{secrets.token_hex(4)}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def until(self, run_id: str, pattern: str) -> str:
        """Request a run's status until one of its lines matches; return the status."""
        return self._wait(
            lambda: (
                answer.out
                if re.search(pattern, (answer := self.command("status", run_id)).out, re.MULTILINE)
                else self._require_unfinished(run_id, answer.out)
            ),
            f"status of {run_id} never matched {pattern!r}",
        )

    def until_written(self, store: str, name: str) -> str:
        """Wait until a store has an object whose name ends with `name`; return its address."""
        root = join(self.store, store)

        def find() -> str:
            return next((join(root, info.name) for info in walk(root) if info.name.endswith(name)), "")

        return self._wait(find, f"{root} never had an object {name}")

    def delete_pod(self, run_id: str, step: str) -> None:
        """Delete the pod of a step, as happens when its node is drained."""
        selector = f"pipeline/runid={run_id},app.kubernetes.io/component={step}"
        command = ["kubectl", "-n", self.namespace, "delete", "pod", "-l", selector]
        done = subprocess.run(
            [*command, "--field-selector", "status.phase=Running"], capture_output=True, text=True
        )
        assert done.returncode == 0 and "deleted" in done.stdout, done.stdout + done.stderr

    @functools.cached_property
    def namespace(self) -> str:
        """The namespace of the runs, as doctor reports it."""
        found = re.search(r"^\S runs in (\S+):", self.command("doctor").out, re.MULTILINE)
        assert found, "doctor did not name the namespace of the runs"
        return found[1]

    def record(self, store: str, stage: str) -> dict[str, Any]:
        """Return the record of the only result of a stage in a store."""
        root = join(self.store, store, stage)
        [name] = [info.name for info in walk(root) if info.name.endswith("stage.json")]
        return json.loads(read_bytes(join(root, name)))

    def losses(self, store: str) -> list[float]:
        """Return the loss of each step of the only training run in a store."""
        root = join(self.store, store, "train")
        [name] = [i.name for i in walk(root) if i.name.endswith("curve.jsonl") and i.name.count("/") == 1]
        rows = [json.loads(line) for line in read_bytes(join(root, name)).splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    def _images(self) -> list[str]:
        return ["--images", self.images] if self.images else []

    def _require_unfinished(self, run_id: str, status: str) -> str:
        ended = re.search(r"^(the run (succeeded|failed)|somebody stopped the run)", status, re.MULTILINE)
        assert not ended, status
        return ""

    def _wait(self, result: Callable[[], str], failure: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := result():
                return found
            time.sleep(2)
        raise AssertionError(failure)


def run_id_of(answer: Answer) -> str:
    """Return the id of the run that `submit` started."""
    found = re.search(r"^run (\S+):", answer.out, re.MULTILINE)
    assert found, answer.out + answer.err
    return found[1]


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """The cluster, with the demo's speech in its bucket. At the end, the tests' prefix is emptied."""
    profile = os.environ[PROFILE]
    store = load_cluster(profile).storage.store
    assert store, f"{profile} has no storage.store, where the tests write"
    folder = tmp_path_factory.mktemp("cluster")
    made = RealCluster(profile, folder, join(store, f"cluster-test-{secrets.token_hex(4)}"))
    speech = CHECKOUT / "demo" / "speech"
    for info in walk(speech):
        upload(speech / info.name, join(made.corpus, info.name))
    yield made
    for info in list(walk(made.store)):
        delete(join(made.store, info.name))


@pytest.fixture(scope="session")
def demo(real: RealCluster) -> str:
    """The id of an undisturbed run of the complete demo, whose results are in the store `store`."""
    answer = real.submit(*CHECKPOINTS, "--wait")
    assert answer.code == 0 and answer.last == "the run succeeded", answer.out + answer.err
    return run_id_of(answer)


@pytest.fixture(scope="session")
def disturbed(real: RealCluster) -> str:
    """The id of another run of the demo, with its own store. The tests disturb it one after another."""
    return run_id_of(real.submit(*CHECKPOINTS, store="disturbed"))
