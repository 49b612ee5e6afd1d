"""Make a store of a dataset: list, decode once, write, put in place."""

import errno
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastidmm.datasets import Item, Source, Unusable
from fastidmm.decode import Picture, decode_all
from fastidmm.errors import DataError, FastidmmError, UsageError
from fastidmm.pack import Packed, pack
from fastidmm.places import READER_VERSION, check_name, home, read_json
from fastidmm.summary import Summary, shown

Described = dict[str, Any]


@dataclass(slots=True)
class _Tally:
    """What became of the files that were not simply decoded."""

    unusable: list[Unusable]
    converted: Counter[str] = field(default_factory=Counter)
    animated: list[str] = field(default_factory=list)

    def usable(
        self, items: Iterable[Item], pictures: Iterator[Picture | str]
    ) -> Iterator[tuple[Item, Picture]]:
        """The items that could be decoded, each with its picture; the others are noted."""
        for item, picture in zip(items, pictures, strict=False):
            if isinstance(picture, str):
                self.unusable.append(Unusable(item.file, picture))
                continue
            self.converted.update(picture.conversions)
            if "animated" in picture.conversions:
                self.animated.append(item.file)
            yield item, picture


def prepare(
    source: Source,
    name: str,
    *,
    max_side: int = 1024,
    workers: int | None = None,
    quiet: bool = False,
) -> Summary:
    """Decode a source into the store `name`, unless that is what it holds, and make it current.

    `max_side` limits the long side in pixels (0: no limit); `workers` is the number of decoding
    threads (None: one per core).
    """
    folder = home() / "stores" / check_name(name, "dataset")
    if max_side < 0:
        raise UsageError(f"max_side {max_side} is less than 0: give pixels, or 0 for no limit.")
    signature = _signature(source, max_side)
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        described = _found(folder, signature)
        fresh = described is None
        if described is None or any(path.exists() for path in _dot_folders(folder)):
            with _part(folder) as part:
                if described is None:
                    described = _decoded(part, source, name, max_side, workers, quiet)
                    described["source_signature"] = signature
                    _write(part / "store.json", json.dumps(described, indent=1))
                    _put_in_place(part, folder)
                else:
                    shutil.rmtree(part)
        _make_current(name)
    return Summary.of(described, folder, fresh)


def _signature(source: Source, max_side: int) -> str:
    """What a store depends on, hashed: the files as they stand, and how they are read."""
    told = (source.description, source.class_names, source.split_seed, source.notes)
    left_out = [asdict(file) for file in source.unusable]
    root = str(source.root.resolve())
    digest = sha256(json.dumps([READER_VERSION, max_side, root, told, left_out]).encode())
    for split in (source.train, source.test):
        digest.update(b"\n")
        for item in split:
            digest.update(json.dumps([item.file, item.label, *_stamp(root, item)]).encode())
    return digest.hexdigest()


def _stamp(root: str, item: Item) -> tuple[int, ...]:
    try:
        found = os.stat(os.path.join(root, item.file))
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


def _found(folder: Path, signature: str) -> Described | None:
    """The description of a store that is whole and of this signature, if there is one."""
    try:
        described = read_json(folder)
        for split, kept in described["splits"].items():
            if (folder / f"{split}.safetensors").stat().st_size != kept["num_bytes"]:
                return None
    except (DataError, OSError):
        return None
    return described if described["source_signature"] == signature else None


def _decoded(
    part: Path, source: Source, name: str, max_side: int, workers: int | None, quiet: bool
) -> Described:
    """Decode and write every split; returns what `store.json` says of them."""
    tally = _Tally(list(source.unusable))
    splits = {"train": source.train, "test": source.test}
    paths = [source.root / item.file for items in splits.values() for item in items]
    packed = {}
    with closing(decode_all(paths, max_side=max_side, workers=workers)) as pictures:
        watched = _watched(pictures, len(paths), name, quiet)
        for split, items in splits.items():
            # Exhausting the train items leaves the pictures at the first test item.
            written = pack(part / f"{split}.safetensors", tally.usable(items, watched))
            if written.files:
                packed[split] = written
            else:
                (part / f"{split}.safetensors").unlink()
    _check_enough(packed.get("train", Packed()), source, tally.unusable)
    return {
        "reader_version": READER_VERSION,
        "name": name,
        "class_names": source.class_names,
        "splits": {split: _told(written) for split, written in packed.items()},
        "source": {"description": source.description, "path": str(source.root.resolve())},
        "max_side": max_side,
        "split_seed": source.split_seed,
        "unusable": [asdict(file) for file in tally.unusable],
        "converted": dict(sorted(tally.converted.items())),
        "animated": tally.animated,
        "notes": [*source.notes, *_classes_lost(source, packed["train"])],
    }


def _watched(
    pictures: Iterator[Picture | str], total: int, name: str, quiet: bool
) -> Iterator[Picture | str]:
    """The same pictures, with a progress bar where a person is looking."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return pictures
    text = f"Decoding {name}"
    return iter(track(pictures, text, total=total, console=console, transient=True))


def _check_enough(train: Packed, source: Source, unusable: list[Unusable]) -> None:
    """One image cannot be told from others, and none cannot be learned from."""
    if len(train.files) >= 2:
        return
    count = "only one" if train.files else "no"
    hint = f"; unusable: {shown(unusable)}" if unusable else ""
    raise DataError(
        f"{source.root} has {count} usable training image, and training needs at least "
        f"2 images{hint}."
    )


def _classes_lost(source: Source, train: Packed) -> list[str]:
    lost = sorted(set(range(len(source.class_names))) - set(train.labels))
    names = ", ".join(source.class_names[label] for label in lost)
    return [f"no usable training image in: {names}"] if lost else []


def _told(packed: Packed) -> Described:
    return {
        "num_images": len(packed.files),
        "num_bytes": packed.num_bytes,
        "fingerprint": packed.fingerprint(),
        "files": packed.files,
    }


def _dot_folders(folder: Path) -> tuple[Path, Path]:
    """What stands beside `folder` for as long as it is made, or after a process was killed."""
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


@contextmanager
def _part(folder: Path) -> Iterator[Path]:
    """A dot folder beside `folder` for this process alone, removed if anything goes wrong."""
    part, old = _dot_folders(folder)
    part.mkdir(exist_ok=True)
    with (part / "lock").open("w") as lock:
        _lock(lock.fileno(), folder.name)
        shutil.rmtree(old, ignore_errors=True)
        for left_over in part.iterdir():
            if left_over.name != "lock":
                left_over.unlink()
        try:
            yield part
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _lock(file: int, name: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{name!r} is being prepared by another process: wait for it.") from None
    except OSError:
        pass  # Some network file systems have no locks.


def _put_in_place(part: Path, folder: Path) -> None:
    """Give a finished store its name, instead of whatever had it."""
    _, old = _dot_folders(folder)
    (part / "lock").unlink()
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_current(name: str) -> None:
    marker = home() / f".current.{os.getpid()}"
    _write(marker, name)
    marker.replace(home() / "current")


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """See a folder's list of names onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write `folder` into one sentence with the remedy."""
    try:
        yield
    except OSError as problem:
        raise _refusal(problem, folder) from None


def _refusal(problem: OSError, folder: Path) -> FastidmmError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(
            f"no space left for {folder}: free some, lower max_side, or set FASTIDMM_HOME "
            "to a folder on a larger disk."
        )
    return UsageError(
        f"{folder} cannot be written ({problem.strerror or problem}): set FASTIDMM_HOME to a "
        "folder that can."
    )
