"""Stopping a `prepare` anywhere, and going on to the same store."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from power import Disk

from fastidmm import store
from fastidmm.datasets import Source
from fastidmm.datasets.folder import Folder
from fastidmm.errors import Interrupted, UsageError
from fastidmm.places import unsummed
from fastidmm.preparing import decode
from fastidmm.preparing import prepare as module
from fastidmm.preparing.making import Making, alone
from fastidmm.preparing.prepare import prepare

MakePhotos = Callable[..., Path]
KILL = Path(__file__).with_name("kill_prepare.py")


@pytest.fixture
def source(photos: MakePhotos, tmp_path: Path) -> Source:
    """Two classes: sixteen training and four test photographs, and one file that is none."""
    root = photos(tmp_path / "photos", per_class=10, side=6)
    (root / "class0" / "text.jpg").write_text("no photograph")
    return Folder().open(from_=root, seed=0)


def stored(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "stores").iterdir())


def contents(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder_of(name).iterdir()}


def counting(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[Path]:
    """Call `act` with the number of files decoded before each; the list of them all."""
    calls: list[Path] = []
    real = decode.decode

    def counted(path: Path, max_side: int, seat: decode.Seat) -> decode.Picture | str:
        act(len(calls))
        calls.append(path)
        return real(path, max_side, seat)

    monkeypatch.setattr(decode, "decode", counted)
    return calls


def nothing(_: int) -> None:
    pass


def test_killed_at_any_line_it_goes_on_to_the_same_bytes(photos: MakePhotos, home: Path) -> None:
    photos(Path("photos/train"), per_class=4, side=6)
    photos(Path("photos/test"), per_class=1, side=7)
    Path("photos/train/class0/text.jpg").write_text("no photograph")
    words: list[str | Path] = [sys.executable, KILL, "photos", "work", "97"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] > 30 and told["spared"] > 2 * told["killed"]
    assert "stores/mine/train-00001.safetensors" in told["files"]
    assert "stores/mine/test.safetensors" in told["files"]
    assert not [file for file in told["files"] if "/." in file]


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals have their usual effect, also where the tests run as a job that ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_again_goes_on(
    home: Path,
    source: Source,
    monkeypatch: pytest.MonkeyPatch,
    heeded: None,
    number: signal.Signals,
) -> None:
    prepare(source, "truth")

    def stop(num: int) -> None:
        if num == 7:
            signal.raise_signal(number)

    calls = counting(monkeypatch, stop)
    with pytest.raises(Interrupted, match=r"stopped after \d+ of 21 files: the same") as caught:
        prepare(source, "mine", workers=1)
    assert caught.value.status == 75 and store.prepared() == ["truth"]
    done = int(str(caught.value).split()[2])
    begun = len(calls)
    assert 0 < done <= begun < 21
    assert prepare(source, "mine", workers=3).fresh
    assert len(calls) - begun == 21 - done and stored(home) == ["mine", "truth"]
    mine, truth = contents("mine"), contents("truth")
    assert mine.keys() == truth.keys() == {
        "prepare.json", "store.json", "test.safetensors", "train.safetensors"
    }  # fmt: skip
    told = {
        name: unsummed(json.loads(files["store.json"]))
        for name, files in (("mine", mine), ("truth", truth))
    }
    assert told["mine"] == {**told["truth"], "name": "mine"}
    assert all(mine[name] == truth[name] for name in mine if name != "store.json")


class Stop(BaseException):
    """An end that nobody handles."""


def stopped(
    source: Source, monkeypatch: pytest.MonkeyPatch, after: int = 12, **options: Any
) -> Making:
    """What a `prepare` left that broke off."""

    def stop(num: int) -> None:
        if num == after:
            raise Stop

    with monkeypatch.context() as patch:
        counting(patch, stop)
        with pytest.raises(Stop):
            prepare(source, "mine", workers=1, **options)
    return Making(store.home() / "stores" / "mine")


@pytest.mark.parametrize("already", [False, True])
def test_breaking_off_leaves_what_was_there(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch, already: bool
) -> None:
    if already:
        prepare(source, "mine", max_side=5)
    before = contents("mine") if already else {}
    stopped(source, monkeypatch)
    assert stored(home) == [".mine.journal", ".mine.part", *(["mine"] if already else [])]
    assert (contents("mine") if already else {}) == before


@pytest.mark.parametrize("what", ["size", "file", "pillow", "shards"])
def test_what_was_begun_otherwise_is_not_gone_on_with(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    stopped(source, monkeypatch)
    options: dict[str, Any] = {"size": {"max_side": 6}, "shards": {"shard_bytes": 1000}}.get(
        what, {}
    )
    if what == "file":
        os.utime(source.root / source.test[-1].file, ns=(1, 1))
    if what == "pillow":
        monkeypatch.setattr(module, "pillow_version", "0.0")
    calls = counting(monkeypatch, nothing)
    prepare(source, "mine", **options)
    assert len(calls) == 21 and stored(home) == ["mine"]
    prepare(source, "truth", **options)
    name = "train-00000.safetensors" if what == "shards" else "train.safetensors"
    assert contents("mine")[name] == contents("truth")[name]


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "journal cut", "journal torn"])
def test_what_a_power_cut_took_is_decoded_again(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    prepare(source, "truth")
    making = stopped(source, monkeypatch)
    data, lines = making.part / "train-00000.safetensors", making.journal.read_bytes()
    pixels = data.read_bytes()
    if damage == "shorter":
        data.write_bytes(pixels[:-1])
    elif damage == "other":
        data.write_bytes(pixels[:-5] + bytes(5))
    elif damage == "gone":
        data.unlink()
    elif damage == "journal cut":
        making.journal.write_bytes(lines[:-3])
    else:
        making.journal.write_bytes(lines[:-40] + bytes(40))
    calls = counting(monkeypatch, nothing)
    prepare(source, "mine")
    noted = lines.count(b"\n") - 1
    assert noted > 4 and len(calls) == (21 if damage == "gone" else 21 - noted + 1)
    assert contents("mine")["train.safetensors"] == contents("truth")["train.safetensors"]


def test_a_damaged_end_does_not_stay_in_the_journal(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, "truth")
    making = stopped(source, monkeypatch, 10)
    data = making.part / "train-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-5] + bytes(5))
    stopped(source, monkeypatch, 5)
    noted = making.journal.read_bytes().count(b"\n") - 1
    calls = counting(monkeypatch, nothing)
    prepare(source, "mine")
    assert noted > 8 and len(calls) == 21 - noted
    assert contents("mine")["train.safetensors"] == contents("truth")["train.safetensors"]


def test_shards_begun_in_another_size_do_not_stay(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    making = stopped(source, monkeypatch, shard_bytes=200)
    assert (making.part / "train-00003.safetensors").exists()
    prepare(source, "mine", shard_bytes=1000)
    prepare(source, "truth", shard_bytes=1000)
    assert contents("mine").keys() == contents("truth").keys()


def test_what_is_marked_as_on_disk_is_not_read_again(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SYNC_BYTES", 300)
    making = stopped(source, monkeypatch)
    assert making.journal.read_bytes().count(b"\nnull\n") > 1
    data = making.part / "train-00000.safetensors"
    pixels = bytearray(data.read_bytes())
    pixels[1024] ^= 1  # as no power cut would: shows that the first picture is trusted
    data.write_bytes(pixels)
    prepare(source, "mine")
    assert contents("mine")["train.safetensors"][1024:1100] == bytes(pixels[1024:1100])


def test_what_follows_the_last_mark_is_read_again(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, "truth")
    monkeypatch.setattr(module, "SYNC_BYTES", 500)
    making = stopped(source, monkeypatch, 14)
    lines = making.journal.read_text().splitlines()[1:]
    last = len(lines) - 1 - lines[::-1].index("null")
    facts = [told for line in lines[:last] if isinstance(told := json.loads(line), list)]
    start = 1024 + sum(3 * high * wide for high, wide, *_ in facts)
    assert isinstance(json.loads(lines[last + 1]), list)
    data = making.part / "train-00000.safetensors"
    pixels = bytearray(data.read_bytes())
    pixels[start] ^= 1  # of the first picture that a power cut could have taken
    data.write_bytes(pixels)
    prepare(source, "mine")
    assert contents("mine")["train.safetensors"] == contents("truth")["train.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_marks_are_on_disk_as_soon_as_they_are_made(
    home: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut would cost more than it may."""
    monkeypatch.setattr(module, "SYNC_BYTES", 300)
    disk = Disk(home, monkeypatch)
    journal = stopped(source, monkeypatch).journal
    kept, written = disk.kept(journal), journal.read_bytes()
    assert isinstance(kept, bytes) and written.startswith(kept)
    assert kept.count(b"\nnull\n") == written.count(b"\nnull\n") > 1


