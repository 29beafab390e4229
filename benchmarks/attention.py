"""Compare this project's causal attention on a CPU with torch's kernel, forward and backward.

    python benchmarks/attention.py [--heads 9 --key-heads 3 --width 64]

Prints both times in milliseconds and their ratio, for several lengths in bf16 and fp32. The kernels
alternate, so that a change in the machine's load affects both.
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional

from slam_asr.models.cpu_attention import causal_attention


def main() -> None:
    """Print one line per length and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(
        f"{options.heads} heads, {options.key_heads} key heads, width {options.width}, "
        f"{torch.get_num_threads()} threads; ms forward and backward"
    )
    for dtype in (torch.bfloat16, torch.float32):
        for positions in (64, 128, 256, 384, 768):
            inputs = [
                torch.randn(h, positions, options.width, dtype=dtype, requires_grad=True)
                for h in (options.heads, options.key_heads, options.key_heads)
            ]
            kernels = {
                "torch": lambda q, k, v: functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, enable_gqa=True
                )[0],
                "ours": causal_attention,
            }
            times: dict[str, list[float]] = {name: [] for name in kernels}
            for _ in range(options.repeats):
                for name, kernel in kernels.items():
                    started = time.perf_counter()
                    output = kernel(*inputs)
                    output.backward(torch.ones_like(output))
                    times[name].append(1000 * (time.perf_counter() - started))
            reference, ours = (statistics.median(times[name]) for name in kernels)
            print(
                f"{str(dtype)[6:]:9}{positions:5} positions  torch {reference:7.2f}  ours {ours:7.2f}  "
                f"{reference / ours:5.2f} ×"
            )


if __name__ == "__main__":
    main()
