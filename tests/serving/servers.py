"""Starts real servers for tests, and reads their metrics."""

import contextlib
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai


@dataclass
class Server:
    """A running `slam-asr serve`."""

    process: subprocess.Popen
    url: str
    folder: Path
    """The server's folder for temporary files."""
    lines: list[str] = field(default_factory=list)
    """The lines that the server has printed."""

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        """Return OpenAI's client for this server. By default, it repeats no request."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the body of a page."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Return a number of /metrics by its name and labels; 0 if /metrics does not have it."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        """Wait until a metric has this value."""
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}"
            time.sleep(0.05)


@contextlib.contextmanager
def serving(model: str, folder: Path, *options: str) -> Iterator[Server]:
    """Start a server, yield it when it is ready, and kill it afterwards."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "slam_asr", "serve", model, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    server = Server(process, "", folder)
    printed: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            server.lines.append(line.rstrip())
            printed.put(line)
        printed.put("")

    threading.Thread(target=read, daemon=True).start()
    try:
        while line := printed.get(timeout=400):
            if found := re.match(r"listening on (\S+)", line):
                server.url = found[1].replace("0.0.0.0", "127.0.0.1")
            if line.startswith("ready"):
                break
        assert line, server.lines
        yield server
    finally:
        process.kill()
        process.wait()


def post(server: Server, content: bytes, headers: dict[str, str] | None = None) -> socket.socket:
    """Send a request without the end of its form, which `finish` sends."""
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="../../a.wav"\r\n\r\n'
    length = len(head) + len(content) + len(b"\r\n--b--\r\n")
    lines = {
        "Host": server.url.removeprefix("http://"),
        "Content-Type": "multipart/form-data; boundary=b",
        "Content-Length": str(length),
        "Connection": "close",
        **(headers or {}),
    }
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=20)
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    connection.sendall(f"POST /v1/audio/transcriptions HTTP/1.1\r\n{text}\r\n".encode() + head)
    connection.sendall(content)
    return connection


def finish(connection: socket.socket) -> str:
    """Send the end of the form, and return the answer."""
    connection.sendall(b"\r\n--b--\r\n")
    return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
