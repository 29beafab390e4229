"""Computes the memory of a training process by part: weights, optimiser, activations, logits, overhead."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slam_asr.models.answer_loss import CHUNK
from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.planning.shapes import Shapes

LOGIT_BYTES = 12
"""Bytes per logit at the peak if all logits exist at once.

In the backward pass, a log-probability and two gradients exist for each logit, all in fp32.
"""
CHUNKED_LOGIT_BYTES = 8
"""Bytes per logit of a chunk, in fp32: the logit, and its exponential while the exponentials are summed."""
GATHERED = 1e9
"""Maximum number of weights that ZeRO-3 retains unsharded until the backward pass has used them.

It is DeepSpeed's default for stage3_max_live_parameters, and applies to each process.
"""
CTC_LOGIT_BYTES = 20
"""Bytes per logit at the peak of the beginning, in which all logits exist at once, in fp32.

With 2,000 positions and 20,000 tokens, 19.4 bytes per logit were measured in fp32 and in bf16.
"""
CUDA_OVERHEAD = 1.5e9
"""Bytes of CUDA's context, of its libraries' workspaces and of NCCL's buffers on a GPU: a rule of thumb."""
PROCESS_OVERHEAD = 0.5e9
"""Bytes of host memory that a training process takes before it loads a model.

475 MB were measured for Python, torch, transformers and DeepSpeed.
"""
FRAGMENTATION = 1.05
"""Ratio of the memory that the allocator takes for activations to the requested memory: a rule of thumb."""


@dataclass
class Load:
    """The size of one micro-batch."""

    rows: float
    """Number of utterances. Estimates may be fractions."""
    length: int
    """Number of LLM positions of each utterance, including padding."""
    audio: int
    """Number of an utterance's positions that hold audio."""
    targets: int
    """Number of an utterance's positions that hold target tokens."""


