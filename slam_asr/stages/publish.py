"""The stage `publish`: registers a trained model in a model registry, if it passes the gate."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr import __version__
from slam_asr.artifacts.run_records import RUN
from slam_asr.artifacts.stage_record import Outcome, Record, read_record, require_record, run_stage
from slam_asr.config.recipe import Recipe
from slam_asr.errors import InputError
from slam_asr.publishing.connection import open_registry
from slam_asr.publishing.registry import FINGERPRINT, SCORES, Registry
from slam_asr.scoring.gate import Verdict, check_better, check_limit
from slam_asr.scoring.run_page import add_decision
from slam_asr.storage import digest, exists, join, read_bytes, sha256_of_bytes, write_atomically, write_json

OPEN, STAGE = "open-registry", "publish"
DECISION, PAGE, REPORT = "decision.json", "decision.md", "report.html"


def check_registry(recipe: Recipe, output: str) -> Record:
    """Check that the model registry answers, so that a long run does not fail at its end.

    Args:
        recipe: names the registry and the model.
        output: folder for the record; {fingerprint} in it is replaced by a digest of the inputs.

    Raises:
        UserError: the registry is not configured, does not answer, or refuses.
    """
    registry = open_registry(recipe.publish.registry, recipe.registered_name)

    def work(folder: Path) -> Outcome:
        newest = registry.newest()
        state = f"newest version {newest.name}" if newest else "no version yet"
        return Outcome(f"{registry.name} in {registry.address}: {state}")

    return run_stage(OPEN, output, _place(registry), work, intact=_never)


def publish(
    recipe: Recipe, model: str, report: str, output: str, run: str = "", overwrite: bool = False
) -> Record:
    """Register a model in a model registry, if its error rate passes the gate.

    A model that is published again keeps its version. If a model does not pass the gate, the result says why.

    Args:
        recipe: `publish` names the registry, and `gate` the condition; on the command line, the recipe that
            the model was trained with, unless another is named.
        model: folder that convert-checkpoint wrote.
        report: folder that score wrote for this model.
        output: folder for the decision; {fingerprint} in it is replaced by a digest of the inputs.
        run: id of the pipeline run, which becomes a property of the registered version.
        overwrite: replace results of other inputs instead of refusing.

    Returns:
        The stage's record; its folder contains decision.json, decision.md, and report.html, which is the
        report with the decision below its heading.

    Raises:
        InputError: the model or the report is missing, or the report is that of another model.
        ConfigurationError: the registry is not configured, or cannot take a model from this store.
        ClusterError: the registry does not answer or refuses; it is asked before anything else.
    """
    registry = open_registry(recipe.publish.registry, recipe.registered_name)
    model_record, config = _read_model(model)
    scores = require_record(report, "score")
    if scores.inputs["training"] != config.get("training", {}):
        raise InputError(f"{report} is the report of another model than {model}: name this model's report.")
    fingerprint = digest(model_record.inputs)[:16]
    properties = _properties(model_record, config, scores) | {FINGERPRINT: fingerprint}
    # If the pipeline runs locally, kfp's id of the run differs from the one in the variable `RUN`, which
    # also names the run's folder in the store's `run-records`.
    run = os.environ.get(RUN) or run
    properties |= {"run": run} if run else {}
    # The run's id is left out: the same model in another run is the same version.
    inputs = _place(registry) | {"model": fingerprint, "scores": scores.inputs, "gate": asdict(recipe.gate)}

    def work(folder: Path) -> Outcome:
        report_page = scores.file(REPORT).read_text(encoding="utf-8")
        verdicts = _verdicts(recipe, registry, fingerprint, scores)
        version = None
        if failed := [verdict.reason for verdict in verdicts if not verdict.passed]:
            summary = f"not published: {'; '.join(failed)}"
        else:
            reason = ", and ".join(verdict.reason for verdict in verdicts)
            version = registry.register(fingerprint, model_record.folder, reason, properties)
            summary = f"published as version {version.name} of {registry.name}: {reason}"
        facts = {
            "decision": summary,
            "published": version is not None,
            **_place(registry),
            "version": version.name if version else None,
            "model": model_record.folder,
            "gate": asdict(recipe.gate),
            "compared": next((asdict(v.compared) for v in verdicts if v.compared), None),
            "properties": properties,
        }
        write_json(folder / DECISION, facts)
        write_atomically(folder / PAGE, _page(facts))
        write_atomically(folder / REPORT, add_decision(report_page, summary))
        return Outcome(summary, {"published": float(version is not None)}, facts)

    return run_stage(STAGE, output, inputs, work, overwrite, intact=_never)


def _never(record: Record) -> bool:
    """Never reuse a result: the registry may have changed since, and the work takes seconds."""
    return False


def _place(registry: Registry) -> dict[str, Any]:
    return {"registry": registry.address, "name": registry.name}


def _read_model(model: str) -> tuple[Record, dict[str, Any]]:
    """Read a model's record and configuration.

    `read_config` is not used, because other functions of its module import torch: requirements/lock.py would
    find these imports, and add torch to this stage's image.
    """
    record, path = read_record(model), join(model, "config.json")
    try:
        config = json.loads(read_bytes(path)) if record and exists(path) else {}
    except ValueError:
        config = {}
    # A folder for transformers has a config.json too, but no recipe in it.
    if record is None or not isinstance(config.get("recipe"), str):
        raise InputError(
            f"{model} holds no model folder with a record: give the one that convert-checkpoint wrote."
        )
    return record, config


def _verdicts(recipe: Recipe, registry: Registry, fingerprint: str, scores: Record) -> list[Verdict]:
    short, rate, _ = _rate(scores)
    verdicts = [check_limit(short.upper(), rate, recipe.gate.max_wer)]
    compares = recipe.gate.better_than == "registered" and verdicts[0].passed
    # A model that is registered already would be compared with itself, or with a later version.
    if compares and registry.find(fingerprint) is None and (newest := registry.newest()):
        verdicts.append(check_better(scores.folder, newest.name, newest.scores))
    return verdicts


def _rate(scores: Record) -> tuple[str, float, tuple[float, float] | None]:
    """Return the error rate's name (wer or cer), the rate, and its 95 % interval, both in percent."""
    short = "wer" if "wer" in scores.metrics else "cer"
    low, high = (scores.metrics.get(f"{short} 95 % {end}") for end in ("low", "high"))
    return short, scores.metrics[short], None if low is None or high is None else (low, high)


