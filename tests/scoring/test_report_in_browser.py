"""The report in a browser, in a sandboxed frame: it logs nothing to the console, and search and sort work."""

import html
import queue
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.scoring.test_report import ROWS, full_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="this machine has no Chromium")

ACTIONS = """
<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll("#utterances tbody tr")].filter((row) => !row.hidden);
  const keys = () => rows().map((row) => row.dataset.key).join(" ");
  const search = document.getElementById("search");
  const results = [keys()];
  search.value = "Red  MAT"; search.dispatchEvent(new Event("input")); results.push(keys());
  search.value = ""; search.dispatchEvent(new Event("input"));
  const [errors, wer, key] = document.querySelectorAll("#utterances thead button");
  key.click(); results.push(keys()); key.click(); results.push(keys()); wer.click(); results.push(keys());
  results.push(String(document.documentElement.scrollWidth <= innerWidth));
  parent.postMessage(results, "*");
});
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 1600])
def test_search_and_sort_work_in_the_dashboards_frame(tmp_path, width):
    _, page, *_ = full_report(tmp_path / "report", audio={("o-1", "test-other"): "SUQz"})
    inner = html.escape(page.replace("</body>", ACTIONS + "</body>"), quote=True)
    dashboard = (
        '<!doctype html><body><script>addEventListener("message", (e) => '
        'fetch("/results", { method: "POST", body: e.data.join("|") }));</script>'
        f'<iframe sandbox="allow-scripts" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{inner}"></iframe></body>'
    )
    results, log = open_page(dashboard, tmp_path, width + 50)
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]
    initial, matching, up, down, by_rate, fits = results.split("|")
    assert sorted(initial.split()) == sorted(row.key for row in ROWS) and initial.split()[0] == "o-1"
    assert matching == "c-1"
    assert up.split() == down.split()[::-1] == sorted(row.key for row in ROWS)
    assert by_rate.split()[0] == "o-1"
    assert fits == "true"


def open_page(page: str, folder: Path, width: int, *options: str) -> tuple[str, str]:
    """Open a page in the browser; return what it posts to /results, and the browser's log."""
    results = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            is_page = self.path == "/"
            self.send_response(200 if is_page else 204)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            if is_page:
                self.wfile.write(page.encode())

        def do_POST(self):
            results.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    log = folder / "browser.log"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, log.open("wb") as output:
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        # A debugging port keeps a headless browser open; without one it exits once the page has loaded.
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},1000",
            "--enable-logging=stderr",
            "--remote-debugging-port=0",
            *options,
            f"http://127.0.0.1:{server.server_port}/",
        ]
        browser = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            answer = results.get(timeout=120)
        except queue.Empty:
            pytest.fail(
                f"the page posted nothing within two minutes; the browser's log: {log.read_text()[-2000:]}"
            )
        finally:
            browser.terminate()
            browser.wait(60)
            server.shutdown()
    return answer, log.read_text()
