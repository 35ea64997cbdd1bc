"""A web server over a folder that can be slow, wrong or broken, and counts what it is asked."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server:
    """`faults[path]` is a list of what the next GETs of a path meet; `None` in it is no fault.

    Faults: a status; "cut" (half the body); "stall"; "trickle"; "longer" / "shorter" (a wrong length);
    "chunked" (no length); "gzip"; or the URL of a redirect. Those of HEAD are under ("HEAD", path).
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.released = threading.Event()

    def gets(self, suffix: str = ".tar") -> int:
        """How many GETs of such paths were made."""
        return sum(n for (method, path), n in self.asked.items() if method == "GET" and path.endswith(suffix))


@contextlib.contextmanager
def serving(folder: Path, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serve a folder on a free port of 127.0.0.1; `server.url` has no slash at its end."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer("HEAD")

        def do_GET(self):
            self.answer("GET")

        def log_message(self, *_):
            pass

        def answer(self, method):
            path = unquote(urlsplit(self.path).path)
            server.asked[method, path] += 1
            faults = server.faults.get((method, path), server.faults.get(path) if method == "GET" else None)
            fault = faults.pop(0) if faults else None
            with contextlib.suppress(ConnectionError):
                self.send(method, folder / path.lstrip("/"), fault)

        def send(self, method, file, fault):
            if isinstance(fault, str) and "://" in fault:
                self.send_response(302)
                self.send_header("Location", fault)
                self.end_headers()
                return
            if isinstance(fault, int) or not file.is_file():
                self.send_error(fault or 404)
                return
            body = file.read_bytes()
            status = file.stat()
            self.send_response(200)
            wrong = {"longer": 512, "shorter": -512}.get(fault, 0)
            if fault != "chunked":
                self.send_header("Content-Length", str(len(body) + wrong))
            if fault == "gzip":
                self.send_header("Content-Encoding", "gzip")
            self.send_header("ETag", f'"{status.st_mtime_ns}-{status.st_size}"')
            self.end_headers()
            if method == "HEAD":
                return
            if fault == "stall":
                self.wfile.write(body[:10])
                server.released.wait(30)
            elif fault == "trickle":
                for byte in body[:300]:
                    self.wfile.write(bytes([byte]))
                    if server.released.wait(0.05):
                        return
            else:
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    server.port = web.server_address[1]
    server.url = f"http://127.0.0.1:{server.port}"
    if tls is not None:
        web.socket = tls.wrap_socket(web.socket, server_side=True)
        server.url = f"https://localhost:{server.port}"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        web.shutdown()
        web.server_close()
