"""Unpacking: what archives hold, whole or not at all, whoever made them."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastidmm.errors import DataError, UsageError
from fastidmm.preparing import unpack as module
from fastidmm.preparing.files import locked
from fastidmm.preparing.unpack import Limits, unpack, unpacked

GOOD = {"a/1.jpg": b"one", "a/b/2.jpg": b"two" * 1000, "readme": b"", "a/ü 花.txt": b"x"}


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in {"mtime": 1234567890, **fields}.items():
        setattr(info, field, value)
    return info


def tar_of(*entries: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in entries:
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content.ljust(info.size, b"\0")))
    return file.getvalue()


def plain_tar(files: dict[str, bytes] = GOOD) -> bytes:
    return tar_of(*((member(name), content) for name, content in files.items()))


def zip_of(
    *entries: tuple[str, bytes], mode: int = stat.S_IFREG | 0o644, kind: int = zipfile.ZIP_DEFLATED
) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.filename = name  # as it is: the constructor mends some
            info.external_attr = mode << 16
            opened.writestr(info, content, kind)
    return file.getvalue()


def stored(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != module.MARKER
    }


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "made",
    [
        plain_tar,
        lambda: gzip.compress(plain_tar(), mtime=0),
        lambda: bz2.compress(plain_tar()),
        lambda: lzma.compress(plain_tar()),
        lambda: zip_of(*GOOD.items()),
    ],
    ids=["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"],
)
def test_every_kind_is_unpacked_once(tmp_path: Path, made: Callable[[], bytes]) -> None:
    archive, into = tmp_path / "archive", tmp_path / "into"
    archive.write_bytes(made())
    unpack({archive: "1" * 64}, into)
    assert stored(into) == GOOD and unpacked(into) == {"archive": "1" * 64}
    times = {path: path.stat().st_mtime_ns for path in into.rglob("*.jpg")}
    (into / "readme").write_text("kept")
    archive.unlink()
    unpack({archive: "1" * 64}, into)
    assert (into / "readme").read_text() == "kept"
    archive.write_bytes(made())
    unpack({archive: "2" * 64}, into)
    assert stored(into) == GOOD
    # Times are the archive's, so that a store of the files stays current.
    assert times == {path: path.stat().st_mtime_ns for path in into.rglob("*.jpg")}
    assert everything(tmp_path) == {"archive", "into", ".into.lock"} | {
        f"into/{name}" for name in (module.MARKER, "a", "a/b", *GOOD)
    }


def test_several_archives_go_into_one_folder(tmp_path: Path) -> None:
    for name, files in (("x.tar", {"a/1": b"1", "b/2": b"2"}), ("y.tar", {"a/3": b"3"})):
        (tmp_path / name).write_bytes(plain_tar(files))
    archives = {tmp_path / "x.tar": "x", tmp_path / "y.tar": "y"}
    assert stored(unpack(archives, tmp_path / "into")) == {"a/1": b"1", "b/2": b"2", "a/3": b"3"}


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
BIG = Limits(num_bytes=10_000, member_bytes=5_000, num_entries=3)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "parent": lambda: plain_tar({"../escaped": b"x"}),
    "parent inside": lambda: plain_tar({"a/../../escaped": b"x"}),
    "absolute": lambda: plain_tar({"/tmp/fastidmm_escaped": b"x"}),
    "backslash": lambda: plain_tar({"..\\escaped": b"x"}),
    "symbolic link": lambda: tar_of((member("link", **LINK), b"")),
    "link and through it": lambda: tar_of(
        (member("link", type=tarfile.SYMTYPE, linkname=".."), b""), (member("link/escaped"), b"x")
    ),
    "hard link": lambda: tar_of((member("link", type=tarfile.LNKTYPE, linkname="../a"), b"")),
    "device": lambda: tar_of((member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), b"")),
    "pipe": lambda: tar_of((member("pipe", type=tarfile.FIFOTYPE), b"")),
    "twice": lambda: tar_of((member("a"), b"1"), (member("./a"), b"2")),
    "file then folder": lambda: tar_of((member("a"), b"1"), (member("a/b"), b"2")),
    "folder then file": lambda: tar_of((member("a/b"), b"1"), (member("a"), b"2")),
    "the folder itself": lambda: tar_of((member("."), b"1")),
    "too large a member": lambda: gzip.compress(plain_tar({"a": bytes(5_001)})),
    "too much together": lambda: gzip.compress(
        plain_tar({"a": bytes(4_999), "b": bytes(4_999), "c": bytes(4_999)})
    ),
    "too many": lambda: plain_tar({str(number): b"" for number in range(4)}),
    "too deep": lambda: plain_tar({"a/" * 20 + "b": b""}),
    "too long": lambda: plain_tar({"a" * 300: b""}),
    "a header that fills memory": lambda: tar_of((member("a" * (2 << 20)), b"")),
    "a negative size": lambda: _negative(plain_tar({"a": b"x"})),
    "sparse": lambda: tar_of((member("a", type=tarfile.GNUTYPE_SPARSE, size=512), b"")),
    "zip parent": lambda: zip_of(("../escaped", b"x")),
    "zip absolute": lambda: zip_of(("/tmp/fastidmm_escaped", b"x")),
    "zip NUL": lambda: zip_of(("a_b", b"x")).replace(b"a_b", b"a\0b"),
    "zip link": lambda: zip_of(("link", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777),
    "zip twice": lambda: zip_of(("a", b"x"), ("./a", b"y")),
    "zip bomb": lambda: zip_of(("a", bytes(5_001))),
    "zip that lies about sizes": lambda: zip_of(("a", bytes(9_000))).replace(
        (9_000).to_bytes(4, "little"), (90).to_bytes(4, "little")
    ),
    "zip encrypted": lambda: zip_of(("a", b"x")).replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"
    ),
}

REASONS = {  # every other is of a wrong type
    "lies outside": ("parent", "parent inside", "absolute", "zip parent", "zip absolute"),
    "no name for a file": ("backslash", "zip NUL"),
    "holds already": ("twice", "file then folder", "folder then file", "the folder itself"),
    "under this name": ("zip twice",),
    "of more than 5,000 bytes": ("too large a member", "zip bomb", "a negative size"),
    "more than 10,000 bytes": ("too much together",),
    "more than 3 entries": ("too many",),
    "too long or too deep": ("too long", "too deep"),
    "a header of 2,0": ("a header that fills memory",),
    "Bad CRC-32": ("zip that lies about sizes",),
}


def _negative(tar: bytes) -> bytes:
    """The first header with a size of -1024 and a checksum that fits."""
    header = bytearray(tar[:512])
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + tar[512:]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_leave_nothing(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "inner" / "bad.tgz"
    archive.parent.mkdir()
    archive.write_bytes(HOSTILE[kind]())
    with pytest.raises(DataError, match=r"get .* again from where it is published") as caught:
        unpack({archive: ""}, tmp_path / "inner" / "into", BIG)
    told = str(caught.value)
    assert str(archive) in told and "\0" not in told
    reason = next((why for why, kinds in REASONS.items() if kind in kinds), "neither a plain file")
    assert reason in told
    assert everything(tmp_path) == {"inner", "inner/bad.tgz", "inner/.into.lock"}
    assert not Path("/tmp/fastidmm_escaped").exists()


def _damaged() -> dict[str, bytes]:
    tar, several = gzip.compress(plain_tar(), mtime=0), plain_tar({"a": b"1", "b": b"2"})
    return {
        "cut": tar[: len(tar) // 2],
        "no archive": b"<html>please log in</html>",
        "empty": b"",
        "bits turned": tar[:40] + bytes(20) + tar[60:],
        "second header": several[:1024] + b"\1" * 512 + several[1536:],
        "zip cut": zip_of(*GOOD.items())[:-30],
        "zip bits turned": zip_of(("a", b"123456789"), kind=zipfile.ZIP_STORED).replace(
            b"1234", b"1235"
        ),
        "xz cut": lzma.compress(plain_tar())[:-50],
        "bz2 cut": bz2.compress(plain_tar())[:-50],
    }


@pytest.mark.parametrize("kind", _damaged())
def test_damage_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "bad.tgz"
    content = _damaged()[kind]
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"bad.tgz is damaged, or no archive .*: get it again"):
        unpack({archive: ""}, tmp_path / "into")
    assert everything(tmp_path) == {"bad.tgz", ".into.lock"}


class Stop(BaseException):
    """An interruption."""


@pytest.mark.parametrize("after", range(6))
def test_an_interruption_at_any_moment_is_made_good(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed outright, too: then even the cleaning up does not happen."""
    archive = tmp_path / "archive"
    archive.write_bytes(plain_tar())
    calls = iter(range(after))

    def dying(*_: object) -> None:
        if next(calls, None) is None:
            raise Stop

    with monkeypatch.context() as patch:
        for place, name in ((os, "utime"), (os, "sync"), (module, "put_in_place")):
            patch.setattr(place, name, dying)
        patch.setattr(module, "_remove", lambda *_: None)
        with pytest.raises(Stop):
            unpack({archive: "1"}, tmp_path / "into")
    assert not (tmp_path / "into").exists() and (tmp_path / ".into.part").exists()
    assert stored(unpack({archive: "1"}, tmp_path / "into")) == GOOD
    assert not (tmp_path / ".into.part").exists()


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(plain_tar())
    with (
        locked(tmp_path / ".into.lock", "unpacking"),
        pytest.raises(UsageError, match=r"another process is unpacking into .*wait"),
    ):
        unpack({tmp_path / "archive": "1"}, tmp_path / "into")
