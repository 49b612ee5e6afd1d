"""Runs that learn nothing are said to; healthy ones are not."""

from typing import Any

import pytest
from synthetic import SMALL, assembled
from torch import Tensor, nn
from toy_runs import RUN, recipe

from fastidmm import stages
from fastidmm.backbones.build import Encoder
from fastidmm.batch import Method
from fastidmm.record import Record
from fastidmm.registry import METHODS
from fastidmm.watch import Watch


def lines(losses: list[float], every: int = 1) -> list[dict[str, Any]]:
    return [{"step": every * (n + 1), "loss": loss} for n, loss in enumerate(losses)]


def said(watch: Watch, told: list[dict[str, Any]]) -> list[str]:
    return [sentence for line in told for sentence in watch.see(line)]


@pytest.mark.parametrize("every", [1, 10, 7])
def test_a_loss_that_stays_where_guessing_puts_it(every: int) -> None:
    """For 50 steps past the warm-up, or above; said once."""
    stuck = [6.0, 6.3, 5.9941] * 40
    assert len(said(Watch(6.0, 0), lines(stuck, every))) == 1
    (sentence,) = said(Watch(6.0, 30), lines(stuck, every))
    first = {1: 31, 10: 40, 7: 35 + 6}[every]
    assert sentence.startswith(f"warning: step {first + 50}: for 50 steps the loss has been 6.")
    assert "no lower than guessing's 6.000" in sentence
    assert not said(Watch(6.0, 71), lines(stuck)) and not said(Watch(None, 0), lines(stuck))


@pytest.mark.parametrize(("low", "well"), [(6 * 0.94, True), (6 * 0.96, False)])
def test_what_counts_is_the_mean_of_fifty_steps(low: float, well: bool) -> None:
    """51 losses, of which one is lower: by 0.12 or by 0.08 % in the mean."""
    told = lines(([6.0] * 50 + [low]) * 4)
    assert bool(said(Watch(6.0, 0), told)) == (not well)
    assert not said(Watch(6.0, 0), [{"step": n, "loss": None} for n in range(200)])


def test_features_that_are_all_alike_are_said_once() -> None:
    watch = Watch(None, 0)
    told = [{"step": n, "loss": 1.0, "spread": s} for n, s in enumerate((0.3, 0.0011, 0.0009, 0.0))]
    (sentence,) = said(watch, told)
    assert "step 2" in sentence and "collapsed" in sentence and "0.09 %" in sentence


def blind(method: Method) -> None:
    """Make every image, class and key the same to a method: zero all but its backbones."""
    for name, tensor in method.state_dict().items():
        if not name.startswith(("backbone.", "teacher.backbone.")):
            tensor.zero_()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_guessing_costs_what_a_method_says(name: str) -> None:
    """The loss of heads that say nothing; features of length zero are near to none."""
    method, loader = assembled(name, num=7, batch_size=7)
    blind(method)
    expected = method.guessing()
    if expected is None:
        pytest.skip("not known of this method")
    assert method(loader.batch(0)).total.item() == pytest.approx(expected, rel=1e-6)


def settings(name: str) -> Any:
    """Over sixty steps, a look each epoch."""
    tables = recipe(method=name, epochs=22, knn_every=1, checkpoint_every=22)
    assert SMALL.get(name, {}).items() <= tables.method.model_dump().items()
    return tables


@pytest.mark.parametrize("name", sorted(METHODS))
def test_healthy_runs_are_not_warned_of(
    name: str, toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.pretrain(settings(name), "run")
    assert "warning" not in capsys.readouterr().err
    spreads = [line["spread"] for line in Record(RUN).metrics() if "spread" in line]
    assert len(spreads) == 22 and min(spreads) > 0.01


def test_a_constant_encoder_is_noticed(
    toy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It can tell no image from another: both are said, at once and after fifty steps."""

    def constant(self: Encoder, images: Tensor) -> Tensor:
        some = next(self.parameters())
        return images.new_zeros(len(images), self.num_features) + some.flatten()[0] * 0 + 0.5

    monkeypatch.setattr(Encoder, "forward", constant)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: nn.init.zeros_(tensor))
    stages.pretrain(settings("idmm"), "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(told) == 2
    assert "step 3: all images look alike" in told[0] and "nothing is learnt" in told[1]
