"""The step's benchmark: its arithmetic, its marks, its FLOP, and a small run."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import assembled
from test_bench import typed

from fastidmm.assemble import Parts
from fastidmm.bench import step as bench

CPU = torch.device("cpu")


def test_rows_of_made_up_times() -> None:
    times = {"step": [0.1, 0.2, 0.4], "one batch": [0.05] * 3}
    times |= {name: [0.01 * place] * 3 for place, name in enumerate(bench.PARTS, 1)}
    rows = bench.rows_of(times, images=256, crops=1536, flop=2e12, peak=1e14)
    assert rows["step"]["milliseconds"]["median"] == 200
    assert rows["step"]["images_per_second"]["raw"] == [2560, 1280, 640]
    assert rows["step"]["crops_per_second"]["median"] == 7680
    assert rows["step"]["mfu"]["raw"] == pytest.approx([0.2, 0.1, 0.05])
    shares = [rows[name]["share"] for name in bench.PARTS]
    assert shares == pytest.approx([place / 15 for place in range(1, 6)])
    assert rows["views"]["milliseconds"]["median"] == 10
    unknown = bench.rows_of(times, images=256, crops=1536, flop=2e12, peak=None)
    assert unknown["step"]["mfu"] is None


def test_what_views_take_is_of_time_and_never_less_than_nothing() -> None:
    shares = {"median": 0.25, "low": 0.2, "high": 0.3}
    assert bench.waited(shares) == "plan and views take 25.0% of its time (20.0% to 30.0%)"
    assert "nothing of its time that can be" in bench.waited({**shares, "low": -0.004})


def test_marks_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)) ** 2)
    marks = bench.Marks(CPU)
    for name in ("", "views", "forward", "views", "", "views"):
        marks(name)
    # At 0, 1, 4, 9, 16 and 25; what passes between two steps is nobody's.
    assert marks.seconds() == {"views": 1 + 5 + 9, "forward": 3}


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_step_is_marked_where_its_parts_end(pieces: int) -> None:
    method, loader = assembled("idmm")
    marks = bench.Marks(CPU)
    batch = loader.batch(0)
    marks("views")
    with marks.within(method):
        for piece in batch.micro(pieces):
            method(piece).total.backward()
        marks("backward")
    ends = [name for name, _ in marks.made]
    assert ends == ["views", *["forward", "loss", "backward"] * pieces]
    method(batch)
    assert len(marks.made) == len(ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["idmm", "supervised"])
def test_flop_are_those_of_the_products(name: str, dtype: torch.dtype) -> None:
    method, loader = assembled(name)
    loader.dtype = dtype  # of the views, as mixed precision has them
    crops = loader.batch(0).num_crops // loader.batch(0).num_images
    out = 7 if name == "idmm" else 3
    # vit_micro at 32 px: 16 patches of 8 px and a class token, width 128, 4 blocks.
    tokens, width = 17, 128
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    unread = (tokens - 1) * (10 * width**2 + 2 * tokens * width)  # of the last block
    products = 16 * 3 * 64 * width + 4 * block - unread + width * out
    assert bench.flop_of_image(method, loader.batch(0)) == 3 * 2 * crops * products


def test_a_gpu_has_the_peak_of_its_own_name() -> None:
    assert bench.PEAKS["NVIDIA H200"] == bench.PEAKS["NVIDIA H100 80GB HBM3"] == 989e12
    assert "NVIDIA H200 MIG 1g.18gb" not in bench.PEAKS
    assert all(1e13 < peak < 1e16 for peak in bench.PEAKS.values())


def test_a_step_is_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--resolution", "16", "--batch-size", "3", "--device", "cpu", "--quick"]
    trace = ["--trace", "trace.json", "--json", "step.json", "--set", "run.precision=fp32"]
    assert typed(monkeypatch, "bench", "step", *words, *trace) == 0
    found: dict[str, Any] = json.loads(Path("step.json").read_text())
    rows = found["tables"]["step"]
    assert list(rows) == ["step", "one batch", *bench.PARTS]
    for name, row in rows.items():
        assert row["milliseconds"]["low"] > 0 and len(row["milliseconds"]["raw"]) == 3, name
    whole = rows["step"]
    assert whole["mfu"] is None and whole["gpu_mb"] is None
    rates = [whole[key]["median"] for key in ("images_per_second", "crops_per_second")]
    assert rates[1] / rates[0] == pytest.approx(6, rel=1e-4)
    assert sum(rows[name]["share"] for name in bench.PARTS) == pytest.approx(1, rel=1e-4)
    assert found["settings"]["backbone"] == "vit_micro" and found["settings"]["flop"] > 0
    assert found["settings"]["set"] == ["run.precision=fp32"]
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)
    assert "GFLOP a step" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["step.json", "trace.json"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.loader=torch", "bench step has run.loader resident: --set cannot change it."),
        ("run.views_ahaed=true", "did you mean 'views_ahead'?"),
    ],
)
def test_settings_that_a_step_cannot_have_are_refused(
    setting: str, said: str, home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert typed(monkeypatch, "bench", "step", "--device", "cpu", "--set", setting) == 2
    assert said in capsys.readouterr().err


def test_settings_reach_the_step(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(Exception):
        pass

    def found(parts: Parts, *_: Any) -> None:
        assert parts.recipe.run.views_ahead and parts.recipe.backbone.drop_path == 0.25
        raise Found

    monkeypatch.setattr(bench, "times_of", found)
    with pytest.raises(Found):
        bench.measure(CPU, settings=["run.views_ahead=true", "backbone.drop_path=0.25"])
