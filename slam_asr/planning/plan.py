"""`slam-asr plan`: whether a training fits, what it takes, and what to set; nothing is loaded."""

from dataclasses import dataclass, field, replace

from slam_asr.errors import UserError
from slam_asr.models.feature_dtype import bytes_per_frame
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.planning.memory import Load, Memory, training_memory
from slam_asr.planning.shapes import Shapes, describe, encoder_flops
from slam_asr.progress import clock, log_line
from slam_asr.recipe import Recipe

PROMPT_POSITIONS = 18
"""Of the reference's prompt with Llama's tokenizer, roughly; others are near it."""
TOKENS_A_SECOND = 3.7
"""Of transcripts: LibriSpeech has 2.7 words a second of audio, Llama's tokenizer some 1.35 tokens a word in lower case."""
USABLE = 0.92
"""Share of a GPU's memory that is planned with: sizes vary between batches, and memory is never packed without gaps."""
ENCODING, TRAINING = 0.30, 0.40
"""Shares of the peak at which an encoder and a training usually compute; the reference trains at 0.09 to 0.20."""


@dataclass
class Stage:
    """A stage's work."""

    flops: float
    seconds: float
    gpus: int


@dataclass
class Plan:
    """What a recipe takes."""

    load: Load
    memory: Memory
    """Of one GPU, in bytes."""
    fits: bool
    cache_bytes: float
    stages: dict[str, Stage]
    steps: int
    proposal: dict[str, object] = field(default_factory=dict)
    """Options that make it fit, or use the memory better; empty where nothing found fits."""


def plan(
    recipe: Recipe,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    hours: float = 960.9,
    utterance_seconds: float = 12.3,
    test_hours: float = 10.5,
    gpu_tflops: float = 989.0,
    gpu_bandwidth: float = 3.35,
) -> Plan:
    """Say what a recipe will take on given GPUs: memory by part, storage, FLOPs and hours by stage.

    Args:
        recipe: models and hyper-parameters.
        gpus: GPUs that train; 0 for one process on a CPU.
        gpu_memory: GB (10^9 bytes) of each.
        hours: audio to train on; LibriSpeech has 960.9.
        utterance_seconds: mean length of an utterance; 12.3 in LibriSpeech.
        test_hours: audio to decode; both test sets of LibriSpeech have 10.5.
        gpu_tflops: peak of each GPU in the recipe's precision, dense; 989 is an H100's in bf16.
        gpu_bandwidth: TB/s of each GPU's memory; 3.35 is an H100's.

    Returns:
        The plan, which is printed too.

    Raises:
        UserError: a model's configuration is nowhere to be found, or a number is not above 0.
    """
    if gpus < 0:
        raise UserError(f"--gpus is {gpus} but must be at least 0.")
    for name, value in (
        ("gpu_memory", gpu_memory),
        ("hours", hours),
        ("utterance_seconds", utterance_seconds),
        ("test_hours", test_hours),
        ("gpu_tflops", gpu_tflops),
        ("gpu_bandwidth", gpu_bandwidth),
    ):
        if not value > 0:
            raise UserError(f"--{name} is {value} but must be above 0.")
    shapes = describe(recipe)
    utterances = max(1, round(hours * 3600 / utterance_seconds))
    # More than a process' share of a step never comes together.
    processes = max(1, gpus)
    share = recipe.training.positions_per_step // processes
    load = mean_load(shapes, utterance_seconds, min(recipe.training.positions_per_batch, share))
    memory = training_memory(shapes, load, processes, on_gpu=gpus > 0)
    room = USABLE * gpu_memory * 1e9
    one = mean_load(shapes, utterance_seconds, 1)
    stages, steps = _work(
        shapes,
        load,
        utterances,
        utterance_seconds,
        test_hours,
        processes,
        gpu_tflops * 1e12,
        gpu_bandwidth * 1e12,
    )
    frames = shapes.encoder.frames_of(round(utterance_seconds * 16_000))
    cache = (
        utterances * frames * bytes_per_frame(shapes.encoder.width, recipe.features.dtype)
        if recipe.caches_features
        else 0
    )
    result = Plan(
        load,
        memory,
        memory.total <= room,
        cache,
        stages,
        steps,
        propose(shapes, one, processes, room, gpus > 0),
    )
    _print(result, shapes, gpus, gpu_memory, gpu_tflops, hours)
    return result


