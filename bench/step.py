"""Where the time of a training step goes, and how much of the GPU's arithmetic it uses.

    fastidmm bench step [--backbone deit_tiny] [--resolution 112] [--set run.views_ahead=true] ...

Pictures are made up and in memory already (`loader resident`). The parts are measured inside whole
steps, by events of the GPU or on the clock of a CPU: `views` with the plan, `forward` of the
backbone, `loss` with the head, `backward`, `update`. `step` is measured without those marks, many
in a row and waited for at the end, as training makes it: on a GPU captured, and `not captured` has
a row of its own. `one batch` is the step on one batch again and again, so that the difference is
what views cost. They take turns.

MFU is 3 times the FLOP of a forward pass (torch's counter, one image on the CPU) over the time of a
step and the GPU's dense bf16 peak by its data sheet. Counted backward passes would be too many:
torch takes grouped convolutions for full ones there.
"""

import copy
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastidmm.assemble import Parts
from fastidmm.batch import Batch, Method
from fastidmm.bench.figures import Rows, measured, result, stall
from fastidmm.bench.made import noise, workplace
from fastidmm.bench.training import assembled
from fastidmm.capture import Captured
from fastidmm.errors import UsageError
from fastidmm.machine import name_of, synchronize
from fastidmm.recipe import with_settings
from fastidmm.step import Stepped, advance, backward, step

NUM = 2040  # rows, as the Flowers have: the head has an output for each
PARTS = ("views", "forward", "loss", "backward", "update")
# Dense bf16 FLOP/s by the data sheets, of GPUs by their own names.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}
Times = dict[str, list[float]]  # seconds of a step, or of a part of it


def measure(
    device: torch.device,
    *,
    quick: bool = False,
    backbone: str | None = None,
    method: str = "idmm",
    resolution: int = 112,
    batch_size: int | None = None,
    settings: Sequence[str] = (),
    trace: Path | None = None,
) -> dict[str, Any]:
    """Time steps and their parts; the default is the paper's DeiT-Tiny, on a CPU a small ViT.

    `settings` of the recipe, as `--set` takes them.
    """
    gpu = device.type == "cuda"
    repeats, steps = (3 if quick else 5), (20 if gpu else 1)
    size = batch_size or (256 if gpu else 8)
    run = {
        "dataset": "noise", "backbone": backbone or ("deit_tiny" if gpu else "vit_micro"),
        "method": method, "resolution": resolution, "batch_size": size, "loader": "resident",
        "device": str(device),
    }  # fmt: skip
    tables = changed(run, settings)
    # 240 MB of pictures on a GPU: several times what its caches hold, and soon drawn.
    store = noise(NUM, 256 if gpu else 2 * size)
    with workplace() as work:
        parts = assembled(tables, store, work)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        captured = Captured(parts) if gpu and parts.recipe.run.capture else None
        warm_up(parts, captured)
        peak_bytes = torch.cuda.max_memory_reserved() if gpu else None  # as a run has it by now
        times = times_of(parts, repeats, steps, captured)
        cut = {"micro_batches": parts.state.micro_batches}
        if captured is not None:
            cut["captured_kinds"] = captured.num_kinds
            captured.close()
        if trace is not None:
            write_trace(parts, trace)
        flop = flop_of_image(parts.method, next(batches(parts))) * size
    peak = PEAKS.get(name_of(device)) if parts.dtype == torch.bfloat16 else None
    crops = size * sum(group.count for group in parts.method.views)
    rows = rows_of(times, images=size, crops=crops, flop=flop, peak=peak)
    rows["step"]["gpu_mb"] = peak_bytes and peak_bytes / 1e6
    lost = measured([stall(*pair) for pair in zip(times["one batch"], times["step"], strict=True)])
    return result(
        "step",
        f"{method}, {run['backbone']}, {size} images of {resolution} px, {name_of(device)}",
        {"step": rows},
        settings=run
        | cut
        | {"set": list(settings), "repeats": repeats, "steps": steps}
        | {"flop": flop, "peak_flops": peak},
        notes=[f"{flop / 1e9:,.0f} GFLOP a step; {waited(lost)}"],
    )


def waited(lost: dict[str, Any]) -> str:
    """What plan and views take of a step's time, in words, from shares as `measured` gives them."""
    if lost["low"] <= 0:  # less than one measurement is from another
        return "plan and views take nothing of its time that can be measured"
    span = f"{lost['low']:.1%} to {lost['high']:.1%}"
    return f"plan and views take {lost['median']:.1%} of its time ({span})"


