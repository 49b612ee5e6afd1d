"""The page's tables, pictures and curves by other means, and the page in a real browser."""

import base64
import io
import json
import re
import shutil
from html import escape, unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import needs_browser, open_page
from PIL import Image
from test_report import copy as copy
from test_report import home as home
from test_report import noise, text
from test_report import page as page
from test_report import run as run
from torch import nn

from fastidmm import checkpoint, scoring
from fastidmm.assemble import assemble
from fastidmm.compare import as_text, compare
from fastidmm.forecast import FORECAST, keep
from fastidmm.methods.idmm import IDMM, IDMMOptions
from fastidmm.ranks import World, world
from fastidmm.record import METRICS, Record
from fastidmm.reporting.curves import BOTTOM, LEFT, RIGHT, Series, chart
from fastidmm.reporting.inside import ASKED, NEAREST, SIDE, WORST, inside
from fastidmm.reporting.mistakes import mistakes
from fastidmm.reporting.pictures import MOST_BYTES, jpeg
from fastidmm.reporting.report import Page, write
from fastidmm.store import Store


def section(page: str, title: str) -> str:
    """The part of a page under a heading."""
    return page.split(f"<h2>{title}</h2>")[1].split("</section>")[0]


def rows(table: str) -> list[list[str]]:
    """A table's cells as a reader sees them, its head first."""
    found = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in found]
    plain = [[unescape(re.sub(r"<[^>]*>", " ", cell)) for cell in row] for row in cells]
    return [
        [" ".join(cell.replace("\N{NO-BREAK SPACE}", " ").split()) for cell in r] for r in plain
    ]


