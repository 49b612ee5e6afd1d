"""Published weights of timm's models, kept where a machine without a network finds them."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastidmm.errors import DataError, UsageError
from fastidmm.places import home
from fastidmm.registry import BACKBONES, find

if TYPE_CHECKING:
    from torch import Tensor


def weights_folder() -> Path:
    """timm's `cache_dir`: in the layout of huggingface_hub's cache."""
    return home() / "weights"


def fetch_weights(name: str) -> Path:
    """Fetch the weights of timm's model `name` (or `timm:name`), and see that they load into it.

    A backbone's own name stands for the model whose weights `--init timm` takes.

    A UsageError for a name without weights, and where the hub cannot be reached. Returns the
    folder of the cache; what is in it already is not fetched again.
    """
    from fastidmm.backbones.any_timm import nearest
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    import httpx
    import timm

    if name in BACKBONES:
        name = find("backbone", name).weights or name
    name = name.removeprefix("timm:")
    known = timm.list_models(pretrained=True)
    if name not in known and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no weights for {name!r}: {nearest(name, known)}")
    folder = weights_folder()
    try:
        timm.create_model(name, pretrained=True, cache_dir=folder)
    except (OSError, httpx.HTTPError) as problem:
        if isinstance(problem, OSError) and problem.errno is not None:
            raise
        reason = str(problem).split("\n", maxsplit=1)[0].rstrip(".")
        raise UsageError(
            f"the weights of {name} could not be fetched ({reason}): check the connection, or "
            f"copy {folder} from a machine that has them."
        ) from None
    return folder


def cached_weights(name: str) -> "dict[str, Tensor]":
    """The weights of timm's model `name` but for its classifier, from the cache alone."""
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    import timm
    from huggingface_hub import try_to_load_from_cache
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    told = timm.get_pretrained_cfg(name)
    path = told and try_to_load_from_cache(
        told.hf_hub_id, "model.safetensors", cache_dir=weights_folder()
    )
    if not isinstance(path, str):
        raise UsageError(
            f"the weights of {name} are not on this machine: `fastidmm prepare --weights {name}` "
            "fetches them."
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise DataError(
            f"{path} cannot be read ({problem}): delete it, then `fastidmm prepare --weights "
            f"{name}`."
        ) from None
    heads = (told.classifier,) if isinstance(told.classifier, str) else tuple(told.classifier or ())
    return {n: t for n, t in state.items() if n.rpartition(".")[0] not in heads}
