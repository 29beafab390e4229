"""The stage `decode`: transcribes test utterances, or one work shard of them; `score` scores them."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr import __version__
from slam_asr.artifacts.hypotheses import HYPOTHESES, NBEST, Hypothesis, write_hypotheses
from slam_asr.artifacts.json_lines import write_json_lines
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.model_folder import model_digests, read_config
from slam_asr.artifacts.stage_record import Outcome, Record, result_folder, run_stage
from slam_asr.artifacts.utterances import load_utterance, manifest_files
from slam_asr.artifacts.word_errors import measure
from slam_asr.config.recipe import Decoding, Encoder, Llm, Recipe
from slam_asr.progress import Meter, log_line
from slam_asr.runtime.work_split import WorkShard, parse_work_shard
from slam_asr.scoring.report import MAX_UTTERANCES
from slam_asr.scoring.report_audio import encode_audio, worst_first, write_audio
from slam_asr.storage import digest, fetch, is_s3, name_of, sha256_of_file

if TYPE_CHECKING:
    from slam_asr.decoding.decoder import Decoder
    from slam_asr.decoding.journal import DecodeJournal
    from slam_asr.models.searcher import Answer

Decoded = tuple[Hypothesis, "Answer"]


def decode(
    recipe: Recipe,
    model: str,
    manifests: list[str],
    output: str,
    feature_store: str | None = None,
    overwrite: bool = False,
    work_shard: str = "1/1",
) -> Record:
    """Transcribe test utterances; `slam-asr score` then computes the word error rate and writes the report.

    Args:
        recipe: how to decode (its section `decoding`), and where the base models are (`encoder.name`,
            `llm.name`); on the command line, the recipe that the model was trained with, unless another is
            named.
        model: folder that convert-checkpoint wrote, or the name of a shipped model.
        manifests: test utterances (JSON lines); for a folder that build-manifest wrote, its test.jsonl is
            read.
        output: folder for the transcripts; {fingerprint} in it is replaced by a digest of the inputs.
        feature_store: written by extract-features; without it, audio is encoded on the fly.
        overwrite: replace the results of other inputs.
        work_shard: i/n: transcribe only the i-th of n equal parts, which may run on n machines. The texts
            are the same as without work shards.

    Returns:
        The stage's record. Its folder, which `slam-asr score --parts` takes, holds hypotheses.jsonl.

    Raises:
        ModelError: a base model is not the one that the model was trained with.
        ConfigurationError: `work_shard` is not i/n; this machine cannot compute in the recipe's precision or
            has too few GPUs; the model has no CTC head, but the recipe requests CTC's scores; or an utterance
            leaves too few LLM positions for its answer.
        UserError: the model or a base model does not exist, or the features come from another encoder.
    """
    from slam_asr.decoding.decoder import Decoder
    from slam_asr.decoding.journal import DecodeJournal
    from slam_asr.decoding.model import open_model
    from slam_asr.models.precision import explain_precision, pick_device, processes_here

    shard = parse_work_shard(work_shard)
    explain_precision(recipe.decoding.precision, pick_device())  # raises if it cannot be used
    processes = processes_here("decoding.processes", recipe.decoding.processes)
    files = manifest_files(manifests, ("test.jsonl",))
    opened = open_model(model, recipe)
    opened.require_ctc_head(recipe.decoding)
    decoder = Decoder(recipe, opened, files, feature_store)
    inputs = _inputs(decoder, shard)
    # The journal's digest leaves out the report's audio, which does not change the answers.
    decoding_digest = digest({"version": __version__} | inputs)
    if recipe.decoding.report_audio:
        inputs["audio of the worst"] = recipe.decoding.report_audio
    published = result_folder(output, inputs)

    def work(folder: Path) -> Outcome:
        journal = DecodeJournal(folder, decoding_digest, published if is_s3(published) else None)
        decoded, facts = _decode(decoder, shard, journal, processes)
        _write(folder, recipe.decoding, decoded, decoder.utterances)
        journal.discard()
        if not any(row.reference.strip() for row, _ in decoded):
            log_line("the manifests have no transcripts: there is nothing to score the hypotheses against")
        summary = f"{len(decoded)} utterances"
        if shard.total > 1:
            total = len(decoder.utterances)
            summary = f"{len(decoded)} of {total} utterances, work shard {shard.number}/{shard.total}"
        return Outcome(summary, _rates(facts), facts, processes if pick_device().type == "cuda" else 0)

    return run_stage("decode", output, inputs, work, overwrite)


def recipe_for_model(recipe: Recipe, model: str) -> Recipe:
    """Return a run's recipe with the base models of a model that the run only evaluates.

    The recipes of run and model may name different encoders and LLMs. A base model's name in the run's recipe
    is used only if it ends in the same path component as the one in the model's recipe: then it is most
    likely another place of the same base model.

    Args:
        recipe: the run's recipe.
        model: as for `read_config`.
    """
    trained = read_config(model).typed_recipe

    def place(requested: Encoder | Llm, own: Encoder | Llm) -> str:
        same = name_of(requested.name) == name_of(own.name)
        # A fully trained encoder or LLM is in the model folder, and `open_model` refuses another name for it.
        return requested.name if same and own.tuning != "full" else own.name

    encoder = replace(recipe.encoder, name=place(recipe.encoder, trained.encoder))
    return replace(recipe, encoder=encoder, llm=replace(recipe.llm, name=place(recipe.llm, trained.llm)))


def _inputs(decoder: "Decoder", shard: WorkShard) -> dict[str, Any]:
    """Return everything that determines the transcripts, for the fingerprint."""
    return {
        "model": model_digests(decoder.model.folder),
        "manifests": [sha256_of_file(fetch(file)) for file in decoder.files],
        "audio": digest(decoder.audio_ids),
        "features": decoder.store.fingerprint if decoder.store else None,
        "decoding": options_that_change_texts(decoder.recipe.decoding),
        "part": str(shard),
    }


def _decode(
    decoder: "Decoder", shard: WorkShard, journal: "DecodeJournal", processes: int
) -> tuple[list[Decoded], dict[str, Any]]:
    """Transcribe a work shard's utterances, except those in the journal.

    Returns:
        Hypothesis and answer of each utterance, and facts for the record: counts, hours and seconds.
    """
    from slam_asr.decoding.decoder import decode_on_several

    # Batches are planned over all utterances, so they do not depend on the number of work shards and
    # processes. Nor do an utterance's rounding errors, which depend on the other utterances in its batch.
    batches = [batch for number, batch in enumerate(decoder.batches) if shard.takes(number)]
    in_shard = sorted(index for batch in batches for index in batch)
    remaining = [batch for batch in batches if not journal.answers.keys() >= set(batch)]
    processes = min(processes, len(remaining))
    hours = _hours(decoder, in_shard)
    log_line(decoder.model.describe(decoder.recipe.decoding.precision))
    beams = decoder.recipe.decoding.beams
    how = f"{beams} beam{'s' * (beams > 1)}" + f" and {processes} processes" * (processes > 1)
    log_line(f"decoding {len(in_shard)} utterances, {hours:.2f} h, with {how}")
    if processes == 1:
        # The weights are loaded before the clock starts, so that the reported speed is that of decoding.
        decoder.load()
    started = time.monotonic()
    with Meter("decode", total=sum(map(len, remaining)), unit="utt") as meter:

        def take(answers: "dict[int, Answer]") -> None:
            journal.add(answers)
            meter.update(len(answers))

        if processes > 1:
            decode_on_several(decoder, remaining, processes, take)
        else:
            for batch in remaining:
                take(decoder.decode(batch))
    seconds = time.monotonic() - started
    decoded = [(decoder.utterances[i], journal.answers[i]) for i in in_shard]
    facts = {
        "beams": beams,
        "seconds": round(seconds, 1),
        "audio_hours": round(hours, 4),
        "utterances": len(decoded),
        "hours_decoded": round(_hours(decoder, [i for batch in remaining for i in batch]), 4),
        "answers_cut": sum(answer.cut for _, answer in decoded),
        "empty_answers": sum(not answer.text for _, answer in decoded),
    }
    # Close calls are reported only if they are known for every answer: a sum over some of the answers would
    # look like one over all.
    close_calls = [answer.close for _, answer in decoded if answer.close is not None]
    if len(close_calls) == len(decoded):
        facts["close_calls"] = sum(close_calls)
    return [(_hypothesis(utterance, answer), answer) for utterance, answer in decoded], facts


def _hypothesis(u: Utterance, a: "Answer") -> Hypothesis:
    return Hypothesis(u.key, u.target, a.text, u.subset, u.speaker, u.duration or 0.0, a.cut, u.language)


def _hours(decoder: "Decoder", indices: Sequence[int]) -> float:
    return sum(decoder.utterances[i].duration or 0.0 for i in indices) / 3600


def _write(
    folder: Path, options: Decoding, decoded: Sequence[Decoded], utterances: Sequence[Utterance]
) -> None:
    """Write the hypotheses and, if the recipe requests them, n-best lists and the worst utterances' audio."""
    # The rows are in the manifest's order, whatever the batches and processes were.
    rows = [row for row, _ in decoded]
    write_hypotheses(folder / HYPOTHESES, rows)
    if options.nbest > 1:
        lists = [
            {"key": row.key, "subset": row.subset, "choices": [asdict(c) for c in answer.choices]}
            for row, answer in decoded
        ]
        write_json_lines(folder / NBEST, lists)
    if options.report_audio:
        by_name = {(u.key, u.subset): u for u in utterances}
        worst = ((rows[i].key, rows[i].subset) for i in worst_first(measure(rows))[:MAX_UTTERANCES])
        if audio := encode_audio(worst, lambda name: load_utterance(by_name[name]), options.report_audio):
            write_audio(folder, audio)


def options_that_change_texts(decoding: Decoding) -> dict[str, Any]:
    """Return the options that can change the transcripts."""
    others = ("checkpoint", "parts", "processes", "shuffled_control", "seed", "report_audio")
    return {key: value for key, value in asdict(decoding).items() if key not in others}


def _rates(facts: dict[str, Any]) -> dict[str, float]:
    """Return numbers for the dashboard: how much was decoded, and how fast.

    The speed is missing if the journal was already complete.
    """
    rates = {key.replace("_", " "): facts[key] for key in ("utterances", "answers_cut", "empty_answers")}
    if (hours := facts["hours_decoded"]) and (seconds := facts["seconds"]):
        rates["times real time"] = round(hours * 3600 / seconds, 2)
    return rates
