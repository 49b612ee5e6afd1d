"""Import torchvision (and so timm) beside a torch that lacks its compiled operators.

A torchvision built for CUDA does not import on a CPU build of torch: its own operators are missing
when it describes them. Declaring the two it stumbles over is enough for models and transforms.
"""

import sys

import torch

_kept_alive: list[torch.library.Library] = []


def make_torchvision_importable() -> None:
    """Import torchvision; where its operators are missing, declare them and import again."""
    try:
        import torchvision
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept_alive.append(library)
        import torchvision  # noqa: F401
