"""Published weights of timm's models, kept where a machine without a network finds them."""

from pathlib import Path

from fastidmm.errors import UsageError, did_you_mean
from fastidmm.places import home


def weights_folder() -> Path:
    """timm's `cache_dir`: in the layout of huggingface_hub's cache."""
    return home() / "weights"


def fetch_weights(name: str) -> Path:
    """Fetch the weights of timm's model `name` (or `timm:name`), and see that they load into it.

    A UsageError for a name without weights, and where the hub cannot be reached. Returns the
    folder of the cache; what is in it already is not fetched again.
    """
    from fastidmm.backbones.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    import httpx
    import timm

    name = name.removeprefix("timm:")
    known = timm.list_models(pretrained=True)
    if name not in known and not timm.is_model_pretrained(name):
        near = [n for n in known if n.split("_")[0] == name.split("_")[0]] or known[:20]
        raise UsageError(f"timm has no weights for {name!r}: {did_you_mean(name, near)}")
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
