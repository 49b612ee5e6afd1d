"""Fetch a published file once: resumed after a cut, verified, and put in place whole."""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.preparing.files import digests, locked, naming, put_in_place, write_whole

if TYPE_CHECKING:  # a tenth of a second that only a fetch should cost
    import httpx

MAX_BYTES = 20_000_000_000  # of a file whose size is not published
PROGRESS = 1 << 20  # bytes that make an attempt count as one that got further
RETRIED = (408, 425, 429, 500, 502, 503, 504)
UNKNOWN_NAME = ("getaddrinfo", "name or service", "name resolution", "nodename", "no address")


@dataclass(frozen=True, slots=True)
class Remote:
    """A published file: its name, where it is (perhaps nowhere any more), what it hashes to."""

    file: str
    sources: tuple[str, ...] = ()  # URLs, in the order to try
    md5: str = ""
    sha1: str = ""
    sha256: str = ""
    size: int | None = None  # bytes

    @property
    def published(self) -> dict[str, str]:
        """The published checksums by kind; empty where there are none."""
        kinds = {"md5": self.md5, "sha1": self.sha1, "sha256": self.sha256}
        return {kind: value for kind, value in kinds.items() if value}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a server."""

    attempts: int = 5  # in a row without getting further
    wait: float = 1.0  # seconds before the second attempt; doubles with each
    longest_wait: float = 30.0
    connect: float = 15.0  # seconds
    stall: float = 60.0  # seconds in which at least `crawl` bytes must come
    crawl: int = 10_000
    sleep: Callable[[float], None] = time.sleep


PATIENCE = Patience()


class _CutError(Exception):
    """An attempt ended early; another may do better."""


class _UselessError(Exception):
    """This source will not do; another may."""

    def __init__(self, reason: str, *, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wrong = wrong  # whether it sent something, which was not the file


def fetch(remote: Remote, folder: Path, patience: Patience | None = None) -> Path:
    """The file in `folder`, fetched there unless it is there already, and verified either way.

    A UsageError where nobody could be reached, a DataError where what came is not the file.
    """
    path = folder / remote.file
    with locked(folder / f".{remote.file}.lock", f"fetching {path}"):
        if path.exists() and _still_good(path, remote):
            return path
        problems = []
        for source in remote.sources:
            try:
                return _fetched(source, remote, path, patience or PATIENCE)
            except _UselessError as problem:
                problems.append((source, problem))
    raise _gave_up(remote, problems)


def verify(path: Path, remote: Remote, folder: Path) -> str:
    """Check a file against what is published and what was seen before; returns its SHA-256.

    The SHA-256 of a first success is kept in `folder`, as FILE.sha256: not where nothing is
    published, since then there was nothing to succeed in. A DataError otherwise.
    """
    if wrong := _wrong(path, remote):
        raise DataError(f"{path} is not the published file ({wrong}): get it again.")
    found = digests(path, ["sha256"])["sha256"]
    seen = recorded(remote, folder)
    if seen and seen != found:
        raise DataError(
            f"{path} is not the file seen before (SHA-256 {found}, not {seen}): get that one "
            f"again, or remove {_record(remote, folder)} to accept this one."
        )
    if not seen and remote.published:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(_record(remote, folder), f"{found}  {remote.file}\n")
    return found


def forget(remote: Remote, folder: Path) -> None:
    """Remove a file that was fetched and turned out to be of no use, and what was noted of it."""
    for path in (folder / remote.file, _record(remote, folder)):
        path.unlink(missing_ok=True)


def recorded(remote: Remote, folder: Path) -> str:
    """The SHA-256 that a file had when it was first verified; empty before that."""
    try:
        found = re.match(r"[0-9a-f]{64}\b", _record(remote, folder).read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def _record(remote: Remote, folder: Path) -> Path:
    return folder / f"{remote.file}.sha256"


def _wrong(path: Path, remote: Remote) -> str:
    """How a file differs from the published one; empty where it does not."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"{size:,} bytes, not {remote.size:,}"
    for kind, found in digests(path, remote.published).items():
        if found != remote.published[kind]:
            return f"{kind.upper()} {found}, not {remote.published[kind]}"
    return ""


def _still_good(path: Path, remote: Remote) -> bool:
    """Whether a file fetched before can be used; one that cannot makes way where it can."""
    try:
        verify(path, remote, path.parent)
    except DataError:
        if not remote.sources:
            raise
        path.unlink()
        return False
    return True


