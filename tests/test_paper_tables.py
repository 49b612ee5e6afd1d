"""The paper's tables as data, and the recipes that measure their cells."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastidmm import stages
from fastidmm.assemble import training_rows
from fastidmm.errors import UsageError
from fastidmm.paper import listing
from fastidmm.paper.protocol import WHOLE, Cut, _shortened, work
from fastidmm.paper.protocol import stages as stages_of
from fastidmm.paper.published import DATASETS, TABLES, Cell, cells, chosen
from fastidmm.recipe import Recipe, read_tables
from fastidmm.record import Record

PUBLISHED = [
    ("T1", "flowers", "deit_tiny", "idmm", 224, 79.9),
    ("T1", "aircraft", "deit_tiny", "dino", 224, 45.7),
    ("T2", "flowers", "deit_tiny", "idmm", 448, 85.6),
    ("T2", "dtd", "deit_base", "random", 224, None),
    ("T2", "cars", "t2t_vit_7", "idmm", 448, 91.2),
    ("T3", "cub", "pvtv2_b3", "mocov3", 224, 63.7),
    ("T3", "cars", "t2t_vit_7", "supervised", 224, 59.9),
    ("T5", "flowers", "deit_tiny", "multicrop", 224, 76.9),
]
SUMS = {"T1": 2363.3, "T2": 10197.3, "T3": 5307.2, "T4": 627.5, "T5": 369.9}  # of all numbers


def cell(table: str, arm: str, backbone: str = "deit_tiny", resolution: int = 224) -> Cell:
    """The one on Flowers, or on ImageNet."""
    found = [c for c in cells(table) if (c.arm, c.backbone) == (arm, backbone)]
    return next(c for c in found if c.resolution == resolution)


def recipe(of: Cell, cut: Cut = WHOLE, images: dict[str, int] | None = None) -> Recipe:
    """Of its own run."""
    return Recipe.of(work(of, 0, cut, images or {}).run.tables)


@pytest.mark.parametrize(("table", "dataset", "backbone", "arm", "px", "number"), PUBLISHED)
def test_numbers_are_the_papers(
    table: str, dataset: str, backbone: str, arm: str, px: int, number: float | None
) -> None:
    found = [
        c.published
        for c in cells(table)
        if (c.dataset, c.backbone, c.arm, c.resolution) == (dataset, backbone, arm, px)
    ]
    assert found == [number]


def test_tables_are_whole() -> None:
    counts = {table: len(cells(table)) for table in TABLES}
    assert counts == {"T1": 7 * 7, "T2": 5 * 4 * 7, "T3": 10 * 7, "T4": 9, "T5": 5}
    for table, total in SUMS.items():
        assert sum(c.published or 0 for c in cells(table)) == pytest.approx(total, abs=0.01)


def test_a_column_a_row_and_what_the_paper_has_not() -> None:
    assert {c.dataset for c in chosen("T1", "pets", None)} == {"pets"}
    assert len(chosen("T2", None, "pvtv2_b3")) == 4 * len(DATASETS)
    mine = chosen("T2", "mine", None)
    assert len(mine) == 20 and {c.published for c in mine} == {None}
    small = chosen("T2", "mine", "vit_micro")
    assert [(c.arm, c.resolution) for c in small] == [
        ("timm", 224), ("random", 224), ("idmm", 224), ("idmm", 448)
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"no table 'T6': .*T1, T2, T3, T4, T5"):
        cells("T6")


@pytest.mark.parametrize(("table", "epochs"), [("T1", 200), ("T2", 800)])
def test_the_main_method_has_the_published_settings(table: str, epochs: int) -> None:
    """112 px, 800 epochs of 256; 2 and 4 crops, CutMix and smoothing; then 224 px."""
    found = recipe(cell(table, "idmm"))
    run, tuned = found.run, found.finetune
    assert (run.method, run.epochs, run.batch_size, run.resolution) == ("idmm", 800, 256, 112)
    assert (found.optim.lr, found.optim.weight_decay, found.optim.warmup_epochs) == (5e-4, 1e-3, 2)
    method = found.method.model_dump()
    assert [method[k] for k in ("smoothing", "num_large", "num_small")] == [0.1, 2, 4]
    assert method["cutmix"] and method["small_scale"] == (0.05, 0.4)
    assert (tuned.epochs, tuned.batch_size, tuned.resolution) == (epochs, 256, 224)
    high = found.finetune_high
    assert (high.epochs, high.batch_size, high.resolution) == (100, 128, 448)


@pytest.mark.parametrize(("arm", "init"), [("timm", "timm"), ("random", "")])
def test_arms_without_pretraining_begin_as_they_are_called(arm: str, init: str) -> None:
    assert recipe(cell("T2", arm)).run.init == init


def test_pvt_and_t2t_learn_at_twice_the_rate() -> None:
    for backbone in ("pvtv2_b0", "pvtv2_b3", "t2t_vit_7"):
        optim = recipe(cell("T2", "idmm", backbone)).optim
        assert (optim.lr, optim.warmup_epochs) == (1e-3, 10)


def test_a_higher_stage_is_of_the_same_run() -> None:
    low, high = (work(cell("T2", "idmm", resolution=px), 1, WHOLE, {}) for px in (224, 448))
    assert low.run == high.run and low.run.name == "T2-flowers-idmm-deit_tiny-s1"
    assert (low.resolutions, high.resolutions) == ((224,), (224, 448))


def test_what_begins_at_random_is_fine_tuned_as_what_was_pretrained(toy: str) -> None:
    """Each key of the recipe, but for the weights: whatever method was before."""
    arms = chosen("T1", toy, "deit_tiny")
    random = recipe(next(c for c in arms if c.arm == "random")).tables()
    assert random["run"]["epochs"] == 200 and not random["run"]["init"]
    for arm in (c for c in arms if c.arm != "random"):
        whole = recipe(arm)
        assert (whole.run.epochs, whole.run.resolution) == (800, 112)
        record = Record.create(Path("runs") / arm.arm, whole, training_rows(whole))
        tuned = Recipe.of(stages.finetune_tables(record, pretrained=False)).tables()
        assert {**tuned, "finetune_high": 0} == {**random, "finetune_high": 0}, arm.arm


def test_the_whole_ablation_is_t1_s_cell() -> None:
    """Trained once for both, where neither is cut; cut, each table has its own share."""
    last, first = cell("T5", "cutmix"), cell("T1", "idmm")
    assert work(last, 2, WHOLE, {}) == work(first, 2, WHOLE, {})
    assert work(last, 2, WHOLE, {}).run.name == "T1-flowers-idmm-deit_tiny-s2"
    short = Cut(share=0.01, suffix="1h")
    assert work(last, 2, short, {}).run.name == "T5-flowers-cutmix-deit_tiny-s2-1h"
    assert work(cell("T5", "multicrop"), 2, WHOLE, {}).run.name.startswith("T5-")


def test_the_ablation_adds_a_part_at_a_time() -> None:
    def settings(arm: str) -> dict[str, Any]:
        tables = recipe(cell("T5", arm)).tables()
        return {f"{n}.{k}": v for n in ("run", "method") for k, v in tables[n].items()}

    rungs = [settings(arm) for arm in ("insdis", "smoothing", "small", "multicrop", "cutmix")]
    changed = [
        {key: after[key] for key in after if after[key] != before[key]}
        for before, after in pairwise(rungs)
    ]
    assert changed == [
        {"method.smoothing": 0.1},
        {"run.resolution": 112},
        {"method.num_small": 4},
        {"method.cutmix": True},
    ]
    assert rungs[0]["run.resolution"] == 224 and rungs[0]["method.num_large"] == 2
    whole = recipe(cell("T1", "idmm")).tables()
    assert rungs[-1] == {f"{n}.{k}": v for n in ("run", "method") for k, v in whole[n].items()}


def test_transfer_pretrains_once_for_all_datasets() -> None:
    arms = [c for c in cells("T3") if (c.arm, c.backbone) == ("mocov3", "pvtv2_b0")]
    works = [work(arm, 2, WHOLE, {}) for arm in arms]
    assert {w.source and w.source.name for w in works} == {"T3-sin10k-mocov3-pvtv2_b0-s2"}
    assert works[0].run.name == "T3-flowers-mocov3-pvtv2_b0-s2"
    source = works[0].source
    assert source and source.tables["run"]["dataset"] == "sin10k"
    tuned = Recipe.of(works[0].run.tables)
    assert (tuned.run.dataset, tuned.run.method, tuned.run.epochs) == ("flowers", "supervised", 200)
    assert tuned.optim.lr == 1e-3
    labels = work(cell("T3", "supervised", "pvtv2_b0"), 0, WHOLE, {}).source
    assert labels and Recipe.of(labels.tables).run.resolution == 112


def test_imagenet_is_trained_for_the_epochs_of_its_row() -> None:
    arms = [c for c in cells("T4") if (c.arm, c.backbone) == ("idmm", "deit_tiny")]
    works = [work(arm, 0, WHOLE, {}) for arm in arms]
    assert [w.run.tables["run"]["epochs"] for w in works] == [100, 300]
    assert len({w.run.name for w in works}) == 2 and works[0].source == works[1].source
    optim = Recipe.of(works[0].run.tables).optim
    assert (optim.lr, optim.weight_decay, optim.warmup_epochs) == (1e-3, 0.05, 5)


def test_a_cut_takes_the_same_share_of_every_stage() -> None:
    """A fiftieth: 16, 4 and 2 epochs; 200 images in 8 steps; sides by 2/7."""
    cut = Cut(1 / 50, 200, 2 / 7, "5m")
    arms = [c for c in chosen("T1", "demo", "vit_micro") if c.arm != "random"]
    for arm in arms:
        found = recipe(arm, cut, {"demo": 1668})
        stage = (found.run.epochs, found.run.resolution, found.run.num_images)
        assert stage == (16, 32, 200) and found.run.batch_size == 25, arm.arm
        assert (found.finetune.epochs, found.finetune.resolution) == (4, 64)
        assert (found.finetune_high.epochs, found.finetune_high.resolution) == (2, 128)
    random = recipe(next(c for c in chosen("T1", "demo", "vit_micro")), cut, {"demo": 1668})
    assert (random.run.epochs, random.run.resolution, random.run.batch_size) == (4, 64, 25)
    whole = recipe(arms[-1], Cut(1 / 50, 5000, 1.0, "5m"), {"demo": 2040})
    assert (whole.run.num_images, whole.run.batch_size, whole.run.resolution) == (0, 256, 112)


def test_what_a_cut_makes_of_each_key() -> None:
    """A tenth, 1,600 images in 8 steps of 200: batches that are smaller as published stay so.

    No run looks or writes but at its end, and what the recipe leaves out stays out.
    """
    whole = {
        "run": {"epochs": 800, "resolution": 112, "batch_size": 64},
        "finetune": {"epochs": 200, "resolution": 224, "batch_size": 256},
        "finetune_high": {"epochs": 0, "resolution": 448},
        "method": {"num_small": 4},
    }
    found = _shortened(whole, Cut(1 / 10, 1600, 1 / 2, "1h"), 2040)
    looks = dict.fromkeys(("knn_every", "score_every", "checkpoint_every"), 80)
    assert found == {
        "run": {"epochs": 80, "resolution": 56, "batch_size": 64, "num_images": 1600, **looks},
        "finetune": {"epochs": 20, "resolution": 112, "batch_size": 200},
        "finetune_high": {"epochs": 0, "resolution": 224, "batch_size": 128},
        "method": {"num_small": 4},
    }
    own = {**whole, "run": {"epochs": 800, "resolution": 112}}  # the method's own batch
    assert _shortened(own, Cut(1 / 10, 1600, 1 / 2, "1h"), 2040)["run"]["batch_size"] == 200


def test_every_stage_is_known_before_it_is_run() -> None:
    """Names and lengths of what is measured for a budget are those of what is run."""
    high = cell("T2", "idmm", resolution=448)
    found = [
        (name, tables["run"]["method"], tables["run"]["resolution"], tables["run"]["batch_size"], n)
        for name, tables, n in stages_of(high, WHOLE, {})
    ]
    run = "T2-flowers-idmm-deit_tiny-s0"
    assert found == [
        (run, "idmm", 112, 256, 800),
        (f"{run}/224", "supervised", 224, 256, 800),
        (f"{run}/448", "supervised", 448, 128, 100),
    ]
    assert [n for *_, n in stages_of(cell("T2", "timm"), WHOLE, {})] == [200]


def test_the_page_of_recipes_is_current() -> None:
    """And every header holds a command and what was measured, or that nothing was."""
    text = (listing.CONFIGS / "README.md").read_text()
    assert text == listing.page(), "python -m fastidmm.paper.listing"
    for path in listing.CONFIGS.glob("*.toml"):
        row = next(line for line in text.splitlines() if f"({path.name})" in line)
        *_, command, measured, _ = (part.strip() for part in row.split("|"))
        assert command.startswith(("`fastidmm ", "`make ")) and measured, path
        tables = read_tables(path.stem)
        tables["run"].setdefault("dataset", "any")
        Recipe.of(tables)
