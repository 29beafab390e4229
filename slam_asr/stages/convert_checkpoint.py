"""The stage `convert-checkpoint`: converts a checkpoint of any kind to a model folder or another format.

It recognises the kind of the checkpoint by its content: the folder of a training run, SLAM-LLM's `model.pt`,
a folder that DeepSpeed wrote, the original file of a speech encoder, or a model folder.
"""

from pathlib import Path
from typing import Literal

from slam_asr.artifacts.stage_record import Outcome, Record, run_stage
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError
from slam_asr.storage import sha256_of_file

STAGE = "convert-checkpoint"


def convert_checkpoint(  # noqa: PLR0913 (each parameter is an option of the command)
    checkpoint: str,
    output: str,
    to: Literal["model", "huggingface", "voxtral", "slam-llm", "llm"] = "model",
    recipe: Recipe | None = None,
    which: Literal["latest", "best", "average"] = "latest",
    half: bool = False,
    adapter: str | None = None,
    complete: bool = False,
    report: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Record:
    """Convert a checkpoint to projector.safetensors and config.json, or to another format.

    Args:
        checkpoint: folder that train wrote or is writing; SLAM-LLM's model.pt, DeepSpeed's folder or what its
            zero_to_fp32.py wrote, which need `recipe`; the original file of Whisper, WavLM, HuBERT or wav2vec
            2.0; a model folder; or a shipped model's name.
        output: folder of the model; {fingerprint} in it is replaced by a digest of the inputs.
        to: `model` writes this project's model folder; `huggingface` a folder that transformers loads by
            itself, on machines without slam-asr; `voxtral` a folder for transformers' own class Voxtral,
            without code; `slam-llm` SLAM-LLM's model.pt; `llm` only the trained LLM, with merged LoRA.
        recipe: defines encoder, LLM, projector and prompt for checkpoints that do not name them: SLAM-LLM's
            model.pt, DeepSpeed's folders and what zero_to_fp32.py wrote. For others, only `encoder.name`,
            `llm.name` and `llm.trust_remote_code` are used: where the models are now, and whether the LLM's
            code may run.
        which: which checkpoint of a training run to convert: the latest, the best (with the lowest dev loss),
            or the average (the mean of all saved checkpoints, without those of the beginning).
        half: save projector and LoRA adapter in bf16, which halves their size.
        adapter: folder of a LoRA adapter as peft writes it (SLAM-LLM's peft_ckpt), for a checkpoint that does
            not contain its adapter.
        complete: with `--to huggingface`, copy encoder and LLM into the folder; by default, it contains only
            the trained weights, and the names of encoder and LLM.
        report: with `--to huggingface` or `voxtral`, folder that score wrote for this model; its error rates
            become part of the model card.
        verify: compare all weights of the result with the checkpoint's and, if the LLM fits in memory, the
            loss on random audio; with `--to llm` only the loss, with `--to voxtral` the logits.
        overwrite: replace a model that was made from another checkpoint, with other options or, for
            huggingface, with other code.

    Returns:
        The stage's record; its folder holds projector.safetensors and config.json, or the requested format.
        If the checkpoint is the original file of an encoder, the folder holds a model for `encoder.name`.

    Raises:
        ModelError: the checkpoint is missing or damaged, or does not fit its encoder or LLM.
        ConfigurationError: the options contradict each other or the checkpoint's kind.
        InputError: the report is missing or damaged, or is that of another model.
    """
    _check(to, half, complete, report, verify)
    from slam_asr.conversion.model_card import read_report  # imported here, as torch takes seconds to load
    from slam_asr.conversion.sources import find_source
    from slam_asr.conversion.writers import TargetFormat, write

    target = TargetFormat(to, half, verify, complete, read_report(report) if report else None)
    source = find_source(checkpoint, which, recipe, adapter)
    if isinstance(source, Path):
        return _convert_encoder(source, output, target.inputs, overwrite)

    inputs = {**source.inputs, **target.inputs}
    return run_stage(STAGE, output, inputs, lambda folder: write(folder, source.read(), target), overwrite)


def _check(to: str, half: bool, complete: bool, report: str | None, verify: bool) -> None:
    """Refuse options that do not fit the format `to`.

    Raises:
        ConfigurationError: an option is not for this format.
    """
    if half and to != "model":
        raise ConfigurationError(
            "--half true is only for --to model; the other formats have their own precision: leave it out."
        )
    if complete and to != "huggingface":
        raise ConfigurationError("--complete true is only for --to huggingface: leave it out.")
    if report and to not in ("huggingface", "voxtral"):
        raise ConfigurationError("--report is only for --to huggingface and --to voxtral: leave it out.")
    if not verify and to == "voxtral":
        raise ConfigurationError(
            "--to voxtral is always verified, as it rewrites weights: leave out --verify."
        )


def _convert_encoder(file: Path, output: str, options: dict[str, object], overwrite: bool) -> Record:
    """Convert the original file of a speech encoder to a folder for `encoder.name`."""
    from slam_asr.pretrained.original_checkpoints import convert_original

    for name in ("to", "half"):
        if options.get(name) not in ("model", None):
            raise ConfigurationError(
                f"{file} holds neither a projector nor an LLM, so it cannot be converted with "
                f"--{name} {str(options[name]).lower()}: leave out --{name}."
            )

    inputs = {"file": sha256_of_file(file), **options}
    return run_stage(STAGE, output, inputs, lambda folder: Outcome(convert_original(file, folder)), overwrite)
