"""Make a store of a dataset: list, decode once, write, put in place."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import __version__ as pillow_version

from fastidmm.datasets import Item, Source, Unusable
from fastidmm.errors import FULL, DataError, FastidmmError, Interrupted, UsageError
from fastidmm.interrupt import Stop, stoppable
from fastidmm.places import READER_VERSION, check_name, home, read_json, split_files, summed
from fastidmm.preparing import beton as beton_file
from fastidmm.preparing.checks import check
from fastidmm.preparing.decode import Facts, Picture, Pictures, decode_all
from fastidmm.preparing.files import sync, write_whole
from fastidmm.preparing.journal import Journal
from fastidmm.preparing.making import Making, alone
from fastidmm.preparing.pack import Packed, Packer, fingerprint_of
from fastidmm.preparing.sources import check_source
from fastidmm.preparing.summary import Summary, counted, shown
from fastidmm.preparing.watching import watching

Described = dict[str, Any]

MAX_SIDE = 1024  # px of a picture's long side
SHARD_BYTES = 64_000_000_000  # pixels in one file of a store
SYNC_BYTES = 1 << 28  # pixels that may have to be read again after a kill


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be made of what."""

    source: Source
    name: str
    max_side: int
    shard_bytes: int
    workers: int | None
    quiet: bool

    def signature(self) -> str:
        """What a store depends on, hashed: the files as they stand, and how they are read."""
        source = self.source
        told = (source.description, source.class_names, source.split_seed, source.notes)
        left_out = [asdict(file) for file in source.unusable]
        root = str(source.root.resolve())
        how = [READER_VERSION, self.max_side, self.shard_bytes, root, told, left_out]
        digest = sha256(json.dumps(how).encode())
        for split in (source.train, source.test):
            digest.update(b"\n")
            for item in split:
                digest.update(json.dumps([item.file, item.label, *_stamp(root, item)]).encode())
        return digest.hexdigest()


@dataclass(slots=True)
class _Tally:
    """What became of the files that were not simply decoded."""

    unusable: list[Unusable]
    converted: Counter[str] = field(default_factory=Counter)
    animated: list[str] = field(default_factory=list)

    def note(self, item: Item, outcome: Facts | str) -> None:
        """Take in one file's outcome."""
        if isinstance(outcome, str):
            self.unusable.append(Unusable(item.file, outcome))
            return
        self.converted.update(outcome.conversions)
        if "animated" in outcome.conversions:
            self.animated.append(item.file)


def prepare(
    source: Source,
    name: str,
    *,
    max_side: int = MAX_SIDE,
    shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    quiet: bool = False,
    beton: bool = False,
) -> Summary:
    """Decode a source into the store `name`, unless that is what it holds, and make it current.

    `max_side` limits the long side in pixels (0: no limit), `shard_bytes` the pixels in one file
    (0: no limit); `workers` is the number of decoding threads (None: one per core); `beton` asks
    for FFCV's file as well. Whatever stops it, doing the same again goes on behind the last
    picture that was written, to the same bytes. What was made of other photographs is not replaced.
    """
    folder = home() / "stores" / check_name(name, "dataset")
    if max_side < 0:
        raise UsageError(f"max_side {max_side} is less than 0: give pixels, or 0 for no limit.")
    check_source(source, name)
    wanted = _Wanted(source, name, max_side, shard_bytes, workers, quiet)
    signature = wanted.signature()
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder) as making:
            before = _before(folder)
            _check_same(before.get("source", {}), source, folder)
            found = _found(folder, signature)
            if beton and not (found and (folder / beton_file.NAME).exists()):
                beton_file.load()  # or say what it needs, before the work of decoding
            told = found or _made(making, wanted, signature)
            making.clear()
            if beton:
                beton_file.write(folder, quiet=quiet)
        write_whole(home() / "current", name)
    changed = bool(before) and _learnt(before) != _learnt(told[0])
    return Summary.of(*told, folder, fresh=found is None, changed=changed)


def _before(folder: Path) -> Described:
    """What the store that has the name already says of itself; empty where it cannot be read."""
    try:
        return read_json(folder)
    except DataError:
        return {}


def _learnt(described: Described) -> str:
    """What runs know their training images by."""
    return str(described["splits"]["train"]["fingerprint"])


def _check_same(made_of: Described, source: Source, folder: Path) -> None:
    """Refuse to put a dataset in the place of one made of other photographs."""
    description, path = made_of.get("description", ""), made_of.get("path", "")
    # A published dataset is the same wherever it lies.
    known = not source.own and description.startswith(source.description)
    if made_of and not known and path != str(source.root.resolve()):
        raise UsageError(
            f"{folder.name!r} is prepared already, of other photographs ({description}, {path}): "
            f"give these another --name, or remove {folder} first to replace them."
        )


def _stamp(root: str, item: Item) -> tuple[int, ...]:
    try:
        found = os.stat(os.path.join(root, item.file))
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


