"""The page of a run in the dashboard: a report, with what the run took.

The report in the store belongs to its result, which several runs may reuse, so it does not contain the table.
"""

import os
from pathlib import Path

from slam_asr.artifacts.costs import cost_table, prices_from_environment
from slam_asr.artifacts.run_records import RUN, read_steps
from slam_asr.pages.render import render


def write_run_page(report: Path, output: str | Path, store: str) -> None:
    """Copy a report, and add the table of costs if this process belongs to a run.

    Args:
        report: the page of the result.
        output: file to write.
        store: store of the run.

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
