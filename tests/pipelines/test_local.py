"""Runs through kfp's real local runner: training, evaluation, cached results, failures and Ctrl-C."""

import fcntl
import io
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from components import component_of
from pipelines import cli
from pipelines.local import LocalRun, LocalStep, LogFilter
from pipelines.run_request import RunRequest
from pipelines.summary import failure
from slam_asr.artifacts.stage_record import follow_pointer, read_record
from slam_asr.errors import EXIT_CODE, UserError
from slam_asr.steps import EVALUATION, TRAINING, outputs_of
from tests.pipelines import run_command
from tests.webhook import SECRET, webhook

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = outputs_of(TRAINING)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(run_command(*arguments), cwd=CHECKOUT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tiny_recipe, tiny_corpus, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Run the pipeline without earlier results, in a folder whose name kfp's own runner would corrupt."""
    output = tmp_path_factory.mktemp("runs") / "my python3 läuft"
    done = run(tiny_recipe, tiny_corpus, output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def table(stdout: str) -> dict[str, tuple[str, str]]:
    """Parse the table at the end of a run: time and summary by step."""
    rows = re.findall(r"^(\S+|this run) +((?:\(cached\) )?\d+:\d\d)(?:  (.*))?$", stdout, re.MULTILINE)
    return {name: (time, summary) for name, time, summary in rows}


@pytest.mark.slow
def test_all_steps_run_and_are_summarised(finished):
    output, done = finished
    rows = table(done.stdout)
    assert list(rows) == [*RESULTS, "this run"]
    assert all(not time.startswith("(cached)") for time, _ in rows.values())
    rates = re.search(
        r"^WER (.*) % · WER shuffled audio (.*) % · WER empty output (.*) %$", done.stdout, re.MULTILINE
    )
    assert float(rates[3]) == 100.0
    report = Path(re.search(r"^report: (.*)$", done.stdout, re.MULTILINE)[1])
    assert report.is_file() and report.is_relative_to(output / "store" / "score")


@pytest.mark.slow
def test_dashboard_gets_pages_and_metrics_of_every_step(finished):
    output, _ = finished
    [steps] = (output / "steps").iterdir()
    for page in ("build-manifest/statistics", "train/curves", "score/report", "score/summary"):
        assert (steps / page).stat().st_size > 0, page
    for stage in RESULTS:
        # The folder of a step in a loop is in a folder of the loop.
        [written] = (f for f in steps.rglob("executor_output.json") if f.parent.name == stage)
        outputs = json.loads(written.read_text())
        outputs_of_step = component_of(stage).component_spec.outputs.items()
        [metrics] = (name for name, output in outputs_of_step if output.type.startswith("system.Metrics"))
        assert outputs["artifacts"][metrics]["artifacts"][0]["metadata"], stage


@pytest.mark.slow
def test_terminal_shows_the_steps_and_the_log_contains_the_rest(finished):
    output, done = finished
    assert "KFP" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout and "non-Python base image" not in done.stderr
    assert "Got executor_input" in (output / "kfp.log").read_text()


@pytest.mark.slow
def test_second_run_reuses_all_results(finished, tiny_recipe, tiny_corpus):
    output, _ = finished
    done = run(tiny_recipe, tiny_corpus, output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("already there, nothing to do") == len(RESULTS)
    assert all(table(done.stdout)[stage][0].startswith("(cached)") for stage in RESULTS)


@pytest.mark.slow
def test_webhook_gets_the_result_of_a_run_or_the_step_and_reason_of_its_failure(
    finished, tiny_recipe, tiny_corpus, tmp_path, monkeypatch
):
    output, first = finished
    with webhook() as hook:
        monkeypatch.setenv("SLAM_ASR_WEBHOOK", hook.url)
        monkeypatch.setenv("SLAM_ASR_PRICES", '{"cpu_hour": 360.0}')
        done = run(tiny_recipe, tiny_corpus, output, "--on-exit", "slack")
        (tmp_path / "empty").mkdir()
        failed = run(tiny_recipe, tmp_path / "empty", tmp_path / "run", "--on-exit", "cloudevents")
    assert (done.returncode, failed.returncode) == (0, EXIT_CODE), failed.stderr
    (_, message), (_, event) = hook.messages
    name = re.escape(Path(tiny_recipe).stem)
    assert re.fullmatch(
        rf"{name} \(run \S+\) succeeded: {re.escape(table(first.stdout)['score'][1])}\.", message["text"]
    )
    assert (event["data"]["state"], event["data"]["step"]) == ("failed", "build-manifest")
    assert event["data"]["reason"] and f"slam-asr: error: {event['data']['reason']}." in failed.stdout
    # Everything was reused, so the run costs nothing; the page of the run has the table too.
    reused = re.search(
        r"^train +0:00 +0\.00 +0\.00 USD +\S+, 0\.00 GPU-hours, (\S+) USD when made$", done.stdout, re.M
    )
    assert float(reused[1]) > 0 and re.search(r"^this run +0:00 +0\.00 +0\.00 USD$", done.stdout, re.M)
    pages = sorted((output / "steps").rglob("score/report"), key=lambda page: page.stat().st_mtime)
    assert f"{reused[1]} USD when made" in pages[-1].read_text()
    assert "What the run took" in pages[0].read_text() and "USD" not in pages[0].read_text()
    assert SECRET not in done.stdout + done.stderr + failed.stdout + failed.stderr


def test_notice_without_a_url_is_refused_before_the_run(
    tiny_recipe, tiny_corpus, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("SLAM_ASR_WEBHOOK", raising=False)
    arguments = ["run", str(tiny_recipe), "--corpus", str(tiny_corpus), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as exit_info:
        cli.main([*arguments, "--on-exit", "slack"])
    assert exit_info.value.code == EXIT_CODE and not (tmp_path / "run").exists()
    assert "--on-exit slack needs the URL of the webhook: set SLAM_ASR_WEBHOOK" in capsys.readouterr().err


IN_WORK_SHARDS = ("--decoding.parts", "3", "--decoding.positions_per_batch", "40")


@pytest.fixture(scope="module")
def in_work_shards(finished, tiny_recipe, tiny_corpus) -> tuple[Path, subprocess.CompletedProcess]:
    """Run again in the same folder with three work shards; return the earlier hypotheses, and the new run."""
    output, _ = finished
    [before] = (output / "store" / "score").glob("*/hypotheses.jsonl")
    done = run(tiny_recipe, tiny_corpus, output, *IN_WORK_SHARDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return before, done


@pytest.mark.slow
def test_decoding_in_work_shards_gives_the_same_texts_and_rates(finished, in_work_shards):
    output, undivided = finished
    before, done = in_work_shards
    [after] = (f for f in (output / "store" / "score").glob("*/hypotheses.jsonl") if f != before)
    assert after.read_bytes() == before.read_bytes()
    assert (
        re.search(r"^WER .*$", done.stdout, re.MULTILINE)[0]
        == re.search(r"^WER .*$", undivided.stdout, re.MULTILINE)[0]
    )
    parts = re.findall(r"decode: (\d+) of (\d+) utterances, work shard (\d)/3", done.stdout)
    assert sorted(number for *_, number in parts) == ["1", "2", "3"]
    assert (
        sum(int(mine) for mine, *_ in parts) == int(parts[0][1]) and min(int(mine) for mine, *_ in parts) > 0
    )


@pytest.mark.slow
def test_score_alone_joins_the_work_shards_of_the_latest_decoding(
    tiny_recipe, tiny_corpus, finished, in_work_shards
):
    output, _ = finished
    rates = re.search(r"^WER ([\d.]+) %", in_work_shards[1].stdout, re.MULTILINE)[1]
    options = (*IN_WORK_SHARDS, "--published_wer.test-tiny", "50")
    done = run(tiny_recipe, tiny_corpus, output, "--only", "score", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"score: WER {rates} % on 6 utterances" in done.stdout and "already there" not in done.stdout
    record = read_record(follow_pointer(output / "results" / "score.json"))
    assert record.stage == "score" and len(record.inputs["parts"]) == 3
    assert record.inputs["published"] == {"test-tiny": 50.0} and record.file("report.html").is_file()


def model_of(output: Path) -> Path:
    [model] = (output / "store" / "convert-checkpoint").glob("*/config.json")
    return model.parent


@pytest.fixture(scope="module")
def trained_model(finished, tmp_path_factory) -> Path:
    """Copy the run's model as a user might share it: a model folder without the record of its stage."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    shutil.copytree(model_of(finished[0]), folder, ignore=shutil.ignore_patterns("stage.json"))
    return folder


@pytest.mark.slow
def test_evaluated_model_has_the_error_rate_of_the_run_that_trained_it(
    finished, trained_model, tiny_recipe, tiny_corpus, tmp_path
):
    before = (
        Path(re.search(r"^report: (.*)$", finished[1].stdout, re.MULTILINE)[1]).parent / "hypotheses.jsonl"
    )
    done = run(tiny_recipe, tiny_corpus, tmp_path, "--model", str(trained_model), "--decoding.parts", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(table(done.stdout)) == [*outputs_of(EVALUATION), "this run"]
    [after] = (tmp_path / "store" / "score").glob("*/hypotheses.jsonl")
    assert after.read_bytes() == before.read_bytes()
    assert (
        re.search(r"^WER .*$", done.stdout, re.MULTILINE)[0]
        == re.search(r"^WER .*$", finished[1].stdout, re.MULTILINE)[0]
    )
    assert table(done.stdout)["build-manifest"][1].startswith("6 test utterances")
    assert table(done.stdout)["extract-features"][1].startswith("6 ")


@pytest.mark.slow
def test_model_trained_on_other_features_stops_the_run_before_its_first_step(
    trained_model, tiny_recipe, tiny_corpus, tmp_path
):
    done = run(
        tiny_recipe,
        tiny_corpus,
        tmp_path,
        "--model",
        str(trained_model),
        "--encoder.frames",
        "all",
        "--features.dtype",
        "fp32",
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.endswith(
        "trained on other features (encoder.frames is all, not speech, features.dtype is fp32, not bf16): "
        "add --encoder.frames speech --features.dtype bf16."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_artifacts_between_steps_are_small(finished):
    """Steps exchange pointers, and pages of bounded size, whatever the size of the data."""
    output, _ = finished
    steps = output / "steps"
    files = {f.relative_to(steps): f.stat().st_size for f in steps.rglob("*") if f.is_file()}
    pages = {
        name: size
        for name, size in files.items()
        if name.name in ("statistics", "curves", "report", "summary")
    }
    assert len(pages) >= 4 and max(pages.values()) < 1_000_000
    assert max(size for name, size in files.items() if name not in pages) < 10_000
    pointers = [name for name in files if name.name in RESULTS.values()]
    assert sorted({name.name for name in pointers}) == sorted(RESULTS.values())
    for name in pointers:
        pointer = json.loads((steps / name).read_text())
        assert set(pointer) == {"uri", "sha256", "bytes", "stage", "summary", "fingerprint", "recipe"}
        assert files[name] < 4096


@pytest.mark.slow
def test_change_of_training_reuses_only_the_steps_before_it(finished, tiny_recipe, tiny_corpus):
    output, _ = finished
    done = run(tiny_recipe, tiny_corpus, output, "--training.max_steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    cached = {stage for stage in RESULTS if table(done.stdout)[stage][0].startswith("(cached)")}
    assert cached == {"build-manifest", "extract-features"}
    assert table(done.stdout)["train"][1].startswith("2 steps")


@pytest.mark.slow
def test_user_error_in_a_step_is_one_sentence_and_code_2(tiny_recipe, tiny_corpus, tmp_path):
    done = run(tiny_recipe, tiny_corpus, tmp_path, "--data.test", "[no-such-subset]")
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert len(re.findall("^slam-asr: error: .*no-such-subset", done.stdout, re.MULTILINE)) == 1
    assert done.stderr == (
        "slam-asr: step build-manifest stopped at the error above: fix it and run the same command again; "
        "finished steps will be reused.\n"
    )


@pytest.mark.slow
@pytest.mark.cold
def test_interrupted_run_ends_with_one_line_and_no_process(tiny_recipe, tiny_corpus, tmp_path):
    process = subprocess.Popen(
        run_command(tiny_recipe, tiny_corpus, tmp_path),
        cwd=CHECKOUT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in process.stdout:
        if line.startswith("2/6"):
            break
    # The line is printed before the step's process starts: wait for it, so that there is something to end.
    deadline = time.monotonic() + 30
    while (
        not (family := psutil.Process(process.pid).children(recursive=True)) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == ["slam-asr: error: interrupted; run the same command again to resume"]
    assert family and not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_single_stage_needs_the_earlier_results_and_leaves_its_own(tiny_recipe, tiny_corpus, tmp_path):
    output = tmp_path / "fresh" / "run"
    done = run(tiny_recipe, tiny_corpus, output, "--only", "extract-features")
    assert done.returncode == 2 and "extract-features needs the result of build-manifest" in done.stderr
    assert not output.exists()
    done = run(tiny_recipe, tiny_corpus, output, "--only", "build-manifest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "recipe.yaml").is_file()
    record = read_record(follow_pointer(output / "results" / "build-manifest.json"))
    assert record.stage == "build-manifest"


def test_run_in_a_folder_in_which_another_run_works_is_rejected(tmp_path):
    with open(tmp_path / ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another run is working in"):
            LocalRun(tmp_path).execute(RunRequest(), "")
        with pytest.raises(UserError, match="Another run is working in"):
            LocalRun(tmp_path).execute_only(
                "train", "", lambda: pytest.fail("prepared in a folder that another run has locked")
            )


def test_log_filter_separates_the_executor_from_the_step():
    terminal, log = io.StringIO(), io.StringIO()
    log_filter = LogFilter(terminal, log)
    executor = [
        "[KFP Executor 2026-01-01 INFO]: Got executor_input:\n",
        "{\n",
        '    "a": {\n',
        "    }\n",
        "}\n",
    ]
    step = ["train: 1/2\n", "{\n", "}\n", "[KFP Executor 2026-01-01 WARNING]: look here\n"]
    for line in [*executor, *step, "[KFP Executor 2026-01-01 INFO]: Wrote executor output file\n"]:
        log_filter.write(line)
    assert terminal.getvalue() == "".join(step)
    assert (
        log.getvalue() == "".join(executor) + "[KFP Executor 2026-01-01 INFO]: Wrote executor output file\n"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "failed with exit code 1; its own output is above, kfp's is in"),
        (137, "killed by signal 9 (often: out of memory)"),
        (143, "killed by signal 15;"),
        (-9, "killed by signal 9 (often: out of memory)"),
    ],
)
def test_failure_names_the_step_and_the_likely_reason(tmp_path, code, words):
    line = failure(LocalStep("train", tmp_path, 0.0, code), tmp_path)
    assert line.startswith("step train ") and words in line