def _found(folder: Path, signature: str) -> tuple[Described, Described] | None:
    """What a store and its checks say, if it is whole and of this signature."""
    try:
        described = read_json(folder)
        for split, told in described["splits"].items():
            for file, shard in split_files(split, told).items():
                if (folder / file).stat().st_size != shard["num_bytes"]:
                    return None
            if fingerprint_of(folder, split, told) != told["fingerprint"]:
                return None
        checks = json.loads((folder / "prepare.json").read_text())
        Summary.of(described, checks, folder, fresh=False, changed=False).lines()
    except (DataError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # it is damaged somewhere, and cannot be told of
    return (described, checks) if described["source_signature"] == signature else None


def _made(making: Making, wanted: _Wanted, signature: str) -> tuple[Described, Described]:
    """Make the store, or go on making it, and put it in place."""
    # What another Pillow began is not gone on with: it may have decoded to other pixels.
    with closing(Journal(making.journal, f"{signature} {pillow_version}")) as journal:
        if not journal.found:
            shutil.rmtree(making.part, ignore_errors=True)
        making.part.mkdir(exist_ok=True)
        tally = _Tally(list(wanted.source.unusable))
        with stoppable() as stop, closing(_Work(wanted, journal, stop)) as work:
            packed = work.done(making.part, tally)
        try:
            _check_enough(packed["train"], wanted.source, tally.unusable)
        except DataError:
            making.clear()
            raise
        checks = check(packed["train"], packed["test"], wanted.source.class_names, tally.unusable)
        described = _described(wanted, packed, tally)
        described["source_signature"] = signature
        for name, told in (("prepare.json", checks), ("store.json", summed(described))):
            (making.part / name).write_text(json.dumps(told, indent=1))
            sync(making.part / name)
        sync(making.part)
        making.put_in_place()
    return described, checks


class _Work:
    """Takes every file in order: those noted before first, then by decoding."""

    def __init__(self, wanted: _Wanted, journal: Journal, stop: Stop) -> None:
        self._wanted, self._journal, self._stop = wanted, journal, stop
        self._splits = {"train": wanted.source.train, "test": wanted.source.test}
        self._known = journal.known()
        self._fresh: Pictures | None = None
        self._num_done = 0

    def close(self) -> None:
        """End the decoding threads."""
        if self._fresh:
            self._fresh.close()

    def done(self, part: Path, tally: _Tally) -> dict[str, Packed]:
        """Write every split below `part`."""
        packed = {}
        total = sum(len(items) for items in self._splits.values())
        doing, quiet = f"Decoding {self._wanted.name}", self._wanted.quiet
        with watching(doing, total, quiet=quiet) as watch:
            for split, items in self._splits.items():
                with Packer(part, split, self._wanted.shard_bytes) as packer:
                    for item in items:
                        tally.note(item, self._next(item, packer))
                        watch(self._num_done)
                        if self._stop.requested:
                            self._save(packer)
                            raise Interrupted(
                                f"stopped after {self._num_done:,} of {total:,} files: the same "
                                "command goes on from there."
                            )
                    packed[split] = packer.finish()
        return packed

    def _next(self, item: Item, packer: Packer) -> Facts | str:
        """The next file's outcome, in its place in the store and in the journal."""
        if self._fresh is None:
            noted = next(self._known, None)
            if noted and packer.holds(noted):
                if isinstance(noted.outcome, Facts):
                    packer.add(item, noted.outcome)
                self._num_done += 1
                return noted.outcome
            self._journal.cut()
            root, items = self._wanted.source.root, chain(*self._splits.values())
            self._fresh = decode_all(
                (root / item.file for item in islice(items, self._num_done, None)),
                max_side=self._wanted.max_side,
                workers=self._wanted.workers,
            )
        outcome = next(self._fresh)
        if isinstance(outcome, Picture):
            packer.add(item, outcome)
        self._journal.add(outcome)
        if packer.unsynced >= SYNC_BYTES:
            self._save(packer)
        self._num_done += 1
        return outcome

    def _save(self, packer: Packer) -> None:
        packer.sync()
        self._journal.mark()


def _described(wanted: _Wanted, packed: dict[str, Packed], tally: _Tally) -> Described:
    """What `store.json` says."""
    source = wanted.source
    description, notes = source.description, source.notes
    if source.official and tally.unusable:
        description += f", less {counted(len(tally.unusable), 'unusable file')}"
        notes += (
            "not the whole official split: scores do not compare with published ones until the "
            "unusable files are got again and the dataset is prepared anew",
        )
    train = packed["train"].labels
    # One class is nothing to fine-tune on, as another note says.
    if len(source.class_names) > 1 and (bare := train.count(-1)):
        notes += (
            f"{bare:,} of the {len(train):,} training images {'has' if bare == 1 else 'have'} no "
            "label: pretraining learns from all, fine-tuning and scores from the others",
        )
    return {
        "reader_version": READER_VERSION,
        "name": wanted.name,
        "class_names": source.class_names,
        "splits": {split: _told(written) for split, written in packed.items() if written.files},
        "source": {"description": description, "path": str(source.root.resolve())},
        "max_side": wanted.max_side,
        "split_seed": source.split_seed,
        "unusable": [asdict(file) for file in tally.unusable],
        "converted": dict(sorted(tally.converted.items())),
        "animated": tally.animated,
        "notes": notes,
    }


def _told(packed: Packed) -> Described:
    told: Described = {
        "num_images": len(packed.files),
        "num_bytes": packed.num_bytes,
        "fingerprint": packed.fingerprint(),
        "files": packed.files,
    }
    if len(packed.shards) > 1:
        told["shards"] = [asdict(shard) for shard in packed.shards]
    return told


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


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write `folder` into one sentence with the remedy."""
    try:
        yield
    except OSError as problem:
        raise _refusal(problem, folder) from None


def _refusal(problem: OSError, folder: Path) -> FastidmmError:
    if problem.errno in FULL:
        return DataError(
            f"no space left for {folder}: free some and do the same again, which goes on from "
            "here, or lower --max-side, or set FASTIDMM_HOME to a folder on a larger disk."
        )
    return UsageError(
        f"{folder} cannot be written ({problem.strerror or problem}): set FASTIDMM_HOME to a "
        "folder that can."
    )