def _fetched(source: str, remote: Remote, path: Path, patience: Patience) -> Path:
    """Fetch from one source, verify, and give the file its name."""
    part = path.with_name(f".{path.name}.part")
    if not remote.published:
        part.unlink(missing_ok=True)  # Nothing would tell two halves of different files apart.
    if _download(source, remote, part, patience) and _wrong(part, remote):
        part.unlink()
        _download(source, remote, part, patience)
    if wrong := _wrong(part, remote):
        part.unlink()
        raise _UselessError(f"sent something else, {wrong}", wrong=True)
    try:
        found = digests(part, ["sha256"])["sha256"]
        seen = recorded(remote, path.parent)
        if seen and seen != found:
            raise _UselessError(
                f"sent another file than the first time, SHA-256 {found}, not {seen}; remove "
                f"{_record(remote, path.parent)} if that is right",
                wrong=True,
            )
        if not seen:
            write_whole(_record(remote, path.parent), f"{found}  {remote.file}\n")
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(source: str, remote: Remote, part: Path, patience: Patience) -> bool:
    """Bring `part` to its whole length; returns whether it was put together of several pieces."""
    stuck, pieced = 0, False
    while True:
        before = _size(part)
        pieced |= before > 0
        try:
            with _client(patience) as client, naming(part):
                _receive(client, source, remote, part, patience)
            return pieced
        except _CutError as problem:
            stuck = 0 if _size(part) - before >= PROGRESS else stuck + 1
            if stuck >= patience.attempts:
                raise _UselessError(str(problem)) from None
        patience.sleep(min(patience.wait * 2 ** max(stuck - 1, 0), patience.longest_wait))


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _client(patience: Patience) -> "httpx.Client":
    import httpx

    timeout = httpx.Timeout(patience.stall, connect=patience.connect)
    # A server that compresses on the way would hide how long the file is.
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastidmm"}
    try:
        return httpx.Client(timeout=timeout, headers=headers, follow_redirects=True)
    except (ValueError, ImportError) as problem:
        raise UsageError(
            f"the proxy named in the environment cannot be used ({problem}): mend or unset "
            "HTTPS_PROXY, HTTP_PROXY and ALL_PROXY, or give files you have with --from."
        ) from None


def _receive(
    client: "httpx.Client", source: str, remote: Remote, part: Path, patience: Patience
) -> None:
    """One attempt: what is missing of `part`, or all of it where the server has no ranges."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    with _understood(source, patience), client.stream("GET", source, headers=headers) as response:
        status, given = response.status_code, response.headers.get("content-range", "")
        if status == 416 and given == f"bytes */{have}":
            return
        if status == 416 or (status == 206 and not given.startswith(f"bytes {have}-")):
            part.unlink(missing_ok=True)
            raise _CutError(f"answered with another range ({given or 'none'}) than was asked for")
        if status not in (200, 206):
            kind = _CutError if status in RETRIED else _UselessError
            raise kind(f"answered {status} {response.reason_phrase}".strip())
        start = have if status == 206 else 0
        length = response.headers.get("content-length", "")
        total = start + int(length) if length.isdecimal() else None
        if remote.size is not None and total not in (None, remote.size):
            raise _UselessError(f"offers {total:,} bytes, not {remote.size:,}", wrong=True)
        limit = remote.size if remote.size is not None else MAX_BYTES
        with part.open("ab" if start else "wb") as file, _bar(remote.file, start, total) as moved:
            for chunk in _flowing(response.iter_raw(), patience):
                if file.tell() + len(chunk) > limit:
                    raise _UselessError(f"sent more than {limit:,} bytes", wrong=True)
                file.write(chunk)
                moved(len(chunk))
            file.flush()
            os.fsync(file.fileno())


def _flowing(chunks: Iterator[bytes], patience: Patience) -> Iterator[bytes]:
    """The same chunks, for as long as they come faster than a crawl."""
    since, got = time.monotonic(), 0
    for chunk in chunks:
        yield chunk
        got += len(chunk)
        now = time.monotonic()
        if now - since >= patience.stall:
            if got < patience.crawl:
                raise _CutError(f"sent only {got} bytes in {now - since:.0f} s")
            since, got = now, 0


@contextmanager
def _understood(source: str, patience: Patience) -> Iterator[None]:
    """Turn what httpx raises into whether to try again, and words for a person."""
    import httpx

    try:
        yield
    except httpx.ProxyError as problem:
        raise _UselessError(f"the proxy refused ({problem}); see HTTPS_PROXY") from None
    except httpx.ConnectTimeout:
        raise _CutError(f"no answer in {patience.connect:g} s{_proxied()}") from None
    except httpx.ConnectError as problem:
        text = str(problem)
        if any(words in text.lower() for words in UNKNOWN_NAME):
            raise _UselessError(f"name not known, is this machine online?{_proxied()}") from None
        if "CERTIFICATE" in text:
            raise _UselessError(f"its certificate is not trusted ({text})") from None
        raise _CutError(f"cannot be reached ({text}){_proxied()}") from None
    except httpx.TimeoutException:
        raise _CutError(f"sent nothing for {patience.stall:g} s") from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as problem:
        raise _CutError(f"the connection broke ({problem})") from None
    except (httpx.HTTPError, httpx.InvalidURL) as problem:
        raise _UselessError(f"cannot be used ({problem})") from None


def _proxied() -> str:
    """A hint where a proxy stands between, whose errors look like the server's."""
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    found = [name for name in names if os.environ.get(name) or os.environ.get(name.lower())]
    return f", with a proxy set by {found[0]}" if found else ""


@contextmanager
def _bar(text: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar where a person is looking; gives the function that moves it by bytes."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    words = TextColumn("{task.description}")
    with Progress(words, *columns, console=console, transient=True) as progress:
        task = progress.add_task(f"Fetching {text}", total=total, completed=done)
        yield lambda num: progress.advance(task, num)


def _gave_up(remote: Remote, problems: list[tuple[str, _UselessError]]) -> FastidmmError:
    """The error when no source gave the file."""
    if not problems:
        return UsageError(
            f"{remote.file} is published nowhere any more: give a copy of it with --from."
        )
    told = "; ".join(f"{urlsplit(source).netloc}: {problem}" for source, problem in problems)
    message = (
        f"{remote.file} could not be fetched ({told}): get {problems[0][0]} by other means and "
        "give the folder it is in with --from."
    )
    wrong = any(problem.wrong for _, problem in problems)
    return DataError(message) if wrong else UsageError(message)
