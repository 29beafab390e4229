"""Enters the phases of a training run: the beginning, if the recipe has one, and the phase with the LLM.

Both phases share data, loop and checkpoints, and one plan contains the steps of both. Each phase has its own
model and engine. The model of the beginning is the projector with a CTC head. Every process can hold it, so
its engine is always DDP. The LLM is loaded at the end of the beginning.

The projector's weights and the CTC head's sharpness pass from the beginning to the next phase. AdamW's
moments do not: they are means over CTC's gradients, whose sizes differ from those of the LLM's loss. With
them, the first updates would be too large or too small in spite of the warm-up.
"""

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from slam_asr.artifacts.checkpoint import BEGINNING, MAIN
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.config.recipe import Training
from slam_asr.models.answer_loss import allows_chunks, score_in_chunks
from slam_asr.models.ctc import AuxiliaryCtc, BlankFilter
from slam_asr.models.ctc_vocabulary import CtcVocabulary
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import explain_precision
from slam_asr.models.slam import Slam
from slam_asr.progress import log_line
from slam_asr.training.beginning import build_ctc_model, build_head
from slam_asr.training.builder import Parts, Phase
from slam_asr.training.engines.choose import make_engine
from slam_asr.training.engines.engine import Engine
from slam_asr.training.kernels import compile_layers, use_liger
from slam_asr.training.model_builder import build_model, count_parameters

WARM_UP = 0.1
"""Share of the beginning's steps over which the learning rate rises."""
CLIPPING = 1.0
"""Maximum norm of the gradient in the beginning, whose first gradients are large."""


def enter_beginning(parts: Parts) -> None:
    """Build the model and the engine of the beginning, and let the readers spell transcripts for CTC."""
    recipe, options = parts.recipe, parts.recipe.projector.beginning
    torch.manual_seed(recipe.training.seed + parts.rank)  # for dropout
    model = build_ctc_model(parts.job, recipe, parts.device)
    parameters = count_parameters(model, parts.job.encoder_parameters)
    training = replace(
        recipe.training,
        engine="ddp",
        zero_stage=0,
        offload_optimizer=False,
        deepspeed={},
        learning_rate=options.learning_rate,
        gradient_clipping=CLIPPING,
    )
    for reader in parts.readers.values():
        reader.packs = reader.without_llm = True
        reader.vocabulary = CtcVocabulary(reader.examples.recipe_prompts.tokenizer, parts.job.ctc_tokens)
    warm_up = round(WARM_UP * options.steps)
    rate = learning_rate_schedule("cosine", options.learning_rate, warm_up, options.steps)
    # Each weight of the projector takes two operations (multiply and add) in the forward pass, two for the
    # gradient of its input and two for its own gradient. The embeddings get no gradient, but take two more
    # operations for the expected embedding.
    operations = 6.0 * parameters["projector"][0] + 6.0 * model.head.embeddings.numel()
    engine = make_engine(model, training, parts.device, {})
    parts.phase = Phase(
        BEGINNING, engine, parameters, packs=True, rate=rate, operations_per_position=operations
    )


def leave_beginning(parts: Parts) -> float:
    """Enter the phase with the LLM's loss, with the projector from the beginning.

    Returns:
        The sharpness that the CTC head has learned in the beginning.
    """
    engine = parts.engine
    sharpness = engine.get_state("head.log_sharpness", "weight").exp().item()
    weights = {
        name.removeprefix("projector."): engine.get_state(name, "weight").detach().to("cpu", copy=True)
        for name in engine.groups.weights
        if name.startswith("projector.")
    }
    # The model and the optimiser of the beginning are freed before the LLM is loaded.
    del parts.phase, engine
    gc.collect()
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()
    enter_main(parts, sharpness, weights)
    return sharpness


