"""Measure how fast features are read in training order, and how fast audio is read.

    python benchmarks/reading.py         # parts 1 and 2: writes a store of noise, and starts a moto server
    python benchmarks/reading.py --audio # only part 3

1. A local store, memory-mapped and in the page cache. One process reads two epochs in training order and
   copies every byte. Checksums are verified in the first epoch only, as in training. Results are in GB/s.
2. The same store in object storage. `FeatureStore` reads an epoch with an empty cache: it prefetches,
   verifies SHA-256, writes to the disk cache and reads utterance by utterance. For comparison, bare boto3
   `download_file` fetches the same shards in the same order with as many threads. The two alternate; the
   ratio is that of their median speeds.
3. Audio. 45 segments of 4 s are read in random order from 20 minutes of stereo, as mp3 and as flac; the cost
   of an mp3 segment must not grow with the length of the audio before it. Then a file of 10 s is read in each
   format with all checks, and by soundfile alone; the two alternate. All results are CPU seconds of one
   process.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from slam_asr.artifacts.feature_store.index import argsort_audio_ids
from slam_asr.artifacts.feature_store.namespace import FeatureNamespace, pack
from slam_asr.artifacts.feature_store.store import _PARALLEL_FETCHES, FeatureStore
from slam_asr.artifacts.manifest import Utterance
from slam_asr.audio import SAMPLE_RATE, read_clip
from slam_asr.models.feature_dtype import QuantizedFrames
from slam_asr.storage import write_bytes
from slam_asr.training.step_plan import plan_epoch

NOISE_FINGERPRINT = {"weights_sha256": "noise", "dtype": "bf16"}


def make_store(root: str, shards: int, megabytes: int, width: int) -> None:
    """Write a store of noise: `shards` shards of `megabytes` MB each, with utterances of 4 to 20 s."""
    generator = np.random.default_rng(0)
    namespace = FeatureNamespace.of(root, NOISE_FINGERPRINT)
    namespace.write_fingerprint(NOISE_FINGERPRINT, width)
    for number in range(shards):
        features, size = {}, 0
        while size < megabytes * 1_000_000:
            frames = int(generator.integers(200, 1000))
            noise = torch.from_numpy(
                generator.integers(-(2**14), 2**14, (frames, width), dtype=np.int16)
            ).view(torch.bfloat16)
            features[generator.bytes(32).hex()] = QuantizedFrames(noise, None)
            size += noise.nbytes
        content, index = pack(features, NOISE_FINGERPRINT, {a: len(v.frames) for a, v in features.items()})
        write_bytes(namespace.shard_path(index.shards[0].name), content)
        write_bytes(namespace.index_path(f"noise-{number}-of-{shards}"), index.to_bytes())


def epoch_of(store: FeatureStore, window: int) -> tuple[list[list[str]], list[list[int]]]:
    """Return the audio ids of each window of an epoch, in training order, and each window's shard numbers."""
    audio_ids = store.index.audio_ids()
    assert (argsort_audio_ids(store.index.columns["address"]) == np.arange(len(audio_ids))).all()
    # The plan assumes one LLM position for every 5 frames, and 40 positions of text.
    positions = (store.index.columns["span"] // 5 + 40).tolist()
    windows = list(plan_epoch(positions, store.index.columns["shard"], window, 6000, 0, 0))
    return [[audio_ids[i] for step in w.steps for i in step] for w in windows], [w.shards for w in windows]


def read_epoch(store: FeatureStore, windows: list[list[str]], shards: list[list[int]]) -> float:
    """Read an epoch and copy every byte of it; return the seconds that this takes."""
    target = torch.empty(1000 * store.index.width, dtype=torch.bfloat16)
    started = time.perf_counter()
    for number, audio_ids in enumerate(windows):
        # As in training, the shards of the next window are fetched while this window is read.
        store.expect([*shards[number], *(shards[number + 1] if number + 1 < len(shards) else [])])
        for audio_id in audio_ids:
            frames = store.read(Utterance("", "", "", sha256=audio_id))
            target[: frames.numel()].copy_(frames.flatten())
    return time.perf_counter() - started


def local(root: str, repeats: int, window: int) -> None:
    """Measure and print part 1."""
    first, later, copies = [], [], []
    for _ in range(repeats):
        store = FeatureStore(root)
        windows, shards = epoch_of(store, window)
        size = sum(s.bytes for s in store.index.shards)
        for times in (first, later):
            times.append(size / read_epoch(store, windows, shards) / 1e9)
        source = torch.frombuffer(
            bytearray(Path(store.namespace.shard_path(store.index.shards[0].name)).read_bytes()),
            dtype=torch.uint8,
        )
        started = time.perf_counter()
        for _ in range(4):
            source.clone()
        copies.append(4 * source.numel() / (time.perf_counter() - started) / 1e9)
    print(
        f"local store of {size / 1e9:.2f} GB in {len(store.index.shards)} shards, "
        f"{len(store.index)} utterances, one process, warm"
    )
    print(f"  first epoch, checksums verified   {statistics.median(first):6.2f} GB/s")
    print(f"  later epochs                      {statistics.median(later):6.2f} GB/s")
    print(f"  plain copy in memory              {statistics.median(copies):6.2f} GB/s")


def remote(root: str, folder: Path, repeats: int, window: int) -> None:
    """Measure and print part 2."""
    import boto3

    with MotoServer() as endpoint:
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "SLAM_ASR_CACHE": str(folder / "cache"),
        }
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="bench")
        for file in sorted(Path(root).rglob("*")):
            if file.is_file():
                client.upload_file(str(file), "bench", f"store/{file.relative_to(root)}")
        ours, bare = [], []
        for repeat in range(repeats + 1):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            store = FeatureStore("s3://bench/store")
            windows, shards = epoch_of(store, window)
            size = sum(s.bytes for s in store.index.shards)
            our_seconds = read_epoch(store, windows, shards)
            order = [store.index.shards[n] for w in shards for n in w]
            target = folder / "bare"
            target.mkdir()
            started = time.perf_counter()
            with ThreadPoolExecutor(_PARALLEL_FETCHES) as pool:
                keys = [f"{store.namespace.root.removeprefix('s3://bench/')}/shards/{s.name}" for s in order]
                files = [str(target / Path(key).name) for key in keys]
                list(pool.map(lambda key, file: client.download_file("bench", key, file), keys, files))
            bare_seconds = time.perf_counter() - started
            shutil.rmtree(target)
            if repeat:  # the first repeat is a warm-up
                ours.append(our_seconds)
                bare.append(bare_seconds)
        our_median, bare_median = statistics.median(ours), statistics.median(bare)
        ratios = ", ".join(f"{y / x:.3f}" for x, y in zip(ours, bare, strict=True))
        print(
            f"object storage (moto), {size / 1e9:.2f} GB in {len(order)} shards, "
            f"windows of {window}, empty cache"
        )
        print(f"  bare boto3 downloads              {size / bare_median / 1e6:6.0f} MB/s")
        print(f"  an epoch in training order        {size / our_median / 1e6:6.0f} MB/s")
        print(f"  ratio                             {bare_median / our_median:6.3f}  (each repeat: {ratios})")