def changed(run: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Tables of a recipe with settings; those that are arguments here cannot be changed."""
    tables = with_settings({"run": run}, {}, list(settings))
    for key, value in run.items():
        if tables["run"][key] != value:
            raise UsageError(f"bench step has run.{key} {value}: --set cannot change it.")
    return tables


def rows_of(times: Times, *, images: int, crops: int, flop: float, peak: float | None) -> Rows:
    """The table of a step of so many images, crops and FLOP; `peak` in FLOP/s, if known."""
    rows: Rows = {}
    for name, seconds in times.items():
        spent = measured([1000 * s for s in seconds])
        rows[name] = {"status": "ok", "milliseconds": spent}
    whole = times["step"]
    rows["step"] |= {
        "images_per_second": measured([images / s for s in whole]),
        "crops_per_second": measured([crops / s for s in whole]),
        "mfu": peak and measured([flop / s / peak for s in whole]),
    }
    total = sum(rows[name]["milliseconds"]["median"] for name in PARTS)
    for name in PARTS:
        rows[name]["share"] = rows[name]["milliseconds"]["median"] / total
    return rows


def batches(parts: Parts) -> Iterator[Batch]:
    """A batch for every step, made when it is asked for: nothing runs beside the step."""
    for number in count():
        yield parts.with_room(partial(parts.loader.batch, number))


def warm_up(parts: Parts, captured: Captured | None) -> None:
    """Steps until nothing new comes: a kind is captured when it comes a third time."""
    if captured is None:
        step(parts, next(batches(parts)))
        return
    turns = 2 if any(group.mix == "alternate" for group in parts.method.views) else 1
    for number in range(3 * turns * parts.loader.steps_per_epoch):
        captured.step(number)


def times_of(parts: Parts, repeats: int, steps: int, captured: Captured | None) -> Times:
    """Seconds of a whole step, of one on the same batch again, and of each part, by turns."""
    device = parts.store.device
    coming = batches(parts)
    still = next(coming)

    def plain() -> Stepped:
        return step(parts, next(coming))

    arms: dict[str, Callable[[], object]] = {"step": plain, "one batch": lambda: step(parts, still)}
    if captured is not None:
        numbers = count()
        arms = {
            "step": lambda: captured.step(next(numbers)),
            "one batch": lambda: captured.step(0, still),
            "not captured": plain,
        }
    found: Times = {name: [] for name in (*arms, *PARTS)}
    for repeat in range(-1, repeats):
        spent = {}
        for name, work in arms.items():
            if captured is not None and captured.is_emptied and name == "step":
                warm_up(parts, captured)  # graphs gave their memory to what came before
            spent[name] = _mean(device, steps, work)
        spent |= _parts(parts, coming, steps)
        if repeat >= 0:
            for name, seconds in spent.items():
                found[name].append(seconds)
    return found


def _mean(device: torch.device, num: int, work: Callable[[], object]) -> float:
    """Seconds of one of `num` calls in a row, waited for at both ends."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(num):
        work()
    synchronize(device)
    return (time.perf_counter() - began) / num


def _parts(parts: Parts, coming: Iterator[Batch], num: int) -> dict[str, float]:
    """Mean seconds of each part over `num` steps."""
    marks = Marks(parts.store.device)
    with marks.within(parts.method):
        for _ in range(num):
            marks("")
            batch = next(coming)
            marks("views")
            loss = backward(parts, batch)
            marks("backward")
            advance(parts, batch, loss)
            marks("update")
    synchronize(parts.store.device)
    return {name: seconds / num for name, seconds in marks.seconds().items()}


class Marks:
    """Moments of a step, each named by what ends there."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.made: list[tuple[str, Any]] = []

    def __call__(self, ended: str) -> None:
        """Note this moment, at which `ended` does."""
        moment: Any = time.perf_counter()
        if self.gpu:
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.made.append((ended, moment))

    @contextmanager
    def within(self, method: Method) -> Iterator[None]:
        """Mark the ends of the backbone and of the loss, too."""
        hooks = [
            # In a batch that is cut, the next piece begins when the last one's gradients are there.
            method.register_forward_pre_hook(lambda *_: self._piece()),
            method.backbone.register_forward_hook(lambda *_: self("forward")),
            method.register_forward_hook(lambda *_: self("loss")),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _piece(self) -> None:
        if self.made[-1][0] == "loss":
            self("backward")

    def seconds(self) -> dict[str, float]:
        """Of every name, all its stretches together; the GPU must have come to the last."""
        found: dict[str, float] = defaultdict(float)
        for (_, begin), (name, end) in pairwise(self.made):
            found[name] += begin.elapsed_time(end) / 1000 if self.gpu else end - begin
        found.pop("", None)  # between two steps
        return found


def flop_of_image(method: Method, batch: Batch) -> float:
    """FLOP of the forward and backward passes of an image's crops: 3 times the forward pass's."""
    # On the CPU, where attention and loss are the products that they are defined by.
    alone = copy.deepcopy(method).eval().cpu()  # a compiled copy would be of the original
    image = replace(batch.micro(batch.num_images)[0].changed(_full), step=0)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        alone(image)
    return 3.0 * counter.get_total_flops()


def _full(tensor: Tensor) -> Tensor:
    """On the CPU, numbers with a point in fp32, as the weights are."""
    tensor = tensor.cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def write_trace(parts: Parts, path: Path) -> None:
    """Three steps as chrome://tracing and Perfetto show them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if parts.store.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    coming = batches(parts)
    # Torch 2.11 warns that it would keep one cycle of several otherwise; there is one.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(3):
            step(parts, next(coming))
        synchronize(parts.store.device)
    aside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        profile.export_chrome_trace(str(aside))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
