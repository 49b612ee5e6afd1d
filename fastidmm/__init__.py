"""Train vision transformers when all you have is a few thousand images."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "prepare", "pretrain"]

if TYPE_CHECKING:
    from fastidmm.api import Run, prepare, pretrain


def __getattr__(name: str) -> Any:
    """What `api` offers, imported when it is first used: commands must not wait for torch."""
    if name in __all__:
        from fastidmm import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
