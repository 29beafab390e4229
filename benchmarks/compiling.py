"""Measure how much `training.compile` speeds up a forward and backward pass through an LLM's layers.

    python benchmarks/compiling.py                              # a Llama with SmolLM2-135M's widths, 4 layers
    python benchmarks/compiling.py --layers 30 --utterances 16

The weights are random. Batches are packed utterances of 30 to 100 positions, and vary in size. On a CPU, the
time is the processor time of one thread, which other programs do not affect; on a GPU, it is wall time.
Compiled and uncompiled passes alternate. Prints the median of their ratios, and all ratios.
"""

import argparse
import copy
import random
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slam_asr.models.packed_attention import allow_packing, packed_arguments
from slam_asr.models.precision import DTYPES, pick_device
from slam_asr.training.kernels import compile_layers


def main() -> None:
    """Print the speed-up for each precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--utterances", type=int, default=6, help="utterances per batch, on average")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    options = parser.parse_args()
    device = pick_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    for precision in options.precisions:
        llm = (
            LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=576,
                    intermediate_size=1536,
                    num_hidden_layers=options.layers,
                    num_attention_heads=9,
                    num_key_value_heads=3,
                    vocab_size=64,
                )
            )
            .to(device, DTYPES[precision])
            .eval()
            .requires_grad_(False)
        )
        assert allow_packing(llm)
        compiled = copy.deepcopy(llm)
        compile_layers(compiled)
        generator = random.Random(0)
        started = time.perf_counter()
        _step(compiled, [40, 60])
        first = time.perf_counter() - started
        _step(llm, [40, 60])
        ratios = []
        for _ in range(options.steps):
            lengths = [
                generator.randint(30, 100) for _ in range(options.utterances + generator.randint(-2, 2))
            ]
            uncompiled_seconds, compiled_seconds = _step(llm, lengths), _step(compiled, lengths)
            ratios.append(uncompiled_seconds / compiled_seconds)
        listed = ", ".join(f"{r:.2f}" for r in ratios)
        print(
            f"{precision} on {device.type}: compiled is {statistics.median(ratios):.2f} × as fast "
            f"({listed}); the first step took {first:.0f} s",
            flush=True,
        )


def _step(llm: LlamaForCausalLM, lengths: list[int]) -> float:
    """Return the seconds of a forward and backward pass over one packed batch.

    Args:
        llm: the LLM; only its layers run, not its output layer.
        lengths: number of positions of each utterance.
    """
    embeddings = torch.randn(1, sum(lengths), 576, device=llm.device, dtype=llm.dtype).requires_grad_()
    clock = time.perf_counter if embeddings.is_cuda else time.process_time
    started = clock()
    llm.base_model(
        inputs_embeds=embeddings * 1, use_cache=False, **packed_arguments(lengths, llm.device)
    ).last_hidden_state.float().sum().backward()
    if embeddings.is_cuda:
        torch.cuda.synchronize()
    return clock() - started


if __name__ == "__main__":
    main()
