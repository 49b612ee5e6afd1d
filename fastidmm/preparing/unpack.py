"""Unpack archives that nobody has looked into: files and folders below one folder, or nothing."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from fastidmm.errors import DataError
from fastidmm.preparing.files import BLOCK, locked, naming, put_in_place, write_whole

MARKER = ".unpacked.json"
COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"BZh": bz2.open,
}
ZIPS = (b"PK\x03\x04", b"PK\x05\x06")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


@dataclass(frozen=True, slots=True)
class Limits:
    """What all archives of a dataset together may unpack to."""

    num_entries: int = 100_000
    num_bytes: int = 20_000_000_000
    member_bytes: int = 1_000_000_000
    depth: int = 16  # folders inside folders
    name_bytes: int = 1000


@dataclass(slots=True)
class _Target:
    """The folder that is filled, and what has gone into it."""

    folder: Path
    limits: Limits
    archive: Path = Path()
    num_entries: int = 0
    num_bytes: int = 0
    folders: set[PurePosixPath] = field(default_factory=set)

    def refuse(self, member: str, why: str) -> DataError:
        """The error about one member, its name as it can be printed."""
        return DataError(
            f"{self.archive} holds {member[:200]!r}, {why}; nothing of it was kept: get the "
            "archive again from where it is published."
        )

    def entry(self, name: str, size: int) -> PurePosixPath:
        """Where a member may go; an error where it may not, or is one too many."""
        self.num_entries += 1
        limits = self.limits
        if self.num_entries > limits.num_entries:
            raise self.refuse(name, f"which is one more than {limits.num_entries:,} entries")
        if not 0 <= size <= limits.member_bytes:
            raise self.refuse(name, f"of more than {limits.member_bytes:,} bytes")
        if self.num_bytes + size > limits.num_bytes:
            raise self.refuse(name, f"which makes more than {limits.num_bytes:,} bytes")
        if not name or "\0" in name or "\\" in name:
            raise self.refuse(name, "which is no name for a file")
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise self.refuse(name, "which lies outside the folder")
        if len(path.parts) > limits.depth or len(os.fsencode(name)) > limits.name_bytes:
            raise self.refuse(name, "whose name is too long or too deep")
        return path

    def make_folder(self, path: PurePosixPath, name: str) -> None:
        """Make a folder and those it is in, one by one, unless they were made before."""
        for step in (*reversed(path.parents), path):
            if step in self.folders or step == PurePosixPath("."):
                continue
            with self.collisions(name):
                (self.folder / step).mkdir()
            self.folders.add(step)

    def write(self, path: PurePosixPath, name: str, content: IO[bytes]) -> Path:
        """Write a file that is not there yet, as far as the limits go."""
        self.make_folder(path.parent, name)
        target, written = self.folder / path, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with self.collisions(name), naming(target):
            handle = os.open(target, flags, 0o644)
        with os.fdopen(handle, "wb") as file, naming(target):
            while block := content.read(BLOCK):
                written += len(block)
                self.num_bytes += len(block)
                if written > self.limits.member_bytes or self.num_bytes > self.limits.num_bytes:
                    raise self.refuse(name, "which unpacks to more than it may")
                file.write(block)
        return target

    @contextmanager
    def collisions(self, name: str) -> Iterator[None]:
        """Names that are there already, or that the file system cannot have."""
        try:
            yield
        except FileExistsError:
            raise self.refuse(name, "which it holds already under this name") from None
        except (NotADirectoryError, ValueError):
            raise self.refuse(name, "which is no name for a file") from None
        except OSError as problem:
            if problem.errno != errno.ENAMETOOLONG:
                raise
            raise self.refuse(name, "whose name is too long or too deep") from None


class _Metered(io.RawIOBase):
    """What tar may see of a stream: forward only, and never much of it in memory at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.position, self.last = stream, 0, b""

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Forward; anything else is an error."""
        return True

    def tell(self) -> int:
        """Bytes read."""
        return self.position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, which must not be more than a block."""
        if not 0 <= size <= BLOCK:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.last = self.stream.read(size)
        self.position += len(self.last)
        return self.last

    def seek(self, position: int, whence: int = 0) -> int:
        """Read on as far as `position`."""
        if whence or position < self.position:
            raise tarfile.ReadError("entries that overlap")
        while self.position < position and self.read(min(position - self.position, BLOCK)):
            pass
        return self.position


