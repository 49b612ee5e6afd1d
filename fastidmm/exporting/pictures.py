"""The photographs that are looked at: a prepared dataset's or a folder's, a few at a time; one."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from fastidmm.datasets import Item, Unusable
from fastidmm.datasets.folder import Folder
from fastidmm.errors import DataError, UsageError, did_you_mean
from fastidmm.evaluate import CROPS_AT_ONCE, central_views, outputs
from fastidmm.machine import dtype_of, set_up
from fastidmm.preparing.decode import SUFFIXES, Picture, decode_all, upright
from fastidmm.preparing.prepare import MAX_SIDE
from fastidmm.preparing.summary import shown
from fastidmm.preparing.watching import watching
from fastidmm.record import Record
from fastidmm.store import Store, folder_of, open_store, prepared, read_json

MOST_BYTES = 1 << 28  # of pixels at a time, unless one picture alone has more


@dataclass(frozen=True, slots=True)
class Named:
    """A photograph: its file as the source names it, its class or -1, its split where given."""

    file: str
    label: int
    split: str


@dataclass(slots=True)
class Pictures:
    """What there is to look at; `parts` gives it in order, and fills `left_out`."""

    title: str
    class_names: tuple[str, ...]
    parts: Iterator[tuple[Store, list[Named]]]
    total: int
    left_out: list[Unusable] = field(default_factory=list)


def pictures(source: str) -> Pictures:
    """Those of the prepared dataset of that name, or else below that folder; or the file itself."""
    if source in prepared():
        return _of_store(source)
    path = Path(source).expanduser()
    if not path.exists():
        known = prepared()
        hint = did_you_mean(source, known) if known else "Nothing is prepared."
        raise UsageError(
            f"--from {source}: no such folder or photograph, and no such dataset. {hint}"
        )
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        alone = Pictures(source, (), iter(()), 1)
        alone.parts = _decoded(path.parent, [(Item(path.name, -1), "")], alone)
        return alone
    if path.is_file() and path.suffix.lower() != ".csv":
        raise UsageError(
            f"--from {source} is no photograph that can be read ({', '.join(SUFFIXES)}), and no "
            ".csv: save it as JPEG first."
        )
    return _of_folder(path)


def looked_through(
    told: Pictures,
    model: nn.Module,
    record: Record,
    device: str | None,
    doing: str,
    *,
    quiet: bool,
) -> Iterator[tuple[Tensor, list[Named]]]:
    """What a run's model gives for each part's photographs, as `evaluate` looks: (N, D) float32.

    On `device`, or the run's own; the rows come on the CPU.
    """
    run = record.recipe.run
    place = set_up(device or run.device, exact=run.exact)
    dtype, num = dtype_of(run.precision, place), 0
    model.to(place)
    with watching(f"{doing} {told.title}", told.total, quiet=quiet) as watch:
        for some, named in told.parts:
            store = some.tables_to(place)
            yield outputs(model, store, resolution=run.resolution, dtype=dtype).cpu(), named
            watch((num := num + len(named)) + len(told.left_out))


def as_utf8(name: str) -> str:
    """A file's name or a class's with bytes that are no UTF-8 replaced, for files of others."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _of_store(name: str) -> Pictures:
    folder = folder_of(name)
    described = read_json(folder)
    splits = described["splits"]

    def parts() -> Iterator[tuple[Store, list[Named]]]:
        for split, told in splits.items():
            store = open_store(folder, split)
            rows = zip(told["files"], store.label.tolist(), strict=True)
            named = [Named(file, label, split) for file, label in rows]
            for some in torch.arange(len(store)).split(CROPS_AT_ONCE):
                yield store.select(some), [named[row] for row in some.tolist()]

    total = sum(told["num_images"] for told in splits.values())
    return Pictures(f"dataset {name!r}", tuple(described["class_names"]), parts(), total)


def _of_folder(path: Path) -> Pictures:
    """Decoded as `prepare` would, and nothing written."""
    source = Folder().open(from_=path, seed=0)
    items = [(item, "train") for item in source.train] + [(item, "test") for item in source.test]
    if source.split_seed is not None:  # what `prepare` would draw is of no interest here
        items = sorted(((item, "") for item, _ in items), key=lambda pair: pair[0].file)
    found = Pictures(str(source.root), source.class_names, iter(()), len(items))
    found.left_out.extend(source.unusable)
    found.parts = _decoded(source.root, items, found)
    return found


def _decoded(
    root: Path, items: list[tuple[Item, str]], found: Pictures
) -> Iterator[tuple[Store, list[Named]]]:
    held: list[tuple[Picture, Named]] = []
    num_bytes, any_usable = 0, False
    paths = (root / item.file for item, _ in items)
    with closing(decode_all(paths, max_side=MAX_SIDE, workers=None)) as outcomes:
        for (item, split), outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, str):
                found.left_out.append(Unusable(item.file, outcome))
                continue
            if held and (
                len(held) == CROPS_AT_ONCE or num_bytes + len(outcome.pixels) > MOST_BYTES
            ):
                yield _together(held, found.class_names)
                held, num_bytes = [], 0
            held.append((outcome, Named(item.file, item.label, split)))
            num_bytes, any_usable = num_bytes + len(outcome.pixels), True
    if held:
        yield _together(held, found.class_names)
    if not any_usable:
        raise DataError(f"{root} has no usable photograph: {shown(found.left_out)}.")


def looked_at(image: Image.Image, *, resolution: int) -> Tensor:
    """A photograph as `evaluate` sees it on a CPU: (3, S, S) float32, normalised.

    Upright, in RGB and no larger than by default in a store.
    """
    # exif_transpose copies, so that the caller's image stays as it is.
    rgb = upright(ImageOps.exif_transpose(image), MAX_SIDE)
    store = Store(
        pixels=torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8),
        offset=torch.zeros(1, dtype=torch.int64),
        height=torch.tensor([rgb.height], dtype=torch.int32),
        width=torch.tensor([rgb.width], dtype=torch.int32),
        label=torch.tensor([-1]),
        class_names=(),
        fingerprint="",
    )
    return central_views(store, torch.zeros(1, dtype=torch.int64), resolution)[0]


def _together(
    held: list[tuple[Picture, Named]], class_names: tuple[str, ...]
) -> tuple[Store, list[Named]]:
    """Pictures as a store in memory."""
    pixels = bytearray().join(picture.pixels for picture, _ in held)
    sizes = torch.tensor([len(picture.pixels) for picture, _ in held])
    store = Store(
        pixels=torch.frombuffer(pixels, dtype=torch.uint8),
        offset=sizes.cumsum(0) - sizes,
        height=torch.tensor([p.height for p, _ in held], dtype=torch.int32),
        width=torch.tensor([p.width for p, _ in held], dtype=torch.int32),
        label=torch.tensor([named.label for _, named in held]),
        class_names=class_names,
        fingerprint="",
    )
    return store, [named for _, named in held]
