"""Reads a request for a transcript: key, form and audio, within the limits.

An upload of up to 1 MB is in memory. A larger one is in a temporary file without a name, which no other user
can open and which disappears with the request.
"""

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from slam_asr.audio import Clip, read_clip
from slam_asr.audio.faults import AudioError, Fault
from slam_asr.errors import ConfigurationError
from slam_asr.serving.limits import Limits, Refusal

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
"""Values of `response_format`."""
_IGNORED = ("prompt", "chunking_strategy", "keywords", "keywords[]")
"""Parameters that only guide a model. They cannot guide this one and are ignored."""
_UNSUPPORTED = {
    "include": "the search has no log probabilities of tokens",
    "known_speaker_names": "speakers are not distinguished",
    "known_speaker_references": "speakers are not distinguished",
}
"""Parameters that request something that this server cannot give, and the reason."""
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_OVERHEAD = 1_000_000
"""Bytes that a body may have in addition to the file, for boundaries and other fields."""
_FORM_LIMITS = {"max_files": 1, "max_fields": 64, "max_part_size": 65_536}
"""Maximum numbers of a form's files and of its fields besides them, and maximum size of a field in bytes."""
_PATIENCE = 30.0
"""Seconds without a new byte after which an upload is refused."""


class Keys:
    """The API keys of a server.

    Args:
        file: text file with one key per line. With several keys, clients can change to a new key one by
            one.

    Raises:
        ConfigurationError: the file cannot be read or has no key.
    """

    def __init__(self, file: str) -> None:
        try:
            lines = Path(file).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"The keys in --api-key-file {file} cannot be read: name a readable text file with one key "
                "per line."
            ) from error
        if not lines:
            raise ConfigurationError(f"--api-key-file {file} has no key: write one key per line.")
        self._digests = [_digest(line) for line in lines]

    def require(self, request: Request) -> None:
        """Refuse a request without a valid key.

        Raises:
            Refusal: the header `Authorization: Bearer KEY` is missing or has another key.
        """
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # The scheme's case does not matter (RFC 9110, section 11.1).
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        # All keys are compared, as digests of equal length, so the time reveals nothing about a key.
        if sum(hmac.compare_digest(given, known) for known in self._digests) == 0:
            why = "The API key is missing or wrong: send the header `Authorization: Bearer KEY`."
            raise Refusal(401, why, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def require_same_origin(request: Request) -> None:
    """Refuse a request from a page of another site: its visitor's browser may be able to reach this server.

    Raises:
        Refusal: the request comes from such a page.
    """
    origin = request.headers.get("origin")
    # Programs send no Origin. Browsers send it with every POST, so a page elsewhere cannot omit it.
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Refusal(403, f"Pages of {origin[:100]} may not use this server.", "cross_origin")


@dataclass(frozen=True)
class Order:
    """A client's request for a transcript, besides the audio."""

    name: str
    """The file's name, for messages."""
    format: str
    """One of `FORMATS`."""
    stream: bool
    language: str
    """The language that the client names, or otherwise that of the model; empty if neither is known."""
    ignored: list[str]
    """Names of the parameters that have no effect."""


def read_order(form: FormData, names: list[str], language: str) -> Order:
    """Read and check the fields of a form.

    Args:
        form: the fields; names of lists end with `[]`, as OpenAI's clients write them.
        names: names of the served model.
        language: the model's language as ISO 639-1; empty if unknown.

    Raises:
        Refusal: a field is missing or wrong, or requests what this server does not have.
    """
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value != ""}
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise _wrong("file", "There is no file: send it as the form's field `file`.")
    if fields.get("model", names[0]) not in names:
        why = f"There is no model {fields['model'][:100]} here: use {names[0]}, or leave the model out."
        raise Refusal(404, why, "model_not_found", "model")
    form_format = fields.get("response_format", "json")
    if form_format not in FORMATS:
        why = f"response_format is {form_format[:50]}: use one of {', '.join(FORMATS)}."
        raise _wrong("response_format", why)
    stream = _BOOLEANS.get(fields.get("stream", "false").lower())
    if stream is None:
        raise _wrong("stream", "stream must be true or false.")
    if stream and form_format in ("srt", "vtt"):
        raise _wrong("stream", f"{form_format} cannot be streamed: use json or verbose_json.")
    for name, reason in _UNSUPPORTED.items():
        if fields.keys() & {name, f"{name}[]"}:
            raise _wrong(name, f"{name} cannot be used, because {reason}: leave it out.")
    if "word" in form.getlist("timestamp_granularities[]") + form.getlist("timestamp_granularities"):
        why = "This server gives no times of words, only of segments: leave timestamp_granularities out."
        raise _wrong("timestamp_granularities", why)
    _require_greedy(fields)
    given = _language(fields, language)
    ignored = {name.removesuffix("[]") for name in _IGNORED if name in fields}
    # `language` has no effect on a model whose language is not known.
    ignored |= {"language"} if given and not language else set()
    return Order(_safe_name(file.filename), form_format, stream, given or language, sorted(ignored))


