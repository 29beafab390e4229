"""The command `slam-asr plan`: estimates if a training run fits in memory, and which options make it fit.

It also estimates the run's storage and time. No weights are loaded.
"""

from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.planning.memory import part_names
from slam_asr.planning.plan import ENCODING_SHARE, TRAINING_SHARE, USABLE, Gpus, Plan, Speech, estimate
from slam_asr.planning.shapes import Shapes, describe
from slam_asr.progress import clock, log_line


def plan(  # noqa: PLR0913 (each parameter is an option of the command)
    recipe: Recipe,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    hours: float = 960.9,
    utterance_seconds: float = 12.3,
    test_hours: float = 10.5,
    gpu_tflops: float = 989.0,
    gpu_bandwidth: float = 3.35,
) -> Plan:
    """Estimate what a recipe needs on the given GPUs: memory by part, storage, FLOPs and time of each stage.

    Args:
        recipe: models and hyper-parameters.
        gpus: number of GPUs to train on; 0 for one process on a CPU.
        gpu_memory: memory of each GPU, or of the CPU, in GB (10^9 bytes).
        hours: hours of audio to train on; LibriSpeech has 960.9.
        utterance_seconds: mean length of an utterance in seconds; 12.3 in LibriSpeech.
        test_hours: hours of audio to decode; both test sets of LibriSpeech together have 10.5.
        gpu_tflops: peak TFLOP/s of each GPU or of the CPU, dense, in the recipe's precision; an H100 has 989
            in bf16.
        gpu_bandwidth: memory bandwidth of each GPU in TB/s; an H100 has 3.35.

    Returns:
        The plan, which is also printed.

    Raises:
        UserError: a model's configuration cannot be found, or a number is too small.
    """
    if gpus < 0:
        raise ConfigurationError(f"--gpus is {gpus} but must be at least 0.")
    numbers = {"gpu-memory": gpu_memory, "hours": hours, "utterance-seconds": utterance_seconds}
    numbers |= {"test-hours": test_hours, "gpu-tflops": gpu_tflops, "gpu-bandwidth": gpu_bandwidth}
    for name, value in numbers.items():
        # `value <= 0` would accept NaN.
        if not value > 0:
            raise ConfigurationError(f"--{name} is {value} but must be above 0.")
    shapes = describe(recipe)
    hardware = Gpus(gpus, gpu_memory * 1e9, gpu_tflops * 1e12, gpu_bandwidth * 1e12)
    result = estimate(shapes, hardware, Speech(hours, utterance_seconds, test_hours))
    size = f"of {gpu_memory:g} GB and {gpu_tflops:g} TFLOP/s (--gpus, --gpu-memory, --gpu-tflops)"
    log_line(
        f"assumed: {hours:g} h of audio to train on and {test_hours:g} h to decode (--hours, --test-hours)"
        + (f"; {gpus} GPU{'s' * (gpus > 1)} {size}" if gpus else f"; a CPU {size}")
    )
    _print_memory(result, shapes, hardware)
    if result.cache_bytes:
        log_line(f"\nfeature cache: {result.cache_bytes / 1e9:,.1f} GB for {hours:g} h")
    _print_work(result, hardware)
    return result


def _print_memory(result: Plan, shapes: Shapes, gpus: Gpus) -> None:
    recipe, load = shapes.recipe, result.load
    log_line(f"{recipe.name}: {recipe.encoder.name} + {recipe.projector.kind} projector + {recipe.llm.name}")
    for note in shapes.notes:
        log_line(f"  {note}")
    tuned = f"{shapes.llm_trained:,} of them trained" if shapes.llm_trained else "frozen"
    log_line(
        f"parameters: encoder {shapes.encoder_parameters:,}, projector {shapes.projector_parameters:,}, LLM "
        f"{shapes.llm_parameters:,} ({tuned})"
    )
    sharding = {"deepspeed": f"ZeRO stage {recipe.training.zero_stage}", "ddp": "DDP", "fsdp": "FSDP2"}
    where = f"each of {gpus.number} GPU{'s' * (gpus.number > 1)}" if gpus.number else "a process on a CPU"
    log_line(f"\nmemory of {where} in training, {sharding[recipe.training.engine]}, GB:")
    details = {
        "activations": f" ({load.rows:.1f} utterances of {load.length} positions)",
        "logits": f" ({load.rows * load.targets:.0f} targets × {shapes.vocabulary})",
        "overhead": " (approximate)",
    }
    names = part_names(gpus.number > 0)
    rows = {names[part] + details.get(part, ""): size for part, size in vars(result.memory).items() if size}
    peak, total = result.memory.total, "total"
    if result.beginning:
        rows["total with the LLM"] = peak
        rows[f"in the beginning, with at most {shapes.vocabulary} tokens for CTC"] = result.beginning.total
        peak, total = max(peak, result.beginning.total), "peak"
    for name, size in rows.items():
        log_line(f"  {name:<52}{size / 1e9:8.2f}")
    verdict = f"{'fits' if result.fits else 'DOES NOT FIT'} in {gpus.memory / 1e9:g} GB"
    log_line(f"  {total:<52}{peak / 1e9:8.2f}  {verdict} ({USABLE:.0%} of it usable)")
    if recipe.training.offload_optimizer:
        name = "optimiser in host memory, all hosts together"
        log_line(f"  {name:<52}{shapes.host_optimizer_bytes / 1e9:8.2f}")


def _print_work(result: Plan, gpus: Gpus) -> None:
    unit = "GPU" if gpus.number else "CPU"
    log_line(
        f"\nwork: {result.steps:,} steps; each {unit} peaks at {gpus.peak / 1e12:g} TFLOP/s, of which "
        f"encoding is assumed to reach {ENCODING_SHARE:.0%} and training {TRAINING_SHARE:.0%}:"
    )
    for name, stage in result.stages.items():
        units = f"{stage.gpus} {unit}{'s' * (stage.gpus > 1)}"
        log_line(f"  {name:<18}{stage.flops / 1e12:14,.1f} TFLOP {clock(stage.seconds):>12} on {units}")
    # The stages run on different numbers of GPUs, so the sum of their durations would not show the cost.
    total = sum(s.seconds * s.gpus for s in result.stages.values()) / 3600
    log_line(f"  {'GPU-hours' if gpus.number else 'hours':<18}{total:12,.1f}")
    proposed = " ".join(f"--{name} {str(value).lower()}" for name, value in result.proposal.items())
    larger = "use more or larger GPUs, a smaller LLM, or `--llm.tuning lora`"
    log_line(f"\nproposed: {proposed}" if proposed else f"\nno combination of options fits: {larger}")
