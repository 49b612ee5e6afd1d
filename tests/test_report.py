"""The report says what the run's files say, and nothing in it can act or reach out."""

import base64
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fastidmm import scoring, stages
from fastidmm.assemble import assemble
from fastidmm.errors import UsageError
from fastidmm.recipe import Recipe, with_settings
from fastidmm.record import Record
from fastidmm.reporting.claims import measures, verdict
from fastidmm.reporting.curves import MOST_POINTS, Series, chart, ticks
from fastidmm.reporting.pictures import NUM_IMAGES, png, side_of
from fastidmm.reporting.report import write

EVIL = "<script>alert('&')</script>"
NUM_TRAIN, NUM_TEST, SIDE = 24, 12, 32


def make_store(home: Path, name: str, *, labelled: bool = True) -> None:
    """Noise around a colour per class; names that a page must not believe."""
    folder = home / "stores" / name
    folder.mkdir(parents=True)
    chance = torch.Generator().manual_seed(0)
    splits = {"train": NUM_TRAIN, "test": NUM_TEST} if labelled else {"train": NUM_TRAIN}
    for split, num in splits.items():
        label = torch.arange(num) % 3
        noise = torch.randint(0, 120, (num, SIDE * SIDE * 3), generator=chance)
        sides = torch.full((num,), SIDE, dtype=torch.int32)
        tensors = {
            "pixels": (noise + 60 * label[:, None]).to(torch.uint8).flatten(),
            "offset": torch.arange(num) * SIDE * SIDE * 3,
            "height": sides,
            "width": sides.clone(),
            "label": label if labelled else torch.full((num,), -1),
        }
        save_file(tensors, folder / f"{split}.safetensors")
    told = {
        split: {
            "num_images": num,
            "fingerprint": f"{name}-{split}",
            "files": [f"{split}/<img src=x onerror=alert({i})>.jpg" for i in range(num)],
        }
        for split, num in splits.items()
    }
    described = {
        "reader_version": 1,
        "name": name,
        "class_names": [EVIL, "b", "c"] if labelled else [],
        "splits": told,
    }
    (folder / "store.json").write_text(json.dumps(described))


def tables(dataset: str, **run: Any) -> dict[str, dict[str, Any]]:
    return {
        "run": {
            "dataset": dataset,
            "backbone": "vit_micro",
            "device": "cpu",
            "epochs": 2,
            "batch_size": 12,
            "resolution": 16,
            **run,
        }
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    make_store(folder, "toy")
    make_store(folder, "bare", labelled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIDMM_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(home: Path) -> Path:
    """A run with both fine-tunings and an evaluation, in a folder with a hostile name."""
    folder = home / "runs" / "toy"
    stages.pretrain(Recipe.of(tables("toy", num_images=20)), str(folder))
    settings = {"run.epochs": 2, "run.resolution": 16, "run.batch_size": 10}
    for pretrained in (True, False):
        stages.finetune(folder, settings, ["optim.lr=1e-4"], pretrained=pretrained)
    hostile = folder.rename(folder.with_name("<b>toy"))
    scoring.evaluate(hostile)
    return hostile


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write(run).read_text()


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def text(page: str) -> str:
    """What a reader sees, on one line."""
    body = page[page.index("<body>") :]
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", body)))


def pictures(page: str) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) for code in found]


def test_every_score_of_the_evaluation_is_in_the_table(run: Path, page: str) -> None:
    evaluation = json.loads((run / scoring.EVALUATION).read_text())
    (table,) = re.findall(r'<table class="scores">.*?</table>', page, flags=re.DOTALL)
    rows = re.findall(r"<tr>\s*<th scope.*?</tr>", table, flags=re.DOTALL)
    assert len(rows) == 3
    assert f"Top-1 on {NUM_TEST} test images" in text(page)
    for row, key in zip(rows, ("knn", "linear_probe", "finetuned_16"), strict=True):
        cells = re.findall(r"<td.*?</td>", row, flags=re.DOTALL)
        for cell, arm in zip(cells, ("pretrained", "random"), strict=False):
            score = evaluation["scores"][arm][key]
            low, high = (100 * side for side in score["interval"])
            assert f"<b>{100 * score['value']:.1f}\N{NO-BREAK SPACE}%</b>" in cell
            assert f"{low:.1f} to {high:.1f}" in cell
            assert ("2 epochs" in cell) == (key == "finetuned_16")
        gap = (
            evaluation["scores"]["pretrained"][key]["value"]
            - evaluation["scores"]["random"][key]["value"]
        )
        assert f"{100 * gap:+.1f} points".replace("-", "\N{MINUS SIGN}") in cells[2]


