"""An unreliable network: a proxy in front of an HTTP server that makes a share of the requests fail.

    with FaultyProxy(server, fault_rate=0.2, seed=1) as proxy:
        ...                                  # use proxy.address instead of server
    assert proxy.faults.total() > 0

The bodies of all other requests, and of their answers, are passed on byte for byte. Each request has its own
connection.
"""

import base64
import contextlib
import hashlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

BUSY = "busy"
"""503 with S3's error SlowDown; the server does not receive the request."""
STALL = "stall"
"""No answer, until the client disconnects."""
RESET = "reset"
"""The connection is reset after half of the request's body was passed to the server."""
LOST = "lost"
"""The server executes the request, but its answer is lost in a connection reset."""
CUT = "cut"
"""The answer ends in the middle with an orderly close: fewer bytes than its Content-Length."""
FLIP = "flip"
"""One bit of the request's body is flipped, or of the answer's if the request has no body."""

TEMPORARY = (BUSY, STALL, RESET, LOST, CUT)
"""Faults that a client survives by retrying."""

_ERROR = (
    "<?xml version='1.0' encoding='UTF-8'?>\n"
    "<Error><Code>{0}</Code><Message>{0}, from the proxy</Message><RequestId>0</RequestId></Error>"
)


@dataclass(frozen=True)
class Request:
    """A request that the proxy received."""

    method: str
    target: str
    """Path and query, as sent."""
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    """As sent, so a chunked body includes the lengths of its chunks."""


Fault = str | tuple[int, str]
"""One of the kinds above, or an answer that the proxy gives itself, such as (503, "SlowDown")."""


class FaultyProxy:
    """Makes a share of the requests to an HTTP server fail.

    Args:
        server: address of the server, http://host:port.
        fault_rate: share of the requests that fail, chosen at random; may be changed at any time.
        kinds: kinds of fault, chosen at random.
        seed: seed of these choices.
        rule: returns the fault of a request, or None to pass it on; replaces `fault_rate` and `kinds`.
    """

    def __init__(
        self,
        server: str,
        fault_rate: float = 0.2,
        kinds: tuple[Fault, ...] = TEMPORARY,
        seed: int = 0,
        rule: Callable[[Request], Fault | None] | None = None,
    ) -> None:
        url = urlsplit(server)
        self.server = (url.hostname, url.port)
        self.fault_rate, self.kinds, self.rule = fault_rate, kinds, rule
        self.checks = True
        """Whether the proxy compares SHA-256 checksums, as S3 does and moto does not.

        If not, it removes them, to imitate a server that does not support them.
        """
        self.one_at_a_time = False
        """Whether the server receives only one request at a time."""
        self.requests: list[Request] = []
        """All requests received, without their bodies."""
        self.faults: Counter[str] = Counter()
        """Number of failed requests, keyed by kind."""
        self._random = random.Random(seed)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        # Closing the socket would not wake the thread in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def count(self, method: str, text: str = "") -> int:
        """Return the number of requests with this method whose target contains this text."""
        return sum(r.method == method and text in r.target for r in self.requests)

    def clear(self) -> None:
        """Reset `requests` and `faults`."""
        with self._lock:
            self.requests.clear()
            self.faults.clear()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # A client may disconnect at any time.
        with client, contextlib.suppress(OSError, EOFError):
            request = _receive(client)
            if request is not None:
                self._answer(client, request, self._choose(request))

    def _choose(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(Request(request.method, request.target, request.headers, b""))
            if self.rule is not None:
                fault = self.rule(request)
            else:
                fault = self._random.choice(self.kinds) if self._random.random() < self.fault_rate else None
            if fault is not None:
                self.faults[fault if isinstance(fault, str) else fault[1]] += 1
            return fault

    def _answer(self, client: socket.socket, request: Request, fault: Fault | None) -> None:
        if fault == BUSY:
            fault = (503, "SlowDown")
        if isinstance(fault, tuple):
            client.sendall(_error(*fault, request.method))
        elif fault == STALL:
            client.settimeout(60)
            client.recv(1)
        elif fault == RESET:
            with socket.create_connection(self.server) as server:
                server.sendall(_head_of(request) + request.body[: len(request.body) // 2])
                _set_to_reset(server)
            _set_to_reset(client)
        else:
            if fault == FLIP and request.body:
                request, fault = (
                    Request(request.method, request.target, request.headers, _flipped(request.body)),
                    None,
                )
            if self.checks and _differs(request):
                client.sendall(_error(400, "BadDigest", request.method))
                return
            with self._turn if self.one_at_a_time else contextlib.nullcontext():
                head, body = self._forward(request if self.checks else _without_checksums(request))
            if fault == LOST:
                _set_to_reset(client)
            elif fault == CUT:
                client.sendall(head + body[: len(body) // 2] if body else head[: len(head) // 2])
            else:
                client.sendall(head)
                client.sendall(_flipped(body) if fault == FLIP and body else body)

    def _forward(self, request: Request) -> tuple[bytes, bytes]:
        """Pass a request on; return the head and the body of the server's answer."""
        with socket.create_connection(self.server) as server:
            server.sendall(_head_of(request))
            server.sendall(request.body)
            answer = bytearray()
            while chunk := server.recv(2**18):
                answer += chunk
        end = answer.index(b"\r\n\r\n") + 4
        head, view = bytes(answer[:end]), memoryview(answer)[end:]
        if b"\r\nconnection: close" not in head.lower():
            head = head[:-2] + b"Connection: close\r\n\r\n"
        return head, bytes(view)


def _receive(client: socket.socket) -> Request | None:
    """Read a complete request; None if the client disconnected before it."""
    stream = client.makefile("rb")
    first = stream.readline().decode("latin-1").split()
    if not first:
        return None
    headers = {}
    while line := stream.readline().strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.pop("expect", "").lower() == "100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join(_chunks(stream))
    else:
        body = _exactly(stream, int(headers.get("content-length", 0)))
    return Request(first[0], first[1], headers, body)


def _chunks(stream) -> Iterator[bytes]:
    size = -1
    while size:
        line = stream.readline()
        size = int(line.split(b";")[0], 16)
        yield line
        if size:
            yield _exactly(stream, size + 2)
    while (line := stream.readline()) not in (b"\r\n", b""):
        yield line
    yield b"\r\n"


def _exactly(stream, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _head_of(request: Request) -> bytes:
    headers = request.headers | {"connection": "close"}
    lines = [
        f"{request.method} {request.target} HTTP/1.1",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _error(status: int, code: str, method: str) -> bytes:
    body = b"" if method == "HEAD" else _ERROR.format(code).encode()
    head = (
        f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _differs(request: Request) -> bool:
    announced = request.headers.get("x-amz-checksum-sha256")
    return (
        bool(announced and request.body)
        and announced != base64.b64encode(hashlib.sha256(request.body).digest()).decode()
    )


def _without_checksums(request: Request) -> Request:
    headers = {
        n: v for n, v in request.headers.items() if not n.startswith(("x-amz-checksum", "x-amz-sdk-checksum"))
    }
    return Request(request.method, request.target, headers, request.body)


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def _set_to_reset(connection: socket.socket) -> None:
    """Make close() reset the connection instead of closing it in an orderly way."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
