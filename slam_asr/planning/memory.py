"""What one process of a training holds in memory, part by part."""

from dataclasses import dataclass

import torch

from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.planning.shapes import Shapes
from slam_asr.training.objective import CHUNK

LOGIT_BYTES = 12
"""A logit at the peak, where all are there at once: log-probabilities, and two gradients of them on the way back, all in fp32."""
CHUNKED_LOGIT_BYTES = 8
"""A logit of a chunk: itself, and its exponential while they are summed, in fp32."""
GATHERED = 1e9
"""Weights that ZeRO-3 leaves whole on every process until the way back has used them, as DeepSpeed has it (stage3_max_live_parameters)."""
CUDA_OVERHEAD = 1.5e9
"""Bytes of CUDA's context, its libraries' workspaces and NCCL's buffers on a GPU; a rule of thumb."""
FRAGMENTATION = 1.05
"""What an allocator takes for activations beyond what is asked of it; a rule of thumb."""


@dataclass
class Load:
    """One micro-batch."""

    rows: float
    """Utterances."""
    length: int
    """LLM positions of each, padding included."""
    audio: int
    """Of these, audio positions."""
    targets: int
    """Of these, target tokens."""


@dataclass
class Memory:
    """Bytes by part, of one process."""

    frozen: float
    """Frozen weights of the LLM, with what is whole for a while of weights that are spread, and of the encoder where it runs with the model."""
    trained: float
    """Trained weights and their gradients."""
    optimizer: float
    """fp32 masters, where computing is in half precision, and Adam's two moments."""
    activations: float
    """What layers keep for the way back, and the most that one of them needs beside that."""
    logits: float
    """What is there of them at a time, and what is computed from them."""
    overhead: float
    """Of the accelerator's software."""

    @property
    def total(self) -> float:
        """All parts."""
        return self.frozen + self.trained + self.optimizer + self.activations + self.logits + self.overhead


def training_memory(shapes: Shapes, load: Load, processes: int, on_gpu: bool = True) -> Memory:
    """Memory of one of `processes` processes at the peak of a step.

    Args:
        shapes: the models.
        load: its largest micro-batch.
        processes: how many share what ZeRO spreads.
        on_gpu: whether to count what a GPU's software takes.
    """
    options = shapes.recipe.training
    size = DTYPES[options.precision].itemsize
    # FSDP2 spreads what ZeRO-3 does, DDP nothing.
    spreads = 3 if options.engine == "fsdp" else options.zero_stage
    spread = [1 if spreads < stage else processes for stage in range(4)]
    trained = shapes.trained_parameters
    frozen = (shapes.llm_parameters - shapes.llm_trained) * size / spread[3] + _gathered(shapes) * size
    if shapes.recipe.encoder.tuning == "frozen" and not shapes.recipe.caches_features:
        # On the way: whole on every process.
        frozen += (
            shapes.encoder_parameters
            * DTYPES[encoder_precision(shapes.recipe.features.dtype, on_gpu)].itemsize
        )
    weights_and_gradients = trained * size / spread[3] + trained * size / spread[2]
    # Adam's two moments, and beside half-precision weights their masters and, in a step, the gradients in fp32.
    # On a CPU the host's memory is this one.
    optimizer = (
        0.0 if options.offload_optimizer and on_gpu else trained * (8 if size == 4 else 16) / spread[1]
    )
    kept = shapes.saved_bytes(load.rows, load.length)
    if options.gradient_checkpointing:
        kept += shapes.saved_bytes_of_a_layer(load.rows, load.length)
    inputs = (
        load.rows * load.audio * shapes.recipe.projector.downsampling * shapes.encoder.width * (size + size)
    )
    hidden = load.rows * load.audio * (2 * shapes.recipe.projector.hidden + shapes.width) * size
    embedded = 3 * load.rows * load.length * shapes.width * size
    activations = kept + inputs + hidden + embedded + _transient(shapes, load, size)
    return Memory(
        frozen,
        weights_and_gradients,
        optimizer,
        activations * FRAGMENTATION,
        _logits(shapes, load, size),
        CUDA_OVERHEAD if on_gpu else 0.0,
    )


def _gathered(shapes: Shapes) -> float:
    """Weights of the LLM that are whole at the peak where each process holds a share of them."""
    options = shapes.recipe.training
    if options.engine == "fsdp":
        # Two layers, and the embedding and output layers, which are not layers of their own.
        return shapes.layer_parameters * 2 / shapes.layers + (shapes.llm_parameters - shapes.layer_parameters)
    if options.zero_stage < 3:
        return 0.0
    # The input embedding is not needed on the way back, unless it is the output layer too.
    head = sum(p.numel() for p in shapes.llm.get_output_embeddings().parameters())
    return min(GATHERED, shapes.layer_parameters + head)


def _logits(shapes: Shapes, load: Load, size: int) -> float:
    """Logits with what is computed from them, as the loop has them scored."""
    targets = load.rows * load.targets
    if not shapes.scores_in_chunks:
        return targets * shapes.vocabulary * LOGIT_BYTES
    at_once = min(targets, max(1, CHUNK // shapes.vocabulary))
    # Beside a chunk, the output layer's inputs and their gradient, which are kept.
    return at_once * shapes.vocabulary * CHUNKED_LOGIT_BYTES + 2 * targets * shapes.width * size


def _transient(shapes: Shapes, load: Load, size: int) -> float:
    """The widest layer's output and its gradient."""
    widest = max(m.out_features for m in shapes.llm.base_model.modules() if isinstance(m, torch.nn.Linear))
    return 2 * load.rows * load.length * widest * size
