"""An S3 server in a process of its own, and a front before it that fails as networks and servers do.

The server's data is in its memory, so each test uses a prefix of its own. This file is also the server's program: it
prints its port, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = "backups"
PAGE_OBJECTS = 100  # to a page of a listing, where S3 has 1,000
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def credentials(address: str) -> dict[str, str]:
    """The environment by which a repository finds the server at an address."""
    return {
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-tests",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{address}",
    }


class S3Server:
    """A server with one empty bucket."""

    def __init__(self) -> None:
        environment = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE_OBJECTS)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        assert self._process.stdout is not None
        self.address = f"127.0.0.1:{int(self._process.stdout.readline())}"
        self.ask("PUT", f"/{BUCKET}")

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its standard input

    def ask(self, method: str, path: str, body: bytes = b"") -> str:
        """The answer to a request of one's own."""
        connection = http.client.HTTPConnection(self.address)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            assert answer.status < 300, answer.status
            return answer.read().decode()

    @property
    def unfinished_uploads(self) -> int:
        """How many uploads in parts were neither completed nor aborted."""
        return self.ask("GET", f"/{BUCKET}?uploads").count("<UploadId>")


class FaultyFront:
    """Hands requests on to a server; harmless until it is told otherwise. Counts are of requests still to fail."""

    def __init__(self, target: str) -> None:
        self.refused = 0  # answered as ``refusal`` says
        self.refusal = 503, _SLOW_DOWN  # status and content
        self.unanswered_puts = 0  # done, but the connection is cut before the answer
        self.unanswered_posts = 0
        self.cut_downloads = 0  # cut in the middle of the content
        self.cut_uploads = 0  # cut in the middle of the content
        self.has_e_tags = True  # while it is not, answers come without
        self.is_silent = False  # while it is, requests are taken, and then nothing happens
        self.may_pass = threading.Event()  # while it is cleared, requests are taken, and wait
        self.may_pass.set()
        self.requests = 0  # so far
        self._target = target
        self._lock = threading.Lock()
        self._ended = threading.Event()
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def log_message(self, *_: object) -> None:
                pass

            def forward(self) -> None:
                front.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> FaultyFront:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.may_pass.set()
        self._server.shutdown()
        self._thread.join()
        self._server.socket.close()

    def _is_next(self, fault: str) -> bool:
        with self._lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(left - 1, 0))
            return left > 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Hands one request on, or fails."""
        with self._lock:
            self.requests += 1
        length = int(request.headers.get("content-length") or 0)
        if length > 1 and request.command == "PUT" and self._is_next("cut_uploads"):
            request.rfile.read(length // 2)
            self._cut(request)
            return
        body = request.rfile.read(length)
        self.may_pass.wait()
        if self.is_silent:
            self._ended.wait()
            self._cut(request)
            return
        if self._is_next("refused"):
            status, content = self.refusal
            self._send(request, status, {}, content)
            return
        connection = http.client.HTTPConnection(self._target)
        with contextlib.closing(connection):
            connection.request(request.command, request.path, body, dict(request.headers))
            answer = connection.getresponse()
            content = answer.read()
        if request.command in ("PUT", "POST") and self._is_next(f"unanswered_{request.command.lower()}s"):
            self._cut(request)
            return
        is_cut = request.command == "GET" and len(content) > 1 and self._is_next("cut_downloads")
        self._send(request, answer.status, dict(answer.getheaders()), content, is_cut=is_cut)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        content: bytes,
        *,
        is_cut: bool = False,
    ) -> None:
        request.send_response_only(status)
        for name, value in headers.items():
            is_kept = self.has_e_tags or name.lower() != "etag"
            if is_kept and name.lower() not in ("connection", "transfer-encoding", "content-length"):
                request.send_header(name, value)
        length = {name.lower(): value for name, value in headers.items()}.get("content-length")
        request.send_header("content-length", length or str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._cut(request)

    def _cut(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True


# -- the server's side -----------------------------------------------------------------------------------------


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server(
        "127.0.0.1", 0, _one_by_one(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


def _one_by_one(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """As S3 does: conditions are checked and met in one step, and half a request is none."""
    lock = threading.Lock()

    def serve(environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environment.get("CONTENT_LENGTH") or 0)
        body = environment["wsgi.input"].read(length)
        if len(body) < length:
            start("400 Bad Request", [("Content-Length", "0")])
            return []
        environment["wsgi.input"] = io.BytesIO(body)
        with lock:
            return list(application(environment, start))

    return serve


if __name__ == "__main__":
    _serve()
