"""A run's page while the run goes on: one page, for the browsers of this machine alone."""

import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fastidmm.errors import FastidmmError
from fastidmm.forecast import FORECAST
from fastidmm.interrupt import Stop
from fastidmm.record import METRICS
from fastidmm.reporting.report import Page
from fastidmm.scoring import EVALUATION

HOST = "127.0.0.1"
RENEW = 10  # seconds between a browser's requests; each folds up what was unfolded
IDLE = 10.0  # seconds that a browser may say nothing
# Whatever grows or changes with a run or its stages.
TOLD = (METRICS, EVALUATION, FORECAST, "checkpoints")
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    # No other page may show this one within itself, or read it.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Kept:
    """The page as last made, and made again when the run has written something."""

    def __init__(self, run: Path) -> None:
        self.page = Page(run)
        self._seen: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        self._text = b""
        self.text()  # what is wrong with a run is said before anything is served

    def text(self) -> bytes:
        """The page as it stands."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                try:
                    self._text = self.page.text(renew=RENEW).encode()
                except (FastidmmError, OSError):
                    # A checkpoint may be gone for the next one: another request finds that.
                    if not self._text:
                        raise
                    return self._text
                self._seen = seen
            return self._text

    def _look(self) -> list[tuple[str, int, int]]:
        run = self.page.run
        paths = [path for name in TOLD for path in (run / name, *run.glob(f"[!.]*/{name}"))]
        found = [(str(p), p.stat()) for p in sorted(paths) if p.exists()]
        return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in found]


class Server(ThreadingHTTPServer):
    """Serves one page under one address, to who asks for it by this machine's own name."""

    daemon_threads = True

    def __init__(self, run: Path) -> None:
        self.kept = Kept(run)
        # Others who use this machine can reach the port: they are not told the path.
        self.path = f"/{secrets.token_urlsafe(16)}"
        super().__init__((HOST, 0), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.timeout = 0.2

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE
    server_version, sys_version = "fastidmm", ""

    def do_GET(self) -> None:
        # A page from elsewhere can have its own name lead here, and would then be let in.
        if self.headers.get("Host", "") not in self.server.hosts:
            self.send_error(403)
        elif not secrets.compare_digest(self.path.encode(), self.server.path.encode()):
            self.send_error(404)
        else:
            body = self.server.kept.text()
            self.send_response(200)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """A request is no news."""


def watch(run: Path, stop: Stop, tell: Callable[[str], None]) -> None:
    """Serve a run's page until asked to stop; `tell` is given its address."""
    with Server(run) as server:
        tell(server.url)
        while not stop.requested:
            server.handle_request()