def test_looks_at_the_test_images_are_told(run: Path, page: str, copy: Path) -> None:
    """Once by each stage, at its end, and once by `evaluate`; a best of several stands marked."""
    told = "These images were looked at 3 times: 2 while fine-tuning, 1 by fastidmm evaluate"
    assert told in text(page) and "selected on these images" not in page
    evaluation = json.loads((copy / scoring.EVALUATION).read_text())
    best = {"value": 0.875, "epoch": 7, "of": 3, "selected_on": "test"}
    evaluation["scores"]["random"]["finetuned_16"]["best"] = best
    (copy / scoring.EVALUATION).write_text(json.dumps(evaluation))
    shown = text(write(copy).read_text()).replace("\N{NO-BREAK SPACE}", " ")
    assert shown.count("best 87.5 % in epoch 7, selected on these images") == 1


def test_the_verdict_comes_first(run: Path, page: str) -> None:
    evaluation = json.loads((run / scoring.EVALUATION).read_text())
    expected = verdict(
        measures(evaluation["scores"]), "Pretraining on these 20 images", num_test=NUM_TEST
    )
    assert unescape(re.findall(r"<h1>(.*?)</h1>", page)[0]) == expected
    assert "vit_micro, idmm, 2 epochs on 20 images at 16 px" in text(page)
    assert "One seed (0)" in text(page)


def test_curves_end_where_the_metrics_do(run: Path, page: str) -> None:
    last = Record(run).metrics()[-1]
    titles = [unescape(title) for title in re.findall(r"<title>(.*?)</title>", page)[1:]]
    assert titles[:3] == [
        f"Pretraining loss, by epoch: last {last['loss']:.4g}",
        "Instance top-1: images recognised as themselves, by epoch: "
        f"last {100 * last['instance_top1']:.4g} %",
        f"kNN on training labels, leave-one-out, by epoch: last {100 * last['knn_top1']:.4g} %",
    ]
    tuned = [Record(run / name).metrics()[-1]["loss"] for name in ("finetune-16", "scratch-16")]
    assert titles[3] == (
        f"Fine-tuning loss, by epoch: finetune-16 {tuned[0]:.4g}, scratch-16 {tuned[1]:.4g}"
    )