def audio(folder: Path, repeats: int) -> None:
    """Measure and print part 3."""
    rate, minutes = 44_100, 20
    t = np.arange(10 * rate) / rate
    starts = np.random.default_rng(0).permutation(45) * 26.0
    print(f"45 segments of 4 s from {minutes} minutes of stereo at 44.1 kHz, in random order")
    for suffix in (".flac", ".mp3"):
        with soundfile.SoundFile(folder / f"long{suffix}", "w", rate, 2) as file:
            for number in range(6 * minutes):
                tone = 0.3 * np.sin(2 * np.pi * (200 + 3 * number) * t)
                file.write(np.stack([tone, tone], axis=1))
        read = partial(read_clip, folder / f"long{suffix}", duration=4.0)
        seconds = [cpu_seconds(partial(read, start=start)) for start in starts]
        slowest = 1000 * max(seconds)
        print(f"  {suffix[1:]:<5} {sum(seconds):6.2f} s of CPU, the slowest segment {slowest:.0f} ms")
    print("100 reads of a file of 10 s at 16 kHz, with all checks, and by soundfile alone")
    noise = np.random.default_rng(0).normal(0, 0.1, 10 * SAMPLE_RATE).astype(np.float32)
    for suffix in (".wav", ".flac", ".ogg", ".mp3"):
        path = folder / f"x{suffix}"
        soundfile.write(path, noise, SAMPLE_RATE)
        ours, bare = [], []
        for _ in range(100 * repeats):
            ours.append(cpu_seconds(partial(read_clip, path)))
            bare.append(cpu_seconds(partial(soundfile.read, path, dtype="float32")))
        our_seconds, bare_seconds = 100 * statistics.median(ours), 100 * statistics.median(bare)
        print(f"  {suffix[1:]:<5} {our_seconds:6.3f} s, {bare_seconds:6.3f} s alone")


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


SERVER_PROGRAM = """
import logging, time
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
time.sleep(1e6)
"""


class MotoServer:
    """A context manager that runs a moto server; entering it returns the server's URL.

    The server is a separate process, so that it does not share the GIL with the measured code.
    """

    def __enter__(self) -> str:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER_PROGRAM],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return "http://{}:{}".format(*self.process.stdout.readline().split())

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local-only", action="store_true")
    parser.add_argument("--audio", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.audio:
            audio(Path(temporary), options.repeats)
            return
        root = str(Path(temporary) / "store")
        make_store(root, options.shards, options.megabytes, options.width)
        local(root, options.repeats, options.window)
        if not options.local_only:
            remote(root, Path(temporary), options.repeats, options.window)


if __name__ == "__main__":
    main()
