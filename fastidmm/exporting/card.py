"""The model card of an export: what was learnt from what, how well, and how to load it."""

from typing import Any

import fastidmm
from fastidmm import checkpoint
from fastidmm.evaluate import Score, resized_side
from fastidmm.exporting.learnt import Learnt
from fastidmm.folders import RECIPE
from fastidmm.plan import num_steps
from fastidmm.preparing.summary import counted
from fastidmm.record import Record
from fastidmm.reporting.claims import ARMS, FINETUNED
from fastidmm.scoring import kept, looks, scored
from fastidmm.stages import summary

FROZEN = {"knn": "kNN on frozen features", "linear_probe": "linear probe on frozen features"}

TIMM = """\
import timm
import torch
{more}from PIL import Image, ImageOps

model = timm.create_model("local-dir:{name}", pretrained=True).eval()
seen = timm.data.resolve_data_config({{}}, model=model)
transform = timm.data.create_transform(**seen)
image = ImageOps.exif_transpose(Image.open("photograph.jpg")).convert("RGB")
with torch.inference_mode():
    {gives} = model(transform(image)[None])  # (1, {width})
"""
LOOK = """\
import torch
{more}from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2

transform = v2.Compose([
    v2.Resize({resized}, interpolation=InterpolationMode.BICUBIC),
    v2.CenterCrop({size}),
    v2.ToImage(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize({mean}, {std}),
])
image = ImageOps.exif_transpose(Image.open("photograph.jpg")).convert("RGB")
images = transform(image)[None]
"""
PT2 = """\
model = torch.export.load("{name}/model.pt2").module()
with torch.inference_mode():
    {gives} = model(images)  # (1, {width})
"""
ONNX = """\
session = onnxruntime.InferenceSession("{name}/model.onnx")
({gives},) = session.run(None, {{"images": images.numpy()}})  # (1, {width})
"""
NAMES = """\
with open("{name}/config.json") as file:
    names = json.load(file)["label_names"]
print(names[int({gives}.argmax())])
"""


