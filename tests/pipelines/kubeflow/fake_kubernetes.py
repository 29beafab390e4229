"""HTTP servers that imitate Kubernetes and a registry of images; `serving` runs any server."""

import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class KubernetesHandler(http.server.BaseHTTPRequestHandler):
    """Serves `server.pods` (name → labels, phase, log) and `server.objects` (path → status, content).

    A pending pod has the reason for its wait in place of a log. If `server.forbidden` is true, all requests
    are refused.
    """

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        """Answer whether an account has a right. It has all except those in `server.objects["denied"]`."""
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.forbidden:
            return self._send(403, json.dumps({"kind": "Status", "message": "forbidden"}).encode())
        assert self.path == "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        asked = request["spec"]["resourceAttributes"]
        right = " ".join(filter(None, (asked["verb"], asked["resource"], asked.get("name"))))
        denied = self.server.objects.get("denied", ())
        review = (request["spec"]["user"], asked.get("namespace"), right)
        self.server.objects.setdefault("reviews", []).append(review)
        request["status"] = {"allowed": right not in denied}
        self._send(201, json.dumps(request).encode())

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        if self.server.forbidden:
            return self._send(403, json.dumps({"kind": "Status", "message": "forbidden"}).encode())
        if path in self.server.objects:
            status, content = self.server.objects[path]
            return self._send(status, json.dumps(content).encode())
        if not path.endswith("/pods") and "/pods/" not in path:
            return self._send(404, json.dumps({"kind": "Status", "code": 404}).encode())
        if match := re.fullmatch(r"/api/v1/namespaces/[^/]+/pods/([^/]+)/log", path):
            assert options["container"] == "main"
            log = self.server.pods[match[1]][2]
            if log is None:
                return self._send(403, json.dumps({"kind": "Status", "message": "forbidden"}).encode())
            return self._send(200, log.encode(), "text/plain")
        key, _, value = options["labelSelector"].partition("=")
        items = [
            {
                "metadata": {
                    "name": name,
                    "labels": labels,
                    "creationTimestamp": f"2026-01-02T03:04:0{number}Z",
                },
                "status": {
                    "phase": phase,
                    "conditions": [{"type": "PodScheduled", "status": "False", "message": log}]
                    if phase == "Pending"
                    else [],
                },
            }
            for number, (name, (labels, phase, log)) in enumerate(self.server.pods.items())
            if labels.get(key) == value
        ]
        self._send(
            200, json.dumps({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}).encode()
        )

    def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class RegistryHandler(http.server.BaseHTTPRequestHandler):
    """A public registry with tokens for anonymous users; `server.manifests`: name:reference → status."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        match = re.fullmatch(r"/v2/(.+)/manifests/(.+)", self.path)
        if self.headers.get("authorization") != f"Bearer for-{match[1]}":
            self.send_response(401)
            address = f"http://127.0.0.1:{self.server.server_address[1]}/token"
            self.send_header(
                "www-authenticate",
                f'Bearer realm="{address}",service="registry",scope="repository:{match[1]}:pull"',
            )
        else:
            self.send_response(self.server.manifests.get(f"{match[1]}:{match[2]}", 404))
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        query = dict(urllib.parse.parse_qsl(self.path.partition("?")[2]))
        content = json.dumps({"token": f"for-{query['scope'].split(':')[1]}"}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(handler: type, **attributes: Any) -> Iterator[str]:
    """Run a local server during the block, and yield its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        vars(server).update(attributes)
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