def _properties(model: Record, config: Mapping[str, Any], scores: Record) -> dict[str, str | int | float]:
    """Return facts that a registered version shows.

    One of them, `SCORES`, is the folder of its scores. `check_better` reads it to compare the next model.
    """
    short, rate, interval = _rate(scores)
    manifests = model.inputs.get("training", {}).get("manifests", {})
    return {
        short: rate,
        **({f"{short}_low": interval[0], f"{short}_high": interval[1]} if interval else {}),
        "utterances": int(scores.facts.get("utterances", 0)),
        "recipe": scores.inputs["title"],
        "recipe_sha256": sha256_of_bytes(config["recipe"].encode()),
        **{f"{name}_manifest_sha256": value for name, value in manifests.items()},
        **{
            f"test_manifest_sha256{f'_{number}' if number > 1 else ''}": value
            for number, value in enumerate(scores.facts.get("manifests", []), start=1)
        },
        SCORES: scores.folder,
        "slam_asr": __version__,
    }


def _page(facts: Mapping[str, Any]) -> str:
    """Return the decision in Markdown, for the dashboard."""
    place = {key: facts[key] for key in ("registry", "name", "version", "model") if facts[key]}
    lines = [f"- {key}: `{value}`" for key, value in (place | facts["properties"]).items()]
    decision: str = facts["decision"]
    return "\n".join([f"**{decision[0].upper()}{decision[1:]}.**", "", *lines]) + "\n"
