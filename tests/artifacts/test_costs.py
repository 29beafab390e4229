"""A run's costs are the sums of its steps, without reused results; an unknown figure is never invented."""

import json

import pytest

from slam_asr.artifacts.costs import PRICES, Prices, cost_table, describe_costs, prices_from_environment
from slam_asr.artifacts.run_records import RUN, StepRecord, read_steps, save_step
from slam_asr.artifacts.stage_record import RECORD, Outcome, read_record, run_stage, write_pointer
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.scoring.run_page import write_run_page

PRICE = Prices(gpu_hour=2.0, cpu_hour=0.1, currency="EUR")


def step(stage, seconds, gpus, cores, reused=False, time=1.0) -> StepRecord:
    return StepRecord(stage, f"/{stage}/{time}", "done", reused, seconds, gpus, cores, time)


def test_work_shards_are_added_up_and_reused_results_cost_nothing():
    steps = [
        step("extract-features", 3600, 4, 8, reused=True),
        step("decode", 900, 1, 4),
        step("decode", 1800, 2, 4, time=2),
        step("decode", 3600, 1, 4, reused=True, time=3),
        step("score", 36, 0, 10),
    ]
    rows = {row.step: (row.time, row.gpu_hours, row.cost, row.reused) for row in cost_table(steps, PRICE)}
    assert rows == {
        "extract-features": ("0:00", "0.00", "0.00 EUR", "1:00:00, 4.00 GPU-hours, 8.80 EUR when made"),
        # 0.25 h × 1 GPU + 0.5 h × 2 GPUs; 4 cores for 0.75 h.
        "decode": ("45:00", "1.25", "2.80 EUR", "1 of 3: 1:00:00, 1.00 GPU-hours, 2.40 EUR when made"),
        "score": ("0:36", "0.00", "0.01 EUR", ""),
        "this run": ("45:36", "1.25", "2.81 EUR", ""),
    }


def test_unknown_figures_are_not_shown_as_zero():
    steps = [step("train", 3600, None, None), step("score", 3600, 0, 2)]
    train, _, run = cost_table(steps, PRICE)
    assert (train.gpu_hours, train.cost) == (run.gpu_hours, run.cost) == ("–", "–")
    # Without a price for cores, their number does not matter.
    assert cost_table([step("train", 3600, 2, None)], Prices(gpu_hour=2))[0].cost == "4.00 USD"
    reused, _, run = cost_table([step("train", 3600, None, None, reused=True), steps[1]], PRICE)
    assert reused.reused == "1:00:00, – GPU-hours, – when made" and run.cost == "0.20 EUR"


def test_terminal_shows_the_table_only_for_prices_or_gpus():
    steps = [step("train", 3600, 0, 2)]
    assert describe_costs([], PRICE) == describe_costs(steps, Prices()) == ""
    assert describe_costs([step("train", 1800, 2, 2)], Prices()).splitlines() == [
        "step       time  GPU-hours  reused results",
        "train     30:00       1.00",
        "this run  30:00       1.00",
    ]
    assert "0.20 EUR" in describe_costs(steps, PRICE)


def test_steps_of_a_run_are_recorded_whether_computed_or_reused(tmp_path, monkeypatch):
    store = str(tmp_path / "store")

    def run(name: str, stage: str, **inputs) -> None:
        monkeypatch.setenv(RUN, name)
        outcome = Outcome(f"{stage} done", gpus=3)
        record = run_stage(stage, f"{store}/{stage}/{{fingerprint}}", inputs, lambda _: outcome)
        write_pointer(record, tmp_path / "pointer", None, store)

    run("one", "train")
    run("two", "train")
    run("two", "decode", part=1)
    run("two", "decode", part=2)
    assert [(s.stage, s.reused, s.gpus) for s in read_steps(store, "one")] == [("train", False, 3)]
    two = read_steps(store, "two")
    assert [(s.stage, s.reused) for s in two] == [("train", True), ("decode", False), ("decode", False)]
    assert two[0].seconds == read_steps(store, "one")[0].seconds and two[0].cores >= 1
    # A step that is started again after its work is done reuses its own result, and its record remains.
    run("two", "decode", part=2)
    assert [s.reused for s in read_steps(store, "two")] == [True, False, False]
    assert read_steps(store, "three") == []
    monkeypatch.delenv(RUN)
    save_step(step("train", 1, 0, 1), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_records_of_earlier_versions_have_no_figures(tmp_path):
    record = run_stage("train", str(tmp_path), {}, lambda _: Outcome("", gpus=2))
    assert (record.gpus, record.reused) == (2, False)
    written = json.loads((tmp_path / RECORD).read_text())
    assert "reused" not in written
    (tmp_path / RECORD).write_text(
        json.dumps({k: v for k, v in written.items() if k not in ("gpus", "cores")})
    )
    old = read_record(tmp_path)
    assert (old.gpus, old.cores) == (None, None)
    assert run_stage("train", str(tmp_path), {}, lambda _: Outcome("")).reused


def test_damaged_record_or_prices_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "run-records" / "r").mkdir(parents=True)
    (tmp_path / "run-records" / "r" / "train.json").write_text("{}")
    with pytest.raises(InputError, match=r"train\.json is not a step's record: remove it\."):
        read_steps(str(tmp_path), "r")
    for text in ("2.5", '{"gpu": 1}', "{", '{"gpu_hour": "much"}', '{"cpu_hour": null}'):
        monkeypatch.setenv(PRICES, text)
        with pytest.raises(ConfigurationError, match=f"{PRICES} is not valid"):
            prices_from_environment()


def test_the_run_page_has_the_table_of_costs_but_the_report_does_not(tmp_path, monkeypatch):
    report, page = tmp_path / "report.html", tmp_path / "page.html"
    report.write_text("<main>rates</main><script></script>")
    write_run_page(report, page, str(tmp_path))
    assert page.read_text() == report.read_text()
    monkeypatch.setenv(RUN, "r")
    monkeypatch.setenv(PRICES, '{"gpu_hour": 2}')
    save_step(step("<train>", 3600, 2, 2), str(tmp_path))
    write_run_page(report, page, str(tmp_path))
    text = page.read_text()
    assert text.index("rates") < text.index("What the run took") < text.index("</main><script>")
    assert "4.00 USD" in text and "&lt;train&gt;" in text and "took" not in report.read_text()
