"""A small stand-in for the API, for tests of the page: it answers the shapes of docs/service.md on loopback.

A started run goes through its recorded steps as its events are read.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import mimetypes
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import cluster.service
from tests.support.page_state import API, Service, get, post

PAGE = Path(cluster.service.__file__).parent / "page"
CSP = (  # as cluster/service/security.py has it
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Handler(BaseHTTPRequestHandler):
    """Routes; the state is the server's."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path, query = self._asked()
        if not path.startswith(API):
            return self._file(path)
        service = self.server.service
        parts = path[len(API) + 1 :].split("/")
        if parts == ["health"]:
            return self._json({"status": "ok", "version": "0.1.0", "token_required": service.token is not None})
        if not self._allowed():
            return None
        if parts[0] == "runs" and len(parts) > 2 and parts[2] == "events":
            return self._events(parts[1], int(query.get("since", ["0"])[0]))
        answer = get(service, parts, query)
        if answer is None:
            return self._error(404, "not_found", "not found")
        return self._json(answer)

    def do_POST(self) -> None:
        path, _ = self._asked()
        service, parts = self.server.service, path[len(API) + 1 :].split("/")
        if parts == ["datasets"]:
            service.taking.wait(60)
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        if len(content) < length or not self._allowed():  # the page hung up, or may not
            return None
        if parts == ["datasets"]:
            service.reading.wait(60)
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + content)
            (part,) = form.iter_parts()
            return self._json(service.take(part.get_filename() or "file", part.get_payload(decode=True)), 201)
        body = json.loads(content) if content else None
        service.bodies.append((path, body))
        if parts[-1] == "chat":
            if service.busy:
                return self._error(429, "busy", "somebody else is chatting")
            return self._chat(body)
        return self._json(*post(service, parts, body, self.headers.get("Idempotency-Key")))

    def do_DELETE(self) -> None:
        path, query = self._asked()
        if not self._allowed():
            return
        parts = path[len(API) + 1 :].split("/")
        held = self.server.service.runs if parts[0] == "runs" else self.server.service.datasets
        if parts[0] == "runs" and query.get("confirm") != [parts[1]]:
            return self._error(422, "invalid_request", "confirm the run's id")
        if parts[1] in self.server.service.used:
            return self._error(409, "conflict", "the run going reads this dataset")
        held.pop(parts[1])
        self._send(204, b"", "text/plain")

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        url = urlsplit(self.path)
        self.server.paths.append(url.path)
        return unquote(url.path), parse_qs(url.query)

    def _allowed(self) -> bool:
        token = self.server.service.token
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self._error(401, "unauthorized", "a bearer token is needed")
        return False

    def _file(self, path: str) -> None:
        file = (PAGE / ("index.html" if path == "/" else path.lstrip("/"))).resolve()
        if not file.is_relative_to(PAGE) or not file.is_file():
            return self._send(404, b"no such file", "text/plain")
        return self._send(200, file.read_bytes(), mimetypes.guess_type(file.name)[0] or "text/plain")

    def _stream(self, blocks: Iterator[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for block in blocks:
                self.wfile.write(block.encode())
                self.wfile.flush()
        except ConnectionError:
            pass  # the page went elsewhere
        self.close_connection = True

    def _events(self, run_id: str, since: int) -> None:
        service = self.server.service

        def blocks() -> Iterator[str]:
            held = service.runs[run_id]
            yield f"event: run\ndata: {json.dumps(held['run'])}\n\n"
            for row in [row for row in held["metrics"] if row["step"] > since]:
                yield f"event: metrics\nid: {row['step']}\ndata: {json.dumps(row)}\n\n"
            while row := service.advance(run_id):
                yield f"event: metrics\nid: {row['step']}\ndata: {json.dumps(row)}\n\n"
                self.server.tick.wait(self.server.pace)
            while held["run"]["state"] == "running" and "coming" not in held and not self.server.tick.wait(0.5):
                yield ": still here\n\n"
            yield f"event: run\ndata: {json.dumps(held['run'])}\n\n"
            yield f"event: end\ndata: {json.dumps({'state': held['run']['state']})}\n\n"

        self._stream(blocks())

    def _chat(self, body: dict[str, Any]) -> None:
        def blocks() -> Iterator[str]:
            yield 'event: state\ndata: {"message": "loading the models"}\n\n'
            answers = {"trained": ["The answer ", "is 110."], "base": ["I like ", "numbers."]}
            asked = {who: answers[who] for who in answers if body[who]}
            if self.server.service.base_is_gone and asked.pop("base", None):
                yield 'event: missing\ndata: {"who": "base", "message": "no such folder"}\n\n'
            for who, words in asked.items():
                for word in words:
                    yield f"event: piece\ndata: {json.dumps({'who': who, 'text': word})}\n\n"
                yield f"event: end\ndata: {json.dumps({'who': who})}\n\n"
            yield "event: done\ndata: {}\n\n"

        assert body["trained"][-1]["role"] == "user"
        self._stream(blocks())

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _error(self, status: int, code: str, message: str) -> None:
        self._json({"error": {"code": code, "message": message, "details": []}}, status)

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text") else kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", CSP)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


class StandIn(ThreadingHTTPServer):
    """The server on a free port of loopback; `pace` is the wait between two steps of a started run, in seconds."""

    daemon_threads = True

    def __init__(self, service: Service, *, pace: float = 0.02, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.service, self.pace, self.tick, self.paths = service, pace, threading.Event(), list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"
