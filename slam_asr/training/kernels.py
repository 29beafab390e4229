"""Fused kernels for the LLM's layers: those that torch.compile writes, or Liger's.

Both leave the arithmetic as it is but for rounding. torch.compile takes each of the LLM's layers by itself: all are alike, so that one is
compiled and the others use it, and lengths are symbols, so that no batch is compiled for anew. Attention over packed
utterances stays out of it: how many there are differs between batches.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from slam_asr.errors import UserError
from slam_asr.models.packed_attention import leave_to_python
from slam_asr.progress import log_line
from slam_asr.recipe import Training


def require_kernels(options: Training, device: torch.device) -> None:
    """Look that what a recipe asks for can be had here, before anything is loaded.

    Raises:
        UserError: no GPU, no package, or no compiler.
    """
    if options.liger and device.type != "cuda":
        raise UserError(
            "training.liger needs a GPU, for which its kernels are written, and there is none here: leave it out."
        )
    if options.liger and importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "training.liger asks for Liger's kernels, whose package is not installed here: run `pip install liger-kernel` (in an image, build it in), or "
            "leave it out."
        )
    if options.compile:
        _require_compiler(device)


def _require_compiler(device: torch.device) -> None:
    # Kernels for a CPU are C++; those for a GPU are Triton's, which has a few lines of C compiled that start them.
    language, variable, usual = (
        ("C++", "CXX", ("g++",)) if device.type == "cpu" else ("C", "CC", ("gcc", "clang"))
    )
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"training.compile needs a {language} compiler, and {' or '.join(names)} is not here: install one (`apt-get install g++`; in an image, build it in), or "
            "leave it out."
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise UserError(
            "training.compile needs Python's headers (Python.h), and they are not here: install them (`apt-get install python3-dev`; in an image, build them in), "
            "or leave it out."
        )


def compile_layers(llm: PreTrainedModel) -> None:
    """Have each of an LLM's layers compiled when it is first called.

    Names of weights stay as they are, and what engines hang on a layer stays outside of what is compiled.

    Raises:
        UserError: the model has no layers that stand by themselves.
    """
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"training.compile: {type(llm).__name__} has no layers that can be compiled one by one; set it to false."
        )
    leave_to_python()
    for layer in layers:
        forward, again = layer.forward, None
        if isinstance(forward, functools.partial) and forward.func is checkpoint:
            # What is computed again on the way back is compiled, rather than the choice to do so.
            (forward,), again = forward.args, forward.keywords
        compiled = torch.compile(forward, dynamic=True)
        layer.forward = compiled if again is None else functools.partial(checkpoint, compiled, **again)


def use_liger(llm: PreTrainedModel) -> None:
    """Replace what Liger has kernels for in an LLM: norms, rotary embeddings and feed-forward layers, not the loss, which is ours."""
    # By name: an image is built with all that its stage imports, and this package is the user's to add.
    monkey_patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    kind = llm.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        log_line(
            f"training.liger: Liger has no kernels for a model of type {kind}, so it trains without them"
        )
        return
    monkey_patch._apply_liger_kernel_to_instance(
        model=llm, cross_entropy=False, fused_linear_cross_entropy=False
    )