def test_two_at_once_do_not_meet(home: Path, source: Source) -> None:
    (home / "stores").mkdir(parents=True)
    with (
        alone(home / "stores" / "mine"),
        pytest.raises(UsageError, match="being made by another process"),
    ):
        prepare(source, "mine")
    assert stored(home) == []
    prepare(source, "mine")


def test_a_lock_that_was_taken_away_meanwhile_is_not_held(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second process opens the lock, the first ends; a third takes a new one."""
    (home / "stores").mkdir(parents=True)
    path = home / "stores" / "mine"
    lock = Making(path).lock
    real = fcntl.flock
    third: list[int] = []

    def late(file: int, how: int) -> None:
        if not third:
            lock.unlink()  # the first process ends
            third.append(os.open(lock, os.O_RDWR | os.O_CREAT))
            real(third[0], how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="another process"), alone(path):
        pytest.fail("two hold the lock")
    os.close(third[0])
    with alone(path):
        assert lock.exists()
    assert not lock.exists()


def test_neither_time_needs_torch(home: Path, source: Source) -> None:
    code = (
        "import sys; from fastidmm import cli; sys.argv[0] = 'fastidmm'\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    words = ["prepare", "--dataset", "folder", "--from", str(source.root), "--name", "mine"]
    for last in ("", " (prepared before)"):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].endswith(last or "kB")
