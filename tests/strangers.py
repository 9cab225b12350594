"""Servers that are not what a command was told they are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def answering_with(status: int, body: bytes, delay_s: float = 0, version: bytes | None = None) -> Iterator[str]:
    """An HTTP server that gives everyone the same answer, after a while; with `version` this one where its version is asked for. Returns its URL."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            over.wait(delay_s)
            with suppress(BrokenPipeError):  # who asked has given up
                knows = version is not None and self.path == "/api/version"
                self.send_response(200 if knows else status)
                self.end_headers()
                self.wfile.write(version if knows and version is not None else body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        server.server_close()
