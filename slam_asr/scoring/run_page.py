"""Copies of a report with facts of one run: its time and cost, and whether its model was published.

Several runs may reuse one result and its report in the store, so only these copies have the facts of a run.
"""

import html
import os
from pathlib import Path

from slam_asr.artifacts.costs import cost_table, prices_from_environment
from slam_asr.artifacts.run_records import RUN, read_steps
from slam_asr.pages.render import capital, render


def write_run_page(report: Path, output: str | Path, store: str) -> None:
    """Copy a report, and add the table of time and cost if this process belongs to a run.

    Args:
        report: page of the report.
        output: file to write.
        store: the run's store, a local folder or s3:// prefix.

    Raises:
        UserError: the store cannot be read, or the prices in the environment are not valid.
    """
    page = report.read_text(encoding="utf-8")
    run = os.environ.get(RUN)
    if run and (steps := read_steps(store, run)):
        prices = prices_from_environment()
        before, end, after = page.rpartition("</main>")
        table = render("costs.html", rows=cost_table(steps, prices), priced=bool(prices))
        page = f"{before}{table}{end}{after}"
    Path(output).write_text(page, encoding="utf-8")


def add_decision(page: str, decision: str) -> str:
    """Return a report's page with one more line below its heading.

    Args:
        page: HTML of the report.
        decision: whether the model was published, and why, as a sentence without a capital and a full stop.
    """
    heading = "</h1>"
    return page.replace(heading, f"{heading}\n<p><b>{html.escape(capital(decision))}.</b></p>", 1)
