"""What a run prints at its end: a summary, or one line about the step that failed."""

import signal
from pathlib import Path

from pipelines.local import KFP_LOG, LocalStep
from slam_asr.artifacts.stage_record import Record
from slam_asr.errors import EXIT_CODE
from slam_asr.progress import clock

METRICS = ("{}", "{} shuffled audio", "{} empty output")
"""Templates for the names of a run's error rate and of its two controls.

`{}` stands for `wer`, or for `cer` where characters are counted.

The controls must be far higher: one scores the hypotheses for another utterance's audio, the other scores
empty output.
"""


def summary(steps: list[LocalStep], seconds: float) -> str:
    """Format a table of the steps, and below it the result.

    The result is the error rate with its controls, and the report's path; for a sweep, the best variation and
    the path of the comparison. If the run has the step `publish`, its decision follows.

    Args:
        steps: the finished steps of a run.
        seconds: duration of the run.
    """
    records = [step.record() for step in steps]
    rows = [("step", "time", "result")]
    rows += [(s.name, _time(s, r), r.summary) for s, r in zip(steps, records, strict=True)]
    rows.append(("this run", clock(seconds), ""))
    name, time = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{a:<{name}}  {b:>{time}}  {c}".rstrip() for a, b, c in rows]
    *_, last = (record for record in records if record.stage != "publish")
    published = [record for record in records if record.stage == "publish"]
    # The folder of `publish` has the report too, with the decision on it.
    page_record = published[0] if published else last
    return "\n".join([*lines, "", *_result(last, page_record), *(record.summary for record in published)])


def _time(step: LocalStep, record: Record) -> str:
    # A record that is older than this run's step belongs to a result that the step has reused.
    cached = record.finished < step.started
    return f"(cached) {clock(record.seconds)}" if cached else clock(record.seconds)


def _result(last: Record, page_record: Record) -> list[str]:
    # Where words are counted, the record has a CER too, so `wer` is looked up first.
    short = "wer" if {"wer", "best wer"} & last.metrics.keys() else "cer"
    if last.stage == "compare-runs":
        best = last.facts["order"][0]
        return [
            f"best: {best}, {short.upper()} {last.metrics[f'best {short}']:.2f} %",
            f"comparison: {last.file('runs.html')}",
        ]
    rates = [
        f"{name.format(short.upper())} {last.metrics[name.format(short)]:.2f} %"
        for name in METRICS
        if name.format(short) in last.metrics
    ]
    return [" · ".join(rates), f"report: {page_record.file('report.html')}"]


def failure(step: LocalStep, output: Path) -> str:
    """Format one line about a failed step, to follow the step's own error message."""
    code = step.exit_code or 0
    if code < 0:  # subprocess reports death by signal n as -n
        code = 128 - code
    if code == EXIT_CODE:
        why = "stopped at the error above: fix it and run the same command again"
    # Shells and container engines report death by signal n as exit code 128 + n.
    elif code > 128:
        likely = " (often: out of memory)" if code - 128 == signal.SIGKILL else ""
        why = f"was killed by signal {code - 128}{likely}"
    else:
        why = f"failed with exit code {code}; its own output is above, kfp's is in {output / KFP_LOG}"
    return f"step {step.name} {why}; finished steps will be reused."
