"""Compare the memory that `slam-asr plan` predicts for training with the memory that a process really needs.

    python benchmarks/plan.py                     # several sizes, on this machine's CPU or GPU
    python benchmarks/plan.py --only 2 --json     # a single case, as a line of JSON

Each case trains a projector in front of a frozen LLM with random weights for two optimiser steps, in a
separate process. The features are random. Batches are packed or padded, and their loss is computed, as in
training. On a CPU, the measurement is the peak resident memory minus the resident memory of the same process
just before a model is loaded (torch, transformers and DeepSpeed imported, process group started). On a GPU,
it is torch's peak of allocated memory. If DeepSpeed is not installed, DDP is measured.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path


def _llama(width: int, inner: int, layers: int, heads: int, vocabulary: int, **more: int) -> dict[str, int]:
    """Return the sizes of a Llama, by the keys of its configuration; `inner` is the feed-forward width."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **more,
    }


CASES = [
    # Each case: LLM configuration, training options, number of utterances, and for each utterance its LLM
    # positions, audio positions and target tokens.
    (_llama(576, 1536, 30, 9, 49152, num_key_value_heads=3, tie_word_embeddings=True), {}, 6, 100, 60, 25),
    (_llama(768, 2048, 12, 12, 32000), {}, 16, 150, 100, 30),
    (_llama(1024, 2816, 8, 16, 32000), {"precision": "bf16"}, 16, 200, 140, 40),
    (_llama(512, 1408, 16, 8, 16000), {"packing": False}, 40, 120, 80, 20),
    (_llama(1280, 3456, 10, 20, 8000), {"packing": False}, 8, 300, 240, 50),
    # The last two cases have a large vocabulary. The first of them computes its logits in chunks. The second
    # uses ZeRO-3, which needs all logits at once; they are then the largest part of the memory.
    (_llama(512, 1408, 6, 8, 128000), {}, 24, 100, 40, 50),
    (_llama(512, 1408, 6, 8, 128000), {"zero_stage": 3}, 24, 100, 40, 50),
]
ENCODER = {"model_type": "whisper", "d_model": 384, "encoder_layers": 1, "decoder_layers": 1}


def main() -> None:
    """Print the predicted and the measured memory of each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", type=int, help="number of a case, from 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--llm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure), Path(options.llm))))
        return
    for number, case in enumerate(CASES):
        if options.only in (None, number):
            result = compare(number, case)
            print(json.dumps(result) if options.json else _line(result), flush=True)


def _line(result: dict) -> str:
    parts = ", ".join(f"{name} {value / 1e6:.0f}" for name, value in result["parts"].items() if value)
    return (
        f"case {result['case']}: measured {result['measured'] / 1e6:.0f} MB, "
        f"predicted {result['predicted'] / 1e6:.0f} MB ({parts}): "
        f"predicted / measured {result['predicted'] / result['measured']:.3f}"
    )


def compare(number: int, case: tuple) -> dict:
    """Predict and measure the memory of one case, in bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slam_asr.models.encoders.registry import spec_of
    from slam_asr.models.precision import DTYPES
    from slam_asr.planning.memory import Load, training_memory
    from slam_asr.planning.shapes import Shapes
    from slam_asr.training.launch import ALLOCATION

    llm_sizes, options, rows, length, audio, targets = case
    recipe = _recipe(options)
    encoder = dict(ENCODER)
    config = AutoConfig.for_model("llama", **llm_sizes)
    shapes = Shapes(
        recipe,
        spec_of(Path("none"), AutoConfig.for_model(encoder.pop("model_type"), **encoder), recipe.encoder),
        config,
        [],
    )
    memory = training_memory(shapes, Load(rows, length, audio, targets), 1, on_gpu=False)
    memory = replace(memory, overhead=0.0)  # the measurement excludes the memory of an idle process
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).to(DTYPES[recipe.training.precision]).save_pretrained(folder)
        command = [sys.executable, __file__, "--measure", json.dumps(case), "--llm", folder]
        env = (
            os.environ
            | dict([ALLOCATION])
            | {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
        )
        done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {
        "case": number,
        "measured": json.loads(done.stdout.splitlines()[-1]),
        "predicted": memory.total,
        "parts": vars(memory),
    }


def _recipe(options: dict):
    from slam_asr.config.recipe import load_recipe

    return load_recipe(
        "librispeech", {f"training.{key}": value for key, value in {"precision": "fp32", **options}.items()}
    )


def measure(case: tuple, llm_folder: Path) -> int:
    """Return the peak memory of training in this process, in bytes.

    Args:
        case: one of `CASES`.
        llm_folder: folder of the case's LLM.
    """
    import torch

    from slam_asr.models.answer_loss import AnswerScores, allows_chunks, score_answers, score_in_chunks
    from slam_asr.models.batch import Row, collate, pack
    from slam_asr.models.llm import llm_width, load_llm
    from slam_asr.models.packed_attention import allow_packing
    from slam_asr.models.precision import DTYPES, pick_device
    from slam_asr.models.projector import build_projector
    from slam_asr.models.slam import Slam
    from slam_asr.training.engines.choose import make_engine, start_process_group

    _, options, rows, length, audio, targets = case
    recipe, device = _recipe(options), pick_device()
    dtype = DTYPES[recipe.training.precision]
    if importlib.util.find_spec("deepspeed") is None:
        recipe.training.engine = "ddp"
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    start_process_group(device, recipe.training.engine)

    def loss_of(output: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
        return AnswerScores(*output).loss if isinstance(output, tuple) else score_answers(output, labels).loss

    idle = _resident("VmRSS")
    llm = load_llm(llm_folder, dtype)
    model = Slam(build_projector(recipe.projector, ENCODER["d_model"], llm_width(llm)), llm)
    make_batch = pack if recipe.training.packing and allow_packing(llm) else collate
    if recipe.training.zero_stage != 3 and allows_chunks(llm):
        model.scorer = score_in_chunks
    engine = make_engine(model, recipe.training, device, {})
    engine.module.train()
    # The first step creates the optimiser's state, so only the second needs all of the memory.
    for _ in range(2):
        # The recipe's projector makes one position of 5 frames.
        features = [torch.randn(audio * 5, ENCODER["d_model"]).to(dtype) for _ in range(rows)]
        prompt = [1] * (length - audio - targets)
        batch = make_batch([Row(f, audio, [], prompt, [1] * targets) for f in features]).to(device)
        engine.backward(loss_of(engine.forward(batch, last=True), batch.labels), rows * targets, last=True)
        engine.step(1e-4)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - idle


def _resident(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not report resident memory")


if __name__ == "__main__":
    main()
