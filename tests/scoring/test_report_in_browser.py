"""The report in a real browser, in a frame as sandboxed as the dashboard's: it says nothing to the console, and search and sort work."""

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
    dashboard = (
        '<!doctype html><body><script>addEventListener("message", (e) => fetch("/told", { method: "POST", body: e.data.join("|") }));</script>'
        f'<iframe sandbox="allow-scripts" style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe></body>'
    )
    told, said = opened(dashboard, tmp_path, width + 50)
    assert "CONSOLE" not in said, [line for line in said.splitlines() if "CONSOLE" in line]
    everything, found, up, down, by_rate, fits = told.split("|")
    assert sorted(everything.split()) == sorted(row.key for row in ROWS) and everything.split()[0] == "o-1"
    assert found == "c-1"
    assert up.split() == down.split()[::-1] == sorted(row.key for row in ROWS)
    assert by_rate.split()[0] == "o-1"
    assert fits == "true"


def opened(page: str, folder: Path, width: int) -> tuple[str, str]:
    """What the page, opened in the browser, posts to /told, and what the browser wrote meanwhile."""
    told = queue.Queue()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/"
            self.send_response(200 if found else 204)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            if found:
                self.wfile.write(page.encode())

        def do_POST(self):
            told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    log = folder / "browser.log"
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server, log.open("wb") as output:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # A port for debugging keeps a headless browser open; without it, it would leave once the page has loaded.
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},1000",
            "--enable-logging=stderr",
            "--remote-debugging-port=0",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        browser = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            answer = told.get(timeout=120)
        except queue.Empty:
            pytest.fail(
                f"the page told nothing within two minutes; the browser says: {log.read_text()[-2000:]}"
            )
        finally:
            browser.terminate()
            browser.wait(60)
            server.shutdown()
    return answer, log.read_text()
