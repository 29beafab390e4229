"""The server's routes: OpenAI's for transcripts and models, probes, metrics, and a page to try the server."""

import secrets
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from slam_asr import __version__
from slam_asr.pages.render import render
from slam_asr.serving.limits import Refusal
from slam_asr.serving.service import CLIENT_GONE, Exchange, Service
from slam_asr.serving.upload import FORMATS, Body, require_same_origin

_FAILED = "failed"
"""State of a server whose decoding thread has ended: it does not recover by itself."""
_FIELDS = {
    "file": {"type": "string", "format": "binary"},
    "model": {"type": "string"},
    "response_format": {"type": "string", "enum": list(FORMATS), "default": "json"},
    "stream": {"type": "boolean", "default": False},
    "language": {"type": "string"},
    "temperature": {"type": "number", "enum": [0]},
    "prompt": {"type": "string"},
}
_SCHEMA = {"type": "object", "required": ["file"], "properties": _FIELDS}
_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}}
"""Schema of the transcription form, for /openapi.json. FastAPI does not know the form, which `Body` reads."""


def build_app(service: Service) -> FastAPI:
    """Return the ASGI application of a server."""
    # FastAPI's own pages of documentation load scripts from other servers.
    app = FastAPI(title="slam-asr", version=__version__, docs_url=None, redoc_url=None)
    for kind in (Refusal, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    _add_transcriptions(app, service)
    _add_models(app, service)
    _add_probes(app, service)
    return app


def _add_transcriptions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/transcriptions", openapi_extra=_FORM)
    async def transcriptions(request: Request) -> Response:
        """Transcribe a recording."""
        body = Body(request, service.limits)
        exchange = Exchange(service, body)
        try:
            _authorise(service, request)
            # This comes before the form is read: `discard` then reads a refused upload without saving it.
            service.admit()
            return await exchange.answer()
        except Refusal as refusal:
            exchange.finish(refusal.status)
            await body.discard()
            raise
        except ClientDisconnect:
            exchange.finish(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)  # nobody reads it
        except Exception:
            exchange.finish(500)
            raise


def _add_models(app: FastAPI, service: Service) -> None:
    served = service.served

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": served.created, "owned_by": "slam-asr"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the names of the model."""
        _authorise(service, request)
        return {"object": "list", "data": [described(name) for name in served.names]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """Describe the model that has this name."""
        _authorise(service, request)
        # The name comes from the request, so only its beginning goes into the message.
        if name not in served.names:
            raise Refusal(404, f"There is no model {name[:100]} here.", "model_not_found", "model")
        return described(name)


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Report whether the process works; if it does not, it should be restarted."""
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else _FAILED}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Report whether requests for transcripts are accepted."""
        if service.draining:
            status = "draining"
        elif not service.batcher.alive:
            status = _FAILED
        else:
            status = "ready" if service.ready else "loading"
        return JSONResponse({"status": status}, 200 if service.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return numbers for Prometheus."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        # A new nonce for each answer: the browser runs only the script and the style that carry it.
        nonce = secrets.token_urlsafe(16)
        model, needs_key = service.served.names[0], service.served.keys is not None
        text = render(
            "serve.html", nonce=nonce, model=model, seconds=service.limits.seconds, needs_key=needs_key
        )
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        # Users type an API key into the page, so no other page may frame it, and no script of another origin
        # may run in it.
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(text, headers=headers)


def _authorise(service: Service, request: Request) -> None:
    require_same_origin(request)
    if service.served.keys is not None:
        service.served.keys.require(request)


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = Refusal(error.status_code, f"{error.detail}.", headers=dict(error.headers or {}))
    elif not isinstance(error, Refusal):
        error = Refusal(500, "The server failed on this request: see its log.")
    return JSONResponse(error.body, error.status, error.headers)
