"""Compare feature extraction with the encoder alone, to see whether the encoder waits for anything else.

    python benchmarks/extraction.py CORPUS              # a LibriSpeech tree; Whisper tiny.en
    python benchmarks/extraction.py --synthetic         # noise; needs no corpus, only the encoder's weights

Two methods alternate, on the same utterances. One runs only the encoder, on prepared batches of the same
composition. The other does all that `extract-features` does with an utterance (reading, decoding,
spectrogram, encoder, writing, checksums). Loading weights and planning shards are not timed. Prints the
utterances per second of both and their ratio.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from slam_asr.artifacts.manifest import Utterance, manifest_line
from slam_asr.audio import load_audio
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.features.audio_workers import AudioLoader, default_workers
from slam_asr.features.encode import plan_batches, run_shards
from slam_asr.features.extraction import Extraction
from slam_asr.models.encoders.frontend import Prepared
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.precision import DTYPES, encoder_precision, pick_device
from slam_asr.progress import Meter
from slam_asr.runtime.work_split import WorkShard
from slam_asr.storage import sha256_of_file


def manifest_of(files: list[Path], folder: Path) -> Path:
    """Write a manifest of audio files, and return its path."""
    utterances = []
    for file in files:
        duration = len(load_audio(file)) / 16_000
        utterances.append(Utterance(file.stem, str(file), "x", duration, 16_000, sha256_of_file(file)))
    (folder / "m.jsonl").write_bytes(b"".join(map(manifest_line, utterances)))
    return folder / "m.jsonl"


def noise(folder: Path, count: int) -> list[Path]:
    """Write `count` files of 3 to 16 s of noise, and return their paths."""
    generator = np.random.default_rng(0)
    files = []
    for i in range(count):
        samples = generator.normal(0, 0.1, int(generator.uniform(3, 16) * 16_000)).astype(np.float32)
        files.append(folder / f"{i}.flac")
        soundfile.write(files[-1], samples, 16_000)
    return files


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", nargs="?", help="folder with FLAC files, such as a LibriSpeech tree")
    parser.add_argument("--synthetic", action="store_true", help="noise instead of a corpus")
    parser.add_argument("--utterances", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--encoder", default="openai/whisper-tiny.en")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-seconds", type=float, default=60.0)
    options = parser.parse_args()
    if not (options.corpus or options.synthetic):
        parser.error("give a corpus or --synthetic")
    return options


def main() -> None:
    """Measure both methods, and print their speeds and the ratio."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.synthetic:
            files = noise(folder, options.utterances)
        else:
            files = sorted(Path(options.corpus).rglob("*.flac"))[: options.utterances]
        recipe = load_recipe(
            "librispeech",
            {
                "encoder.name": options.encoder,
                "encoder.frames": "speech",
                "encoder.batch_seconds": options.batch_seconds,
                "features.workers": options.workers,
            },
        )
        encoder_times, extraction_times, batches = measure(
            recipe, manifest_of(files, folder), options, folder
        )
    audio = sum(p.samples for batch in batches for p in batch) / 16_000
    a, b = statistics.median(encoder_times), statistics.median(extraction_times)
    ratios = [x / y for x, y in zip(encoder_times, extraction_times, strict=True)]
    print(
        f"{len(files)} utterances, {audio:.0f} s, {len(batches)} batches, {pick_device().type}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"encoder alone  {len(files) / a:7.2f} utt/s, {audio / a:7.0f} × real time")
    print(
        f"extraction     {len(files) / b:7.2f} utt/s, {audio / b:7.0f} × real time, without loading weights"
    )
    print(f"ratio          {a / b:.3f}  (each repeat: {', '.join(f'{r:.3f}' for r in ratios)})")


def measure(
    recipe: Recipe, manifest: Path, options: argparse.Namespace, folder: Path
) -> tuple[list[float], list[float], list[list[Prepared]]]:
    """Run both methods alternately.

    Returns:
        The seconds of the encoder alone and of the extraction in each repeat, and the prepared batches.
    """
    spec, device = describe_encoder(recipe.encoder), pick_device()
    encoder = spec.load(DTYPES[encoder_precision(recipe.features.dtype, device.type == "cuda")], device)
    extraction = Extraction(recipe, spec, [str(manifest)], str(folder / "planned"), WorkShard())
    shards = [shard for plan in extraction.plans() for shard in plan.shards]
    with Meter("prepare", plain_lines=False) as meter:
        batches = [
            [encoder.prepare(load_audio(u.source)) for u in batch.utterances]
            for batch in plan_batches(extraction, shards, meter)
        ]
    encoder_times, extraction_times = [], []
    workers = options.workers or default_workers(1, device.type == "cuda")
    with AudioLoader(spec.preparer(), workers) as loader:
        for repeat in range(options.repeats + 1):
            started = time.perf_counter()
            for batch in batches:
                encoder.encode(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            encoder_seconds = time.perf_counter() - started
            # Each repeat has a store of its own, because extraction skips shards that exist.
            extraction = Extraction(
                recipe, spec, [str(manifest)], str(folder / f"store-{repeat}"), WorkShard()
            )
            missing = extraction.missing(extraction.plans())
            started = time.perf_counter()
            run_shards(extraction, missing, encoder, loader)
            if repeat:  # the first repeat is a warm-up
                encoder_times.append(encoder_seconds)
                extraction_times.append(time.perf_counter() - started)
    return encoder_times, extraction_times, batches


if __name__ == "__main__":
    main()
