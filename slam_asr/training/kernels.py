"""Fused kernels for the LLM's layers, from torch.compile or Liger.

Both change results only by rounding errors. torch.compile is applied to each layer separately. All layers are
alike, so the first is compiled and the others reuse its code. Sequence lengths are symbolic, so a new length
causes no recompilation. Attention over packed utterances is not compiled, because the number of utterances
varies.
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

from slam_asr.config.recipe import Training
from slam_asr.errors import ConfigurationError
from slam_asr.models.packed_attention import exclude_from_compilation
from slam_asr.progress import log_line


def require_kernels(options: Training, device: torch.device) -> None:
    """Check, before anything is loaded, that this machine can run the kernels that a recipe asks for.

    Raises:
        ConfigurationError: the GPU, the package, the compiler or Python's headers are missing.
    """
    if options.liger and device.type != "cuda":
        raise ConfigurationError(
            f"training.liger needs a GPU, but this run uses the {device.type.upper()}: set "
            "--training.liger false."
        )
    if options.liger and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigurationError(
            "training.liger needs the package liger-kernel, which is not installed: run `pip install "
            "liger-kernel` (for an image, add it to the build), or set --training.liger false."
        )
    if options.compile:
        _require_compiler(device)


def _require_compiler(device: torch.device) -> None:
    # For a CPU, torch.compile generates C++. For a GPU it uses Triton, which compiles a small launcher in C.
    language, variable, defaults = (
        ("C++", "CXX", ("g++",)) if device.type == "cpu" else ("C", "CC", ("gcc", "clang"))
    )
    names = [os.environ[variable]] if os.environ.get(variable) else defaults
    if not any(shutil.which(name) for name in names):
        absent = f"neither {' nor '.join(names)} is" if len(names) > 1 else f"{names[0]} is not"
        raise ConfigurationError(
            f"training.compile needs a {language} compiler, and {absent} installed: install one (`apt-get "
            f"install {defaults[0]}`; for an image, add it to the build), or set --training.compile false."
        )
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise ConfigurationError(
            "training.compile needs Python's headers (Python.h), which are not installed: install them "
            "(`apt-get install python3-dev`; for an image, add them to the build), or set "
            "--training.compile false."
        )


def compile_layers(llm: PreTrainedModel) -> None:
    """Wrap each layer in torch.compile. The first call compiles the code, which the other layers reuse.

    Only the `forward` method of the layers is replaced, so weights have the same names as before, and the
    engines' hooks stay outside the compiled code.

    Raises:
        ConfigurationError: the model has no layers that can be compiled separately.
    """
    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigurationError(
            f"training.compile: {type(llm).__name__} has no layers that can be compiled separately: set "
            "--training.compile false."
        )
    exclude_from_compilation()
    # By default, torch compiles code for the first length alone, and at the second length compiles again with
    # symbolic lengths.
    compile_ = functools.partial(torch.compile, dynamic=True)
    for layer in layers:
        forward = layer.forward
        if isinstance(forward, functools.partial) and forward.func is checkpoint:
            # Compile the checkpointed function itself, not the checkpointing around it.
            (checkpointed,) = forward.args
            layer.forward = functools.partial(checkpoint, compile_(checkpointed), **forward.keywords)
        else:
            layer.forward = compile_(forward)


def use_liger(llm: PreTrainedModel) -> None:
    """Replace an LLM's norms, rotary embeddings and feed-forward layers with Liger's kernels.

    Liger's loss is not used, because `slam_asr.models.answer_loss` computes the loss. An LLM that Liger does
    not support is left unchanged, and a line is logged.
    """
    # Not an import statement: requirements/lock.py puts every package that such a statement names into the
    # images, but liger-kernel is optional.
    monkey_patch = importlib.import_module("liger_kernel.transformers.monkey_patch")
    kind = llm.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        log_line(f"training.liger: Liger has no kernels for a model of type {kind}; training without them")
        return
    monkey_patch._apply_liger_kernel_to_instance(
        model=llm, cross_entropy=False, fused_linear_cross_entropy=False
    )
