"""What came of preparing a dataset, for people and for scripts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastidmm.datasets import Unusable
from fastidmm.preparing.beton import NAME as BETON
from fastidmm.terminal import line, printable

STORE = "store.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """A store in figures: what it holds, what was left out and what was converted."""

    name: str
    folder: Path
    fresh: bool  # False where nothing had to be decoded
    num_train: int
    num_test: int
    num_bytes: int  # on disk
    class_names: tuple[str, ...]
    split_seed: int | None
    max_side: int
    unusable: tuple[Unusable, ...]
    converted: dict[str, int]  # what was done to how many images
    animated: tuple[str, ...]  # files of which the first frame was taken
    notes: tuple[str, ...]
    checks: dict[str, Any]  # as `checks.check` returns them
    beton_bytes: int = 0  # of `train.beton`; 0 where there is none
    changed: bool = False  # whether the store of that name held other training images before

    @classmethod
    def of(
        cls,
        described: dict[str, Any],
        checks: dict[str, Any],
        folder: Path,
        *,
        fresh: bool,
        changed: bool,
    ) -> "Summary":
        """Read off `store.json` and `prepare.json`."""
        splits, beton = described["splits"], folder / BETON
        return cls(
            name=described["name"],
            folder=folder,
            fresh=fresh,
            num_train=splits["train"]["num_images"],
            num_test=splits.get("test", {}).get("num_images", 0),
            num_bytes=sum(split["num_bytes"] for split in splits.values()),
            class_names=tuple(described["class_names"]),
            split_seed=described["split_seed"],
            max_side=described["max_side"],
            unusable=tuple(Unusable(**file) for file in described["unusable"]),
            converted=described["converted"],
            animated=tuple(described["animated"]),
            notes=tuple(described["notes"]),
            checks=checks,
            beton_bytes=beton.stat().st_size if beton.exists() else 0,
            changed=changed,
        )

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "folder": str(self.folder)}

    def lines(self, limit: int = 10) -> list[str]:
        """The same for people; of long lists the first `limit`."""
        lines = [self.heading()]
        if self.changed:
            lines.append("other training images than before: runs begun on those cannot go on")
        if self.split_seed is not None:
            lines.append(
                f"which image is for training and which for testing: seed {self.split_seed}"
            )
        if self.unusable:
            count = counted(len(self.unusable), "file")
            lines.append(f"{count} unusable: {shown(self.unusable, limit, STORE)}")
        if self.converted:
            counts = (f"{count:,} {what}" for what, count in self.converted.items())
            lines.append(f"converted: {', '.join(counts)}")
        if self.animated:
            files = _listed([printable(file) for file in self.animated], limit, at=STORE)
            lines.append(f"first frame only: {files}")
        lines += [*self.notes, *_findings(self.checks)]
        if self.beton_bytes:
            lines.append(f"{BETON}: {_size(self.beton_bytes)}, for --loader ffcv")
        return [*lines, f"in {self.folder}"]

    def heading(self) -> str:
        """What the store holds, in a line."""
        return f"{self.name}: {self._holds()}{'' if self.fresh else ' (prepared before)'}"

    def _holds(self) -> str:
        images = f"{self.num_train:,} training and {counted(self.num_test, 'test image')}"
        if not self.num_test:
            images = f"{counted(self.num_train, 'training image')} and no test images"
        labels = len(self.class_names)
        classes = counted(labels, "class", "classes") if labels else "no labels"
        return f"{images}, {classes}, {_size(self.num_bytes)}"


def shown(unusable: Sequence[Unusable], limit: int = 10, at: str = "") -> str:
    """Unusable files with their reasons, in a line; `at`: where all of them are, if anywhere."""
    told = [f"{printable(file.file)} ({line(file.reason)})" for file in unusable]
    return _listed(told, limit, at=at)


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: 1 file, 1,024 files."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _listed(texts: list[str], limit: int, total: int | None = None, *, at: str) -> str:
    more = (len(texts) if total is None else total) - limit
    see = f" (see {at})" if at else ""
    return ", ".join(texts[:limit]) + (f" and {more:,} more{see}" if more > 0 else "")


FEW_CASES, FEW_CLASSES = 2, 5  # more pairs of paths fill a screen; all are in prepare.json
FINDINGS: dict[str, tuple[str, str]] = {
    "same_in_train": ("training image repeats another", "training images repeat others"),
    "same_in_test": ("test image is a training image too", "test images are training images too"),
    "alike_in_train": ("training image looks like another", "training images look like others"),
    "alike_in_test": (
        "test image looks like a training image",
        "test images look like training images",
    ),
    "labels_differ": (
        "image has another label than the one it repeats or looks like",
        "images have another label than the one they repeat or look like",
    ),
    "small_classes": (
        "class with fewer than 5 training images",
        "classes with fewer than 5 training images",
    ),
    "tiny": ("image with a side of less than 32 px", "images with a side of less than 32 px"),
}


def _findings(checks: dict[str, Any]) -> list[str]:
    """What the checks found, a line each."""
    lines = list(checks["warnings"])
    for name, (one, many) in FINDINGS.items():
        total = checks[name]["count"]
        if total:
            cases = [_case(case) for case in checks[name]["cases"]]
            limit = FEW_CLASSES if name == "small_classes" else FEW_CASES
            listed = _listed(cases, limit, total, at="prepare.json")
            lines.append(f"{counted(total, one, many)}: {listed}")
    return lines


def _case(case: dict[str, Any]) -> str:
    """One case of a finding, short."""
    if "class" in case:
        return f"{printable(case['class'])} ({case['num_train']})"
    if "height" in case:
        return f"{printable(case['file'])} ({case['height']} x {case['width']})"
    names = [case["file"], case["like"]]
    labels = [
        f" ({printable(case[key])})" if key in case else "" for key in ("label", "like_label")
    ]
    sign = " ~ " if "bits" in case else " = "
    return sign.join(printable(n) + label for n, label in zip(names, labels, strict=True))


def _size(num_bytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return (
                f"{num_bytes / size:,.1f} {unit}" if unit == "GB" else f"{num_bytes / size:.0f} MB"
            )
    return f"{num_bytes / 1e3:.0f} kB"
