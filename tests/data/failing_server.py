"""A web server on the loopback that serves a folder, and fails as its test says."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FailingServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        failures: by file name, what happens to the next requests, one each: "500", "reset", "silence" (no answer),
            "stall" (a part comes, then nothing), "truncate" (fewer bytes than Content-Length says), "end" (fewer bytes,
            without a Content-Length), "change" (one byte differs), or "ok".
        always: by file name, what happens to each request when there is nothing left of `failures`.
        requests: by file name, how often it was asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.failures: dict[str, deque[str]] = {}
        self.always: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.folder.name}"


class _Handler(BaseHTTPRequestHandler):
    server: FailingServer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.requests[name] += 1
        waiting = self.server.failures.get(name)
        failure = waiting.popleft() if waiting else self.server.always.get(name, "ok")
        path = self.server.folder / name
        if not path.is_file():
            return self.send_error(404)
        if failure.isdigit():
            return self.send_error(int(failure))
        if failure == "reset":  # closing with SO_LINGER 0 sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if failure == "silence":
            self.server.closing.wait(20)
            return self.connection.close()
        content = bytearray(path.read_bytes())
        if failure == "change":
            content[len(content) // 2] ^= 1
        self.send_response(200)
        if failure != "end":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if failure in ("truncate", "end", "stall"):
            content = content[: len(content) // 3]
        self.wfile.write(content)
        self.wfile.flush()
        if failure == "stall":
            self.server.closing.wait(20)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[FailingServer]:
    """Serve a folder in a thread."""
    with FailingServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
