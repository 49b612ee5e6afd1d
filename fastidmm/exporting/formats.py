"""The forms that a model is exported in: how each is written, and loaded again."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastidmm.errors import UsageError
from fastidmm.exporting.learnt import Learnt

CONFIG = "config.json"
Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """One value of `--to`."""

    file: str  # that holds the weights
    write: Callable[[Learnt, Path], None]
    load: Callable[[Path], Model | None]  # given the folder; None: nothing here can run it
    needs: tuple[str, ...] = ()  # packages, of the extra that is named after the form


def configured(found: Learnt) -> dict[str, Any]:
    """`config.json`: what timm and transformers build the model by, and all others look up."""
    num_classes = len(found.class_names)
    classes = {"label_names": list(found.class_names)} if num_classes else {}
    seen = {**found.preprocessing(), "num_classes": num_classes}
    told = {"num_classes": num_classes, "num_features": found.encoder.num_features, **classes}
    made_of: tuple[str, dict[str, Any]] | None = getattr(found.encoder.model, "made_of", None)
    if made_of is None:
        return {**told, "pretrained_cfg": seen}
    own: dict[str, Any] = found.encoder.model.pretrained_cfg  # type: ignore[assignment]
    # Where the first and the last layer are, for whoever wants other channels or classes.
    kept = ("fixed_input_size", "first_conv", "classifier")
    seen |= {key: own[key] for key in kept if own.get(key) is not None}
    architecture, shape = made_of
    return {"architecture": architecture, **told, "model_args": shape, "pretrained_cfg": seen}


def _write_timm(found: Learnt, folder: Path) -> None:
    from safetensors.torch import save

    name = found.record.recipe.run.backbone
    config = configured(found)
    if "architecture" not in config:
        raise UsageError(f"timm has no model such as {name}: choose --to onnx or pt2.")
    tensors = found.encoder.model.state_dict()
    if found.head is not None:
        # Several where a model has a token of its own for each, and gives their mean.
        places = config["pretrained_cfg"].get("classifier", ())
        for place in (places,) if isinstance(places, str) else places:
            tensors |= {f"{place}.{key}": t for key, t in found.head.state_dict().items()}
    # As bytes: safetensors tells a full disk in words of its own. transformers asks for the format.
    plain = torch.contiguous_format
    whole = {key: tensor.clone(memory_format=plain) for key, tensor in tensors.items()}
    (folder / FORMS["timm"].file).write_bytes(save(whole, metadata={"format": "pt"}))


def _load_timm(folder: Path) -> Model:
    import timm

    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.eval()


def _example(found: Learnt) -> tuple[Tensor]:
    """What a program is traced with; of two images, since one would be taken for a constant."""
    return (torch.zeros(2, *found.preprocessing()["input_size"]),)


_ANY_NUMBER = ({0: torch.export.Dim("batch")},)


def _write_pt2(found: Learnt, folder: Path) -> None:
    program = torch.export.export(found.model(), _example(found), dynamic_shapes=_ANY_NUMBER)
    # As bytes, too: torch's writer tells a full disk as an error of its own.
    whole = BytesIO()
    torch.export.save(program, whole)
    (folder / FORMS["pt2"].file).write_bytes(whole.getbuffer())


def _load_pt2(folder: Path) -> Model:
    return torch.export.load(folder / FORMS["pt2"].file).module()


def _write_onnx(found: Learnt, folder: Path) -> None:
    with _hushed():
        torch.onnx.export(
            found.model(),
            _example(found),
            folder / FORMS["onnx"].file,
            dynamo=True,
            dynamic_shapes=_ANY_NUMBER,
            input_names=["images"],
            output_names=[found.gives],
            external_data=False,
            verbose=False,
        )


@contextmanager
def _hushed() -> Iterator[None]:
    """What the exporter says of itself is nothing that a user could mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _load_onnx(folder: Path) -> Model | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / FORMS["onnx"].file, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        (told,) = session.run(None, {"images": images.numpy()})
        return torch.from_numpy(told)

    return run


FORMS = {
    "timm": Form("model.safetensors", _write_timm, _load_timm),
    "onnx": Form("model.onnx", _write_onnx, _load_onnx, needs=("onnx", "onnxscript")),
    "pt2": Form("model.pt2", _write_pt2, _load_pt2),
}


def write(found: Learnt, to: str, folder: Path) -> None:
    """The model and its `config.json` into a folder that is there."""
    FORMS[to].write(found, folder)
    (folder / CONFIG).write_text(json.dumps(configured(found), indent=2) + "\n")


def check_installed(to: str) -> None:
    """Refuse a form whose packages are not here, with what installs them."""
    missing = [name for name in FORMS[to].needs if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--to {to} needs {' and '.join(missing)}: `pip install 'fastidmm[{to}]'`."
        )
