"""What a run was shown: a few images of one step with their views, made again from its plan."""

from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from fastidmm.assemble import build_method
from fastidmm.batch import Method, ViewGroup
from fastidmm.chance import Counters
from fastidmm.kernels.views import views
from fastidmm.plan import GroupPlan, Plan, draw
from fastidmm.record import Record
from fastidmm.shares import only
from fastidmm.store import Store, read_json

NUM_IMAGES = 4
LONGEST_SIDE = 160  # px
# PNG cannot shrink noise: with this many bytes of pixels a page stays below 5 MB whatever is shown.
MOST_BYTES = 2_200_000


@dataclass(frozen=True, slots=True)
class View:
    """One crop as the model saw it."""

    uri: str
    own: float  # share of the crop that is of its own image
    partner: str  # name of the image that the rest is of


@dataclass(frozen=True, slots=True)
class Shown:
    """One image, and all its views of a step."""

    name: str
    label: str  # "" where there are no labels
    height: int
    width: int
    uri: str
    views: tuple[View, ...]


def shown(record: Record, store: Store, step: int) -> list[Shown]:
    """A few images of a step with all their views, by the code that trained on them."""
    method, plan = planned(record, store, step)
    name = names_of(store)
    num_images = plan.rows.numel()
    # Apart from one another: neighbours in a batch share the box of their mixing.
    places = sorted({num_images * i // NUM_IMAGES for i in range(NUM_IMAGES)})
    side = side_of(len(places) * sum(group.count for group in method.views))
    images = []
    for place in places:
        row = int(plan.rows[place])
        label = int(store.label[row])
        views = [
            view
            for group_plan, group in zip(plan.groups, method.views, strict=True)
            for view in _views(store, some(group_plan, place, num_images), group, side, name)
        ]
        images.append(
            Shown(
                name=name(row),
                label=store.class_names[label] if label >= 0 else "",
                height=int(store.height[row]),
                width=int(store.width[row]),
                uri=png(store.image(row), LONGEST_SIDE),
                views=tuple(views),
            )
        )
    return images


def side_of(num_pictures: int) -> int:
    """The longest side at which so many pictures are shown, px."""
    return min(LONGEST_SIDE, int((MOST_BYTES / (3 * num_pictures)) ** 0.5))


def planned(record: Record, store: Store, step: int) -> tuple[Method, Plan]:
    """The plan of a step, drawn on the CPU, and the method it was for."""
    recipe, run = record.recipe, record.recipe.run
    counters = Counters(run.seed, record.state.get("attempt", 0))
    method = build_method(recipe, store, counters)
    plan = draw(
        (store.height, store.width),
        method.views,
        counters,
        step=step,
        batch_size=run.batch_size,
        cutmix_groups=method.cutmix_groups,
    )
    return method, plan


def some(plan: GroupPlan, place: int, num_images: int) -> GroupPlan:
    """The part of a plan that one image's views need: the views, then what is pasted in them."""
    own = torch.arange(place, plan.partner.numel(), num_images)
    wanted = torch.cat((own, plan.partner[own]))
    return only(plan, wanted, torch.arange(len(own), len(wanted)).repeat(2))


def _views(
    store: Store, plan: GroupPlan, group: ViewGroup, side: int, name: Callable[[int], str]
) -> Iterator[View]:
    """One image's views of a group, finished and mixed."""
    pixels = views(store, plan, group, torch.float32)
    for crop in range(group.count):
        own, partner = (int(plan.crops.rows[i]) for i in (crop, int(plan.partner[crop])))
        yield View(
            uri=png(plain(pixels[crop], group), side),
            own=float(plan.weight[crop]),
            partner="another view of itself" if own == partner else name(partner),
        )


def names_of(store: Store) -> Callable[[int], str]:
    """How images are called: by the file they came from, or by their row."""
    assert store.folder is not None, "a run's store was prepared"
    files = read_json(store.folder)["splits"][store.split]["files"]

    def name(row: int) -> str:
        original = row if store.row is None else int(store.row[row])
        return files[original].rpartition("/")[2] if files else f"row {original}"

    return name


def plain(pixels: Tensor, group: ViewGroup) -> Tensor:
    """A normalised crop (3, S, S) as bytes again: (S, S, 3) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (group.mean, group.std))
    return ((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)


def png(pixels: Tensor, longest_side: int) -> str:
    """A picture (height, width, 3) uint8 as a data URI, made smaller where it is larger."""
    return _uri(pixels, longest_side, "png")


def jpeg(pixels: Tensor, longest_side: int) -> str:
    """The same in a fifth of the bytes: for photographs whose exact pixels are not the point."""
    return _uri(pixels, longest_side, "jpeg", quality=85)


def _uri(pixels: Tensor, longest_side: int, kind: str, **options: int) -> str:
    picture, file = Image.fromarray(pixels.numpy()), BytesIO()
    picture.thumbnail((longest_side, longest_side))
    picture.save(file, kind, **options)
    return f"data:image/{kind};base64," + b64encode(file.getvalue()).decode()
