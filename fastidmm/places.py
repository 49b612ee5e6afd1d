"""Where prepared data lives, by name; without torch, which preparing has no use for."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from fastidmm.errors import DataError, UsageError, did_you_mean

READER_VERSION = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def home() -> Path:
    """Where prepared data lives: `FASTIDMM_HOME`, or a folder in the user's home."""
    told = Path(os.environ.get("FASTIDMM_HOME", "~/.local/share/fastidmm")).expanduser()
    return readable(told, "FASTIDMM_HOME")


def readable(path: Path, what: str) -> Path:
    """The path, which `what` named, unless safetensors could not open weights or pixels there."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{what} {path} is not UTF-8, and nothing in it could be read again: rename that "
            "folder, or name another."
        ) from None
    return path


def check_name(name: str, kind: str) -> str:
    """`name` when it can name a dataset or a run, an error with the rule otherwise."""
    if NAME.fullmatch(name):
        return name
    raise UsageError(
        f"{name!r} cannot name a {kind}: use 1 to 64 letters, digits, '.', '_' or '-', "
        "beginning with a letter or digit."
    )


def prepared() -> list[str]:
    """The names of all prepared datasets."""
    return sorted(p.parent.name for p in (home() / "stores").glob("[!.]*/store.json"))


def current() -> str:
    """The dataset prepared last."""
    marker = home() / "current"
    name = marker.read_text().strip() if marker.exists() else ""
    if name in (known := prepared()):
        return name
    if known:
        raise UsageError(
            f"the dataset prepared last is gone: name one by --dataset. Known: {', '.join(known)}."
        )
    raise UsageError(
        "no dataset is prepared yet: type `fastidmm prepare --dataset demo`, or "
        "`fastidmm prepare --dataset folder --from PHOTOS --name mine`."
    )


def folder_of(name: str) -> Path:
    """The folder of a prepared dataset, an error with what to type where there is none."""
    folder = home() / "stores" / check_name(name, "dataset")
    if (folder / "store.json").exists():
        return folder
    known = prepared()
    hint = did_you_mean(name, known) if known else "Nothing is prepared yet."
    raise UsageError(f"no dataset {name!r} is prepared: `fastidmm prepare` makes one. {hint}")


def read_json(folder: Path) -> dict[str, Any]:
    """A store's description: class names, source files, fingerprints."""
    path = folder / "store.json"
    try:
        described = unsummed(json.loads(path.read_text()))
    except (OSError, ValueError) as problem:
        raise DataError(f"{path} cannot be read ({problem}); prepare the dataset again.") from None
    if described.get("reader_version") != READER_VERSION:
        raise DataError(f"{folder} was written by another version; prepare the dataset again.")
    return described


def summed(told: dict[str, Any]) -> dict[str, Any]:
    """What a JSON file is to say, and the SHA-256 of that."""
    return {**told, "sum": _sum(told)}


def unsummed(told: Any) -> dict[str, Any]:
    """What `summed` was given; a ValueError where that changed. Older files have no sum."""
    if not isinstance(told, dict):
        raise ValueError("it is no table")
    said = {key: value for key, value in told.items() if key != "sum"}
    if "sum" in told and told["sum"] != _sum(said):
        raise ValueError("it is damaged")
    return said


def _sum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def has_split(name: str, split: str) -> bool:
    """Whether a dataset is prepared and has that split."""
    return name in prepared() and split in read_json(folder_of(name))["splits"]


def shard_name(split: str, place: int | None = None) -> str:
    """The file of a split, or of one of its shards."""
    return f"{split}.safetensors" if place is None else f"{split}-{place:05d}.safetensors"


def split_files(split: str, told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files of a split in order, each with its figures, from what `store.json` says of it."""
    shards = told.get("shards")
    if not shards:
        return {shard_name(split): told}
    return {shard_name(split, place): shard for place, shard in enumerate(shards)}