def enter_main(
    parts: Parts, sharpness: float | None, projector: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Enter the phase with the LLM's loss: build its model and engine, and set up the readers.

    Args:
        parts: the parts of the training run.
        sharpness: the sharpness that the CTC head has learned in the beginning; None without a beginning.
        projector: weights of the projector, by name. By default, the projector starts from the weights in
            `projector.init_from` or, without it, from random weights.

    Raises:
        UserError: the weights of the encoder, the projector or the LLM cannot be used.
    """
    recipe, options = parts.recipe, parts.recipe.training
    torch.manual_seed(options.seed + parts.rank)  # for dropout, if any
    model, lazy_weights = build_model(parts.job, recipe, parts.device)
    if projector is not None:
        model.projector.load_state_dict(projector)
    if recipe.projector.ctc_weight:
        head = build_head(parts.job, recipe, sharpness).to(parts.device)
        model.ctc = AuxiliaryCtc(head, recipe.projector.ctc_weight)
        if recipe.projector.drop_blanks:
            model.blank_filter = BlankFilter(head, recipe.projector.drop_blanks)
    # Counted before the engine shards the model.
    parameters = count_parameters(model, parts.job.encoder_parameters)
    rates = {"llm": recipe.llm.learning_rate, "encoder": recipe.encoder.learning_rate}
    engine = make_engine(model, options, parts.device, rates, lazy_weights)
    packs = _set_up_llm(model, engine, options)
    for reader in parts.readers.values():
        reader.packs, reader.without_llm, reader.vocabulary = packs, False, None
    if recipe.projector.ctc_weight:
        # CTC's loss is added only in training. The dev loss is that of the LLM alone, so that recipes can be
        # compared by it.
        train = parts.readers["train"]
        train.vocabulary = CtcVocabulary(train.examples.recipe_prompts.tokenizer, parts.job.ctc_tokens)
    beginning = parts.plan.beginning
    rate = learning_rate_schedule(
        options.schedule, options.learning_rate, options.warmup_steps, parts.plan.steps - beginning
    )
    # Each weight of the LLM takes two operations (multiply and add) in the forward pass and two for the
    # gradient of its input; a trained weight takes two more for its own gradient.
    weights, trained = parameters["llm"]
    operations = 4.0 * weights + 2.0 * trained
    parts.phase = Phase(MAIN, engine, parameters, packs, lambda step: rate(step - beginning), operations)


def _set_up_llm(model: Slam, engine: Engine, options: Training) -> bool:
    """Find out what the LLM allows, and set its loss and its kernels accordingly.

    Returns:
        Whether the utterances of a batch are packed into one row.
    """
    # Not earlier than here: if the LLM is sharded, its weights exist only after the engine has read them.
    packs = options.packing and engine.try_llm(allow_packing)
    # Under ZeRO-3 the output layer's weights are complete only during its own forward call, and
    # `score_in_chunks` reads them directly.
    if options.zero_stage != 3 and engine.try_llm(allows_chunks):
        model.scorer = score_in_chunks
    # The kernels come last, because the trials would compile the layers for their own inputs.
    if options.liger:
        use_liger(model.llm)
    if options.compile:
        compile_layers(model.llm)
    return packs


def learning_rate_schedule(
    kind: str, peak: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Create a schedule of learning rates.

    The rate rises linearly to `peak` over `warmup_steps`. After that, it stays there (`constant`, as in the
    SLAM-ASR paper) or falls to zero at the last step (`linear`, `cosine`).

    Args:
        kind: `constant`, `linear` or `cosine`.
        peak: highest learning rate.
        warmup_steps: number of steps of the linear rise.
        total_steps: number of steps of the phase.

    Returns:
        A function from step of the phase, counted from 1, to learning rate.
    """

    def rate(step: int) -> float:
        # Without warm-up steps this is never true, because steps are counted from 1. So nothing is divided by
        # zero.
        if step <= warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind == "linear":
            return peak * (1 - progress)
        if kind == "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        return peak

    return rate


def announce(parts: Parts) -> None:
    """Log the models, the device and the plan, before the first step of a phase."""
    recipe, options, plan, budget = parts.recipe, parts.recipe.training, parts.plan, parts.budget
    train = parts.readers["train"]
    audio = "cached features" if isinstance(train.reader, FeatureStore) else "encoded on the fly"
    llm = "" if parts.in_beginning else f" + {recipe.llm.name}"
    log_line(f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector{llm}")
    total, trained = (sum(counts) for counts in zip(*parts.phase.parameters.values(), strict=True))
    by_part = ", ".join(f"{name} {count:,}" for name, (_, count) in parts.phase.parameters.items() if count)
    names = "encoder and projector" if parts.in_beginning else "encoder, projector and LLM"
    log_line(f"parameters: {total:,} in {names}, {trained:,} trained ({by_part})")
    engine = {"deepspeed": f"DeepSpeed, ZeRO stage {options.zero_stage}", "ddp": "DDP", "fsdp": "FSDP2"}
    compiled = ", layers are compiled during the first step" if options.compile else ""
    log_line(
        f"device: {parts.device.type} × {parts.processes}, "
        f"{explain_precision(options.precision, parts.device)}, "
        f"{'DDP' if parts.in_beginning else engine[options.engine] + compiled}"
    )
    log_line(
        f"audio: {train.examples.hours:.2f} h in {len(train.examples)} utterances; {plan.steps} steps of "
        f"{budget.step} {'utterances' if budget.counts_utterances else 'LLM positions'} "
        f"in {plan.epochs} epochs, batches {'packed' if parts.phase.packs else 'padded'}"
    )
    if parts.in_beginning:
        log_line(
            f"beginning: up to step {plan.beginning}, CTC over {len(parts.job.ctc_tokens) - 1} of the tokens "
            f"of {recipe.llm.name}, without its layers"
        )