def of_its_images(run: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Store]:
    """Features and head of a run by float64, each image resized by Pillow and cut out."""
    parts = assemble(Record(run))
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    parts.method.load_state_dict(checkpoint.load(newest, checkpoint.MODEL)[0][0])
    crops = []
    for row in range(len(parts.store)):
        # The shorter side becomes 16 * 256 / 224, and the middle 16 of it are seen.
        picture = Image.fromarray(parts.store.image(row).numpy()).resize((18, 18), 3)
        crops.append(np.asarray(picture)[1:17, 1:17] / 255.0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.tensor((np.stack(crops) - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = parts.method.backbone.double().eval()(pixels).numpy()
    weight, bias = (p.detach().double().numpy() for p in parts.method.head.parameters())  # type: ignore[union-attr]
    return features, features @ weight.T + bias, parts.store


def names_in(store: Store) -> list[str]:
    """What `make_store` called the images of each row."""
    assert store.row is not None
    return [f"<img src=x onerror=alert({int(row)})>.jpg" for row in store.row]


def test_neighbours_and_worst_fitted_are_those_of_float64(run: Path) -> None:
    record = Record(run)
    features, logits, store = of_its_images(run)
    found = inside(record, store, record.result)
    num = len(store)
    assert (found.step, found.num) == (4, num) and len(found.near) == min(ASKED, num)
    names = names_in(store)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    for each in found.near:
        own = names.index(each.face.name)
        assert each.face.label == store.class_names[int(store.label[own])]
        expected = np.sort(cosines[own])[::-1][:NEAREST]
        assert np.allclose([cosine for _, cosine in each.others], expected, atol=2e-3)
        shown = [cosines[own, names.index(face.name)] for face, _ in each.others]
        assert np.allclose(shown, expected, atol=2e-3)
    told = re.findall(r"<figcaption>([\d.e-]+) (?!%)", Page(run).text())
    assert told == [f"{1 - cosine:.2g}" for each in found.near for _, cosine in each.others]
    largest = logits.max(axis=1, keepdims=True)
    logs = logits - largest - np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    losses = -0.9 * np.diag(logs) - 0.1 * logs.mean(axis=1)
    assert found.mean == pytest.approx(losses.mean(), abs=2e-3)
    assert [u.loss for u in found.unfit] == pytest.approx(np.sort(losses)[::-1][:WORST], abs=5e-3)
    np.fill_diagonal(logits, -np.inf)
    for unfit in found.unfit:
        own = names.index(unfit.face.name)
        assert unfit.loss == pytest.approx(losses[own], abs=5e-3)
        assert logits[own, names.index(unfit.like.name)] == pytest.approx(
            logits[own].max(), abs=5e-3
        )


def test_the_likeliest_other_is_never_the_image_itself() -> None:
    """By hand: logits of 5, 2.6, 0; of 0, 5.1, 1; and of 0, 0.1, 5."""
    backbone = nn.Identity()
    backbone.num_features = 3  # type: ignore[assignment]
    method = IDMM(backbone, IDMMOptions(), resolution=16, num_rows=3, batch_size=3)
    with torch.no_grad():
        method.head.weight.copy_(torch.tensor([[1, 0, 0], [0.5, 1, 0], [0, 0.2, 1]]))
        method.head.bias.copy_(torch.tensor([0, 0.1, 0]))
        losses, likely = method.own_losses(5 * torch.eye(3), torch.arange(3))
    assert likely.tolist() == [1, 2, 1]
    logits = np.array([[5, 2.6, 0], [0, 5.1, 1], [0, 0.1, 5]])
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert losses.tolist() == pytest.approx(list(-0.9 * np.diag(logs) - 0.1 * logs.mean(axis=1)))


def test_a_look_has_bounds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many images some are looked at, evenly; only who learns images has losses of theirs."""
    record = Record(run)
    store = assemble(record).store
    whole = inside(record, store, record.result)
    monkeypatch.setattr("fastidmm.reporting.inside.MOST_IMAGES", 5)
    some = inside(record, store, record.result)
    names = [names_in(store)[i] for i in (0, 4, 8, 12, 16)]
    assert some.num == 5 and {each.face.name for each in some.near} == set(names)
    assert {face.name for each in some.near for face, _ in each.others} == set(names)
    assert {u.face.name for u in some.unfit} == set(names)
    told = {u.face.name: (u.loss, u.like.name) for u in whole.unfit}
    for unfit in some.unfit:
        if unfit.face.name in told:
            loss, like = told[unfit.face.name]
            assert unfit.loss == pytest.approx(loss, abs=1e-4) and unfit.like.name == like
    tuned = Record(run / "finetune-16")
    found = inside(tuned, store, tuned.result)
    assert len(found.near) == 5 and found.unfit == () and found.mean is None


def test_the_first_of_several_ranks_looks_by_itself(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that was dealt out in training is whole in a checkpoint, and here."""
    store = assemble(Record(copy)).store
    alone = inside(Record(copy), store, Record(copy).result)
    path = copy / "recipe.toml"
    recipe = path.read_text().replace('head = "auto"', 'head = "sharded"')
    assert "sharded" in recipe
    path.write_text(recipe)
    monkeypatch.setattr("fastidmm.ranks._here", World(rank=0, size=2))
    assert inside(Record(copy), store, Record(copy).result) == alone
    assert world().size == 2


def test_what_was_found_inside_is_shown(run: Path, page: str) -> None:
    record = Record(run)
    store = assemble(record).store
    found = inside(record, store, record.result)
    near = section(page, "Nearest neighbours")
    shown = [face for each in found.near for face in (each.face, *(f for f, _ in each.others))]
    assert re.findall(r'src="([^"]*)"', near) == [face.uri for face in shown]
    other = sum(f.label != each.face.label for each in found.near for f, _ in each.others)
    assert near.count('class="face other"') == other
    worst = section(page, "Worst fitted")
    assert re.findall(r"loss (\d+\.\d+)", worst) == [f"{u.loss:.3f}" for u in found.unfit]
    assert re.findall(r'src="([^"]*)"', worst) == [
        uri for u in found.unfit for uri in (u.face.uri, u.like.uri)
    ]
    picture = Image.open(io.BytesIO(base64.b64decode(shown[0].uri.partition(",")[2])))
    truth = store.image(names_in(store).index(shown[0].name)).numpy()
    assert abs(np.asarray(picture).astype(float) - truth).mean() < 40  # JPEG's worst: noise


def test_where_it_errs_is_what_was_evaluated(run: Path, page: str) -> None:
    evaluation = json.loads((run / scoring.EVALUATION).read_text())
    evaluation["class_names"] = ["a", "b", "c"]
    for arm, right in (("pretrained", (1, 4, 2)), ("random", (0, 3, 4))):
        of_arm = evaluation["scores"][arm]["finetuned_16"]
        of_arm["per_class"] = [[each, 4] for each in right]
        of_arm["confusion"] = [[0, 2, 2], [2, 1, 2], [0, 1, 1]]
    found = mistakes(evaluation)
    assert found is not None and found.measure == "fine-tuned accuracy at 16 px"
    told = [(c.name, c.num, c.right) for c in found.classes]
    assert told == [("a", 4, (1, 0)), ("c", 4, (2, 4)), ("b", 4, (4, 3))]
    assert found.confused == [("a", "c", 2, 4), ("c", "b", 2, 4), ("a", "b", 1, 4)]
    del evaluation["class_names"]
    assert mistakes(evaluation) is None
    seen = rows(section(page, "Where it errs"))
    assert seen[0] == ["class", "test images", "pretrained", "random"] and len(seen) == 4
    assert sum(int(row[1]) for row in seen[1:]) == evaluation["num_test"]
    right = evaluation["scores"]["pretrained"]["finetuned_16"]["correct"]
    assert sum(int(row[2].split("(")[1].rstrip(")")) for row in seen[1:]) == right


def test_long_lists_of_classes_are_folded_up(copy: Path) -> None:
    path = copy / scoring.EVALUATION
    evaluation = json.loads(path.read_text())
    evaluation["class_names"] = [f"class {i}" for i in range(13)]
    for arm in evaluation["scores"].values():
        arm["finetuned_16"]["per_class"] = [[0, 1]] * 13
        arm["finetuned_16"]["confusion"] = [[i, 0, 1] for i in range(1, 13)]
    path.write_text(json.dumps(evaluation))
    seen = section(write(copy).read_text(), "Where it errs")
    assert "<details><summary>2 more confusions" in seen and "<details><summary>All 13" in seen
    assert "class 12 taken for class 0: 1 of 1" in text("<body>" + seen)


def test_other_runs_on_the_same_images_stand_beside(copy: Path, run: Path) -> None:
    lone = write(copy).read_text()
    assert "Other runs" not in lone
    other = Path(shutil.copytree(copy, copy.with_name("other")))
    lines = (other / METRICS).read_text().splitlines()
    last = {**json.loads(lines[-1]), "knn_top1": 0.25}
    first = {**json.loads(lines[0]), "knn_top1": 0.75}
    told = [json.dumps(first), *lines[1:-1], json.dumps(last)]
    (other / METRICS).write_text("\n".join(told) + "\n")
    evaluation = json.loads((other / scoring.EVALUATION).read_text())
    evaluation["scores"]["pretrained"]["knn"]["correct"] = 0
    (other / scoring.EVALUATION).write_text(json.dumps(evaluation))
    elsewhere = Path(shutil.copytree(copy, copy.with_name("elsewhere")))
    started = json.loads((elsewhere / "environment.json").read_text())
    started["train_fingerprint"] = "of other images"
    (elsewhere / "environment.json").write_text(json.dumps(started))
    broken = Path(shutil.copytree(copy, copy.with_name("broken")))
    (broken / scoring.EVALUATION).write_text("[]")
    head, this, that, *none = rows(
        section(write(copy).read_text(), "Other runs on the same images")
    )
    assert not none and head[3:5] == ["kNN on training labels", "kNN accuracy on frozen features"]
    assert this[0] == "copy (this run) vit_micro, idmm" and that[0] == "other vit_micro, idmm"
    assert this[1] == that[1] == "2" and that[3] == "25.0 %"
    assert this[3] == f"{100 * Record(copy).metrics()[-1]['knn_top1']:.1f} %"
    assert that[4].startswith("0.0 %") and that[4].endswith("lower than this run")
    assert that[5].endswith("no difference can be claimed") and "run" not in this[5]


def test_where_many_differences_are_tested_it_is_said(copy: Path) -> None:
    """Three measures a run: with two others there are six tests."""
    told = "6 differences are tested here, each at 5 %: were there none at all, chance alone"
    for name in ("one", "two"):
        assert told not in write(copy).read_text()
        shutil.copytree(copy, copy.with_name(name))
    page = write(copy).read_text()
    assert f"{told} would still claim about 0.3." in page
    runs = [copy.with_name(name) for name in ("one", "two", copy.name)]
    assert told in as_text(compare(runs)) and told not in as_text(compare(runs[:2]))


def test_what_was_forecast_stands_beside_what_it_took(copy: Path) -> None:
    keep(copy, {"forecast_seconds": 41.7, "forecast_took": 44.0})
    (copy / "scratch-16" / FORECAST).write_text('{"forecast_seconds": "much"}')
    found = rows(section(write(copy).read_text(), "What it took"))
    by_name = {row[0]: row[1:] for row in found[1:]}
    assert by_name["copy"][-1] == "42 s for what took 44 s"
    assert by_name["scratch-16"][-1] == by_name["finetune-16"][-1] == "none"
    assert by_name["scratch-16"][:3] == ["random weights", "2 of 2", "16"]
    assert by_name["finetune-16"][0] == "pretrained weights"


def test_whatever_lines_hold_is_a_curve(copy: Path) -> None:
    lines = [{**line, "some_measure": 7.25} for line in Record(copy).metrics()]
    lines[0]["some_measure"] = None
    (copy / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    titles = re.findall(r"<title>(.*?), by epoch: (.*?)</title>", write(copy).read_text())
    told = {unescape(title): value for title, value in titles}
    assert told["some measure"] == "last 7.25"
    assert told["Norm of the gradients"] == f"last {lines[-1]['grad_norm']:.4g}"
    assert told["Learning rate"] == f"last {lines[-1]['lr']:.4g}"
    spread = 100 * lines[-1]["spread"]
    assert told["Features about their mean, share of their length"] == f"last {spread:.4g} %"
    tuned = Record(copy / "finetune-16").metrics()[-1]["lr"]
    assert told["Fine-tuning: learning rate"].startswith(f"finetune-16 {tuned:.4g}, ")
    assert not {"step", "epoch", "skipped", "test num"} & set(told)


def test_who_points_at_a_curve_is_told_its_values() -> None:
    series = [Series("a", [(1, 10.0), (2, 30.0)]), Series("b", [(2, 5.0), (4, 7.5)])]
    svg = str(chart("loss", series, unit=" %"))
    bands = re.findall(r'<g class="at"><rect x="([\d.]+)" width="([\d.]+)"', svg)
    places = [(float(x), float(width)) for x, width in bands]
    assert places[0][0] == LEFT and sum(places[-1]) == pytest.approx(RIGHT, abs=0.2)
    for (x, width), (after, _) in pairwise(places):
        assert x + width == pytest.approx(after, abs=0.2)
    told = [re.sub(r"<[^>]*>", "", g) for g in re.findall(r'<g class="at">.*?</g>', svg)]
    assert told == [
        "epoch 1: 10 % · none",
        "epoch 2: 30 % · 5 %",
        "epoch 4: none · 7.5 %",
    ]
    assert f'y2="{BOTTOM}"' in svg


def test_noise_in_every_picture_stays_below_five_megabytes() -> None:
    """The views' share is bounded by `MOST_BYTES`; beside them, sources and small pictures."""
    small = (ASKED * (1 + NEAREST) + 2 * WORST) * len(jpeg(noise(SIDE), SIDE))
    sources = 4 * 160 * 160 * 3 * 4 / 3
    assert MOST_BYTES * 4 / 3 + sources + small < 4_700_000


class Words(HTMLParser):
    """The words of a page, without those of its style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.found += data.split()


@needs_browser
def test_a_browser_shows_it_all_and_asks_for_nothing(run: Path, page: str, tmp_path: Path) -> None:
    # Without the policy nothing is refused, and whatever the page wants is asked for.
    free = tmp_path / "free.html"
    free.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page))
    for number, path in enumerate((run / "report.html", free)):
        seen = open_page(path.as_uri(), tmp_path / f"browser-{number}")
        assert seen.console == []
        assert {url for url in seen.asked if not url.startswith("data:")} <= {path.as_uri()}
        assert Words(seen.dom).found == Words(page).found
        assert seen.dom.count("<svg") == page.count("<svg")


@needs_browser
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """That a page asks for something, or complains."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>missing()</script>")
    seen = open_page(bad.as_uri(), tmp_path / "browser")
    assert "http://127.0.0.1:9/x.png" in seen.asked
    assert any("missing is not defined" in line for line in seen.console)


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(page: str, tmp_path: Path, width: int) -> None:
    """A script around the page measures it; tables that are wider scroll by themselves."""
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    frame = tmp_path / "frame.html"  # a window has a least width
    frame.write_text(MEASURE.format(width, escape(free)))
    seen = open_page(frame.as_uri(), tmp_path / "browser")
    inner, whole = map(int, re.findall(r"measured (\d+) (\d+)", seen.dom)[0])
    assert whole <= inner and width - 20 <= inner <= width


MEASURE = """<iframe width="{}" height="900" style="border: 0" srcdoc="{}"></iframe>
<script>
onload = () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = `measured ${{root.clientWidth}} ${{root.scrollWidth}}`;
}};
</script>"""


def test_read_live_it_renews_itself_and_looks_at_no_image_before_the_end(copy: Path) -> None:
    lines = (copy / METRICS).read_text().splitlines(keepends=True)
    live = Page(copy)
    whole = live.text(renew=5)
    assert '<meta http-equiv="refresh" content="5">' in whole and "Worst fitted" in whole
    (copy / METRICS).write_text(lines[0])
    shutil.rmtree(Record(copy).result)
    part = live.text(renew=5)
    assert "looked at once this run is finished" in part and "Worst fitted" not in part
    assert 'http-equiv="refresh"' not in live.text()
