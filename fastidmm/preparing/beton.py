"""The training split once more, as the file that FFCV reads: `train.beton` in the store's folder.

FFCV's own writer runs worker processes, and waits for ever where one of them dies, as on a full
disk. Its parts are driven from here instead, in one process.
"""

import errno
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastidmm.doctor import FFCV_NEEDS
from fastidmm.errors import DataError, Interrupted, UsageError
from fastidmm.interrupt import stoppable
from fastidmm.preparing.files import put_in_place
from fastidmm.preparing.watching import watching

if TYPE_CHECKING:
    from fastidmm.store import Store

NAME = "train.beton"
FIELD = "image"
INSTALL = f"`{FFCV_NEEDS}`, then `pip install 'fastidmm[ffcv]'`"
MOST_SIDE = 2**16 - 1  # px, of FFCV's format
LEAST_PAGE, PICTURES_OF_A_PAGE, MOST_PAGE = 2**21, 8, 2**31  # bytes; of the largest; bytes


def unusable() -> str | None:
    """Why FFCV cannot be used here, with what to type; None where it is installed."""
    return None if find_spec("ffcv") else f"FFCV is not installed: {INSTALL}"


def load() -> None:
    """Import FFCV, a UsageError where that cannot be done; afterwards it is there to import."""
    if reason := unusable():
        raise UsageError(f"{reason}.")
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv.loader  # noqa: F401
    except (ImportError, OSError) as problem:
        raise UsageError(f"FFCV cannot be imported ({problem}): {INSTALL}.") from None
    finally:
        torch.set_num_threads(threads)  # It sets one thread.


def write(folder: Path, *, quiet: bool = False) -> None:
    """Write `train.beton` beside the files of the store in `folder`, unless it is there.

    Sample r holds the pixels of row r as they are. OSError where the disk refuses.
    """
    path, aside = folder / NAME, folder / f".{NAME}"
    if path.exists():
        return
    from fastidmm.store import open_store

    store = open_store(folder, "train")
    total = len(store)
    try:
        with stoppable() as stop, watching(f"Writing {NAME}", total, quiet=quiet) as watch:

            def stop_or_go_on(num_done: int) -> None:
                if stop.requested:
                    raise Interrupted(
                        f"stopped after {num_done:,} of {total:,} images of {NAME}: the same "
                        "command begins it again; the store itself is whole."
                    )
                watch(num_done)

            _write(aside, store, stop_or_go_on)
        put_in_place(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write(path: Path, store: "Store", watch: Callable[[int], None]) -> None:
    """Write the file as FFCV lays it out, and see it onto the disk."""
    from ffcv.fields import RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    page_size = _page_size(store)
    writer = DatasetWriter(
        str(path), {FIELD: RGBImageField(write_mode="raw")}, page_size=page_size, num_workers=1
    )
    writer.num_samples = len(store)
    writer.prepare()
    shared = writer.metadata_sm
    try:
        table = np.zeros(len(store), writer.metadata_type)
        pages = MemoryAllocator(str(path), writer.data_region_start, page_size)
        with pages:
            for row in range(len(store)):
                watch(row)
                sample = (store.image(row).numpy(),)
                handle_sample(sample, row, table.dtype.names, table, pages, writer.fields)
        # FFCV takes no notice of a write that was cut short by a full disk.
        if path.stat().st_size != pages.offset + pages.next_page_allocated.value * page_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        shared.buf[: table.nbytes] = table.tobytes()
        writer.finalize(pages.allocations)
    finally:
        shared.close()
        shared.unlink()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _page_size(store: "Store") -> int:
    """Bytes of a page: a power of two that several of the largest pictures fit into."""
    side = max(store.max_height, store.max_width)
    most = int((3 * store.height.long() * store.width).max())
    page = max(LEAST_PAGE, 1 << (PICTURES_OF_A_PAGE * most - 1).bit_length())
    if side > MOST_SIDE or page > MOST_PAGE:
        raise DataError(
            f"the largest picture ({side:,} px, {most / 1e6:.0f} MB) is more than FFCV's files "
            "hold: prepare with --max-side 8192 or less."
        )
    return page
