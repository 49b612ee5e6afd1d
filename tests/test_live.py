"""`report --watch`: one page for this machine's browsers, by real requests, and nothing else."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import needs_browser, open_page
from test_report import home as home
from test_report import run as run

from fastidmm.errors import UsageError
from fastidmm.interrupt import Stop
from fastidmm.record import METRICS, Record
from fastidmm.reporting.live import HEADERS, RENEW, Server, _Handler, watch
from fastidmm.reporting.report import Page


@pytest.fixture(scope="module")
def copy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(run, tmp_path_factory.mktemp("live") / "copy"))


@pytest.fixture(scope="module")
def url(copy: Path) -> Iterator[str]:
    """Where the page is, served by a thread until the last test is done."""
    stop, told, heard = Stop(), [], threading.Event()

    def tell(address: str) -> None:
        told.append(address)
        heard.set()

    thread = threading.Thread(target=watch, args=(copy, stop, tell))
    thread.start()
    assert heard.wait(60)
    yield told[0]
    stop.requested = True
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        asked(told[0])


def asked(
    url: str, path: str | None = None, *, host: str | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of what a request is answered."""
    parts = urlsplit(url)
    to = http.client.HTTPConnection(parts.netloc, timeout=30)
    to.putrequest(method, path or parts.path, skip_host=True)
    if host != "":
        to.putheader("Host", host or parts.netloc)
    to.endheaders()
    answer = to.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read().decode()
    to.close()
    return found


def test_the_page_is_served_and_renews_itself(url: str, copy: Path) -> None:
    status, headers, page = asked(url)
    assert status == 200 and HEADERS.items() <= headers.items()
    assert f'<meta http-equiv="refresh" content="{RENEW}">' in page
    assert "Content-Security-Policy" in page and "Worst fitted" in page
    port = urlsplit(url).port
    assert asked(url, host=f"localhost:{port}")[0] == 200
    assert (
        not (copy / "report.html").exists() or "refresh" not in (copy / "report.html").read_text()
    )


def test_only_this_machine_can_ask(url: str) -> None:
    parts = urlsplit(url)
    assert parts.hostname == "127.0.0.1" and parts.port
    with socket.socket() as other:  # another address of this machine is another machine's way in
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", parts.port)) != 0


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:PORT",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost",
        "",
        "[::1]:PORT",
    ],
)
def test_another_host_is_refused(url: str, host: str) -> None:
    """A name of others' that leads here is how a page from elsewhere would read this one."""
    status, _, body = asked(url, host=host.replace("PORT", str(urlsplit(url).port)))
    assert status == 403 and "<h1>Pretraining" not in body and len(body) < 1000


def test_another_path_is_not_there(url: str) -> None:
    own = urlsplit(url).path
    assert re.fullmatch(r"/[\w-]{22}", own)
    for path in ("/", "/report.html", own + "/", own + "x", own + "?x", own[:-1], "/../recipe.toml",
                 own + "/../../etc/passwd", "/recipe.toml", "/%2e%2e/recipe.toml"):  # fmt: skip
        status, _, body = asked(url, path)
        assert status == 404 and len(body) < 1000


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_there_is_nothing_but_get(url: str, method: str) -> None:
    assert asked(url, method=method)[0] == 501


def test_two_servers_have_two_addresses(
    url: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Page, "text", lambda self, *, renew: "short")
    with Server(copy) as other:
        assert other.server_port != urlsplit(url).port
        assert other.path != urlsplit(url).path and not other.url.endswith("/")


def test_it_is_made_again_when_the_run_tells_more(url: str, copy: Path) -> None:
    before = asked(url)[2]
    assert asked(url)[2] == before
    path = copy / METRICS
    lines, last = path.read_text(), Record(copy).result
    aside = last.with_name("aside")
    try:
        path.write_text(lines.splitlines(keepends=True)[0])
        last.rename(aside)
        after = asked(url)[2]
        assert "epoch 1 of 2 (not finished)" in after
        assert "epoch 1 of 2 (not finished)" not in before
        aside.rename(last)
        assert "(not finished)" not in asked(url)[2]  # by its checkpoint alone
        last.rename(aside)
        assert asked(url)[2] == after
        # What is half-way to another state leaves the page as it was.
        recipe = (copy / "recipe.toml").read_text()
        (copy / "recipe.toml").write_text("[run")
        path.write_text(lines)
        aside.rename(last)
        assert asked(url)[2] == after
        (copy / "recipe.toml").write_text(recipe)
        assert asked(url)[2] == before
    finally:
        path.write_text(lines)
        if aside.exists():
            aside.rename(last)


def test_who_connects_and_says_nothing_is_in_nobodys_way(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Handler, "timeout", 300.0)  # not until it is sent away
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)):
        assert asked(url)[0] == 200


def test_what_cannot_be_shown_is_said_before_anything_is_served(run: Path) -> None:
    with pytest.raises(UsageError, match="fastidmm report --run"):
        Server(run / "finetune-16")


@needs_browser
def test_a_browser_reads_it_live_and_asks_for_nothing_else(url: str, tmp_path: Path) -> None:
    seen = open_page(url, tmp_path / "browser")
    assert seen.console == [] and "Worst fitted" in seen.dom
    # A browser asks every site for an icon, and the page is not asked which.
    icon = url.replace(urlsplit(url).path, "/favicon.ico")
    assert {each for each in seen.asked if not each.startswith("data:")} <= {url, icon}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_well(copy: Path, number: signal.Signals) -> None:
    """Nothing is left undone, so that the status is 0."""
    # A shell may have it ignored.
    code = (
        "import signal, sys; signal.signal(int(sys.argv.pop(1)), signal.SIG_DFL); "
        "from fastidmm.__main__ import main; main()"
    )
    words = [sys.executable, "-c", code, str(int(number)), "report", str(copy), "--watch"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as process:
        assert process.stdout and process.stderr
        address = process.stdout.readline().strip()
        assert asked(address)[0] == 200
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr.read().splitlines() == [
            "looking at 20 training images for the report",
            "until Ctrl-C, for this machine's browsers:",
        ]
