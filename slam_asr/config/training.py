"""The section `training` of a recipe."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from slam_asr.config.schema import bounded, nearest

TRACKERS = ["mlflow", "wandb"]


@dataclass
class Training:
    """How the projector is trained."""

    engine: Literal["deepspeed", "ddp", "fsdp"] = "deepspeed"
    """What distributes the training over processes: DeepSpeed; PyTorch's DDP, where each process holds the
    complete model; or PyTorch's FSDP2, where each holds a part. All take the same steps."""
    nodes: int = bounded(1, at_least=1)
    """Machines to train on. With more than one, the pipeline's step `train` starts them as a TrainJob of
    Kubeflow Trainer."""
    processes: int = bounded(0, at_least=0)
    """Processes on each machine, one per GPU. 0: as many as there are GPUs, or one on a CPU."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Number format of the frozen weights and of the forward and backward passes. The projector's master
    weights are always fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage. 0 is fastest if the LLM fits on one GPU; 3 shards the frozen LLM too. Must be
    0 for the other engines."""
    deepspeed: dict[str, Any] | str = field(default_factory=dict)
    """DeepSpeed's own JSON, or a path to it. Values that have a recipe key are moved to that key. Unknown
    keys, contradictions, and settings for what slam-asr does in its own way are refused. All other values are
    passed on to DeepSpeed."""
    offload_optimizer: bool = False
    """Keep the optimiser's state (12 bytes per trained weight) in host memory and compute its steps there,
    which saves GPU memory but is slower. Needs ZeRO stage 1, 2 or 3."""
    gradient_checkpointing: bool = False
    """Save only each LLM layer's input and recompute the layer in the backward pass. This needs a fraction of
    the memory, but a third more time."""
    compile: bool = False
    """Let torch.compile fuse the operations of each LLM layer. The training machine needs Python's headers
    and a compiler: for C++ if it trains on a CPU, for C on a GPU. The first step waits for compilation. Does
    not work with ZeRO stage 3 or with `liger`."""
    liger: bool = False
    """Use Liger's kernels for the LLM's norms, rotary embeddings and feed-forward layers. Needs a GPU and the
    package liger-kernel."""
    epochs: int = bounded(3, at_least=1)
    """Passes over the train utterances; `max_steps` may end training earlier."""
    max_steps: int = bounded(100_000, at_least=1)
    """Maximum number of optimiser steps."""
    positions_per_step: int = bounded(6000, at_least=1)
    """LLM positions (audio, prompt and answer) in one optimiser step, summed over all processes, so the steps
    are the same for any number of processes."""
    positions_per_batch: int = bounded(6000, at_least=1)
    """LLM positions that one process puts through the LLM at once. Fewer need less memory; gradients are
    accumulated until the step is complete."""
    packing: bool = True
    """Put the utterances of a batch one after another in one row, so that nothing is padded, if the LLM can
    keep them apart. With `false`, or if the LLM cannot do this, each utterance gets a row, padded to the
    longest one."""
    utterances_per_batch: int = bounded(0, at_least=0)
    """Utterances that one process puts through the LLM at once, as in the reference implementation, instead
    of batches by positions. A step then has utterances_per_batch × `accumulation` × processes utterances, so
    it depends on the number of processes. 0: batches by positions."""
    accumulation: int = bounded(1, at_least=1)
    """Batches of `utterances_per_batch` whose gradients each process accumulates in one step."""
    learning_rate: float = bounded(1e-4, above=0)
    """Peak of AdamW's learning rate."""
    weight_decay: float = bounded(0.0, at_least=0.0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = bounded(1000, at_least=0)
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant as in the publication, or down to zero at the last step."""
    gradient_clipping: float = bounded(0.0, at_least=0.0)
    """Maximum norm of the gradient; 0: no clipping."""
    validate_every: int = bounded(1000, at_least=1)
    """Steps between validations on dev. Training always ends with one."""
    samples: int = bounded(8, at_least=0)
    """Dev utterances that each validation transcribes (greedily), always the same ones. They give an early
    word error rate, and texts to look at. 0: none."""
    trackers: list[str] = field(default_factory=list)
    """Trackers to which the numbers are sent (mlflow, wandb), in addition to the log, curve.jsonl and
    TensorBoard's files. You provide their packages and accounts."""
    patience: int = bounded(0, at_least=0)
    """Validations without a lower dev loss after which training ends early; 0: never."""
    nonfinite_steps: int = bounded(3, at_least=1)
    """Training stops after this many consecutive steps with a loss or gradient that is not finite. Each such
    step is skipped, and its utterances are written to nonfinite.jsonl. In fp16, steps that are skipped while
    the loss scale adapts do not count."""
    checkpoint_every: int = bounded(1000, at_least=0)
    """Steps between checkpoints; 0: by time alone. Training also saves one at its end, when
    `projector.beginning` is over, and at each validation with the lowest dev loss so far."""
    checkpoint_minutes: float = bounded(10.0, at_least=0.0)
    """Maximum minutes between checkpoints. This much work can be lost if a cluster leaves too little time for
    a last checkpoint when it ends the pod. 0: by steps alone."""
    checkpoints: int = bounded(2, at_least=1)
    """Number of most recent checkpoints to retain, in addition to the one with the lowest dev loss."""
    log_every: int = bounded(10, at_least=1)
    """Steps between two lines of the log."""
    seed: int = 0
    """Seed of everything that is drawn at random, such as the initial weights of projector and LoRA adapter,
    and the order of the utterances."""

    def contradictions(self) -> Iterator[str]:
        """Yield a sentence for each value that cannot work, alone or with another one."""
        if unknown := [tracker for tracker in self.trackers if tracker not in TRACKERS]:
            yield (
                f"training.trackers knows {' and '.join(TRACKERS)}, "
                f"not {unknown[0]}{nearest(unknown[0], TRACKERS) or '.'}"
            )
        if self.engine != "deepspeed":
            for key in ("zero_stage", "offload_optimizer", "deepspeed"):
                if getattr(self, key):
                    yield (
                        f"training.{key} is DeepSpeed's, but training.engine is {self.engine}: "
                        "leave it out, or choose the engine deepspeed."
                    )
        if self.offload_optimizer and self.zero_stage == 0:
            yield "training.offload_optimizer needs training.zero_stage 1, 2 or 3; it is 0."
        if self.compile and self.zero_stage == 3:
            yield (
                "training.compile does not work with training.zero_stage 3, which gathers a layer's weights "
                "while it runs: leave one of them out, or choose the engine fsdp."
            )
        if self.compile and self.liger:
            yield (
                "training.compile and training.liger both replace the kernels of the LLM's layers: "
                "choose one."
            )
        if self.accumulation > 1 and not self.utterances_per_batch:
            yield (
                f"training.accumulation is {self.accumulation} without training.utterances_per_batch, "
                "but batches by positions accumulate up to training.positions_per_step: set that, or "
                "training.utterances_per_batch."
            )
        if self.positions_per_batch > self.positions_per_step:
            yield (
                f"training.positions_per_batch ({self.positions_per_batch}) must not exceed "
                f"training.positions_per_step ({self.positions_per_step}): a batch is a part of a step."
            )
