"""Compare fp32 with bf16 on this machine: a training pass through the LLM, and a pass through the encoder.

    python benchmarks/precision.py [--threads N]

Both precisions alternate within one run, so that a change in the machine's speed affects both; only the ratio
is meaningful. The published figure is for two cores of an Intel Xeon that has AVX-512 with bf16 instructions
but no AMX. On that machine, fp32 is faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from slam_asr.config.recipe import load_recipe
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import load_llm
from slam_asr.models.precision import DTYPES, pick_device
from slam_asr.pretrained.locate import locate_model

UTTERANCES, POSITIONS, ANSWER = 8, 55, 12
"""Size of the LLM's batch: utterances, LLM positions per utterance, and positions of its answer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, device = load_recipe("demo"), pick_device()
    print(f"{device.type}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    spec = describe_encoder(recipe.encoder)
    llms = {name: llm_pass(locate_model(recipe.llm.name), DTYPES[name], device) for name in ("fp32", "bf16")}
    compare(
        f"{recipe.llm.name}, forward and backward",
        "positions/s",
        UTTERANCES * POSITIONS,
        llms,
        options.rounds,
    )
    encoders = {name: encoder_pass(spec, DTYPES[name], device) for name in ("fp32", "bf16")}
    compare(f"{recipe.encoder.name}, 30-s window", "windows/s", 1, encoders, options.rounds)


def llm_pass(folder, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function that runs forward to the answer's logits and backward to the input.

    Training runs the same passes.
    """
    llm = load_llm(folder, dtype).to(device)
    embeddings = torch.randn(
        UTTERANCES, POSITIONS, llm.config.hidden_size, dtype=dtype, device=device, requires_grad=True
    )

    def run() -> None:
        logits = llm(inputs_embeds=embeddings, use_cache=False, logits_to_keep=ANSWER).logits
        logits.float().logsumexp(-1).sum().backward()

    return run


def encoder_pass(spec, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function that encodes three seconds of prepared audio, which Whisper pads to one window."""
    encoder = spec.load(dtype, device)
    prepared = encoder.prepare(np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32))
    return lambda: encoder.encode([prepared]) and None


def compare(what: str, unit: str, amount: int, passes: dict[str, Callable[[], None]], rounds: int) -> None:
    """Time the passes alternately, and print their median rates and the ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_number in range(rounds + 1):
        for name, run in passes.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU computes after the call has returned
            if round_number:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: amount / statistics.median(times) for name, times in seconds.items()}
    figures = ", ".join(f"{name} {rate:.2f} {unit}" for name, rate in rates.items())
    print(f"{what}: {figures}; fp32 / bf16 = {rates['fp32'] / rates['bf16']:.2f}")


if __name__ == "__main__":
    main()
