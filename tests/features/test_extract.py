"""Extraction computes the same audio only once, and an interruption loses no finished shard.

The bytes of shards do not depend on the number of processes and runs that wrote them, nor on the storage.
"""

import dataclasses
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from slam_asr.artifacts.feature_store.namespace import namespaces_in
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.utterances import manifest_files
from slam_asr.audio import load_audio
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.stages.extract_features import extract_features
from slam_asr.storage import delete, read_bytes, walk, write_bytes
from tests.conftest import make_tone, write_wav
from tests.features.conftest import LENGTHS, utterances_in
from tests.utterances import write_manifest

STORES, KILLS = (20, 3) if os.environ.get("SLAM_ASR_SOAK") else (1, 2)
"""Number of stores that are filled by killed runs, and number of runs that are killed for each store."""


@pytest.fixture
def manifest(tmp_path):
    """Write a manifest; return its path, and its utterances without the one that repeats another's audio."""
    utterances = utterances_in(tmp_path)
    duplicate = dataclasses.replace(utterances[0], key="the same audio again")
    write_manifest(tmp_path / "manifest.jsonl", [*utterances, duplicate])
    return tmp_path / "manifest.jsonl", utterances


def recipe(tiny_models, **overrides):
    return load_recipe(
        "librispeech", {"encoder.name": tiny_models["encoder"], "features.dtype": "fp32", **overrides}
    )


SMALL = {"encoder.frames": "all", "features.shard_megabytes": 1, "encoder.batch_seconds": 60}
"""Options for small shards: 1 MB holds ten windows of the tiny encoder in fp32."""


def contents(store) -> dict[str, bytes]:
    """Read every file of a store except the records, which contain times, and the locks."""
    return {
        f.name: read_bytes(f"{store}/{f.name}")
        for f in walk(str(store))
        if not f.name.endswith(("stage.json", ".lock"))
    }


@pytest.mark.parametrize("frames", ["all", "speech"])
def test_frames_cover_the_window_or_the_speech(tiny_models, manifest, tmp_path, frames):
    record = extract_features(
        recipe(tiny_models, **{"encoder.frames": frames}), [str(manifest[0])], str(tmp_path / "store")
    )
    store = FeatureStore(record.folder)
    assert len(store.index) == len(LENGTHS) == record.metrics["utterances"]
    for utterance in manifest[1]:
        samples = round(utterance.duration * 16000)
        assert store.index.entry(store.find(utterance.sha256)).frames == (
            1500 if frames == "all" else math.ceil(samples / 320)
        )


def test_speech_frames_are_the_first_of_the_complete_window(tiny_models, manifest, tmp_path):
    stores = [
        FeatureStore(
            extract_features(
                recipe(tiny_models, **{"encoder.frames": f}), [str(manifest[0])], str(tmp_path / f)
            ).folder
        )
        for f in ("all", "speech")
    ]
    for utterance in manifest[1]:
        complete, speech = (s.read(utterance) for s in stores)
        torch.testing.assert_close(complete[: len(speech)], speech)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_features_do_not_depend_on_the_batch(tiny_models, manifest, tmp_path, dtype):
    options = recipe(tiny_models, **{"encoder.batch_seconds": 120, "features.dtype": dtype})
    store = FeatureStore(extract_features(options, [str(manifest[0])], str(tmp_path / "store")).folder)
    encoder = describe_encoder(options.encoder).load(torch.float32)
    for utterance in manifest[1]:
        alone = encoder.encode([encoder.prepare(load_audio(utterance.source))])[0]
        relative = {"fp32": 1e-4, "bf16": 2**-7, "fp8": 2**-3}[dtype]
        torch.testing.assert_close(
            store.read(utterance).float(), alone, rtol=relative, atol=1e-5 if dtype == "fp32" else 0.02
        )


def test_a_second_extraction_does_nothing(tiny_models, manifest, tmp_path, capsys):
    first = extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))
    assert extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store")) == first
    assert "already there, nothing to do" in capsys.readouterr().out


def test_only_new_audio_is_computed(tiny_models, manifest, tmp_path):
    extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))
    before = contents(tmp_path / "store")
    new = utterances_in(tmp_path, (0.5, 0.6), first=10)
    renamed = [dataclasses.replace(u, key=f"other-{u.key}") for u in manifest[1]]
    write_manifest(tmp_path / "more.jsonl", [*renamed, *new])
    record = extract_features(recipe(tiny_models), [str(tmp_path / "more.jsonl")], str(tmp_path / "store"))
    assert (record.metrics["new utterances"], record.metrics["utterances"]) == (2, 6)
    after = contents(tmp_path / "store")
    assert before.items() <= after.items()
    assert sum("shards/" in name for name in after) == 2
    store = FeatureStore(record.folder)
    assert all(len(store.read(u)) for u in [*manifest[1], *new])


