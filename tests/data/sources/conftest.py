"""A server on this machine to download from: it can break off, fall silent, and send headers that are wrong."""

import http.server
import threading

import pytest


@pytest.fixture
def server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content, requested = self.server.content, self.headers.get("Range")
            self.server.ranges.append(requested)
            start = int(requested.split("=")[1].rstrip("-")) if requested else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if requested else 200)
            for name, value in {"Content-Length": str(len(content) - start), **self.server.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            body = content[start:]
            if self.server.break_after is not None:
                body, self.server.break_after = body[: self.server.break_after], None
            self.wfile.write(body)
            self.wfile.flush()
            self.server.stalls.wait(timeout=30)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.content, httpd.ranges, httpd.break_after, httpd.headers = b"", [], None, {}
        httpd.stalls = threading.Event()
        httpd.stalls.set()
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/a.tar.gz"
        yield httpd
        httpd.shutdown()
