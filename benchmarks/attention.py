"""Causal attention on a CPU, forward and back, beside torch's own kernel.

    python benchmarks/attention.py [--heads 9 --key-heads 3 --width 64]

Prints milliseconds of either and their ratio, for several lengths in bf16 and fp32; both take turns.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional

from slam_asr.models.cpu_attention import causal_attention


def main() -> None:
    """Print a line for each length and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(
        f"{options.heads} heads, {options.key_heads} of keys, width {options.width}, {torch.get_num_threads()} threads; ms forward and back"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for positions in (64, 128, 256, 384, 768):
            inputs = [
                torch.randn(h, positions, options.width, dtype=dtype, requires_grad=True)
                for h in (options.heads, options.key_heads, options.key_heads)
            ]
            ways = {
                "torch": lambda q, k, v: functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, enable_gqa=True
                )[0],
                "ours": causal_attention,
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(options.repeats):
                for name, way in ways.items():
                    started = time.perf_counter()
                    output = way(*inputs)
                    output.backward(torch.ones_like(output))
                    times[name].append(1000 * (time.perf_counter() - started))
            torchs, ours = (statistics.median(times[name]) for name in ways)
            print(
                f"{str(dtype)[6:]:9}{positions:5} positions  torch {torchs:7.2f}  ours {ours:7.2f}  {torchs / ours:5.2f} ×"
            )


if __name__ == "__main__":
    main()
