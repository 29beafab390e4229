"""The stage `decode`: test manifests through a model, and the word error rate of what comes out."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slam_asr import __version__
from slam_asr.audio import load_utterance
from slam_asr.conversion.model import model_digests
from slam_asr.decoding.decoder import Decoder
from slam_asr.decoding.model import open_model
from slam_asr.features.extract import manifest_files
from slam_asr.manifest import Utterance, write_json_lines
from slam_asr.progress import Meter, log_line
from slam_asr.recipe import Recipe
from slam_asr.scoring.metrics import measure
from slam_asr.scoring.report import WORST
from slam_asr.scoring.report_audio import Name, listen_to, worst_first, write_audio
from slam_asr.scoring.score import HYPOTHESES, NBEST, controls_of, rates, report, what_decides_the_texts
from slam_asr.scoring.wer import Hypothesis, write_hypotheses
from slam_asr.stage import FINGERPRINT, Outcome, Record, run_stage
from slam_asr.storage import digest, fetch, is_s3, sha256_of_file
from slam_asr.work_split import WorkShard, parse_work_shard

if TYPE_CHECKING:
    from slam_asr.decoding.journal import DecodeJournal
    from slam_asr.models.search import Answer


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
    from slam_asr.decoding.journal import DecodeJournal
    from slam_asr.models.precision import explain_precision, pick_device, processes_here

    part = parse_work_shard(shard) if shard else None
    explain_precision(recipe.decoding.precision, pick_device())
    processes = processes_here("decoding.processes", recipe.decoding.processes)
    opened = open_model(model)
    decoder = Decoder(recipe, opened, manifest_files(manifests, ("test.jsonl",)), feature_store)
    utterances, store = decoder.utterances, decoder.store
    inputs = {
        "model": model_digests(opened.folder),
        "manifests": [sha256_of_file(fetch(file)) for file in decoder.files],
        "audio": digest(decoder.addresses),
        "features": store.fingerprint if store else None,
        "decoding": what_decides_the_texts(recipe.decoding),
        **({"audio of the worst": recipe.decoding.report_audio} if recipe.decoding.report_audio else {}),
        **(
            {"part": str(part)}
            if part
            else {
                "title": recipe.name,
                "published": recipe.published_wer,
                "controls": controls_of(recipe.decoding),
            }
        ),
    }

    # Neither does the report decide the texts, nor what it plays; what is kept of a decoding serves any.
    deciding = digest(
        {"version": __version__}
        | {
            key: value
            for key, value in inputs.items()
            if key not in ("title", "published", "controls", "audio of the worst")
        }
    )
    place = output.replace(FINGERPRINT, digest(inputs)[:16])

    def work(folder: Path) -> Outcome:
        with DecodeJournal(folder, deciding, place if is_s3(place) else None) as kept:
            decoded, facts = _decode(decoder, part or WorkShard(), kept, processes)
        rows = [row for row, _ in decoded]
        write_hypotheses(folder / HYPOTHESES, rows)
        if recipe.decoding.nbest > 1:
            write_json_lines(
                folder / NBEST,
                [
                    {"key": row.key, "subset": row.subset, "choices": [asdict(c) for c in answer.choices]}
                    for row, answer in decoded
                ],
            )
        heard = _audio_of_the_worst(recipe, rows, utterances)
        if part:
            if heard:
                write_audio(folder, heard)
            outcome = Outcome(
                f"{len(rows)} of {len(utterances)} utterances, part {part}", rates(facts), facts
            )
        else:
            outcome = report(folder, recipe, rows, opened.config.training, facts, heard)
        kept.close()
        return outcome

    return run_stage("decode", output, inputs, work, overwrite)


def _decode(
    decoder: Decoder, part: WorkShard, kept: "DecodeJournal", processes: int
) -> tuple[list[tuple[Hypothesis, "Answer"]], dict[str, Any]]:
    """Transcribe a part of the utterances, but for those that are kept → what was written, and facts of how."""
    from slam_asr.decoding.launch import launch_decoding
    from slam_asr.models.precision import explain_precision, pick_device

    options, trained, utterances = decoder.recipe.decoding, decoder.model.trained, decoder.utterances
    log_line(
        f"models: {trained.encoder.name} + projector + {trained.llm.name}; {explain_precision(options.precision, pick_device())}"
    )
    # Planned over all utterances, so that each is decoded beside the same others whatever the number of parts and processes.
    batches = [batch for number, batch in enumerate(decoder.batches) if part.takes(number)]
    mine = sorted(index for batch in batches for index in batch)
    hours = sum(utterances[i].duration or 0.0 for i in mine) / 3600
    left = [batch for batch in batches if not kept.answers.keys() >= set(batch)]
    processes = min(processes, len(left))
    log_line(
        f"decoding {len(mine)} utterances, {hours:.2f} h, with {options.beams} beam{'s' * (options.beams > 1)}"
        f"{f' and {processes} processes' * (processes > 1)}"
    )
    if processes == 1:
        decoder.load()
    started = time.monotonic()
    with Meter("decode", total=sum(map(len, left)), unit="utt") as meter:

        def take(answers: "dict[int, Answer]") -> None:
            kept.add(answers)
            meter.update(len(answers))

        if processes > 1:
            launch_decoding(decoder, left, processes, take)
        else:
            for batch in left:
                take(decoder.decode(batch))
    seconds = time.monotonic() - started

    answers = kept.answers
    decoded = [
        (
            Hypothesis(
                u.key, u.target, answers[i].text, u.subset, u.speaker, u.duration or 0.0, answers[i].cut
            ),
            answers[i],
        )
        for i, u in ((i, utterances[i]) for i in mine)
    ]
    new = [i for batch in left for i in batch]
    facts = {
        "beams": options.beams,
        "seconds": round(seconds, 1),
        "audio_hours": round(hours, 4),
        "utterances": len(decoded),
        "hours_decoded": round(sum(utterances[i].duration or 0.0 for i in new) / 3600, 4),
        "answers_cut": sum(a.cut for _, a in decoded),
        "empty_answers": sum(not a.text for _, a in decoded),
    }
    if all(a.close is not None for _, a in decoded):
        facts["close_calls"] = sum(a.close for _, a in decoded)
    return decoded, facts


def _audio_of_the_worst(
    recipe: Recipe, rows: Sequence[Hypothesis], utterances: Sequence[Utterance]
) -> dict[Name, str]:
    """The sound of as many of the worst utterances as the report has room for."""
    if not recipe.decoding.report_audio:
        return {}
    spoken = {(u.key, u.subset): u for u in utterances}
    names = ((rows[i].key, rows[i].subset) for i in worst_first(measure(rows))[:WORST])
    return listen_to(names, lambda name: load_utterance(spoken[name]), recipe.decoding.report_audio)