@dataclass
class Memory:
    """Memory of one process in bytes, by part."""

    frozen: float
    """Frozen weights, with those of an encoder that runs on the fly, and weights gathered at the peak."""
    trained: float
    """Trained weights and their gradients."""
    optimizer: float
    """Adam's two moments. In bf16 and fp16, also fp32 master weights and fp32 gradients."""
    activations: float
    """Tensors that projector and LLM save for the backward pass, the encoder's frames, the LLM's input
    embeddings, and the temporary tensors of the LLM's widest layer."""
    logits: float
    """The logits that exist at one time, and the tensors that are computed from them."""
    overhead: float
    """On a GPU, memory of CUDA and NCCL. On a CPU, memory of Python and its libraries."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.frozen + self.trained + self.optimizer + self.activations + self.logits + self.overhead


def part_names(on_gpu: bool) -> dict[str, str]:
    """Return the names of the parts of `Memory` in messages."""
    return {
        "frozen": "frozen weights",
        "trained": "trained weights and gradients",
        "optimizer": "optimiser",
        "activations": "activations",
        "logits": "logits",
        "overhead": "CUDA and NCCL" if on_gpu else "Python and its libraries",
    }


def training_memory(shapes: Shapes, load: Load, processes: int, on_gpu: bool = True) -> Memory:
    """Compute the memory of one process at the peak of a step, in bytes.

    Args:
        shapes: sizes of the models, and the recipe.
        load: the largest micro-batch of the process.
        processes: number of processes over which ZeRO shards.
        on_gpu: whether the process has a GPU. If so, the result is GPU memory: it includes that of CUDA and
            NCCL, and an offloaded optimiser takes none of it.
    """
    options = shapes.recipe.training
    size = DTYPES[options.precision].itemsize
    # FSDP2 shards what ZeRO-3 shards. DDP shards nothing, and a recipe with DDP has ZeRO stage 0.
    zero_stage = 3 if options.engine == "fsdp" else options.zero_stage
    # shards[n]: number of processes that share what ZeRO shards from stage n on. Stage 1 shards the state of
    # the optimiser, stage 2 also gradients, stage 3 also weights.
    shards = [1 if zero_stage < stage else processes for stage in range(4)]
    trained = shapes.trained_parameters
    frozen = (shapes.llm_parameters - shapes.llm_trained) * size / shards[3] + _gathered(shapes) * size
    if shapes.recipe.encoder.tuning == "frozen":
        frozen += _encoder_bytes(shapes, on_gpu)
    weights_and_gradients = trained * size / shards[3] + trained * size / shards[2]
    # Adam's two moments take 8 bytes per weight. In bf16 or fp16, fp32 masters take 4 more, and so do fp32
    # gradients during a step. On a CPU, offloading saves nothing, because all memory is host memory.
    offloaded = options.offload_optimizer and on_gpu
    optimizer = 0.0 if offloaded else trained * (8 if size == 4 else 16) / shards[1]
    saved = shapes.saved_bytes(load.rows, load.length)
    if options.gradient_checkpointing:
        # The backward pass recomputes one layer at a time, and this layer then saves all of its tensors.
        saved += shapes.saved_bytes_of_a_layer(load.rows, load.length)
    projector = shapes.recipe.projector
    # The encoder's frames exist twice: in one tensor per utterance, and in the projector's joined input.
    inputs = load.rows * load.audio * projector.downsampling * shapes.encoder.width * (size + size)
    # The projector's hidden layer before and after its activation function, and its output.
    hidden = load.rows * load.audio * (2 * projector.hidden + shapes.width) * size
    embedded = 3 * load.rows * load.length * shapes.width * size
    activations = saved + inputs + hidden + embedded + _transient(shapes, load, size)
    logits, overhead = _logits(shapes, load, size), CUDA_OVERHEAD if on_gpu else PROCESS_OVERHEAD
    return Memory(frozen, weights_and_gradients, optimizer, activations * FRAGMENTATION, logits, overhead)


def beginning_memory(shapes: Shapes, load: Load, on_gpu: bool = True) -> Memory:
    """Compute the memory of one process at the peak of a step of the beginning, in bytes.

    Each process holds the complete projector and its optimiser, but none of the LLM's layers.

    Args:
        shapes: sizes of the models, and the recipe.
        load: the largest micro-batch of the process.
        on_gpu: whether the process has a GPU.
    """
    recipe, size = shapes.recipe, DTYPES[shapes.recipe.training.precision].itemsize
    trained, tokens, positions = shapes.projector_parameters, shapes.vocabulary, load.rows * load.audio
    # Two copies of the frames; the hidden layer before and after its activation function; and outputs,
    # expected embeddings and their difference.
    inputs = 2 * recipe.projector.downsampling * shapes.encoder.width * size
    hidden, outputs = 2 * recipe.projector.hidden * size, shapes.width * (size + 8)
    return Memory(
        _encoder_bytes(shapes, on_gpu) + tokens * shapes.width * size,
        2 * trained * size,
        float(trained * (8 if size == 4 else 16)),
        positions * (inputs + hidden + outputs) * FRAGMENTATION,
        positions * tokens * CTC_LOGIT_BYTES,
        CUDA_OVERHEAD if on_gpu else PROCESS_OVERHEAD,
    )


def memory_of_phases(shapes: Shapes, processes: int, on_gpu: bool = True) -> list[Callable[[Load], Memory]]:
    """Return, for each phase of a training run, a function that computes one process's memory from its load.

    The first function is for the phase with the LLM. The arguments are those of `training_memory`.
    """
    phases = [lambda load: training_memory(shapes, load, processes, on_gpu)]
    if shapes.recipe.projector.beginning.active:
        phases.append(lambda load: beginning_memory(shapes, load, on_gpu))
    return phases


def _encoder_bytes(shapes: Shapes, on_gpu: bool) -> float:
    """Return the bytes of an encoder that runs on the fly. It is not sharded: every process holds a copy."""
    if shapes.recipe.caches_features:
        return 0.0
    dtype = DTYPES[encoder_precision(shapes.recipe.features.dtype, on_gpu)]
    return shapes.encoder_parameters * dtype.itemsize


def _gathered(shapes: Shapes) -> float:
    """Return how many of the LLM's weights are gathered at the peak; 0 if the LLM is not sharded."""
    options = shapes.recipe.training
    if options.engine == "fsdp":
        # FSDP2 gathers the layers in turn. With prefetching, two layers are complete at a time. All other
        # weights, such as embedding and output layer, are one unit, which is complete throughout.
        return shapes.layer_parameters * 2 / shapes.layers + (shapes.llm_parameters - shapes.layer_parameters)
    if options.zero_stage < 3:
        return 0.0
    # The backward pass does not need the input embedding, unless it is tied to the output layer.
    head = sum(p.numel() for p in shapes.llm.get_output_embeddings().parameters())
    return min(GATHERED, shapes.layer_parameters + head)


def _logits(shapes: Shapes, load: Load, size: int) -> float:
    """Return the bytes of the logits and of the tensors that are computed from them."""
    targets = load.rows * load.targets
    if not shapes.scores_in_chunks:
        return targets * shapes.vocabulary * LOGIT_BYTES
    at_once = min(targets, max(1, CHUNK // shapes.vocabulary))
    # In addition to the chunk, the output layer's inputs and their gradient are in memory.
    return at_once * shapes.vocabulary * CHUNKED_LOGIT_BYTES + 2 * targets * shapes.width * size


def _transient(shapes: Shapes, load: Load, size: int) -> float:
    """Return the bytes of the output of the widest layer, and of its gradient."""
    widest = max(m.out_features for m in shapes.llm.base_model.modules() if isinstance(m, torch.nn.Linear))
    return 2 * load.rows * load.length * widest * size