def test_audio_in_two_manifests_of_one_command_is_saved_once(tiny_models, manifest, tmp_path):
    extra = utterances_in(tmp_path, (0.5,), first=10)
    write_manifest(tmp_path / "dev.jsonl", [dataclasses.replace(manifest[1][1], key="duplicate"), *extra])
    record = extract_features(
        recipe(tiny_models), [str(manifest[0]), str(tmp_path / "dev.jsonl")], str(tmp_path / "store")
    )
    assert record.metrics["new utterances"] == len(LENGTHS) + 1
    [namespace] = namespaces_in(str(tmp_path / "store"))
    saved = sum(len(namespace.read_index(namespace.index_path(name))) for name in namespace.index_names())
    assert saved == len(LENGTHS) + 1


def test_no_key_can_write_outside_the_store(tiny_models, tmp_path):
    utterances = utterances_in(tmp_path / "audio")
    keys = ["a/b/../../../../../escaped", str(tmp_path / "absolute"), "..", "ü ß 漢 " + "k" * 2000]
    for utterance, key in zip(utterances, keys, strict=True):
        utterance.key = key
    write_manifest(tmp_path / "manifest.jsonl", utterances)
    extract_features(recipe(tiny_models), [str(tmp_path / "manifest.jsonl")], str(tmp_path / "in" / "store"))
    assert {p.name for p in tmp_path.iterdir()} == {"audio", "in", "manifest.jsonl"}
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["store"]
    store = FeatureStore(str(tmp_path / "in" / "store"))
    assert all(len(store.read(utterance)) for utterance in utterances)


def test_a_changed_encoder_never_reads_old_features(tiny_models, manifest, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_models["encoder"], other)
    weights = load_file(other / "model.safetensors")
    weights["encoder.conv1.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    records = [
        extract_features(
            recipe(tiny_models, **{"encoder.name": str(name)}), [str(manifest[0])], str(tmp_path / "store")
        )
        for name in (tiny_models["encoder"], other)
    ]
    assert all(r.metrics["new utterances"] == len(LENGTHS) for r in records)
    one, two = (
        FeatureStore(
            str(tmp_path / "store"),
            describe_encoder(recipe(tiny_models, **{"encoder.name": str(n)}).encoder).fingerprint(),
        )
        for n in (tiny_models["encoder"], other)
    )
    assert not torch.equal(one.read(manifest[1][2]), two.read(manifest[1][2]))


