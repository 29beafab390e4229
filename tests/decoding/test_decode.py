"""Decoding gives the same texts whether it runs in one go, in work shards, on several processes, or resumed.

The models are tiny: their texts mean nothing, but depend on the audio.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slam_asr.artifacts.hypotheses import read_hypotheses
from slam_asr.artifacts.manifest import Utterance
from slam_asr.config.recipe import dump_recipe, load_recipe
from slam_asr.decoding import journal
from slam_asr.decoding.decoder import Decoder, _serve
from slam_asr.decoding.journal import FILE, DecodeJournal
from slam_asr.errors import UserError
from slam_asr.models.projector import build_projector
from slam_asr.models.searcher import Answer, Choice, CloseCalls, Searcher
from slam_asr.runtime.launch import ProcessEnded
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.decode import _rates, decode
from slam_asr.stages.score import score
from tests.artifacts.feature_store.test_store import publish, some_features
from tests.conftest import make_tone, write_wav
from tests.utterances import write_manifest

COUNT = 9


@pytest.fixture(scope="module")
def tiny_recipe(tiny_recipe, tiny_models, tmp_path_factory) -> str:
    """A recipe whose LLM has large random weights; with small ones, texts would not depend on the audio."""
    folder = tmp_path_factory.mktemp("llm")
    shutil.copytree(tiny_models["llm"], folder, dirs_exist_ok=True)
    llm = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weights in llm.parameters():
            if weights.dim() > 1:
                weights.mul_(20)
    llm.save_pretrained(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump_recipe(load_recipe(str(tiny_recipe), {"llm.name": str(folder)})))
    return str(recipe)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    rows = []
    for n in range(COUNT):
        clip = write_wav(folder / f"{n}.wav", make_tone(0.5 + n / 3, frequency=200 + 90 * n))
        rows.append(
            {
                "key": f"u{n}",
                "source": str(clip),
                "target": "some words",
                "duration": 0.5 + n / 3,
                "subset": "test",
                "speaker": str(n % 3),
            }
        )
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "test.jsonl")


def decode_recipe(recipe, **options):
    """Load a recipe that decodes from audio files, in batches of few utterances."""
    return load_recipe(
        str(recipe),
        {"features.cache": "none", "decoding.positions_per_batch": 120, "decoding.max_new_tokens": 6}
        | options,
    )


def texts(record):
    """Return the hypotheses of a decoding, keyed by utterance."""
    return {row.key: row.hypothesis for row in read_hypotheses(record.file("hypotheses.jsonl"))}


@pytest.mark.slow
@pytest.mark.parametrize(("beams", "penalty"), [(1, 1.0), (1, 1.5), (3, 1.0), (3, 1.5)])
def test_single_batched_sharded_and_resumed_decoding_agree(
    model, manifest, tiny_recipe, tmp_path, monkeypatch, beams, penalty
):
    options = {"decoding.beams": beams, "decoding.repetition_penalty": penalty}
    recipe = decode_recipe(tiny_recipe, **options)
    complete = decode(recipe, model, [manifest], str(tmp_path / "complete"))
    assert len(set(texts(complete).values())) > 1  # otherwise mixed-up texts would go unnoticed
    single = decode(
        decode_recipe(tiny_recipe, **options, **{"decoding.positions_per_batch": 1}),
        model,
        [manifest],
        str(tmp_path / "single"),
    )
    shards = [
        decode(recipe, model, [manifest], str(tmp_path / f"shard{n}"), work_shard=f"{n}/3") for n in (1, 2, 3)
    ]
    joined = score(recipe, model, [shard.folder for shard in shards], str(tmp_path / "joined"))
    undivided = score(recipe, model, [complete.folder], str(tmp_path / "undivided"))
    assert texts(single) == texts(joined) == texts(complete) == texts(undivided)
    assert joined.metrics == undivided.metrics

    calls = []
    search = Searcher.decode

    def interrupt_third_batch(self, audio, positions):
        calls.append(len(audio))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(self, audio, positions)

    monkeypatch.setattr(Searcher, "decode", interrupt_third_batch)
    with pytest.raises(KeyboardInterrupt):
        decode(recipe, model, [manifest], str(tmp_path / "cut"))
    assert (tmp_path / "cut" / FILE).is_file() and not (tmp_path / "cut" / "stage.json").exists()
    already_decoded = sum(calls[:2])
    resumed = decode(recipe, model, [manifest], str(tmp_path / "cut"))
    assert texts(resumed) == texts(complete) and sum(calls[3:]) == COUNT - already_decoded
    assert not (tmp_path / "cut" / FILE).exists()


def test_fetched_features_take_no_more_disk_than_the_recipe_allows(bucket, tmp_path):
    features = some_features()
    publish("s3://bucket/f", features)
    utterances = [Utterance(a, "x.wav", "text", 1.0, 16_000, a) for a in features]
    write_manifest(tmp_path / "test.jsonl", utterances)
    recipe = load_recipe(
        "demo", {"features.cache_gigabytes": 2, "features.shard_megabytes": 1, "features.cache": "store"}
    )
    model = SimpleNamespace(
        spec=SimpleNamespace(window_samples=None),
        config=SimpleNamespace(encoder={"weights_sha256": "abc"}),
        trained=recipe,
        prompt=lambda: None,
    )
    decoder = Decoder(recipe, model, [str(tmp_path / "test.jsonl")], "s3://bucket/f")
    assert decoder.store._cache.limit == 2_000_000_000


@pytest.mark.slow
def test_a_journal_from_other_options_is_not_used(model, manifest, tiny_recipe, tmp_path, monkeypatch):
    search, calls = Searcher.decode, []
    monkeypatch.setattr(
        Searcher,
        "decode",
        lambda self, audio, positions: (
            calls.append(1) or (search(self, audio, positions) if len(calls) < 3 else 1 / 0)
        ),
    )
    with pytest.raises(ZeroDivisionError):
        decode(decode_recipe(tiny_recipe), model, [manifest], str(tmp_path / "d"))
    monkeypatch.setattr(Searcher, "decode", search)
    other = decode(
        decode_recipe(tiny_recipe, **{"decoding.max_new_tokens": 2}), model, [manifest], str(tmp_path / "d")
    )
    assert texts(other) == texts(
        decode(
            decode_recipe(tiny_recipe, **{"decoding.max_new_tokens": 2}),
            model,
            [manifest],
            str(tmp_path / "fresh"),
        )
    )


def test_lines_before_a_damaged_one_are_read(tmp_path):
    answer = Answer("text", False, [1, 2])
    journal = DecodeJournal(tmp_path, "d")
    for index in (3, 4):
        journal.add({index: answer})
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-5] + b"\xff\xfe\n")
    assert DecodeJournal(tmp_path, "d").answers == {3: answer}


def test_an_incomplete_last_line_is_ignored(tmp_path):
    answer = Answer("text", False, [1, 2], choices=[Choice("text", -0.5), Choice("tex", -0.75)])
    first = DecodeJournal(tmp_path, "d")
    first.add({3: answer})
    first.add({4: answer})
    file = tmp_path / FILE
    file.write_text(file.read_text()[:-7])
    second = DecodeJournal(tmp_path, "d")
    assert second.answers == {3: answer}
    second.add({4: answer})
    third = DecodeJournal(tmp_path, "d")
    assert third.answers == {3: answer, 4: answer}
    third.discard()
    assert not file.exists()


def test_another_machine_resumes_from_object_storage(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "UPLOADED_EVERY", -1.0)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    DecodeJournal(tmp_path / "here", "d", f"s3://{bucket.name}/decoded").add({1: Answer("text", False, [1])})
    second = DecodeJournal(tmp_path / "there", "d", f"s3://{bucket.name}/decoded")
    assert list(second.answers) == [1]
    second.discard()
    (tmp_path / "third").mkdir()
    assert not DecodeJournal(tmp_path / "third", "d", f"s3://{bucket.name}/decoded").answers


@pytest.mark.slow
def test_nbest_lists_are_sorted_by_score_and_start_with_the_hypothesis(
    model, manifest, tiny_recipe, tmp_path
):
    options = {"decoding.beams": 3, "decoding.nbest": 3}
    complete = decode(decode_recipe(tiny_recipe, **options), model, [manifest], str(tmp_path / "complete"))
    rows = [json.loads(line) for line in complete.file("nbest.jsonl").read_text().splitlines()]
    assert {row["key"]: row["choices"][0]["text"] for row in rows} == texts(complete)
    for row in rows:
        scores = [choice["score"] for choice in row["choices"]]
        assert len(scores) == 3 and all(score < 0 for score in scores)
        assert scores == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert complete.facts["close_calls"] <= COUNT
    shards = [
        decode(
            decode_recipe(tiny_recipe, **options),
            model,
            [manifest],
            str(tmp_path / f"shard{n}"),
            work_shard=f"{n}/2",
        )
        for n in (1, 2)
    ]
    joined = score(
        decode_recipe(tiny_recipe, **options),
        model,
        [shard.folder for shard in shards],
        str(tmp_path / "joined"),
    )
    together = [json.loads(line) for line in joined.file("nbest.jsonl").read_text().splitlines()]
    assert [(r["key"], [c["text"] for c in r["choices"]]) for r in together] == [
        (r["key"], [c["text"] for c in r["choices"]]) for r in rows
    ]
    with pytest.raises(UserError, match=r"decoding.nbest is 3 but decoding.beams is 1"):
        decode_recipe(tiny_recipe, **{"decoding.beams": 1, "decoding.nbest": 3})


def test_close_calls_after_an_answers_end_do_not_count():
    recorder = CloseCalls(torch.tensor([9]))
    near, far = [1.0, 1.00005, 0.0], [1.0, 2.0, 0.0]
    recorder(torch.zeros((3, 0), dtype=torch.long), torch.tensor([far, near, far]))
    recorder(torch.tensor([[5], [5], [9]]), torch.tensor([far, far, near]))
    assert recorder.close.tolist() == [False, True, False]


def test_slam_llms_files_and_the_worst_utterances_audio_are_written(model, manifest, tiny_recipe, tmp_path):
    recipe = decode_recipe(tiny_recipe, **{"decoding.report_audio": 0.05})
    decoded = decode(recipe, model, [manifest], str(tmp_path / "d"))
    record = score(recipe, model, [decoded.folder], str(tmp_path / "scored"))
    lines = [line.split("\t") for line in record.file("decode_log_gt").read_text().splitlines()]
    assert lines == [[f"u{n}", "some words"] for n in range(COUNT)]
    assert [line.split("\t")[0] for line in record.file("decode_log_pred").read_text().splitlines()] == [
        key for key, _ in lines
    ]
    assert 1 <= record.file("report.html").read_text().count("<audio ") <= COUNT


@pytest.mark.slow
def test_a_killed_decoding_resumes(model, manifest, tiny_recipe, tmp_path):
    """The command-line program is killed as soon as the journal has an answer."""
    command = [
        sys.executable,
        "-m",
        "slam_asr",
        "decode",
        "--recipe",
        str(tiny_recipe),
        "--model",
        model,
        "--manifests",
        f"[{manifest}]",
        "--features.cache",
        "none",
        "--decoding.positions_per_batch",
        "1",
        "--decoding.max_new_tokens",
        "6",
        "--output",
    ]
    for attempt in range(5):  # on a busy machine, the program may end before the signal arrives
        killed = tmp_path / f"killed{attempt}"
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.PIPE, text=True)
        file = killed / FILE
        with contextlib.suppress(FileNotFoundError):  # the program may end now, and remove its journal
            while process.poll() is None and not (file.exists() and file.read_text().count("\n") > 1):
                time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode:
            break
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run([*command, str(killed)], capture_output=True, text=True, check=True)
    assert "utterances are already decoded" in done.stdout
    subprocess.run([*command, str(tmp_path / "complete")], capture_output=True, check=True, env=os.environ)
    assert (killed / "hypotheses.jsonl").read_text() == (
        tmp_path / "complete" / "hypotheses.jsonl"
    ).read_text()


@pytest.mark.parametrize("part", ["llm", "encoder"])
@pytest.mark.parametrize("change", ["other weights", "gone"])
def test_a_base_model_other_than_that_of_training_is_refused(tiny_recipe, manifest, tmp_path, part, change):
    recipe = load_recipe(str(tiny_recipe))
    base = shutil.copytree(getattr(recipe, part).name, tmp_path / "base")
    changed_recipe = tmp_path / "changed.yaml"
    changed_recipe.write_text(dump_recipe(load_recipe(str(tiny_recipe), {f"{part}.name": str(base)})))
    recipe = load_recipe(str(changed_recipe))
    weights = build_projector(recipe.projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{n}": t for n, t in weights.items()}, tmp_path / "model.pt")
    model = convert_checkpoint(str(tmp_path / "model.pt"), str(tmp_path / "model"), recipe=recipe).folder
    if change == "gone":
        shutil.rmtree(base)
        expected = str(base)
    else:
        [file] = base.glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, {"format": "pt"})
        expected = f"is not the {'LLM' if part == 'llm' else part} that .* was trained with"
    with pytest.raises(UserError, match=expected) as refused:
        decode(recipe, model, [manifest], str(tmp_path / "decoded"))
    assert "\n" not in refused.value.args[0] and not (tmp_path / "decoded").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "holds no utterance"),
        (
            '{"key": "a", "source": "/nowhere/a.wav", "target": "x"}\n',
            "There is no audio file /nowhere/a.wav",
        ),
    ],
)
def test_a_test_set_without_audio_is_refused_before_weights_are_loaded(
    model, tiny_recipe, tmp_path, monkeypatch, line, expected
):
    monkeypatch.setattr(
        "slam_asr.decoding.model.Model.load", lambda *_, **__: pytest.fail("weights were loaded")
    )
    (tmp_path / "test.jsonl").write_text(line)
    with pytest.raises(UserError, match=expected) as refused:
        decode(
            load_recipe(str(tiny_recipe)), model, [str(tmp_path / "test.jsonl")], str(tmp_path / "decoded")
        )
    assert "\n" not in refused.value.args[0] and not (tmp_path / "decoded").exists()


def test_a_model_without_a_ctc_head_is_refused_before_weights_are_loaded(
    model, manifest, tiny_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "slam_asr.artifacts.model_folder.read_projector", lambda *_: pytest.fail("weights were loaded")
    )
    with pytest.raises(UserError, match=r"ctc_weight is 0\.3, but .* has no CTC head: set it to 0, or train"):
        decode(
            decode_recipe(tiny_recipe, **{"decoding.ctc_weight": 0.3}), model, [manifest], str(tmp_path / "d")
        )
    assert not (tmp_path / "d").exists()


@pytest.mark.real_input("B33-small c")
def test_an_utterance_in_two_manifests_is_refused(model, manifest, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "slam_asr.decoding.model.Model.load", lambda *_, **__: pytest.fail("weights were loaded")
    )
    copy = tmp_path / "copy.jsonl"
    copy.write_text(Path(manifest).read_text(encoding="utf-8").splitlines(keepends=True)[3])
    for second in (manifest, str(copy)):
        with pytest.raises(UserError, match=r"The utterance u\d is in .* and in .*: give each once"):
            decode(decode_recipe(tiny_recipe), model, [manifest, second], str(tmp_path / "decoded"))


@pytest.mark.real_input("B30-speaker-null", "B33-small f")
def test_utterances_without_transcript_and_speaker_are_decoded(
    model, manifest, tiny_recipe, tmp_path, capsys
):
    row = json.loads(Path(manifest).read_text(encoding="utf-8").splitlines()[0]) | {
        "target": "",
        "speaker": None,
    }
    (tmp_path / "test.jsonl").write_text(json.dumps(row) + "\n")
    record = decode(decode_recipe(tiny_recipe), model, [str(tmp_path / "test.jsonl")], str(tmp_path / "d"))
    (hypothesis,) = read_hypotheses(record.file("hypotheses.jsonl"))
    assert (hypothesis.reference, hypothesis.speaker) == ("", "")
    assert "there is nothing to score the hypotheses against" in capsys.readouterr().out


def workers_of_this_process() -> list[int]:
    """Return the ids of the decoding processes that this process started."""
    workers = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                "slam_asr.decoding.decoder" in (folder / "cmdline").read_text()
                and f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
            ):
                workers.append(int(folder.name))
    return workers


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_several_processes_give_the_same_results(model, manifest, tiny_recipe, tmp_path, capsys, beams):
    options = {"decoding.beams": beams, "decoding.nbest": beams}
    single = decode(decode_recipe(tiny_recipe, **options), model, [manifest], str(tmp_path / "single"))
    parallel = decode(
        decode_recipe(tiny_recipe, **options, **{"decoding.processes": 2}),
        model,
        [manifest],
        str(tmp_path / "parallel"),
    )
    assert f"with {beams} beam{'s' * (beams > 1)} and 2 processes" in capsys.readouterr().out
    for name in ("hypotheses.jsonl", *["nbest.jsonl"] * (beams > 1)):
        assert single.file(name).read_text() == parallel.file(name).read_text()
    assert single.inputs == parallel.inputs
    assert not workers_of_this_process() and not (tmp_path / "parallel" / FILE).exists()


@pytest.mark.slow
def test_a_killed_process_ends_the_stage_and_a_retry_resumes(model, manifest, tiny_recipe, tmp_path, capfd):
    recipe, place = (
        decode_recipe(tiny_recipe, **{"decoding.processes": 2, "decoding.positions_per_batch": 1}),
        tmp_path / "killed",
    )

    def kill_a_process_after_the_first_answer():
        file = place / FILE
        while not (file.exists() and file.read_text().count("\n") > 1):
            time.sleep(0.001)
        os.kill(workers_of_this_process()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_a_process_after_the_first_answer)
    killer.start()
    with pytest.raises(UserError, match=r"slam_asr\.decoding\.decoder ended with code -9"):
        decode(recipe, model, [manifest], str(place))
    killer.join()
    assert not workers_of_this_process() and not (place / "stage.json").exists()
    record = decode(recipe, model, [manifest], str(place))
    assert "utterances are already decoded" in capfd.readouterr().out
    assert texts(record) == texts(
        decode(
            decode_recipe(tiny_recipe, **{"decoding.positions_per_batch": 1}),
            model,
            [manifest],
            str(tmp_path / "complete"),
        )
    )


@pytest.mark.parametrize(
    ("hours", "seconds", "speed"), [(0.5, 100.0, 18.0), (0.0, 0.0, None), (0.5, 0.0, None)]
)
def test_speed_is_reported_only_if_something_was_decoded(hours, seconds, speed):
    facts = {
        "hours_decoded": hours,
        "seconds": seconds,
        "utterances": 1,
        "answers_cut": 0,
        "empty_answers": 0,
    }
    assert _rates(facts).get("times real time") == speed


def test_the_exit_code_of_a_process_is_known_when_its_input_is_a_broken_pipe():
    # The process closes its input first and ends later, like a killed process whose memory is being freed.
    program = "import os, time; os.close(0); print(flush=True); time.sleep(0.3); os._exit(3)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdout.readline() == "\n", "its input is closed"
    with pytest.raises(ProcessEnded):
        _serve(process, iter([[0]]), lambda answers: None, threading.Lock())
    assert process.returncode == 3


@pytest.mark.slow
def test_audio_that_one_of_several_processes_cannot_read_is_refused(model, manifest, tiny_recipe, tmp_path):
    rows = [json.loads(line) for line in Path(manifest).read_text(encoding="utf-8").splitlines()]
    (tmp_path / "broken.wav").write_bytes(Path(rows[0]["source"]).read_bytes()[:100] + b"no audio")
    rows[4]["source"] = str(tmp_path / "broken.wav")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"broken\.wav") as refused:
        decode(
            decode_recipe(tiny_recipe, **{"decoding.processes": 2}),
            model,
            [str(tmp_path / "test.jsonl")],
            str(tmp_path / "d"),
        )
    assert "\n" not in refused.value.args[0] and not workers_of_this_process()
