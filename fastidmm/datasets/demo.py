"""The demonstration: photographs of solar cells, some of them cracked.

ELPV (Buerhop-Lutz and others, EU PVSEC 2018; Deitsch and others, Solar Energy 2019), 2,624
electroluminescence images of 300 by 300 pixels, as the package `elpv-dataset` brings them.
Only the 2,223 cells are taken of which the experts were certain.
The photographs are under CC BY-NC-SA 4.0: they may not be used commercially.
"""

from importlib.util import find_spec
from pathlib import Path

from fastidmm.datasets import About, Item, Source, stratified
from fastidmm.errors import UsageError

CLASS_NAMES = ("mono-defective", "mono-functional", "poly-defective", "poly-functional")
CERTAIN = {0.0: "functional", 1.0: "defective"}
HELD_OUT_ONE_IN = 4


class Demo:
    """Solar cells by kind (mono- or polycrystalline) and state; 1,668 to train, 555 to test."""

    about = About(4, 1668, 555)

    def open(self, *, from_: Path | None, seed: int) -> Source:
        """List the cells of the installed package, or of its folder `data/` given as `from_`."""
        root = from_.expanduser().resolve() if from_ else _installed()
        labels = root / "labels.csv"
        if not labels.is_file():
            raise UsageError(f"there is no {labels}: leave --from out, or give ELPV's data folder.")
        items = []
        for line in labels.read_text().splitlines():
            file, probability, kind = line.split()
            state = CERTAIN.get(float(probability))
            if state:
                items.append(Item(file, CLASS_NAMES.index(f"{kind}-{state}")))
        train, test = stratified(items, seed=seed, one_in=HELD_OUT_ONE_IN)
        return Source(
            description="ELPV solar cells, CC BY-NC-SA 4.0",
            root=root,
            class_names=CLASS_NAMES,
            train=train,
            test=test,
            split_seed=seed,
        )


def _installed() -> Path:
    """The data folder of the package, found without running its code."""
    package = find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise UsageError("the demo's photographs are missing: `pip install 'fastidmm[demo]'`.")
    return Path(package.submodule_search_locations[0]) / "data"
