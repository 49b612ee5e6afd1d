"""The photographs that a store was prepared from, for loaders that decode them every epoch."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastidmm.store import Store, read_json

RESIDENT = "choose --loader resident, which needs no files"


@dataclass(frozen=True, slots=True)
class Files:
    """Where the rows of a store come from, and how they were read."""

    paths: tuple[str, ...]  # one per row
    max_side: int  # px; pictures with a longer side were made smaller, 0: none
    converted: dict[str, int]  # how many pictures were not RGB and upright, by what they were

    @classmethod
    def of(cls, store: Store) -> "Files":
        """Those of a store that was opened from a folder."""
        assert store.folder is not None, "only prepared stores know their files"
        described = read_json(store.folder)
        names = described["splits"][store.split]["files"]
        root = Path(described["source"]["path"])
        rows = range(len(store)) if store.row is None else store.row.tolist()
        paths = tuple(str(root / names[row]) for row in rows)
        return cls(paths, described["max_side"], described["converted"])


def unfit(store: Store) -> str | None:
    """Why a store's photographs cannot be read again; None where they can."""
    if store.folder is None:
        return f"the images were not prepared from files: {RESIDENT}"
    for path in Files.of(store).paths:
        if not os.path.isfile(path):
            return f"{path} is not there any more: {RESIDENT}"
    return None
