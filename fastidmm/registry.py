"""Every name a recipe can use, one line each; a part is imported when it is chosen."""

from importlib import import_module
from typing import Any

from fastidmm.errors import UsageError, did_you_mean

DATASETS = {
    "aircraft": "fastidmm.datasets.aircraft:Aircraft",
    "cars": "fastidmm.datasets.cars:Cars",
    "cub": "fastidmm.datasets.cub:CUB",
    "demo": "fastidmm.datasets.demo:Demo",
    "dtd": "fastidmm.datasets.dtd:DTD",
    "flowers": "fastidmm.datasets.flowers:Flowers",
    "folder": "fastidmm.datasets.folder:Folder",
    "imagenet": "fastidmm.datasets.imagenet:ImageNet",
    "indoor67": "fastidmm.datasets.indoor67:Indoor67",
    "pets": "fastidmm.datasets.pets:Pets",
    "sin10k": "fastidmm.datasets.sin10k:SIN10k",
}
METHODS = {
    "dino": "fastidmm.methods.dino:DINO",
    "idmm": "fastidmm.methods.idmm:IDMM",
    "mocov2": "fastidmm.methods.mocov2:MoCoV2",
    "mocov3": "fastidmm.methods.mocov3:MoCoV3",
    "simclr": "fastidmm.methods.simclr:SimCLR",
    "supcon": "fastidmm.methods.supcon:SupCon",
    "supervised": "fastidmm.methods.supervised:Supervised",
}
BACKBONES = {
    "deit_base": "fastidmm.backbones.vit:deit_base",
    "deit_tiny": "fastidmm.backbones.vit:deit_tiny",
    "pvtv2_b0": "fastidmm.backbones.pvt:pvtv2_b0",
    "pvtv2_b3": "fastidmm.backbones.pvt:pvtv2_b3",
    "t2t_vit_14": "fastidmm.backbones.t2t:t2t_vit_14",
    "t2t_vit_7": "fastidmm.backbones.t2t:t2t_vit_7",
    "vit_micro": "fastidmm.backbones.vit:vit_micro",
}
LOADERS = {
    "dali": "fastidmm.loaders.dali:Dali",
    "ffcv": "fastidmm.loaders.ffcv:FFCV",
    "resident": "fastidmm.loaders.resident:Resident",
    "torch": "fastidmm.loaders.torch:Torch",
}
KERNELS = {
    "add_norm": "fastidmm.kernels.add_norm:add_norm",
    "draws": "fastidmm.kernels.draws:draws",
    "dropout": "fastidmm.kernels.dropout:dropout",
    "linear_dwconv_gelu": "fastidmm.kernels.linear_dwconv_gelu:linear_dwconv_gelu",
    "instance_loss": "fastidmm.kernels.instance_loss:instance_loss",
    "linear_add_norm": "fastidmm.kernels.linear_add_norm:linear_add_norm",
    "linear_gelu": "fastidmm.kernels.linear_gelu:linear_gelu",
    "linear_heads": "fastidmm.kernels.linear_heads:linear_heads",
    "linear_performer": "fastidmm.kernels.linear_performer:linear_performer",
    "randaugment": "fastidmm.kernels.randaugment:randaugment",
    "views": "fastidmm.kernels.views:views",
    "words": "fastidmm.kernels.words:words",
}
TABLES = {
    "dataset": DATASETS,
    "method": METHODS,
    "backbone": BACKBONES,
    "loader": LOADERS,
    "kernel": KERNELS,
}


def find(kind: str, name: str) -> Any:
    """The part of that kind and name, imported now."""
    table = TABLES[kind]
    if name not in table:
        raise UsageError(f"unknown {kind} {name!r}: {did_you_mean(name, list(table))}")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
