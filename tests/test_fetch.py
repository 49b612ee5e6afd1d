"""Fetching from servers that cut, stall, lie and send something else."""

import errno
import hashlib
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from webserver import Site, serving

from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.preparing import fetch as module
from fastidmm.preparing.fetch import Patience, Remote, fetch, recorded, verify
from fastidmm.preparing.files import locked

CONTENT = bytes(range(256)) * 400 + b"end"
MD5 = hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
WAITED: list[float] = []
QUICK = Patience(attempts=3, stall=0.15, connect=2, sleep=WAITED.append)


@pytest.fixture(autouse=True)
def unwaited() -> None:
    WAITED.clear()


@pytest.fixture
def remote(site: Site) -> Remote:
    return Remote("x.tgz", (site.add("x.tgz", CONTENT),), md5=MD5)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


WHOLE = {"x.tgz", "x.tgz.sha256", ".x.tgz.lock"}


def test_a_file_is_fetched_once_and_verified_always(
    site: Site, remote: Remote, tmp_path: Path
) -> None:
    path = fetch(remote, tmp_path, QUICK)
    assert path == tmp_path / "x.tgz" and path.read_bytes() == CONTENT and left(tmp_path) == WHOLE
    assert (tmp_path / "x.tgz.sha256").read_text() == f"{SHA256}  x.tgz\n"
    fetch(remote, tmp_path, QUICK)
    assert site.asked == [("/x.tgz", "")]
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(remote, tmp_path, QUICK).read_bytes() == CONTENT and len(site.asked) == 2
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"x.tgz is not the published file .MD5 .*get it again"):
        fetch(replace(remote, sources=()), tmp_path, QUICK)


@pytest.mark.parametrize("kind", ["md5", "sha1", "sha256"])
def test_each_kind_of_checksum_is_compared(site: Site, tmp_path: Path, kind: str) -> None:
    url = site.add("x.tgz", CONTENT)
    right: dict[str, Any] = {kind: hashlib.new(kind, CONTENT).hexdigest()}
    fetch(Remote("x.tgz", (url,), **right), tmp_path / "right", QUICK)
    wrong: dict[str, Any] = {kind: hashlib.new(kind, b"other").hexdigest()}
    with pytest.raises(DataError, match=f"{kind.upper()} {right[kind]}, not {wrong[kind]}"):
        fetch(Remote("x.tgz", (url,), **wrong), tmp_path / "wrong", QUICK)
    assert left(tmp_path / "wrong") == {".x.tgz.lock"}


def test_a_file_is_held_against_what_was_seen_before(tmp_path: Path) -> None:
    """Where nothing is published, too: its first SHA-256 is all there is."""
    path, bare = tmp_path / "x.tgz", Remote("x.tgz")
    path.write_bytes(CONTENT)
    assert verify(path, bare, tmp_path) == SHA256 and left(tmp_path) == {"x.tgz"}
    other = hashlib.sha256(b"other").hexdigest()
    (tmp_path / "x.tgz.sha256").write_text(f"{SHA256}  x.tgz\n")
    assert verify(path, bare, tmp_path) == SHA256
    (tmp_path / "x.tgz.sha256").write_text(f"{other}  x.tgz\n")
    words = rf"not the file seen before .SHA-256 {SHA256}, not {other}.* remove .*x.tgz.sha256"
    with pytest.raises(DataError, match=words):
        verify(path, bare, tmp_path)


def test_a_published_size_alone_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "x.tgz"
    path.write_bytes(CONTENT)
    assert verify(path, Remote("x.tgz", size=102_403), tmp_path) == SHA256
    for size in (102_402, 102_404):
        with pytest.raises(DataError, match=f"not the published file .102,403 bytes, not {size:,}"):
            verify(path, Remote("x.tgz", size=size), tmp_path)


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        (["cut"], ["", "bytes=51201-"]),
        (["cut", "cut"], ["", "bytes=51201-", "bytes=76802-"]),
        (["cut", "503"], ["", "bytes=51201-", "bytes=51201-"]),
        (["stall"], ["", "bytes=51201-"]),
        (["cut", "ignore range"], ["", "bytes=51201-"]),
        (["cut", "other range"], ["", "bytes=51201-", ""]),
        (["says more"], ["", "bytes=102403-"]),
        (["cut", "wrong content"], ["", "bytes=51201-", ""]),
        (["429", "500"], ["", "", ""]),
    ],
)
def test_faults_that_pass(
    site: Site, remote: Remote, tmp_path: Path, faults: list[str], asked: list[str]
) -> None:
    site.faults = faults
    assert fetch(remote, tmp_path, QUICK).read_bytes() == CONTENT and left(tmp_path) == WHOLE
    assert [given for _, given in site.asked] == asked


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("404", UsageError, "answered 404 Not Found"),
        ("503", UsageError, "answered 503 Service Unavailable"),
        ("stall", UsageError, "sent nothing for 0.15 s"),
        ("wrong content", DataError, "sent something else, MD5"),
        ("says less", DataError, "sent something else, MD5"),
        ("no length", DataError, "sent something else, MD5"),
    ],
)
def test_faults_that_stay_lead_to_the_next_source(
    site: Site, remote: Remote, tmp_path: Path, fault: str, error: type[FastidmmError], words: str
) -> None:
    site.faults = [fault] * 20
    with pytest.raises(error, match=words) as caught:
        fetch(remote, tmp_path, QUICK)
    assert f"get {site.url}/x.tgz by other means" in str(caught.value)
    assert "--from" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x.tgz").exists() and not recorded(remote, tmp_path)
    with serving() as mirror:
        both = replace(remote, sources=(*remote.sources, mirror.add("x.tgz", CONTENT)))
        assert fetch(both, tmp_path, QUICK).read_bytes() == CONTENT


