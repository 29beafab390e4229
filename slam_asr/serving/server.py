"""Runs the server until SIGTERM, and then until the last request is answered."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator

import uvicorn

from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line
from slam_asr.serving.app import build_app
from slam_asr.serving.service import Served, Service


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which raise the signal again and so end the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket, before anything is loaded.

    Args:
        host: address or name; `0.0.0.0` for all IPv4 addresses of this machine, `::` for all addresses.
        port: 0 for any free one.

    Raises:
        ConfigurationError: the address is in use, or does not belong to this machine.
    """
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listener = socket.socket(family)
        # Without this option, connections of an earlier server that are still in TIME_WAIT would block the
        # port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # The same number of waiting connections that uvicorn allows by default.
        listener.listen(2048)
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"{host}, port {port}, cannot be used ({error}): choose another --port or --host."
        ) from error
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Return whether only programs on this machine can reach the address."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def run(served: Served, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then until the requests in progress are answered.

    A second signal ends the server at once.

    Raises:
        UserError: the model cannot be loaded.
    """
    asyncio.run(_serve(served, listener))


async def _serve(served: Served, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    failures: list[BaseException] = []

    def on_loaded(error: BaseException | None) -> None:
        if error is None:
            log_line(f"ready: {served.names[0]}")
        else:
            failures.append(error)
            loop.call_soon_threadsafe(stop)

    service = Service(served, on_loaded)
    config = uvicorn.Config(
        build_app(service),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(served.limits.deadline)),
    )
    server = _Server(config)

    def stop() -> None:
        if server.should_exit:
            server.force_exit = True
        elif not failures:
            log_line(f"finishing {service.in_progress} requests")
        service.draining = server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    host, port = listener.getsockname()[:2]
    log_line(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
    service.batcher.start()
    await server.serve([listener])
    await asyncio.to_thread(service.close)
    if failures:
        raise failures[0]