def test_pictures_are_those_of_training(run: Path, page: str) -> None:
    parts = assemble(Record(run))
    steps = parts.loader.steps_per_epoch
    assert f"step {steps} (the first of epoch 2)" in text(page)
    batches = parts.loader.batches(steps)
    batch = next(batches)
    found = iter(pictures(page))
    places = [batch.num_images * i // NUM_IMAGES for i in range(NUM_IMAGES)]
    captions = iter(re.findall(r"<figcaption>([\d.]+ % own|all its own)", page))
    for place in places:
        assert np.array_equal(next(found), parts.store.image(int(batch.groups[0].rows[place])))
        for views, group in zip(batch.groups, parts.method.views, strict=True):
            mean, std = (torch.tensor(v)[:, None, None] for v in (group.mean, group.std))
            for crop in range(place, views.rows.numel(), batch.num_images):
                pixels = 255 * (views.pixels[crop] * std + mean)
                shown = torch.tensor(next(found)).permute(2, 0, 1)
                assert (pixels - shown).abs().max() <= 0.5 + 1e-3
                own = float(views.weights[crop])
                expected = f"{100 * own:.3g} % own" if own < 1 else "all its own"
                assert next(captions) == expected
    assert next(found, None) is None


class Tags(HTMLParser):
    """Every tag of a page with its attributes, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_acts_or_reaches_out(page: str) -> None:
    tags = Tags(page).found
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in tags
    assert not {"script", "link", "iframe", "object", "embed", "a", "form"} & {
        tag for tag, _ in tags
    }
    for tag, attributes in tags:
        assert not any(name.startswith("on") or "href" in name for name in attributes)
        if "src" in attributes:
            kinds = r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+"
            assert tag == "img" and re.fullmatch(kinds, str(attributes["src"]))
    assert not re.search(r"url\(|@import|://", page)
    assert len(page.encode()) < 5_000_000


def test_names_are_shown_and_not_believed(page: str) -> None:
    assert EVIL in unescape(page) and EVIL not in page
    assert "<img src=x onerror=" in unescape(page) and "<img src=x" not in page
    assert "<b>toy" in unescape(page) and "<b>toy" not in page


def test_a_run_is_repeated_by_its_commands(run: Path, page: str) -> None:
    block = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)[0]
    commands = [shlex.split(line) for line in unescape(block).splitlines()]
    assert [words[1] for words in commands] == [
        "pretrain",
        "finetune",
        "finetune",
        "evaluate",
        "report",
    ]
    # The folder is called <b>toy, which a shell would read a file for.
    assert {words[words.index("--run") + 1] for words in commands} == {"b-toy-again"}
    recipe = commands[0][commands[0].index("--recipe") + 1]
    assert Path(recipe) == run / "recipe.toml"
    parent = Record(run)
    for words, name in zip(commands[1:3], ("finetune-16", "scratch-16"), strict=True):
        assert ("--scratch" in words) == (name == "scratch-16")
        flags = {"run.resolution": "--resolution", "run.epochs": "--epochs"}
        flags["run.batch_size"] = "--batch-size"
        settings = {key: int(words[words.index(flag) + 1]) for key, flag in flags.items()}
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        usual = stages.finetune_tables(parent, pretrained=name == "finetune-16")
        assert Recipe.of(with_settings(usual, settings, sets)) == Record(run / name).recipe
    environment = json.loads((run / "environment.json").read_text())
    assert environment["train_fingerprint"] in text(page)
    assert "drop_path = 0.1" in text(page)


def test_a_run_that_is_not_finished_or_scored_says_so(copy: Path) -> None:
    (copy / scoring.EVALUATION).unlink()
    shutil.rmtree(copy / "scratch-16")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0])
    shutil.rmtree(Record(copy).result)
    seen = text(write(copy).read_text())
    assert "Not evaluated yet: nothing can be said of what pretraining did." in seen
    assert "epoch 1 of 2 (not finished)" in seen
    assert f"fastidmm resume {copy}" in seen
    assert f"finetune --run {copy} --resolution 16 --epochs 2 --batch-size 10 --scratch" in seen
    assert f"fastidmm evaluate --run {copy}" in seen
    assert [path.name for path in copy.glob(".*")] == [".lock"]


def test_a_run_whose_metric_lines_are_lost_is_finished_all_the_same(copy: Path) -> None:
    (copy / "metrics.jsonl").unlink()
    seen = text(write(copy).read_text())
    assert "vit_micro, idmm, 2 epochs on 20 images" in seen and "stands at epoch" not in seen
    assert "fastidmm resume" not in seen and "copy random weights 2 of 2" in seen


def test_a_stage_that_was_not_run_is_a_gap_in_the_table(copy: Path) -> None:
    shutil.rmtree(copy / "scratch-16")
    evaluation = json.loads((copy / scoring.EVALUATION).read_text())
    del evaluation["scores"]["random"]["finetuned_16"]
    (copy / scoring.EVALUATION).write_text(json.dumps(evaluation))
    seen = write(copy).read_text()
    (table,) = re.findall(r'<table class="scores">.*?</table>', seen, flags=re.DOTALL)
    assert table.count('<td class="faint">not run</td>') == 1
    assert "fine-tuned accuracy" not in re.findall(r"<h1>(.*?)</h1>", seen)[0]


def test_without_the_dataset_only_the_pictures_are_missing(
    copy: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTIDMM_HOME", str(tmp_path / "empty"))
    gone = write(copy).read_text()
    assert "The pictures cannot be made again: no dataset 'toy' is prepared" in text(gone)
    assert not pictures(gone)
    assert gone.count("<svg") == page.count("<svg")


def test_another_dataset_of_that_name_is_not_shown(copy: Path) -> None:
    path = copy / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "train_fingerprint": "another"}))
    changed = write(copy).read_text()
    assert "'toy' was prepared anew since" in text(changed)
    assert not pictures(changed)


def test_images_without_labels_have_curves_and_pictures(home: Path) -> None:
    folder = home / "runs" / "bare"
    stages.pretrain(Recipe.of(tables("bare", epochs=1)), str(folder))
    page = write(folder).read_text()
    assert "Without labels of at least two classes nothing can be scored" in text(page)
    shutil.copytree(folder, folder.with_name("other"))
    last = Record(folder).metrics()[-1]["retrieval_top1"]
    beside = text(write(folder).read_text()).replace("\N{NO-BREAK SPACE}", " ")
    assert "training retrieval" in beside and beside.count(f"{100 * last:.1f} %") >= 2
    assert "kNN" not in text(page) and "fastidmm evaluate" not in text(page)
    assert 'class="scores"' not in page and "Where it errs" not in page
    assert "Fine-tuning" not in page and "of another class" not in page
    first, _ = page.split("More curves")
    for title in ("Retrieval: crops that", "RankMe: dir", "Uniformity: 0", "Alignment: two"):
        assert title in first and page.count(f"<title>{title}") == 1
    assert "retrieval and RankMe are better high" in text(first)
    assert len(pictures(page)) == NUM_IMAGES * 7


def test_a_stage_has_no_report_of_its_own(run: Path) -> None:
    with pytest.raises(UsageError, match="fastidmm report --run"):
        write(run / "finetune-16")


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (5.98, 7.44), (0.0, 2.0), (61.2, 61.3), (3.0, 3.0), (0.0, 0.0)]
)
def test_ticks_enclose_what_they_measure(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_long_curves_are_averaged_and_end_exactly() -> None:
    values = torch.linspace(9, 5, 8001).tolist()
    svg = str(chart("loss", [Series("a", [(i / 10, v) for i, v in enumerate(values)])]))
    points = re.findall(r'points="([^"]*)"', svg)[0].split()
    assert len(points) <= MOST_POINTS + 1
    assert "last 5<" in svg
    assert points[-1] == "408.0,212.0"


def noise(side: int) -> Tensor:
    return torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)


@pytest.mark.parametrize("num_views", [2, 6, 20])
def test_even_noise_stays_below_five_megabytes(num_views: int) -> None:
    num = NUM_IMAGES * num_views
    size = num * len(png(noise(side_of(num)), side_of(num)))
    assert size + NUM_IMAGES * len(png(noise(160), 160)) < 4_500_000
