"""A web server on this machine that misbehaves when told to."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What is served, what goes wrong with the next requests, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # one a request, in order; "" for none
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, Range
    url: str = ""
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, content: bytes) -> str:
        """Serve a file; returns its URL."""
        self.files[name] = content
        return f"{self.url}/{name}"


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        site, asked = self.site, self.headers.get("Range", "")
        site.asked.append((self.path, asked))
        fault = site.faults.pop(0) if site.faults else ""
        content = site.files.get(self.path[1:])
        if fault.isdecimal() or content is None:
            self.send_error(int(fault or 404))
            return
        if fault == "wrong content":
            content = content[::-1]
        whole, start = len(content), 0
        if found := re.fullmatch(r"bytes=(\d+)-", asked):
            start = int(found[1])
        if fault == "ignore range":
            start = 0
        if start >= whole > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{whole}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        told = start + 1 if fault == "other range" else start
        if start:
            self.send_header("Content-Range", f"bytes {told}-{whole - 1}/{whole}")
        lie = {"says more": 7, "says less": -7}.get(fault, 0)
        if fault != "no length":
            self.send_header("Content-Length", str(whole - start + lie))
        self.end_headers()
        body = content[start:]
        if fault in ("cut", "stall", "no length"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            site.released.wait(20)
        self.close_connection = True


@contextmanager
def serving() -> Iterator[Site]:
    """A site of its own on a free port, for as long as the context lasts."""
    site = Site()
    handler = type("Handler", (_Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        site.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
