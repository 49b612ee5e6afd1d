"""The datasets by name, with what is published of each and whether it is prepared."""

from dataclasses import asdict, dataclass

from fastidmm.datasets import About
from fastidmm.places import prepared
from fastidmm.registry import DATASETS, find


@dataclass(frozen=True, slots=True)
class Entry:
    """One dataset; numbers are None where it is whatever photographs it is made of."""

    name: str
    num_classes: int | None
    num_train: int | None
    num_test: int | None
    needs_from: bool
    prepared: bool  # under its own name

    def line(self) -> str:
        """The same as a row of a table."""
        numbers = (self.num_classes, self.num_train, self.num_test)
        cells = [f"{self.name:<10}", *(f"{n:>9,}" if n is not None else " " * 9 for n in numbers)]
        state = "prepared" if self.prepared else "needs --from" if self.needs_from else ""
        return "  ".join([*cells, state]).rstrip()


def catalogue() -> list[Entry]:
    """Every registered dataset, by name."""
    done = prepared()
    entries = []
    for name in sorted(DATASETS):
        about: About | None = getattr(find("dataset", name), "about", None)
        entries.append(
            Entry(
                name,
                about.num_classes if about else None,
                about.num_train if about else None,
                about.num_test if about else None,
                needs_from=not (about and about.fetched),
                prepared=name in done,
            )
        )
    return entries


def as_lines(entries: list[Entry]) -> list[str]:
    """A table for people."""
    return [f"{'':<10}  {'classes':>9}  {'training':>9}  {'test':>9}", *(e.line() for e in entries)]


def as_dicts(entries: list[Entry]) -> list[dict[str, object]]:
    """The same for scripts."""
    return [asdict(entry) for entry in entries]