def test_waits_grow_and_end(site: Site, remote: Remote, tmp_path: Path) -> None:
    site.faults = ["503"] * 10
    with pytest.raises(UsageError):
        fetch(remote, tmp_path, replace(QUICK, attempts=5, longest_wait=3))
    assert WAITED == [1, 2, 3, 3] and len(site.asked) == 5


def test_a_server_that_crawls_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    slow = module._flowing(iter([b"x" * 100] * 50), Patience())
    with pytest.raises(module._CutError, match="sent only 300 bytes in 60 s"):
        list(slow)
    fast = [b"x" * 10_000] * 20
    assert list(module._flowing(iter(fast), Patience())) == fast


def test_a_part_survives_an_interruption(
    site: Site, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    site.faults = ["cut"]
    with pytest.raises(KeyboardInterrupt):
        fetch(remote, tmp_path, replace(QUICK, sleep=interrupted))
    assert left(tmp_path) == {".x.tgz.part", ".x.tgz.lock"}
    assert fetch(remote, tmp_path, QUICK).read_bytes() == CONTENT
    assert [given for _, given in site.asked] == ["", "bytes=51201-"] and left(tmp_path) == WHOLE


@pytest.mark.parametrize("part", [b"junk", CONTENT[:-5] + b"junk!", CONTENT + b"more"])
def test_a_part_that_is_of_something_else_is_dropped(
    remote: Remote, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / ".x.tgz.part").write_bytes(part)
    assert fetch(remote, tmp_path, QUICK).read_bytes() == CONTENT and left(tmp_path) == WHOLE


def test_without_a_published_checksum_nothing_is_pieced_together(
    site: Site, remote: Remote, tmp_path: Path
) -> None:
    bare = replace(remote, md5="")
    (tmp_path / ".x.tgz.part").write_bytes(b"of another time")
    assert fetch(bare, tmp_path, QUICK).read_bytes() == CONTENT
    assert site.asked == [("/x.tgz", "")]
    (tmp_path / "x.tgz").unlink()
    site.add("x.tgz", b"another file")
    with pytest.raises(DataError, match=r"another file than the first time.*remove .*sha256"):
        fetch(bare, tmp_path, QUICK)
    assert left(tmp_path) == {"x.tgz.sha256", ".x.tgz.lock"}


def test_sizes_bound_what_is_written(
    site: Site, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="offers 102,403 bytes, not 99"):
        fetch(replace(remote, size=99), tmp_path, QUICK)
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="sent more than 1,000 bytes"):
        fetch(remote, tmp_path, QUICK)


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:{port}/x", "cannot be reached"),
        ("http://no-such-host.invalid/x", "name not known, is this machine online"),
        ("ftp://127.0.0.1/x", "cannot be used"),
    ],
)
def test_no_way_to_the_server(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, words: str
) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if "invalid" in url:
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UsageError, match=words) as caught:
        fetch(Remote("x", (url.format(port=closed_port()),)), tmp_path, QUICK)
    assert "--from" in str(caught.value)


def test_proxies_that_do_not_work(
    site: Site, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(UsageError, match="with a proxy set by HTTP_PROXY"):
        fetch(remote, tmp_path, QUICK)
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    with pytest.raises(UsageError, match="the proxy named in the environment cannot be used"):
        fetch(remote, tmp_path, QUICK)


def test_a_full_disk_names_the_file(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        fetch(remote, tmp_path, QUICK)
    assert caught.value.errno == errno.ENOSPC and "x.tgz.part" in caught.value.filename


def test_two_at_once_do_not_meet(remote: Remote, tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".x.tgz.lock", "fetching"),
        pytest.raises(UsageError, match=r"another process is fetching .*x.tgz: wait for it"),
    ):
        fetch(remote, tmp_path, QUICK)
    assert fetch(remote, tmp_path, QUICK).read_bytes() == CONTENT


def test_what_is_published_nowhere_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cars_train.tgz is published nowhere .* --from"):
        fetch(Remote("cars_train.tgz", md5=MD5), tmp_path)
