"""Writes a checkpoint in one of the formats of `convert_checkpoint`, and verifies what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slam_asr.artifacts.model_folder import ENCODER, LLM, ModelConfig, write_adapter, write_model
from slam_asr.artifacts.stage_record import Outcome
from slam_asr.config.recipe import dump_recipe
from slam_asr.conversion.huggingface_folder import SOURCES, write_huggingface
from slam_asr.conversion.model_card import Report, require_own_report
from slam_asr.conversion.parts import Parts, divide
from slam_asr.conversion.slam_llm import FILE, write_slam_llm
from slam_asr.conversion.sources import Content
from slam_asr.conversion.tuned import write_trained_encoder, write_trained_llm
from slam_asr.conversion.verification import verify
from slam_asr.conversion.voxtral import write_voxtral
from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line
from slam_asr.storage import allow_readers, digest, sha256_of_file


@dataclass(frozen=True)
class TargetFormat:
    """The format of the result.

    Each field is the option of `convert_checkpoint` with the same name; `report` has been read already.
    """

    to: str
    half: bool
    verify: bool
    complete: bool = False
    report: Report | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The stage's inputs that describe these options.

        Options other than `to` are left out if they have their default values, so that models that were
        converted before these options existed still have the same fingerprint. A folder for transformers
        contains code, which is an input like the checkpoint.
        """
        code = {name: sha256_of_file(source) for name, source in SOURCES.items()}
        return {
            "to": self.to,
            **({"code": digest(code)} if self.to == "huggingface" else {}),
            **({"half": True} if self.half else {}),
            **({} if self.verify else {"verified": False}),
            **({"complete": True} if self.complete else {}),
            **({"report": sha256_of_file(self.report.file)} if self.report else {}),
        }


def write(folder: Path, content: Content, target: TargetFormat) -> Outcome:
    """Check the weights, write them part by part, and verify the result.

    Args:
        folder: folder for the result.
        content: the checkpoint's content; its tensors are read one after the other.
        target: the format.

    Raises:
        ModelError: the weights do not fit encoder or LLM; or the written weights differ from the
            checkpoint's, or give another loss.
        ConfigurationError: the format cannot hold what was trained, or the recipe is not that of the
            training.
        InputError: the report is that of another model.
    """
    if target.report:
        require_own_report(target.report, content.facts, content.where)
    # A projector or LoRA adapter that does not fit is refused here, before anything is written.
    parts = divide(content)
    checked = "not compared with the checkpoint"
    match target.to:
        case "model":
            _write_model(folder, parts, target.half)
        case "huggingface":
            write_huggingface(folder, parts, target.complete, target.report)
        case "slam-llm":
            _write_for_slam_llm(folder, parts)
        case "llm":
            _write_llm(folder, parts)
        case "voxtral":
            checked = write_voxtral(folder, parts, target.report)
        case _:
            raise ConfigurationError(f"--to is {target.to}, which is not a format: see --help.")
    if target.verify and target.to != "voxtral":
        checked = verify(folder, parts, target.to, target.half)
    allow_readers(folder)
    llm = "adapter" if parts.adapter else "llm"
    trained = {"projector": parts.projector.state_dict(), llm: parts.llm, "encoder": parts.encoder}
    written = {llm: parts.llm} if target.to == "llm" else trained
    counts = {name: sum(t.numel() for t in tensors.values()) for name, tensors in written.items() if tensors}
    summary = " and ".join(f"{part} of {count:,} parameters" for part, count in counts.items())
    megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".safetensors", ".pt")) / 1e6
    return Outcome(f"{summary}, {megabytes:.1f} MB, {checked}", {"parameters": sum(counts.values())})


def _write_llm(folder: Path, parts: Parts) -> None:
    """Write the trained LLM as transformers does, with LoRA merged into it."""
    if not parts.llm:
        raise ConfigurationError(
            f"{parts.where} leaves the LLM {parts.recipe.llm.name} unchanged, so it has no trained LLM to "
            "write: leave out --to."
        )
    write_trained_llm(folder, parts)
    log_line(f"{folder}: use it as llm.name, or in any program that loads transformers' models")


def _write_for_slam_llm(folder: Path, parts: Parts) -> None:
    """Write SLAM-LLM's model.pt."""
    if parts.encoder or (parts.llm and not parts.adapter):
        raise ConfigurationError(
            f"{parts.where} contains a completely trained LLM or encoder, which SLAM-LLM's model.pt cannot "
            "hold: leave out --to."
        )
    if parts.recipe.projector.drop_blanks:
        raise ConfigurationError(
            f"{parts.where} was trained with projector.drop_blanks, so its LLM expects no blanks, and "
            "SLAM-LLM drops none: leave out --to, or train with projector.drop_blanks 0."
        )
    write_slam_llm(folder, parts.projector.state_dict(), parts.adapter)
    log_line(f"{folder / FILE}: pass it to SLAM-LLM as ckpt_path")


def _write_model(folder: Path, parts: Parts, half: bool) -> None:
    """Write a model folder; its config.json, which makes it one, comes last."""
    if parts.adapter:
        write_adapter(folder, parts.adapter, parts.recipe, half)
    elif parts.llm:
        write_trained_llm(folder / LLM, parts)
    if parts.encoder:
        write_trained_encoder(folder / ENCODER, parts)
    config = ModelConfig(
        dump_recipe(parts.recipe),
        **parts.content.bases,
        encoder_width=parts.widths[0],
        llm_width=parts.widths[1],
        training=parts.content.facts,
    )
    write_model(folder, parts.projector.state_dict(), config, half)
