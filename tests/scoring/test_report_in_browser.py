"""The report in a real browser, in a frame as sandboxed as the dashboard's: it says nothing to the console, and search and sort work."""

import html
import re
import shutil
import subprocess

import pytest

from tests.scoring.test_report import ROWS, full_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

ACTIONS = """
<script>
addEventListener("load", () => {
  const keys = () => [...document.querySelectorAll("#utterances tbody tr")].filter((row) => !row.hidden).map((row) => row.dataset.key).join(" ");
  const search = document.getElementById("search");
  const told = [keys()];
  search.value = "Red  MAT"; search.dispatchEvent(new Event("input")); told.push(keys());
  search.value = ""; search.dispatchEvent(new Event("input"));
  const [errors, wer, key] = document.querySelectorAll("#utterances thead button");
  key.click(); told.push(keys()); key.click(); told.push(keys()); wer.click(); told.push(keys());
  told.push(String(document.documentElement.scrollWidth <= innerWidth));
  parent.postMessage(told, "*");
});
</script>
"""


@pytest.mark.parametrize("width", [320, 1600])
def test_search_and_sort_work_in_the_dashboards_frame(tmp_path, width):
    _, page, *_ = full_report(tmp_path / "report", audio={("o-1", "test-other"): "SUQz"})
    inner = html.escape(page.replace("</body>", ACTIONS + "</body>"), quote=True)
    outer = tmp_path / "dashboard.html"
    outer.write_text(
        f'<!doctype html><body><pre id="told"></pre><script>addEventListener("message", (e) => {{ document.getElementById("told").textContent = e.data.join("|"); }});'
        f'</script><iframe sandbox="allow-scripts" style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe></body>'
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 50},1000",
               "--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", outer.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    everything, found, up, down, by_rate, fits = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)[1].split("|")
    assert sorted(everything.split()) == sorted(row.key for row in ROWS) and everything.split()[0] == "o-1"
    assert found == "c-1"
    assert up.split() == down.split()[::-1] == sorted(row.key for row in ROWS)
    assert by_rate.split()[0] == "o-1"
    assert fits == "true"
