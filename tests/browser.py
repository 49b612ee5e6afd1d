"""A headless Chromium, where there is one: what it makes of a page, says and asks for."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser on the PATH: one of {', '.join(NAMES)}"
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A page as the browser has it."""

    dom: str
    console: list[str]  # errors, warnings, refusals
    asked: set[str]  # addresses that the page itself asked for


def open_page(url: str, folder: Path, *, width: int = 1280) -> Seen:
    """Open an address; the browser's profile and its log of the net go to `folder`."""
    assert BROWSER
    folder.mkdir()
    log = folder / "net.json"
    words = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--window-size={width},900",
        f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom", url,
    ]  # fmt: skip
    environ = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=120, env=environ
    )
    told = json.loads(log.read_text())
    kinds = {number: name for name, number in told["constants"]["logEventTypes"].items()}
    asked = set()
    for event in told["events"]:
        given = event.get("params", {})
        # What the browser wants for itself has no origin.
        own = given.get("initiator") == "not an origin"
        if kinds[event["type"]] == "URL_REQUEST_START_JOB" and "url" in given and not own:
            asked.add(given["url"])
    return Seen(done.stdout, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr), asked)