@pytest.fixture
def undisturbed(tiny_models, many, tmp_path):
    """Return the contents of a store that one uninterrupted process filled."""
    extract_features(recipe(tiny_models, **SMALL), [str(many)], str(tmp_path / "undisturbed"))
    return contents(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("work_shards", [2, 7])
def test_work_shards_fill_the_store_with_the_same_shards(
    tiny_models, many, undisturbed, tmp_path, work_shards
):
    store = tmp_path / "store"
    for number in reversed(range(work_shards)):
        record = extract_features(
            recipe(tiny_models, **SMALL), [str(many)], str(store), f"{number + 1}/{work_shards}"
        )
    shards = {n: c for n, c in undisturbed.items() if "/shards/" in n}
    assert {n: c for n, c in contents(store).items() if "/shards/" in n} == shards and len(shards) == 5
    assert len(FeatureStore(record.folder).index) == 50


@pytest.mark.slow
def test_several_processes_fill_the_store_with_the_same_bytes(tiny_models, many, undisturbed, tmp_path):
    extract_features(
        recipe(tiny_models, **SMALL, **{"features.processes": 2}), [str(many)], str(tmp_path / "store")
    )
    assert contents(tmp_path / "store").keys() == undisturbed.keys()
    assert contents(tmp_path / "store") == undisturbed


def test_a_store_in_object_storage_has_the_same_bytes(tiny_models, many, undisturbed, bucket):
    record = extract_features(recipe(tiny_models, **SMALL), [str(many)], "s3://bucket/store")
    assert contents("s3://bucket/store") == undisturbed
    assert record.folder.startswith("s3://bucket/store/") and len(FeatureStore(record.folder).index) == 50


def test_lost_shards_and_indexes_are_computed_again(tiny_models, many, undisturbed, tmp_path, capsys):
    store = tmp_path / "store"
    record = extract_features(recipe(tiny_models, **SMALL), [str(many)], str(store))
    for kind in ("shards", "indexes"):
        lost = sorted(n for n in undisturbed if f"/{kind}/" in n)[0]
        delete(store / lost)
        with pytest.raises(UserError, match="run `slam-asr extract-features`"):
            FeatureStore(record.folder)
        extract_features(recipe(tiny_models, **SMALL), [str(many)], str(store))
        assert "the store has lost some" in capsys.readouterr().out
        assert contents(store) == undisturbed


def test_shards_finished_before_an_interruption_are_not_computed_again(
    tiny_models, many, undisturbed, tmp_path, monkeypatch
):
    from slam_asr.features import encode

    published = []

    def dying(self, shard, features, spans, real=encode.ShardWriter._publish):
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(shard.number)
        real(self, shard, features, spans)

    monkeypatch.setattr(encode.ShardWriter, "_publish", dying)
    with pytest.raises(KeyboardInterrupt):
        extract_features(recipe(tiny_models, **SMALL), [str(many)], str(tmp_path / "store"))
    with pytest.raises(UserError, match="no index"):
        FeatureStore(str(tmp_path / "store"))
    times = {f.name: f.stamp for f in walk(str(tmp_path / "store")) if "/shards/" in f.name}
    assert len(times) == 2
    monkeypatch.undo()
    extract_features(recipe(tiny_models, **SMALL), [str(many)], str(tmp_path / "store"))
    assert times.items() <= {f.name: f.stamp for f in walk(str(tmp_path / "store"))}.items()
    assert contents(tmp_path / "store") == undisturbed


def command(options: dict, manifest: Path, store) -> list[str]:
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return [
        sys.executable,
        "-m",
        "slam_asr",
        "extract-features",
        "--recipe",
        "librispeech",
        "--manifests",
        f"[{manifest}]",
        "--output",
        str(store),
        *arguments,
    ]


def run_to_the_end(options, manifest, store, **environment) -> None:
    done = subprocess.run(
        command(options, manifest, store), capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.cold
def test_a_store_has_the_same_bytes_after_runs_that_were_killed_at_any_moment(
    tiny_models, many, tmp_path, warmth
):
    options = {"encoder.name": tiny_models["encoder"], "features.dtype": "fp32", **SMALL}
    # Only the runs that are killed must start cold, because the test looks at their child processes.
    run_to_the_end(options, many, tmp_path / "undisturbed", **warmth)
    expected = contents(tmp_path / "undisturbed")
    total = _shards_in(tmp_path / "undisturbed")
    moments = random.Random(0)
    killed = 0
    for number in range(STORES):
        store = tmp_path / f"store-{number}"
        # Several runs are killed, each when it has come further than the one before; then a run finishes. The
        # moments are counted in shards instead of seconds, because the time of a start varies.
        for reached in sorted(moments.sample(range(total), KILLS)):
            run = subprocess.Popen(
                command(options, many, store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            children = _children_until(run, store, reached)
            time.sleep(moments.uniform(0, 0.1))
            killed += run.poll() is None
            run.send_signal(signal.SIGKILL)
            run.wait()
            _require_ended(children)
        run_to_the_end(options, many, store, **warmth)
        assert contents(store) == expected, f"store {number}"
    assert killed >= STORES, "most runs ended before they could be killed"


def _shards_in(store: Path) -> int:
    return sum("/shards/" in f.name for f in walk(str(store))) if store.exists() else 0


def _children_until(run: subprocess.Popen, store: Path, shards: int) -> list[psutil.Process]:
    """Wait until a run's store has this many shards; return the run's descendants, or none if it ended."""
    while run.poll() is None:
        # The shards are counted first, because a search for children reads the state of every process.
        if _shards_in(store) >= shards and (children := psutil.Process(run.pid).children(recursive=True)):
            return children
        time.sleep(0.05)
    return []


def _require_ended(children: list[psutil.Process]) -> None:
    """Check that the processes that a killed run started end by themselves."""
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, f"still running: {alive}"


@pytest.mark.slow
def test_two_extractors_at_once_fill_one_store(tiny_models, many, tmp_path, bucket):
    options = {"encoder.name": tiny_models["encoder"], "features.dtype": "fp32", **SMALL}
    run_to_the_end(options, many, tmp_path / "undisturbed")
    # The two runs differ as on two machines: clocks a year apart, other host names and caches, and no common
    # lock. A program whose file name ends with `_program.py` starts warm (see tests/warm).
    elsewhere = tmp_path / "elsewhere_program.py"
    elsewhere.write_text(
        "import runpy, socket, sys, time\n"
        "if __name__ == '__main__':  # workers that read audio import this file too\n"
        "    node, real = int(sys.argv.pop(1)), time.time\n"
        "    time.time = lambda: real() + node * 3e7\n"
        "    socket.gethostname = lambda: f'node-{node}'\n"
        "    runpy.run_module('slam_asr', run_name='__main__')\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, str(elsewhere), str(i), *command(options, many, "s3://bucket/store")[3:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"SLAM_ASR_CACHE": str(tmp_path / f"cache-{i}"), "TZ": zone},
        )
        for i, zone in enumerate(("UTC", "Asia/Tokyo"))
    ]
    for run in both:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    assert contents("s3://bucket/store") == contents(tmp_path / "undisturbed")


def test_extraction_resumes_after_a_full_disk(tiny_models, many, undisturbed, tmp_path):
    disk = tmp_path / "small disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs root, to mount a small disk and fill it")
    try:
        with pytest.raises(OSError, match="No space left"):
            extract_features(recipe(tiny_models, **SMALL), [str(many)], str(disk / "store"))
        with pytest.raises(UserError, match="no index"):
            FeatureStore(str(disk / "store"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        extract_features(recipe(tiny_models, **SMALL), [str(many)], str(disk / "store"))
        assert contents(disk / "store") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nothing_is_saved_if_the_recipe_does_not_cache_features(tiny_models, manifest, tmp_path):
    for options, why in (
        (recipe(tiny_models, **{"features.cache": "none"}), "features: none"),
        (recipe(tiny_models, **{"encoder.tuning": "full"}), "trained too"),
    ):
        record = extract_features(options, [str(manifest[0])], str(tmp_path / "store"))
        assert why in record.summary
        assert [f.name.rpartition("/")[2] for f in walk(record.folder)] == ["stage.json"]


def test_audio_that_differs_from_its_manifest_is_refused(tiny_models, manifest, tmp_path):
    write_wav(tmp_path / "2.wav", np.zeros(16000, np.float32))
    with pytest.raises(UserError, match=r"2\.wav was changed since"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))


def test_missing_audio_is_named(tiny_models, manifest, tmp_path):
    (tmp_path / "2.wav").unlink()
    with pytest.raises(UserError, match=r"There is no audio file .*2\.wav"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "store"))


def test_changed_audio_is_extracted_again_if_the_manifest_has_no_digests(tiny_models, manifest, tmp_path):
    without_digests = tmp_path / "plain.jsonl"
    write_manifest(without_digests, [dataclasses.replace(u, sha256=None, duration=None) for u in manifest[1]])
    extract_features(recipe(tiny_models), [str(without_digests)], str(tmp_path / "store"))
    write_wav(tmp_path / "2.wav", make_tone(0.5))
    after = extract_features(recipe(tiny_models), [str(without_digests)], str(tmp_path / "store"))
    assert after.metrics["new utterances"] == 1


def test_damaged_weights_are_reported_in_one_sentence(tiny_models, manifest, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_models["encoder"], broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is damaged or cut off: fetch the model again"):
        extract_features(
            recipe(tiny_models, **{"encoder.name": str(broken)}), [str(manifest[0])], str(tmp_path / "s")
        )


@pytest.mark.parametrize("work_shard", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_an_invalid_work_shard_is_reported_in_one_sentence(tiny_models, manifest, tmp_path, work_shard):
    with pytest.raises(UserError, match=f"--work-shard is {work_shard}: write it as i/n"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "s"), work_shard)


def test_a_damaged_plan_is_reported_in_one_sentence(tiny_models, manifest, tmp_path):
    record = extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "s"))
    [plan] = [f.name for f in walk(str(tmp_path / "s")) if "/plans/" in f.name]
    write_bytes(tmp_path / "s" / plan, b"{")
    delete(f"{record.folder}/stage.json")
    with pytest.raises(UserError, match="is damaged: remove it"):
        extract_features(recipe(tiny_models), [str(manifest[0])], str(tmp_path / "s"))


def test_a_folder_of_manifests_means_all_three_manifests_or_those_that_are_named(
    tmp_path, tiny_recipe, tiny_corpus
):
    from slam_asr.stages.build_manifest import build_manifest

    built = build_manifest(load_recipe(str(tiny_recipe)), str(tiny_corpus), str(tmp_path / "m"))
    assert [Path(f).name for f in manifest_files([built.folder])] == [
        "train.jsonl",
        "dev.jsonl",
        "test.jsonl",
    ]
    assert [Path(f).name for f in manifest_files([built.folder], ("test.jsonl",))] == ["test.jsonl"]
    built.file("stage.json").unlink()
    with pytest.raises(UserError, match="no finished build-manifest"):
        manifest_files([built.folder])


def test_a_model_that_is_not_an_encoder_is_refused(tiny_models, manifest, tmp_path):
    with pytest.raises(UserError, match="a model of type llama; supported encoders: whisper"):
        extract_features(
            recipe(tiny_models, **{"encoder.name": tiny_models["llm"]}),
            [str(manifest[0])],
            str(tmp_path / "s"),
        )
