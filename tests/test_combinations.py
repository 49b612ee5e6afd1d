"""Every registered method on every registered backbone, and its golden losses on the smallest."""

import math
import os
from pathlib import Path

import pytest
import torch
from synthetic import assembled
from toy_runs import RUN, losses, recipe

from fastidmm import stages
from fastidmm.registry import BACKBONES, METHODS

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_every_backbone(name: str, backbone: str) -> None:
    method, loader = assembled(name, backbone=backbone, num=3, batch_size=3, drop_path=0.0)
    batch = loader.batch(0)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-4, fused=True)
    found: list[float] = []
    # The worse of the first two: the least may be there before the first step, by luck.
    while len(found) < 3 or (len(found) < 20 and found[-1] >= 0.97 * max(found[:2])):
        optimizer.zero_grad()
        loss = method(batch).total
        loss.backward()
        gradients = [p.grad for p in method.backbone.parameters() if p.requires_grad]
        assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
        optimizer.step()
        found.append(loss.item())
    assert all(map(math.isfinite, found))
    assert found[-1] < 0.97 * max(found[:2]), found


@pytest.mark.parametrize("name", list(METHODS))
def test_an_epoch_may_end_in_one_image(name: str) -> None:
    """No statistic of one row makes a loss or a gradient that is not finite."""
    method, loader = assembled(name, num=5, batch_size=4)
    batch = loader.batch(1)
    assert batch.num_images == 1
    loss = method(batch).total
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "idmm"])
def test_twenty_golden_losses_of_every_method(name: str, toy: str) -> None:
    """As `test_golden_losses`, which has IDMM's and how to change them."""
    stages.pretrain(recipe(method=name), "run")
    found, path = losses(RUN)[:20], GOLDEN / f"{name}_vit_micro.txt"
    if os.environ.get("FASTIDMM_WRITE_GOLDEN"):
        path.write_text("".join(f"{loss:.6f}\n" for loss in found))
    how = f"FASTIDMM_WRITE_GOLDEN=1 make test ARGS=\"-k 'golden and {name}'\""
    assert path.is_file(), f"{path.name} is missing: write it by {how}"
    golden = [float(line) for line in path.read_text().split()]
    assert len(golden) == 20 and found == pytest.approx(golden, rel=1e-4)
