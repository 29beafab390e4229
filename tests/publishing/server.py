"""An HTTP server with the REST API of Kubeflow's Model Registry.

The server parses requests and writes answers with the classes of the real client, which were generated from
the API's description. A request or an answer with a wrong field therefore fails.
"""

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mr_openapi as mr
from mr_openapi.models.metadata_value import MetadataValue

TOKEN = "a-token-that-nobody-may-see"
PAGE = 2
"""Items per page of a list. It is small, so that a client has to ask for several pages."""


class ModelRegistryServer:
    """The state of the server."""

    def __init__(self) -> None:
        self.token = ""
        """The token that a request must have; empty for none."""
        self.versions_of_api = ("v1alpha3", "v1")
        self.faults: list[int | str] = []
        """Statuses of the next answers to any request; `html` is an answer with a page in HTML."""
        self.fails_at = ""
        """Requests whose path ends with this text get the status 500; empty for none."""
        self.models: list[mr.RegisteredModel] = []
        self.versions: list[mr.ModelVersion] = []
        self.artifacts: list[tuple[str, mr.ModelArtifact]] = []
        """(id of the version, artifact) for each artifact."""
        self.requests: list[str] = []

    def properties_of(self, version: str) -> dict[str, Any]:
        """Return the custom properties of a version as plain values."""
        [found] = [v for v in self.versions if v.name == version]
        return {key: _plain(value) for key, value in found.custom_properties.items()}

    def answer(self, method: str, path: list[str], query: dict[str, str], body: str) -> tuple[int, Any]:
        match [method, *path]:
            case ["GET", "registered_models"]:
                return 200, _page(mr.RegisteredModelList, self.models, query)
            case ["GET", "registered_model"]:
                return _one([m for m in self.models if m.name == query["name"]])
            case ["POST", "registered_models"]:
                sent = mr.RegisteredModelCreate.from_json(body)
                return self._add(self.models, mr.RegisteredModel, sent.to_dict())
            case ["GET", "registered_models", parent, "versions"]:
                found = [v for v in self.versions if v.registered_model_id == parent]
                return 200, _page(mr.ModelVersionList, found, query)
            case ["GET", "model_version"]:
                requested = (query["name"], query["parentResourceId"])
                return _one([v for v in self.versions if (v.name, v.registered_model_id) == requested])
            case ["POST", "model_versions"]:
                sent = mr.ModelVersionCreate.from_json(body)
                return self._add(self.versions, mr.ModelVersion, sent.to_dict())
            case ["POST", "model_versions", parent, "artifacts"]:
                sent = mr.Artifact.from_json(body)
                added = mr.ModelArtifact.from_dict(sent.to_dict() | {"id": str(len(self.artifacts) + 1)})
                self.artifacts.append((parent, added))
                return 201, added.to_dict()
            case ["GET", "model_artifact"]:
                key = (query["parentResourceId"], query["name"])
                return _one([a for parent, a in self.artifacts if (parent, a.name) == key])
        return 404, {"code": "404", "message": "no such path"}

    def _add(self, rows: list[Any], kind: Any, values: dict[str, Any]) -> tuple[int, Any]:
        key = (values["name"], values.get("registeredModelId"))
        if key in [(row.name, getattr(row, "registered_model_id", None)) for row in rows]:
            return 409, {"code": "409", "message": f"{values['name']} exists already"}
        # Ids grow with time, as the real server's do.
        rows.append(kind.from_dict(values | {"id": str(len(rows) + 1)}))
        return 201, rows[-1].to_dict()


def _plain(value: MetadataValue) -> Any:
    actual = value.actual_instance
    kind = actual.metadata_type.removeprefix("Metadata").removesuffix("Value").lower()
    plain = getattr(actual, f"{kind}_value")
    return int(plain) if kind == "int" else plain


def _one(found: list[Any]) -> tuple[int, Any]:
    return (200, found[0].to_dict()) if found else (404, {"code": "404", "message": "not found"})


def _page(kind: Any, rows: list[Any], query: dict[str, str]) -> Any:
    rows = list(reversed(rows)) if query.get("sortOrder") == "DESC" else rows
    start = int(query.get("nextPageToken") or 0)
    items = rows[start : start + PAGE]
    more = str(start + PAGE) if start + PAGE < len(rows) else ""
    return kind(nextPageToken=more, pageSize=PAGE, size=len(items), items=items).to_dict()


class _Handler(http.server.BaseHTTPRequestHandler):
    state: ModelRegistryServer

    def _handle(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        state, (*root, api, path) = self.state, url.path.strip("/").split("/", 3)
        state.requests.append(f"{self.command} {url.path}")
        if state.faults:
            fault = state.faults.pop(0)
            if fault == "html":
                return self._send(200, "<html>Log in</html>", "text/html")
            return self._send(int(fault), json.dumps({"code": str(fault), "message": "on request"}))
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            return self._send(401, json.dumps({"code": "401", "message": "unauthorised"}))
        if root != ["api", "model_registry"] or api not in state.versions_of_api:
            return self._send(404, "404 page not found", "text/plain")
        if state.fails_at and url.path.endswith(state.fails_at):
            return self._send(500, json.dumps({"code": "500", "message": "on request"}))
        query = dict(urllib.parse.parse_qsl(url.query))
        status, answer = state.answer(self.command, path.split("/"), query, body)
        return self._send(status, json.dumps(answer))

    do_GET = do_POST = do_PATCH = _handle

    def _send(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def model_registry() -> Iterator[tuple[ModelRegistryServer, str]]:
    """Run a server, and yield its state and address."""
    state = ModelRegistryServer()
    handler = type("Handler", (_Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield state, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
