"""Memory of one training process, by part: weights, optimiser, activations, logits, overhead."""

from dataclasses import dataclass

import torch

from slam_asr.models.answer_loss import CHUNK
from slam_asr.models.precision import DTYPES, encoder_precision
from slam_asr.planning.shapes import Shapes

LOGIT_BYTES = 12
"""Bytes per logit at the peak if all logits exist at once.

Log-probabilities, and two gradients of them in the backward pass, all in fp32.
"""
CHUNKED_LOGIT_BYTES = 8
"""Bytes per logit of a chunk: the logit, and its exponential while they are summed, in fp32."""
GATHERED = 1e9
"""Weights that ZeRO-3 retains unsharded on every process until the backward pass has used them.

DeepSpeed's default of stage3_max_live_parameters.
"""
CUDA_OVERHEAD = 1.5e9
"""Bytes of CUDA's context, its libraries' workspaces and NCCL's buffers on a GPU; a rule of thumb."""
FRAGMENTATION = 1.05
"""Memory that the allocator takes for activations, relative to what is requested; a rule of thumb."""


@dataclass
class Load:
    """One micro-batch."""

    rows: float
    """Utterances; a fraction if rows are packed."""
    length: int
    """LLM positions of each, padding included."""
    audio: int
    """Audio positions among them."""
    targets: int
    """Target tokens among them."""


@dataclass
class Memory:
    """Memory of one process in bytes, by part."""

    frozen: float
    """Frozen weights, weights that are gathered at the peak, and an encoder that runs on the fly."""
    trained: float
    """Trained weights and their gradients."""
    optimizer: float
    """fp32 master weights, if the precision is bf16 or fp16, and Adam's two moments."""
    activations: float
    """What layers save for the backward pass, and the temporary tensors of the widest layer."""
    logits: float
    """The logits that exist at one time, and what is computed from them."""
    overhead: float
    """Memory of CUDA and NCCL."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.frozen + self.trained + self.optimizer + self.activations + self.logits + self.overhead


def training_memory(shapes: Shapes, load: Load, processes: int, on_gpu: bool = True) -> Memory:
    """Memory of one of `processes` processes at the peak of a step, in bytes.

    Args:
        shapes: the models.
        load: the process' largest micro-batch.
        processes: number of processes over which ZeRO shards.
        on_gpu: whether to count the memory of a GPU's software.
    """
    options = shapes.recipe.training
    size = DTYPES[options.precision].itemsize
    # FSDP2 shards what ZeRO-3 shards; DDP shards nothing. The recipe refuses a ZeRO stage with either.
    zero_stage = 3 if options.engine == "fsdp" else options.zero_stage
    # shards[n]: the number of shards of what ZeRO stage n shards: 1 optimiser, 2 gradients, 3 weights.
    shards = [1 if zero_stage < stage else processes for stage in range(4)]
    trained = shapes.trained_parameters
    frozen = (shapes.llm_parameters - shapes.llm_trained) * size / shards[3] + _gathered(shapes) * size
    if shapes.recipe.encoder.tuning == "frozen" and not shapes.recipe.caches_features:
        # The encoder runs on the fly, unsharded on every process.
        frozen += (
            shapes.encoder_parameters
            * DTYPES[encoder_precision(shapes.recipe.features.dtype, on_gpu)].itemsize
        )
    weights_and_gradients = trained * size / shards[3] + trained * size / shards[2]
    # Adam's two moments are 8 bytes per weight. Weights in bf16 or fp16 have fp32 masters and, during a step,
    # fp32 gradients in addition. On a CPU, offloading saves nothing: host memory is the process' memory.
    optimizer = (
        0.0 if options.offload_optimizer and on_gpu else trained * (8 if size == 4 else 16) / shards[1]
    )
    saved = shapes.saved_bytes(load.rows, load.length)
    if options.gradient_checkpointing:
        saved += shapes.saved_bytes_of_a_layer(load.rows, load.length)
    inputs = (
        load.rows * load.audio * shapes.recipe.projector.downsampling * shapes.encoder.width * (size + size)
    )
    hidden = load.rows * load.audio * (2 * shapes.recipe.projector.hidden + shapes.width) * size
    embedded = 3 * load.rows * load.length * shapes.width * size
    activations = saved + inputs + hidden + embedded + _transient(shapes, load, size)
    return Memory(
        frozen,
        weights_and_gradients,
        optimizer,
        activations * FRAGMENTATION,
        _logits(shapes, load, size),
        CUDA_OVERHEAD if on_gpu else 0.0,
    )


def _gathered(shapes: Shapes) -> float:
    """Weights of the LLM that are gathered at the peak if each process holds a shard of them."""
    options = shapes.recipe.training
    if options.engine == "fsdp":
        # Two layers, and the embedding and output layers, which FSDP2 does not gather layer by layer.
        return shapes.layer_parameters * 2 / shapes.layers + (shapes.llm_parameters - shapes.layer_parameters)
    if options.zero_stage < 3:
        return 0.0
    # The backward pass does not need the input embedding, unless it is the output layer too.
    head = sum(p.numel() for p in shapes.llm.get_output_embeddings().parameters())
    return min(GATHERED, shapes.layer_parameters + head)


def _logits(shapes: Shapes, load: Load, size: int) -> float:
    """Bytes of the logits and of what is computed from them, by how the loop scores them."""
    targets = load.rows * load.targets
    if not shapes.scores_in_chunks:
        return targets * shapes.vocabulary * LOGIT_BYTES
    at_once = min(targets, max(1, CHUNK // shapes.vocabulary))
    # In addition to the chunk, the output layer's inputs and their gradient are retained.
    return at_once * shapes.vocabulary * CHUNKED_LOGIT_BYTES + 2 * targets * shapes.width * size


def _transient(shapes: Shapes, load: Load, size: int) -> float:
    """Bytes of the widest layer's output and its gradient."""
    widest = max(m.out_features for m in shapes.llm.base_model.modules() if isinstance(m, torch.nn.Linear))
    return 2 * load.rows * load.length * widest * size