def card(found: Learnt, to: str, name: str) -> str:
    """README.md of the folder `name`."""
    run, started = found.record.recipe.run, found.record.environment()
    parts = [
        _head(found, to),
        f"# {name}\n",
        f"{_sentence(found)} Trained by fastidmm {started['fastidmm']} (torch {started['torch']}, "
        f"{started['device']}), exported by {fastidmm.__version__}.\n",
        f"- method: {_lineage(found)}\n- images: {started['num_train']:,} of the dataset "
        f"{run.dataset}\n- backbone: {run.backbone} at {run.resolution} px\n"
        f"- weights: {_weights(found)}\n",
        f"## How well\n\n{_scores(found)}\n",
        f"## How to load it\n\nBeside this folder:\n\n```python\n{snippet(found, to, name)}```\n",
        f"{_more(found, to)}## Recipe\n\n```toml\n{found.record.recipe.toml()}```",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def snippet(found: Learnt, to: str, name: str) -> str:
    """Python that loads it and asks it about photograph.jpg."""
    seen = found.preprocessing()
    size = seen["input_size"][1]
    t2t = "import fastidmm.backbones.t2t  # timm learns of it here\n"
    more = {"timm": t2t if _is_t2t(found) else "", "onnx": "import onnxruntime\n"}.get(to, "")
    text = TIMM if to == "timm" else LOOK + (PT2 if to == "pt2" else ONNX)
    if found.class_names:
        text = "import json\n\n" + text + NAMES
    return text.format(
        name=name, gives=found.gives, width=found.width, more=more, size=size,
        resized=resized_side(size), mean=seen["mean"], std=seen["std"],
    )  # fmt: skip


def _is_t2t(found: Learnt) -> bool:
    return found.record.recipe.run.backbone.removeprefix("timm:").startswith("t2t_")


def _head(found: Learnt, to: str) -> str:
    """What a model hub reads; only timm's folder is one that it can load."""
    if to != "timm":
        return ""
    task = "image-classification" if found.class_names else "image-feature-extraction"
    return f"---\nlibrary_name: timm\npipeline_tag: {task}\ntags: [fastidmm]\n---\n"


def _sentence(found: Learnt) -> str:
    if found.class_names:
        return f"A classifier of photographs into {len(found.class_names)} classes."
    return f"A backbone that gives {found.width} features of a photograph, and no classes."


def _lineage(found: Learnt) -> str:
    """The method, and the one whose weights it began with."""
    run = found.record.recipe.run
    epochs = f"{run.method}, {counted(run.epochs, 'epoch')} in batches of {run.batch_size}"
    init = found.record.init
    # A checkpoint's folder is two below its run's.
    start = init.parent.parent if init else None
    if start and (start / RECIPE).exists():
        before = Record(start).recipe.run
        length = counted(before.epochs, "epoch")
        return f"{epochs}, from {before.method} ({length} at {before.resolution} px)"
    return f"{epochs}, from {'an earlier run' if init else run.init or 'random weights'}"


def _weights(found: Learnt) -> str:
    run = found.record.recipe.run
    step = checkpoint.step_of(found.checkpoint)
    epochs = step / num_steps(found.record.environment()["num_train"], run.batch_size)
    best = found.checkpoint.parent == found.record.best
    which = "best on held-out images" if best else "the last"
    return f"{which}, after {epochs:g} of {run.epochs} epochs"


def _more(found: Learnt, to: str) -> str:
    """What else can load it."""
    if to != "timm":
        return "Any number of photographs can be asked about at once.\n\n"
    kind = "AutoModelForImageClassification" if found.class_names else "AutoModel"
    return (
        f"transformers loads the same folder by `{kind}.from_pretrained`; with `num_classes=10`, "
        "`timm.create_model` gives it a new classifier.\n\n"
    )


def _scores(found: Learnt) -> str:
    """A table of what was measured on the test images, with 95 % intervals."""
    rows = _rows(found)
    if not rows:
        return "Not evaluated on test images."
    heads = ("on test images", "share right, 95 % interval", "with random weights instead")
    lines = [heads, ("---",) * 3, *rows]
    wide = 3 if any(row[2] for row in rows) else 2
    told = [f"| {' | '.join(row[:wide])} |" for row in lines]
    if found.head is not None and (seen := looks(found.record.folder)["finetune"]):
        told.append(f"\nThe test images were scored {counted(seen, 'time')} while it learnt.")
    return "\n".join(told)


def _rows(found: Learnt) -> list[tuple[str, str, str]]:
    """Scores of these very weights: as `evaluate` kept them, or as training told them."""
    folder, step = found.record.folder, checkpoint.step_of(found.checkpoint)
    evaluation = kept(folder) or kept(folder.parent)
    if found.head is None:
        if not evaluation or evaluation.get("step") != step:
            return []
        cells = [[evaluation["scores"][arm].get(key) for arm in ARMS] for key in FROZEN]
        return [
            (name, _share(a), _share(b))
            for name, (a, b) in zip(FROZEN.values(), cells, strict=True)
        ]
    if evaluation and (of_it := scored(found.record, evaluation)):
        arm, cell = of_it
        against = evaluation["scores"]["random"].get(f"{FINETUNED}{found.record.resolution}", {})
        fair = arm == "pretrained" and against.get("epochs") == cell["epochs"]
        beside = _share(against) if fair else ""
        top5 = [("top-5", _share(cell["top5"]), "")] if cell.get("top5") else []
        return [("top-1", _share(cell), beside), *top5]
    # With images held out it was never asked about the test images as it learnt.
    last = summary(found.record).get("test_top1")
    return [("top-1", _share(last), "")] if last else []


def _share(cell: dict[str, Any] | None) -> str:
    return str(Score(cell["correct"], cell["num"])) if cell else "not run"
