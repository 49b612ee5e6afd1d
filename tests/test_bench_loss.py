"""The loss benchmark's arms compute one and the same loss; what is missing is said."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loss_truth import truth
from torch.nn.functional import cross_entropy

from fastidmm.bench import loss as bench
from fastidmm.bench.figures import text

CPU = torch.device("cpu")


def nll(z: Any, weight: Any, rows: Any, *, reduction: str, filter_eps: float | None) -> Any:
    """What cut-cross-entropy answers, and the setting that makes its gradients right."""
    assert filter_eps is None
    return cross_entropy(z.float() @ weight.float().T, rows, reduction=reduction)


def test_all_arms_are_one_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", SimpleNamespace(linear_cross_entropy=nll))
    case = bench.made((7, 33, 16), CPU)
    lam = torch.full((7,), bench.KEPT)
    z, weight, rows, partner = (t.detach() for t in case)
    true = truth(z, weight, rows, partner, lam, smoothing=bench.SMOOTHING)
    made = {name: make() for name, make in bench.arms(CPU)}
    made |= {"closed form": bench.closed_form, "cut": bench.cut()}
    assert {"fastidmm", "eager, soft target", "eager, smoothed twice"} < set(made)
    for name, arm in made.items():
        torch.testing.assert_close(arm(case).double(), true.loss, rtol=1e-5, atol=1e-5, msg=name)
        assert all(v < 1e-5 for v in bench.gradient_error(arm, case).values()), name
    half = bench.gradient_error(lambda c: 0.5 * bench.ours(c), case)
    assert half["error_z"] == pytest.approx(0.5, rel=1e-4)
    assert half["error_weight"] == pytest.approx(0.5, rel=1e-4)


def test_a_run_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CPU's run")

    def broken() -> bench.Arm:
        raise ValueError("no such loss\nat all")

    arms = list(bench.arms(CPU))
    more = [("cut-cross-entropy", bench.cut), ("broken", broken)]
    monkeypatch.setattr(bench, "arms", lambda _: [*arms, *more])
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    found = bench.measure(CPU, rounds=4, shapes=[(5, 20, 16)])
    rows = found["tables"]["B = 5, N = 20, D = 16"]
    for name in ("fastidmm", "eager, soft target", "eager, smoothed twice", "floor"):
        eager = rows[name]["milliseconds"]
        assert rows[name]["status"] == "ok" and len(eager["raw"]) == 4
        assert min(eager["raw"]) <= eager["low"] <= eager["median"] <= max(eager["raw"])
    assert rows["cut-cross-entropy"]["status"].startswith("missing: import of cut_cross_entropy")
    assert rows["cut-cross-entropy"]["status"].endswith("pip install 'fastidmm[bench]'")
    assert rows["broken"] == {"status": "failed: ValueError: no such loss"}
    lines = text(found).splitlines()
    assert any(line.startswith("fastidmm ") and "e-" in line for line in lines)
    assert any(line.startswith("broken ") and "no such loss" in line for line in lines)