def mean_load(shapes: Shapes, seconds: float, budget: int) -> Load:
    """As many utterances of mean length as fill a budget of LLM positions; one at least."""
    audio = positions_of(shapes.recipe.projector, shapes.encoder.span_of(round(seconds * 16_000)))
    targets = round(seconds * TOKENS_A_SECOND) + 1
    length = audio + PROMPT_POSITIONS + targets
    return Load(max(1.0, budget / length), length, audio, targets)


def propose(shapes: Shapes, one: Load, processes: int, room: float, on_gpu: bool = True) -> dict[str, object]:
    """The smallest ZeRO stage with which the recipe fits, and the largest budget of a batch with it.

    Where no stage does, layers are computed again, and then the optimiser is kept by the host of the GPUs.

    Args:
        shapes: the models.
        one: a batch of a single utterance.
        processes: how many train.
        room: bytes of each.
        on_gpu: whether it trains on GPUs.

    Returns:
        Keys of the recipe and their values; none where nothing tried fits.
    """
    recipe = shapes.recipe
    again = {"gradient_checkpointing": True}
    for more in ({}, again, {**again, "offload_optimizer": True}) if on_gpu else ({}, again):
        for stage in (0, 1, 2, 3) if processes > 1 else (0, 2):
            if more.get("offload_optimizer") and stage == 0:
                continue
            engine = {} if recipe.training.engine == "deepspeed" else {"engine": "deepspeed"}
            options = {**engine, "zero_stage": stage, "offload_optimizer": False, **more}
            training = replace(recipe.training, **options)
            changed = replace(shapes, recipe=replace(recipe, training=training))
            first, second = (
                training_memory(changed, replace(one, rows=n), processes, on_gpu).total for n in (1, 2)
            )
            if first > room:
                continue
            rows = int((room - first) // (second - first)) + 1
            return {
                f"training.{name}": value
                for name, value in {**options, **_budget(recipe, one.length, rows, processes)}.items()
            }
    return {}


def _budget(recipe: Recipe, length: int, rows: int, processes: int) -> dict[str, int]:
    """The key that says how much is computed at once, with no more than a step has."""
    options = recipe.training
    if options.utterances_per_batch:
        return {"utterances_per_batch": min(rows, options.utterances_per_batch)}
    return {"positions_per_batch": min(rows * length, max(length, options.positions_per_step // processes))}


def _work(
    shapes: Shapes,
    load: Load,
    utterances: int,
    seconds: float,
    test_hours: float,
    gpus: int,
    peak: float,
    bandwidth: float,
) -> tuple[dict[str, Stage], int]:
    recipe = shapes.recipe
    options, samples = recipe.training, round(seconds * 16_000)
    encode = encoder_flops(shapes.encoder, samples)
    positions = utterances * load.length
    steps_an_epoch = max(1, -(-positions // options.positions_per_step))
    steps = min(options.max_steps, steps_an_epoch * options.epochs)
    seen = utterances * steps / steps_an_epoch
    width, layers = shapes.width, shapes.layers
    # Forward, and gradients of activations, are two FLOPs each a weight and position; gradients of weights as many again.
    passes = 2 + 2 + (2 if options.gradient_checkpointing else 0)
    text = load.length * (passes * shapes.layer_parameters + 2 * shapes.llm_trained)
    attention = (passes + 2) * load.length * load.length * width * layers
    output = 4 * load.targets * shapes.vocabulary * width
    projected = 6 * load.audio * shapes.projector_parameters
    on_the_way = 0 if recipe.caches_features else encode
    heard = 3 * on_the_way if recipe.encoder.tuning == "full" else on_the_way
    train = seen * (text + attention + output + projected + heard)
    extract = utterances * encode if recipe.caches_features else 0
    tested = test_hours * 3600 / seconds
    prefill = tested * (2 * shapes.layer_parameters * (load.length - load.targets) + on_the_way)
    beams = recipe.decoding.beams
    rows = max(
        1, recipe.decoding.positions_per_batch // ((load.length + recipe.decoding.max_new_tokens) * beams)
    )
    decode = prefill + tested * 2 * shapes.llm_parameters * load.targets * beams
    # Each token of a batch reads all weights once; a batch lasts as long as its longest answer.
    reading = (
        tested
        / rows
        * 1.5
        * load.targets
        * shapes.llm_parameters
        * DTYPES[recipe.decoding.precision].itemsize
        / bandwidth
    )
    return {
        "extract-features": Stage(extract, extract / (peak * ENCODING), 1),
        "train": Stage(train, train / (gpus * peak * TRAINING), gpus),
        "decode": Stage(decode, decode / (peak * ENCODING) + reading, 1),
    }, steps


def _print(
    result: Plan, shapes: Shapes, gpus: int, gpu_memory: float, gpu_tflops: float, hours: float
) -> None:
    recipe, memory = shapes.recipe, result.memory
    log_line(f"{recipe.name}: {recipe.encoder.name} + {recipe.projector.kind} projector + {recipe.llm.name}")
    for note in shapes.notes:
        log_line(f"  {note}")
    log_line(
        f"parameters: encoder {shapes.encoder_parameters:,}, projector {shapes.projector_parameters:,}, LLM "
        f"{shapes.llm_parameters:,} (of which trained {shapes.llm_trained:,})"
    )
    engine = recipe.training.engine
    spread = (
        f"ZeRO stage {recipe.training.zero_stage}"
        if engine == "deepspeed"
        else {"ddp": "DDP", "fsdp": "FSDP2"}[engine]
    )
    where = f"each of {gpus} GPU{'s' * (gpus > 1)}" if gpus else "a process on a CPU, beyond an idle one,"
    log_line(f"\nmemory of {where} in training, {spread}, GB:")
    load = result.load
    rows = {
        "frozen weights": memory.frozen,
        "trained weights and gradients": memory.trained,
        "optimiser": memory.optimizer,
        f"activations ({load.rows:.1f} utterances of {load.length} positions)": memory.activations,
        f"logits ({load.rows * load.targets:.0f} targets × {shapes.vocabulary})": memory.logits,
        "CUDA and NCCL, about": memory.overhead,
    }
    for name, size in rows.items():
        if size:
            log_line(f"  {name:<52}{size / 1e9:8.2f}")
    verdict = "fits" if result.fits else "DOES NOT FIT"
    log_line(
        f"  {'in all':<52}{memory.total / 1e9:8.2f}  {verdict} into {gpu_memory:g} GB ({USABLE:.0%} of them planned with)"
    )
    if recipe.training.offload_optimizer:
        log_line(
            f"  {'optimiser in the memory of all hosts together':<52}{12 * shapes.trained_parameters / 1e9:8.2f}"
        )
    if result.cache_bytes:
        log_line(f"\nfeature cache: {result.cache_bytes / 1e9:,.1f} GB for {hours:g} h")
    log_line(
        f"\nwork, at {gpu_tflops:g} TFLOP/s each, of which {ENCODING:.0%} encoding and {TRAINING:.0%} training, in {result.steps:,} steps:"
    )
    for name, stage in result.stages.items():
        log_line(
            f"  {name:<18}{stage.flops / 1e12:14,.1f} TFLOP {clock(stage.seconds):>12} on {stage.gpus} {'GPU' if gpus else 'CPU'}{'s' * (stage.gpus > 1)}"
        )
    total = sum(s.seconds * s.gpus for s in result.stages.values()) / 3600
    log_line(f"  {'GPU-hours' if gpus else 'hours':<18}{total:12,.1f}")
    if result.proposal:
        command = " ".join(f"--{name} {str(value).lower()}" for name, value in result.proposal.items())
        log_line(f"\nproposed: {command}")
    else:
        log_line(
            "\nnothing tried here fits: take more GPUs or larger ones, or a smaller LLM, or llm.tuning lora"
        )
