"""Measure the speed of encoders in their published shapes, also as a share of the hardware's limit.

    python benchmarks/encoders.py                                   # GPU: WavLM-large, Whisper large-v3, bf16
    python benchmarks/encoders.py --layers 2 --seconds-a-batch 60   # CPU: the same code, but small

The weights are random, so no network is needed. Each batch is prepared once. The timed part is the work of
`extract-features` on the device: the input is copied there, the encoder runs, and the output is copied back
in the store's dtype while the next batch runs. FLOPs are those of `slam_asr.planning`. --peak is the device's
limit in TFLOP/s.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, PretrainedConfig, WavLMConfig, WhisperConfig

from slam_asr.config.recipe import Encoder
from slam_asr.features.encode import AudioBatch, _copy_to_host
from slam_asr.models import feature_dtype
from slam_asr.models.encoders import base as encoders
from slam_asr.models.encoders.registry import spec_of
from slam_asr.models.precision import DTYPES, pick_device
from slam_asr.planning.shapes import encoder_flops

SHAPES: dict[str, PretrainedConfig] = {
    "wavlm-large": WavLMConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_buckets=320,
        max_bucket_distance=800,
    ),
    "whisper-large-v3": WhisperConfig(
        d_model=1280,
        encoder_layers=32,
        decoder_layers=1,
        encoder_attention_heads=20,
        decoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
        num_mel_bins=128,
        vocab_size=51866,
    ),
}


def build(
    name: str, layers: int | None, dtype: torch.dtype, device: torch.device, folder: Path
) -> encoders.SpeechEncoder:
    """Build an encoder with random weights; with `layers`, it has fewer layers than the published shape."""
    config = SHAPES[name]
    if layers:
        config.update(
            {"num_hidden_layers": layers, "encoder_layers": layers}
            if name.startswith("whisper")
            else {"num_hidden_layers": layers}
        )
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}), encoding="utf-8")

    def random_weights(kind: type, where: Path, precision: torch.dtype, part: str) -> torch.nn.Module:
        with torch.device(device):
            return AutoModel.from_config(config).to(precision).eval().requires_grad_(False)

    # This replaces the function with which encoders read published weights.
    encoders.load_weights = random_weights
    return spec_of(folder, config, Encoder(name=name)).load(dtype, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than in the published shapes")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--seconds-a-batch", type=float, nargs="+", default=[480.0, 960.0])
    parser.add_argument("--utterance", type=float, default=12.3, help="seconds; 12.3 is LibriSpeech's mean")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--peak", type=float, default=989.0, help="the device's dense TFLOP/s in that dtype (H100, bf16: 989)"
    )
    options = parser.parse_args()
    device, dtype = pick_device(), DTYPES[options.dtype]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.shapes:
            encoder = build(name, options.layers, dtype, device, Path(temporary))
            samples = round(options.utterance * 16_000)
            for seconds in options.seconds_a_batch:
                count = max(1, int(seconds / encoder.spec.seconds_of(samples)))
                waves = [generator.normal(0, 0.1, samples).astype(np.float32) for _ in range(count)]
                prepared = [encoder.prepare(w) for w in waves]
                times, previous = [], None
                for _ in range(options.repeats + 2):
                    started = time.perf_counter()
                    features = [feature_dtype.quantize(f, options.dtype) for f in encoder.encode(prepared)]
                    # `_copy_to_host` uses no field of the batch, so an empty one is enough.
                    encoded = _copy_to_host(AudioBatch(None, [], [], True), features)
                    # Waiting for the previous batch's copy only now lets it overlap with this batch.
                    if previous is not None:
                        previous.wait()
                    previous = encoded
                    times.append(time.perf_counter() - started)
                # The first two rounds are warm-ups.
                median = statistics.median(times[2:])
                flops = count * encoder_flops(encoder.spec, samples)
                audio = count * options.utterance
                layers = f" ({options.layers} layers)" if options.layers else ""
                print(
                    f"{name}{layers}, {options.dtype} on {device.type}, {count} utterances of "
                    f"{options.utterance:g} s: {audio / median:8.1f} × real time, "
                    f"{flops / median / 1e12:7.2f} TFLOP/s, "
                    f"{flops / median / options.peak / 1e10:5.1f} % of {options.peak:g}"
                )


if __name__ == "__main__":
    main()
