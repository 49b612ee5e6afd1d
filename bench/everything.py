"""Every subject of `fastidmm bench` in a row; one that fails does not stop the others."""

from collections.abc import Callable
from typing import Any

import torch

from fastidmm.bench import loader, loss, prepare, step, views
from fastidmm.bench.figures import result
from fastidmm.bench.surroundings import surroundings
from fastidmm.progress import say

SUBJECTS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "loader": lambda device, quick: loader.measure(device, quick=quick),
    "views": lambda device, quick: views.measure(device, quick=quick),
    "loss": lambda device, quick: loss.measure(device, quick=quick),
    "prepare": lambda _, quick: prepare.measure(quick=quick),
    "step": lambda device, quick: step.measure(device, quick=quick),
}


def measure(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """The results of all subjects by name, under "subjects"."""
    found: dict[str, Any] = {"subject": "all", "surroundings": surroundings(), "subjects": {}}
    for name, subject in SUBJECTS.items():
        say(f"measuring {name}")
        try:
            found["subjects"][name] = subject(device, quick)
        except Exception as problem:  # the others are worth having
            row = {"status": f"failed: {type(problem).__name__}: {problem}".splitlines()[0]}
            found["subjects"][name] = result(
                name, f"`fastidmm bench {name}` says more", {name: {name: row}}, settings={}
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def failed(found: dict[str, Any]) -> list[str]:
    """The subjects of which nothing could be measured."""
    return [
        name
        for name, each in found["subjects"].items()
        if all(row["status"] != "ok" for rows in each["tables"].values() for row in rows.values())
    ]
