"""The server's page in a browser: a chosen file and a recording become text with times."""

import base64
import contextlib
import json
import os
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websocket

from slam_asr.decoding.transcriber import load_transcriber
from tests.conftest import make_tone, write_wav
from tests.scoring.test_report_in_browser import BROWSER
from tests.serving.servers import serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="this machine has no Chromium"),
]
KEY = "a-key-for-the-page"


class Tab:
    """A tab of a browser, controlled by the Chrome DevTools Protocol."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, timeout=120, suppress_origin=True)
        self.number, self.session = 0, ""
        self.problems: list[str] = []
        """Console messages and exceptions of the page, as JSON."""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Run a command of the protocol and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv())
            about = answer.get("params", {})
            if (
                answer.get("method")
                in (
                    "Runtime.exceptionThrown",
                    "Runtime.consoleAPICalled",
                    "Log.entryAdded",
                )
                and about.get("entry", {}).get("level") != "verbose"
            ):  # `verbose` entries are advice, such as on forms
                self.problems.append(json.dumps(about))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        """Evaluate JavaScript as if the user had clicked, and return its value."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until a script has a true value, and return that value."""
        end = time.monotonic() + 60
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.problems)
            time.sleep(0.1)
        return value

    def choose(self, file: Path) -> None:
        """Choose a file in the page's file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


@contextlib.contextmanager
def browser(url: str, folder: Path) -> Iterator[Tab]:
    """Open a page in a browser whose fake microphone beeps; yield the page's tab."""
    process = subprocess.Popen(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
            *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
            f"--user-data-dir={folder / 'profile'}",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    addresses: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in process.stderr:
            if found := re.search(r"DevTools listening on (\S+)", line):
                addresses.put(found[1])

    threading.Thread(target=read, daemon=True).start()
    try:
        tab = Tab(addresses.get(timeout=120))
        target = tab.call("Target.createTarget", url="about:blank")["targetId"]
        tab.session = tab.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            tab.call(f"{domain}.enable")
        tab.call("Page.navigate", url=url)
        tab.wait_for("document.readyState === 'complete' && !!document.getElementById('record')")
        yield tab
    finally:
        process.terminate()
        process.wait(60)


def check_width(tab: Tab, width: int) -> None:
    """Check that the page fits a width, and save a picture of it if SLAM_ASR_PICTURES names a folder."""
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("SLAM_ASR_PICTURES"):
        content = base64.b64decode(tab.call("Page.captureScreenshot")["data"])
        (Path(folder) / f"serve-{width}.png").write_bytes(content)


def test_a_file_and_a_recording_become_text_with_times(model, tmp_path):
    quiet = np.zeros(16_000, np.float32)
    file = write_wav(tmp_path / "a.wav", np.concatenate([make_tone(3, frequency=300), quiet, make_tone(3)]))
    expected = load_transcriber(model, max_segment_seconds=5).transcribe(str(file))
    (tmp_path / "keys").write_text(KEY)
    options = ["--limits.segment", "5", "--api-key-file", str(tmp_path / "keys")]
    with (
        serving(model, tmp_path / "t", *options) as server,
        browser(f"{server.url}/", tmp_path) as tab,
    ):
        check_width(tab, 360)
        tab.choose(file)
        tab.wait_for("document.querySelector('#state.error')?.innerText.startsWith('The API key is missing')")
        # The browser itself logs that a request was refused.
        assert all("401" in problem for problem in tab.problems), tab.problems
        tab.problems.clear()
        tab.run(f"document.getElementById('key').value = '{KEY}'")
        tab.choose(file)
        assert tab.wait_for("document.getElementById('state').innerText.startsWith('7.0 s of audio in')")
        rows = tab.run(
            "[...document.querySelectorAll('#segments li')]"
            ".map((row) => [...row.children].map((cell) => cell.textContent))"
        )
        assert [row[1] for row in rows] == [s.text + " …" * s.cut for s in expected.segments]
        assert [row[0] for row in rows] == ["0:00.0–0:03.2", "0:03.8–0:07.0"]
        for width in (360, 1200):
            check_width(tab, width)
        tab.run("document.getElementById('record').click()")
        tab.wait_for("document.getElementById('record').getAttribute('aria-pressed') === 'true'")
        time.sleep(2)
        tab.run("document.getElementById('record').click()")
        seconds = tab.wait_for(
            "document.getElementById('state').innerText.match(/^(\\d\\.\\d) s of audio in/)?.[1]"
        )
        # The fake microphone beeps once per second.
        assert 1 <= float(seconds) <= 6
        assert tab.run("document.querySelectorAll('#segments li').length") >= 1
        assert tab.problems == []