def unpack(archives: Mapping[Path, str], into: Path, limits: Limits | None = None) -> Path:
    """Unpack archives, given with their SHA-256, into the folder `into`, unless that was done.

    `into` appears whole or not at all. Only files and folders are taken; a link, a device, a name
    outside the folder or twice, or more than `limits` is a DataError, as is damage.
    """
    marker = {path.name: digest for path, digest in archives.items()}
    if unpacked(into) == marker:
        return into
    part, old = (into.with_name(f".{into.name}.{state}") for state in ("part", "old"))
    with locked(into.with_name(f".{into.name}.lock"), f"unpacking into {into}"):
        for left_over in (part, old):
            _remove(left_over)
        part.mkdir(parents=True)
        try:
            target = _Target(part, limits or Limits())
            for archive in archives:
                target.archive = archive
                with _damage(archive):
                    _unpack(archive, target)
            write_whole(part / MARKER, json.dumps(marker, indent=1) + "\n")
            os.sync()  # The name must not outlive the contents.
            if into.exists():
                into.rename(old)
            put_in_place(part, into)
        finally:
            for left_over in (part, old):
                _remove(left_over)
    return into


def unpacked(into: Path) -> dict[str, str]:
    """What was unpacked into a folder, by name with its SHA-256; empty where nothing was."""
    try:
        found: dict[str, str] = json.loads((into / MARKER).read_text())
    except (OSError, ValueError):
        return {}
    return found


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    """Turn what the readers of archives raise into one sentence."""
    try:
        yield
    except DataError:
        raise
    except (*DAMAGED, OSError, RuntimeError, NotImplementedError, ValueError) as problem:
        # Readers raise OSError for damage too, but only the system numbers its own.
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        raise DataError(
            f"{archive} is damaged, or no archive ({problem or 'it ends too early'}); nothing of "
            "it was kept: get it again from where it is published."
        ) from None


def _unpack(archive: Path, target: _Target) -> None:
    with archive.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        if start.startswith(ZIPS):
            return _unpack_zip(file, target)
        for magic, opener in COMPRESSED.items():
            if start.startswith(magic):
                with opener(file) as stream:
                    return _unpack_tar(stream, target)
        return _unpack_tar(file, target)


def _unpack_tar(stream: IO[bytes], target: _Target) -> None:
    metered = _Metered(stream)
    with tarfile.open(fileobj=cast(IO[bytes], metered), mode="r:") as tar:
        for member in tar:
            size = member.size if member.isreg() else 0
            path = target.entry(member.name, size)
            if member.isdir():
                target.make_folder(path, member.name)
                continue
            if not member.isreg() or member.issparse():
                raise target.refuse(member.name, "which is neither a plain file nor a folder")
            content = tar.extractfile(member)
            assert content is not None  # of a regular file
            written = target.write(path, member.name, content)
            seconds = min(max(member.mtime, 0), 2**31)
            os.utime(written, (seconds, seconds))
            # Headers are kept there, with a megabyte of names each where somebody likes.
            tar.members.clear()  # type: ignore[attr-defined]
        # The reader takes a broken header for the end, which is a block of zeros or nothing.
        if metered.last.strip(b"\0"):
            raise tarfile.ReadError("a broken header")


def _unpack_zip(file: IO[bytes], target: _Target) -> None:
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            # The reader itself cuts names at a NUL, and would so hide what they are.
            name = member.orig_filename
            path = target.entry(name, member.file_size)
            mode = stat.S_IFMT(member.external_attr >> 16)
            if mode not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
                raise target.refuse(name, "which is encrypted, or neither a plain file nor folder")
            if member.is_dir():
                target.make_folder(path, name)
                continue
            with opened.open(member) as content:
                written = target.write(path, name, content)
            # A zip's times have no zone; what matters is that other contents have another time.
            os.utime(written, (member.CRC, member.CRC))
