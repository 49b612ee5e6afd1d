"""Ranks that torchrun begins anew after one was killed go on with the run that they began."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from forks import PRETRAIN, Bench, bench, start
from ranked import free_port
from ranks import losses, ranks
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from toy_runs import Killed, kill_before_update, recipe

from fastidmm import optim, step
from fastidmm.__main__ import main
from fastidmm.errors import UsageError
from fastidmm.recipe import Recipe
from fastidmm.record import Record
from fastidmm.runs import apart
from fastidmm.stages import finetune, pretrain

UNNAMED = PRETRAIN.replace("--run run ", "").replace("--epochs 4", "--epochs 2")
NAME = "toy_vit_micro_idmm"


@pytest.fixture(scope="module")
def work() -> Iterator[Bench]:
    """A dataset of 32 photographs; all that children import is imported."""
    with bench() as made:
        yield made


def torchrun() -> None:
    """What `torchrun --nproc-per-node 2 --max-restarts 1 -m fastidmm ...` does; forks no import."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, start_method="fork",
        rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{free_port()}", rdzv_configs={"rank": 0},
        run_id="none", local_addr="127.0.0.1",
    )  # fmt: skip
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    elastic_launch(config, rank)()
    os._exit(0)


def rank() -> None:
    """Be a rank of it, killed at some step the first time if it is the second."""
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_oneself_at(6)
    main()


def kill_oneself_at(number: int) -> None:
    """In the middle of that step."""
    calls, update = iter(range(number)), optim.update

    def dying(*args: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*args)

    mock.patch.object(step, "update", dying).start()


def test_a_run_whose_rank_is_killed_ends_by_itself_as_if_it_had_not(work: Bench) -> None:
    """To the bit, in its own folder, beside one of the same recipe that is not this launch's."""
    place = work.work / "anew"
    place.mkdir()
    assert [child.status() for child in ranks(2, UNNAMED, place)] == [0, 0]
    child = start(f"{UNNAMED} --device cpu", place, torchrun)
    assert child.status() == 0, (place / "said").read_text()
    child.gone(5)
    words = (place / "said").read_text()
    assert words.count(f"begun anew by torchrun: runs/{NAME}-2 goes on") == 1, words
    assert sorted(path.name for path in (place / "runs").iterdir()) == [NAME, f"{NAME}-2"]
    assert Record(place / "runs" / f"{NAME}-2").finished
    assert losses(place / "runs" / f"{NAME}-2") == losses(place / "runs" / NAME)


def begun_by(monkeypatch: pytest.MonkeyPatch, launch: str, restarts: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))


def killed(monkeypatch: pytest.MonkeyPatch, made: Recipe, run: str | None = None) -> None:
    """Pretrain up to the sixth step, in a launch's first attempt."""
    begun_by(monkeypatch, "mine", 0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before_update(patch, 5)
        pretrain(made, run)


def test_it_goes_on_where_all_says_that_it_is_the_same(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is refused, by the sentence of a name that is taken, where anything does not."""
    made = recipe(device="cpu", epochs=2)
    killed(monkeypatch, made, "run")
    for launch, restarts, other in (
        ("mine", 0, made),
        ("another", 1, made),
        ("mine", 1, recipe(device="cpu", epochs=2, seed=1)),
    ):
        begun_by(monkeypatch, launch, restarts)
        with pytest.raises(UsageError, match="`fastidmm resume runs/run` goes on with it"):
            pretrain(other, "run")
    begun_by(monkeypatch, "mine", 1)
    assert pretrain(made, "run")["steps"] == 6
    assert pretrain(made, "run")["steps"] == 6  # `run` comes by here when a later stage was killed
    assert len(list(Path("runs").iterdir())) == 1


def test_folders_with_numbers_and_stages_are_found_again(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(device="cpu", epochs=2)
    for launch in ("mine", "another"):
        begun_by(monkeypatch, launch, 0)
        pretrain(made, None)
    assert sorted(path.name for path in Path("runs").iterdir()) == [NAME, f"{NAME}-2"]
    begun_by(monkeypatch, "mine", 1)
    assert pretrain(made, None)["run"] == f"runs/{NAME}"
    begun_by(monkeypatch, "third", 1)
    assert pretrain(made, None)["run"] == f"runs/{NAME}-3"
    stage = {"run.epochs": 2}
    folders = []
    for restarts in (0, 0, 1):
        begun_by(monkeypatch, "mine", restarts)
        folders.append(finetune(Path(f"runs/{NAME}"), stage, [])["run"])
    assert [Path(folder).name for folder in folders] == [
        "finetune-16", "finetune-16-2", "finetune-16-2",
    ]  # fmt: skip
    found = apart(Path(f"runs/{NAME}"), Path(f"runs/{NAME}-2"))
    assert found == {"recipe": {}, "environment": {}}