def _wrong(field: str, why: str) -> Refusal:
    """Return the refusal of a form because of one of its fields."""
    return Refusal(400, why, param=field)


def _require_greedy(fields: Mapping[str, str]) -> None:
    with contextlib.suppress(ValueError):
        if float(fields.get("temperature", "0")) == 0:
            return
    raise _wrong("temperature", "temperature can only be 0, because the search is not random: leave it out.")


def _language(fields: Mapping[str, str], language: str) -> str:
    given = fields.get("language", "").lower()
    if not re.fullmatch(r"([a-z]{2,3}(-[a-z0-9]+)?)?", given):
        raise _wrong("language", f"language is {given[:50]}: write it as ISO 639-1, such as en.")
    if given and language and given.partition("-")[0] != language:
        why = f"The model transcribes only {language}, not {given}: leave language out, or use another model."
        raise _wrong("language", why)
    return given


def _safe_name(name: str | None) -> str:
    """Return a file's name without folders, and without characters that could disturb a log."""
    # Some clients send a complete path, on Windows with backslashes.
    own = PurePosixPath((name or "").replace("\\", "/")).name
    return re.sub(r"[^\w .()+-]", "_", own)[:100] or "audio"


class Body:
    """The body of a request, which is refused as soon as it is too large or stops arriving.

    Args:
        request: the request; its body must not have been read.
        limits: limits of the server, one of which is the size of an upload.
    """

    def __init__(self, request: Request, limits: Limits) -> None:
        self._receive, self._limits, self._count = request.receive, limits, 0
        self._max_bytes = limits.bytes + _OVERHEAD
        announced = request.headers.get("content-length", "0")
        # A client may announce any length, so the bytes that arrive are counted as well.
        self._announced = int(announced) if announced.isdecimal() else 0
        self.ended = False
        """Whether all of the body has been read."""
        # Starlette reads a form through its request's `receive`, so the limits apply while it is read.
        self.request = Request(request.scope, self.receive)
        """The request; its form is read through this object."""

    async def form(self) -> FormData:
        """Read a form, which is empty for a body of another type. Close its file: `await form.close()`.

        Raises:
            Refusal: the body is too large, is a damaged form, exceeds a form's limits, or stopped arriving.
            ClientDisconnect: the client has disconnected.
        """
        # Refused before the first byte is read. If the length is missing or wrong, `receive` finds out.
        if self._announced > self._max_bytes:
            raise _too_large(self._limits)
        try:
            return await self.request.form(**_FORM_LIMITS)
        except (HTTPException, KeyError, ValueError) as error:
            why = error.detail if isinstance(error, HTTPException) else "it is damaged"
            raise Refusal(400, f"The form cannot be read ({why.rstrip('.')}).", "invalid_form") from error

    async def discard(self) -> None:
        """Read the rest of a refused upload, within limits.

        Some clients read the answer only after they have sent the complete upload.
        """
        if self._announced > 2 * self._max_bytes:
            return
        with contextlib.suppress(Refusal, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                while not self.ended and (await self.receive())["type"] == "http.request":
                    pass

    async def receive(self) -> Message:
        """Receive a part of the body, or the message that the client has disconnected.

        Raises:
            Refusal: the body is too large, or none of it arrived for 30 s.
        """
        if self.ended:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), _PATIENCE)
        except TimeoutError:
            why = f"No byte of the upload arrived for {_PATIENCE:g} s: send it again."
            raise Refusal(408, why, "upload_stopped") from None
        self.ended = not message.get("more_body", False)
        self._count += len(message.get("body", b""))
        # If this was the last part, `decode_audio` compares the file alone with its own limit.
        if self._count > self._max_bytes and not self.ended:
            raise _too_large(self._limits)
        return message


def _too_large(limits: Limits) -> Refusal:
    why = f"The upload is larger than {limits.megabytes:g} MB: send a shorter recording or a compressed one."
    return Refusal(413, why, "file_too_large", "file")


def decode_audio(file: UploadFile, name: str, limits: Limits) -> Clip:
    """Decode an upload to samples. This takes long, so call it in a thread.

    Raises:
        Refusal: the file is no audio, is damaged, is too large or too long, or needs a package that is not
            installed.
    """
    content = file.file.read()
    if len(content) > limits.bytes:
        raise _too_large(limits)
    try:
        return read_clip(name, limits.seconds, content=content)
    except AudioError as error:
        if error.reason == Fault.TOO_LONG:
            raise Refusal(413, str(error), "audio_too_long", "file") from error
        raise Refusal(400, str(error), "invalid_audio", "file") from error
    except ConfigurationError as error:
        raise Refusal(415, str(error), "unsupported_format", "file") from error
