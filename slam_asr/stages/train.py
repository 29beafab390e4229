"""The stage `train`: checks everything that can be checked without loading weights, then starts torchrun."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr.artifacts.checkpoint import CHECKPOINTS
from slam_asr.artifacts.stage_record import Outcome, Record, result_folder, run_stage
from slam_asr.config.recipe import Recipe, dump_recipe
from slam_asr.progress import clock
from slam_asr.runtime.worker import FAILURE
from slam_asr.storage import is_s3, join, require_writable, write_atomically, write_bytes, write_json
from slam_asr.training.job import FACTS

if TYPE_CHECKING:
    from slam_asr.training.inputs import CheckedInputs


def train(
    recipe: Recipe,
    train_manifest: str,
    output: str,
    feature_store: str | None = None,
    dev_manifest: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Train the projector, and other parts if the recipe says so, with one or more processes and machines.

    Args:
        recipe: models and hyper-parameters.
        train_manifest: utterances to train on (JSON lines).
        output: folder for checkpoints and curves; {fingerprint} in it is replaced by a digest of the inputs.
        feature_store: feature store that extract-features wrote. Without one, or if the recipe trains the
            encoder too or has `features.cache: none`, audio is encoded on the fly.
        dev_manifest: utterances to validate on (JSON lines).
        overwrite: replace results of other inputs instead of refusing.

    Returns:
        The stage's record. Its folder contains checkpoints/, curve.jsonl, curves.html and recipe.yaml.

    Raises:
        UserError: inputs do not fit each other, or this machine cannot train the recipe.
    """
    # Imported here, as in other stages, because torch takes seconds to load and `--help` does without it.
    from slam_asr.training.inputs import check_inputs
    from slam_asr.training.launch import require_same_training, train_as_worker_node

    checked = check_inputs(recipe, train_manifest, dev_manifest, feature_store)
    inputs = checked.job.inputs
    # Worker nodes need this folder, too, but do not call `run_stage`.
    published = result_folder(output, inputs)

    def train_here(folder: Path) -> None:
        _train_in(folder, recipe, checked, published)

    def work(folder: Path) -> Outcome:
        require_same_training(join(published, CHECKPOINTS), inputs, overwrite)
        train_here(folder)
        return _outcome(folder, recipe, checked)

    # Only the first node runs the stage, because only one machine may write its record.
    if not checked.nodes.is_coordinator:
        return train_as_worker_node(published, inputs, checked.nodes, train_here, overwrite)
    return run_stage("train", output, inputs, work, overwrite)


def _train_in(folder: Path, recipe: Recipe, checked: "CheckedInputs", published: str) -> None:
    """Train on this machine, with results in a local folder."""
    from slam_asr.artifacts.utterances import save_rows
    from slam_asr.planning.memory_fit import require_fit
    from slam_asr.planning.shapes import Shapes
    from slam_asr.pretrained.model_config import read_model_config
    from slam_asr.runtime.machine import machine_of
    from slam_asr.training.launch import launch_training

    llm = read_model_config(Path(checked.job.llm_folder), "LLM", recipe.llm.trust_remote_code)
    shapes = Shapes(recipe, checked.encoder, llm, [])
    machine = machine_of(checked.device, checked.processes, checked.nodes.number)
    # Each machine writes its own share of a checkpoint, and may have other rights than the first one.
    require_writable(join(published, CHECKPOINTS))
    require_fit(shapes, checked.prompt, checked.fitting["train"], machine)
    # An earlier attempt may have left these files; they must not be taken for results of this one.
    for leftover in (FACTS, FAILURE):
        (folder / leftover).unlink(missing_ok=True)
    write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    if is_s3(published):
        # Checkpoints are uploaded during the training, but most other results only at its end. With this
        # file, a checkpoint can be converted before then.
        write_bytes(join(published, "recipe.yaml"), dump_recipe(recipe))
    rows = {name: save_rows(folder / f"rows-{name}.npy", us) for name, us in checked.fitting.items()}
    job = replace(checked.job, folder=str(folder), published=published, rows=rows)
    job.encoder_parameters = checked.encoder.count_parameters()
    write_json(folder / "job.json", asdict(job))
    launch_training(checked.processes, folder, checked.nodes, join(published, CHECKPOINTS))


def _outcome(folder: Path, recipe: Recipe, checked: "CheckedInputs") -> Outcome:
    """Write the page of curves, and summarise a finished training."""
    from slam_asr.training.live import write_page

    hours, count = checked.hours, len(checked.utterances["train"])
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    audio_and_time = [("Audio", f"{hours:.2f} h in {count} utterances"), ("Time", clock(facts["seconds"]))]
    shown = write_page(folder, recipe, audio_and_time)
    curve, validation = shown["curve"], shown["validation"]
    last = validation[-1] if validation else curve[-1]
    facts |= {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name, **checked.base}
    facts |= {"train_utterances": count, "train_hours": round(hours, 4), **shown}
    accuracy = f"{'dev ' if validation else ''}accuracy {last['accuracy']:.3f}"
    summary = f"{facts['steps']} steps, {accuracy}, loss {last['loss']:.3f}"
    metrics: dict[str, Any] = {"steps": facts["steps"]}
    metrics |= {name: round(curve[-1][name], 4) for name in ("loss", "accuracy")}
    if "beginning" in shown:
        metrics["steps of the beginning"] = shown["beginning"]["curve"][-1]["step"]
        if points := shown["beginning"]["validation"]:
            metrics["dev token error rate of the beginning"] = round(1 - points[-1]["accuracy"], 4)
    if validation:
        metrics |= {"dev loss": round(last["loss"], 4), "dev accuracy": round(last["accuracy"], 4)}
    for name in {"wer", "cer"} & last.keys():
        metrics[f"dev {name.upper()} of samples"] = round(last[name], 4)
    gpus = checked.processes * checked.nodes.number if checked.device.type == "cuda" else 0
    return Outcome(summary, metrics, facts, gpus)
