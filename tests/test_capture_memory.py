"""Memory of captured steps: what their graphs hold is given back where something else needs it."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from recorded import Recorded
from test_capture import parts_of, plain_operations, plainly, told  # noqa: F401
from torch import Tensor

from fastidmm import capture
from fastidmm.batch import Batch
from fastidmm.capture import Captured
from fastidmm.loaders.planned import Planned
from fastidmm.step import step


def test_short_memory_takes_what_graphs_hold_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the batch is cut, and graphs of larger parts go; no number changes but by rounding."""
    plain, caught = (parts_of("idmm", tmp_path / name) for name in ("plain", "caught"))
    captured, kind, fits = Captured(caught, Recorded), type(caught.method), [True]
    forward = kind.forward

    def scarce(self: object, batch: Batch) -> object:
        if not fits[-1] and batch.num_crops > 4:
            fits[-1] = bool(captured.num_kinds)  # a graph's memory is enough for one more pass
            raise torch.OutOfMemoryError("on purpose")
        return forward(self, batch)  # type: ignore[arg-type]

    found, expected = [], plainly(plain, 12)
    monkeypatch.setattr(kind, "forward", scarce)
    kinds = []
    for number in range(12):
        fits.append(number not in (5, 9))  # a tail's second, which is not captured yet; a full one
        if number == 9:
            captured.release()
        found.append(told(captured.step(number)))
        kinds.append((captured.num_kinds, caught.state.micro_batches))
    assert kinds[4:6] == [(1, 1), (0, 1)] and kinds[8] == (2, 1)
    assert kinds[9][1] == 4 and kinds[10][1] == 4
    assert found[:9] == expected[:9]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_other_parts_of_a_batch_warm_up_before_they_are_captured(tmp_path: Path) -> None:
    """A kernel that is compiled within a capture is refused there."""
    parts = parts_of("idmm", tmp_path / "run")
    captured = Captured(parts, Recorded)
    for number in range(9):
        captured.step(number)
    assert captured.num_kinds == 2
    parts.state.micro_batches = 2
    graphs = []
    for number in range(9, 18):
        captured.step(number)
        graphs.append(captured.num_kinds)
    assert graphs == [0] * 3 + [1] * 5 + [2]


def test_views_take_the_memory_of_graphs_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, caught = (parts_of("idmm", tmp_path / name) for name in ("plain", "caught"))
    captured, views_of, held = Captured(caught, Recorded), Captured._views, []

    def scarce(self: Captured, number: int, counter: Tensor | None = None) -> Batch:
        if number == 5 and captured.num_kinds:  # a tail's second, which is not captured yet
            held.append(captured.num_kinds)
            raise torch.OutOfMemoryError("on purpose")
        return views_of(self, number, counter)

    monkeypatch.setattr(Captured, "_views", scarce)
    found = [told(captured.step(number)) for number in range(6)]
    assert found == plainly(plain, 6) and held and captured.is_emptied


def test_a_graph_is_not_replayed_whose_memory_went_for_its_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step back, whose views were not made ahead."""
    plain = parts_of("idmm", tmp_path / "plain")
    caught = parts_of("idmm", tmp_path / "caught", views_ahead=True)
    captured, views_of, short = Captured(caught, Recorded), Captured._views, [False]

    def scarce(self: Captured, number: int, counter: Tensor | None = None) -> Batch:
        if short[-1] and captured.num_kinds:
            raise torch.OutOfMemoryError("on purpose")
        return views_of(self, number, counter)

    replays, replay = list[Recorded](), Recorded.replay

    def noted(self: Recorded) -> None:
        replays.append(self)
        replay(self)

    monkeypatch.setattr(Captured, "_views", scarce)
    monkeypatch.setattr(Recorded, "replay", noted)
    assert isinstance(plain.loader, Planned)
    for place, number in enumerate([*range(9), 6]):
        short.append(place == 9)
        before = len(replays)
        found = told(captured.step(number))
        assert found == told(step(plain, plain.loader.batch(number))), (place, number)
        assert (len(replays) > before) == (6 <= place < 9)
    assert not captured.num_kinds


def test_an_evaluation_takes_the_memory_of_graphs_where_there_is_no_other(tmp_path: Path) -> None:
    parts = parts_of("idmm", tmp_path / "run")
    captured = Captured(parts, Recorded)
    for number in range(9):
        captured.step(number)
    short = iter([True, False])

    def work() -> int:
        if captured.num_kinds or next(short):
            raise torch.OutOfMemoryError("on purpose")
        return 3

    with pytest.raises(torch.OutOfMemoryError):  # of what is short of memory without graphs, too
        parts.with_room(work)
    assert not captured.num_kinds and parts.with_room(work) == 3


def test_nothing_of_a_run_outlives_its_steps(tmp_path: Path) -> None:
    """Nor waits for Python to look for circles: the next stage needs the memory."""
    parts = parts_of("idmm", tmp_path / "run")
    captured = Captured(parts, Recorded)
    for number in range(5):
        captured.step(number)
    weight = weakref.ref(parts.method.get_parameter("backbone.model.norm.weight"))
    gone = weakref.ref(captured)
    gc.collect()
    gc.disable()
    try:
        captured.close()
        del captured
        assert gone() is None and parts.with_room(lambda: 1) == 1 and not parts.release()
        del parts
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ends", [True, False])
def test_what_stands_in_the_way_of_a_graph_is_said_first(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the capture could be ended or not, and the pool is not kept for nobody."""
    done: list[object] = []

    class Graph:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            if not ends:
                raise RuntimeError("the capture was invalidated")

    for name, answer in {
        "CUDAGraph": Graph, "graph": Graph, "current_stream": lambda: "before",
        "current_device": lambda: 0, "set_stream": done.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: done.append((name, *given)))
    graph = capture.CudaGraph("pool")

    def work() -> None:
        try:
            raise KeyError("met on the way")
        except KeyError:
            raise ValueError("what stood in the way")  # noqa: B904

    with pytest.raises(ValueError, match="what stood in the way"):
        graph.record(work)
    left = ["before", ("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool")]
    assert done == ([] if ends else left)
    if not ends:
        with pytest.raises(RuntimeError, match="invalidated"):
            graph.record(lambda: None)
    else:
        assert graph.record(lambda: 7) == 7
