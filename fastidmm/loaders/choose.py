"""`--loader auto`: which loader, and why, in one line."""

import torch

from fastidmm.errors import DataError
from fastidmm.loaders.memory import tier_of
from fastidmm.recipe import Recipe
from fastidmm.registry import find
from fastidmm.store import Store

# Where a store fits no memory: the one that decodes fastest first.
STREAMING = ("dali", "ffcv", "torch")


def settled(recipe: Recipe, store: Store, device: torch.device) -> tuple[Recipe, str]:
    """The recipe with its loader named, and what to say of it; "" where it was named before."""
    if recipe.run.loader != "auto":
        return recipe, ""
    name, why = choose(store, device)
    tables = recipe.tables()
    tables["run"]["loader"] = name
    return Recipe.of(tables), f"loader {name}: {why}"


def choose(store: Store, device: torch.device) -> tuple[str, str]:
    """The loader for a store on a device, and why."""
    size = f"{store.num_bytes / 1e9:.1f} GB of pixels"
    if device.type == "cpu":
        return "resident", f"{size} are read from the store's memory map"
    tier = tier_of(store, device)
    if tier:
        where = {"device": "the GPU's memory", "host": "the host's memory, not the GPU's"}[tier]
        return "resident", f"{size} fit {where}"
    reasons = [f"{size} fit neither the GPU's nor the host's memory"]
    for name in STREAMING:
        kind = find("loader", name)
        problem = kind.unusable() or kind.unfit(store)
        if problem is None:
            return name, "; ".join(reasons)
        reasons.append(f"not {name}, since {problem}")
    raise DataError(f"no loader can deliver this dataset here: {'; '.join(reasons)}.")
