"""Backbones: their published sizes, and chance that comes from counters alone."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from fastidmm.backbones.build import BackboneOptions, Encoder, build_encoder, load_weights
from fastidmm.backbones.drop import Dropout, DropPath, PathWords, draw_from_counters
from fastidmm.chance import Counters, Use, philox
from fastidmm.errors import UsageError
from fastidmm.registry import BACKBONES

VIT = "timm:vit_tiny_patch16_224"
# Four blocks, patches of 8 x 8, a token of the class and 196 of patches, the last norm.
MICRO = 4 * (12 * 128**2 + 13 * 128) + (3 * 8**2 + 1) * 128 + (1 + 197) * 128 + 2 * 128
# Parameters at 112 px: the backbone alone, and with a linear head of 2040 rows; feature width.
# Where nothing is published, as of `vit_micro`, by the formula.
PUBLISHED = {
    "deit_tiny": (5_496_192, 5_889_912, 192),
    "deit_base": (85_685_760, 87_254_520, 768),
    "pvtv2_b0": (3_409_760, 3_934_040, 256),
    "pvtv2_b3": (44_725_696, 45_772_216, 512),
    "t2t_vit_7": (4_015_590, 4_539_870, 256),
    "t2t_vit_14": (21_104_102, 21_889_502, 384),
    "vit_micro": (MICRO, MICRO + 129 * 2040, 128),
}


def build(
    name: str, *, resolution: int = 32, drop_path: float = 0.2, seed: int = 0, attempt: int = 0
) -> Encoder:
    counters = Counters(seed, attempt)
    options = BackboneOptions(drop_path=drop_path)
    return build_encoder(name, options, resolution=resolution, counters=counters)


def global_generators() -> list[Any]:
    """The state of every global generator that a forward pass could reach, as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    keys = numpy_state["state"]
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        keys["key"].tolist(),
        keys["pos"],
    ]


# --- shapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BACKBONES))
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert name in PUBLISHED, f"write in PUBLISHED what is published of {name!r}, as of the others"
    with torch.device("meta"):
        encoder = build(name, resolution=112)
        head = nn.Linear(encoder.num_features, 2040)
    alone = sum(p.numel() for p in encoder.parameters())
    both = alone + sum(p.numel() for p in head.parameters())
    assert (alone, both, encoder.num_features) == PUBLISHED[name]


@pytest.mark.parametrize(("resolution", "tokens"), [(112, 50), (224, 197), (448, 785)])
def test_deit_has_the_published_tokens(resolution: int, tokens: int) -> None:
    with torch.device("meta"):
        encoder = build("deit_tiny", resolution=resolution)
    assert encoder.state_dict()["model.pos_embed"].shape == (1, tokens, 192)


@pytest.mark.parametrize("name", ["deit_tiny", "pvtv2_b0", "t2t_vit_7", "vit_micro", VIT])
def test_features_are_as_wide_as_said(name: str) -> None:
    encoder = build(name, resolution=64).eval()
    with torch.inference_mode():
        features = encoder(torch.zeros(3, 3, 64, 64))
    assert features.shape == (3, encoder.num_features)


def test_the_feature_is_the_class_token_after_the_last_norm() -> None:
    encoder = build("vit_micro").eval()
    model: Any = encoder.model
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # norm(blocks(...)) by timm itself; the head and what precedes it must add nothing.
        tokens = model.forward_features(x)
        assert torch.equal(encoder(x), tokens[:, 0])
        mean, variance = tokens[:, 0].mean(dim=1), tokens[:, 0].var(dim=1, unbiased=False)
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance, torch.ones(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "resolution", "near"),
    [
        ("deit_tiny", 100, 96),
        ("deit_tiny", 0, 16),
        ("pvtv2_b0", 31, 32),
        ("t2t_vit_7", 120, 128),
        ("vit_micro", 36, 32),
        (VIT, 4, 8),
    ],
)
def test_a_resolution_that_does_not_fit_is_refused(name: str, resolution: int, near: int) -> None:
    with pytest.raises(UsageError, match=f"not {resolution}: try --resolution {near}."):
        build(name, resolution=resolution)


@pytest.mark.parametrize(("resolution", "sides"), [(32, (8, 4, 2, 1)), (112, (28, 14, 7, 4))])
def test_pvt_has_the_published_grids(resolution: int, sides: tuple[int, ...]) -> None:
    model: Any = build("pvtv2_b0", resolution=resolution).eval().model
    with torch.inference_mode():
        x = torch.zeros(1, 3, resolution, resolution)
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert tuple(m.shape[-1] for m in maps) == sides
        torch.testing.assert_close(model(x), model.forward_features(x).mean(dim=(2, 3)))


# --- first weights ------------------------------------------------------------------------------


def test_first_weights_are_a_function_of_the_seed() -> None:
    before = global_generators()
    first, again = build("vit_micro").state_dict(), build("vit_micro").state_dict()
    other = build("vit_micro", seed=1).state_dict()
    assert global_generators() == before
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["model.pos_embed"], other["model.pos_embed"])


def test_class_tokens_and_positions_begin_as_published() -> None:
    state = build("deit_tiny", resolution=112).state_dict()
    for key in ("model.cls_token", "model.pos_embed", "model.blocks.3.attn.qkv.weight"):
        assert float(state[key].std()) == pytest.approx(0.02, rel=0.15), key


# --- chance -------------------------------------------------------------------------------------


def dropping_vit() -> Encoder:
    """A small vision transformer with every dropout timm offers but the one in attention."""
    rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "drop_path_rate": 0.4}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0, **rates)
    return Encoder(model, Counters(0))


MADE: dict[str, Callable[[], Encoder]] = {
    **{name: partial(build, name) for name in (*BACKBONES, VIT) if name != "deit_base"},
    "every dropout": dropping_vit,
}


@pytest.mark.parametrize("name", list(MADE))
def test_training_draws_from_no_global_generator(name: str) -> None:
    encoder = MADE[name]().train()
    images = torch.zeros(4, 3, 32, 32)
    encoder.set_place(torch.arange(4))
    before = global_generators()
    encoder(images)
    assert global_generators() == before
    kinds = [m for m in encoder.modules() if "drop" in type(m).__name__.lower()]
    assert all(type(m) in (DropPath, Dropout) for m in kinds)


@pytest.mark.parametrize("name", ["deit_tiny", "pvtv2_b0", "t2t_vit_7", "vit_micro", VIT])
def test_transformers_drop_paths_at_the_rate_asked_for(name: str) -> None:
    """What is published of them does; any other backbone may have none."""
    paths = [m.p for m in build(name, drop_path=0.3).modules() if isinstance(m, DropPath)]
    assert max(paths) == pytest.approx(0.3)


def test_drop_path_grows_with_depth_and_every_block_has_its_own_number() -> None:
    paths = [m for m in build("deit_tiny").modules() if isinstance(m, DropPath)]
    rates = [p.p for p in paths]
    expected = [0.2 * block / 11 for block in range(12) for _ in range(2)][2:]
    assert rates == pytest.approx(expected)  # the first block drops nothing
    numbers = [m.block for m in build("deit_tiny").modules() if isinstance(m, DropPath | Dropout)]
    assert len(set(numbers)) == len(numbers)


def test_dropout_in_attention_is_refused() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, attn_drop_rate=0.1
    )
    with pytest.raises(UsageError, match="attention"):
        draw_from_counters(model, PathWords(Counters(0)))


@pytest.mark.parametrize(
    "layer", [nn.Dropout2d(0.1), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout()]
)
def test_layers_that_draw_by_themselves_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match="draws by itself"):
        draw_from_counters(nn.Sequential(nn.Linear(2, 2), layer), PathWords(Counters(0)))


def kept(layer: type[DropPath | Dropout], num: int = 4000, **where: Any) -> Tensor:
    """What a layer with p = .3 makes of ones for `num` crops: (num, 6)."""
    counters = Counters(where.get("seed", 0), where.get("attempt", 0), where.get("step", 0))
    counters.place = where.get("place", torch.arange(num))
    module: nn.Module
    if layer is DropPath:
        words = PathWords(counters)
        module = DropPath(0.3, where.get("block", 0), words).train()
        words.draw()
    else:
        module = Dropout(0.3, where.get("block", 0), counters).train()
    return module.forward(torch.ones(len(counters.place), 6))


@pytest.mark.parametrize("layer", [DropPath, Dropout])
def test_drops_keep_their_share_and_scale_the_rest(layer: type[DropPath | Dropout]) -> None:
    x = kept(layer)
    assert x.unique().tolist() == pytest.approx([0, 1 / 0.7])
    independent = x[:, 0] if layer is DropPath else x
    share = float((independent > 0).double().mean())
    assert abs(share - 0.7) < 4.5 * (0.7 * 0.3 / independent.numel()) ** 0.5
    whole = bool((x == x[:, :1]).all())
    assert whole == (layer is DropPath)


def test_every_path_drops_at_its_own_rate() -> None:
    words = PathWords(Counters(0, place=torch.arange(4000)))
    paths = [DropPath(p, block, words).train() for block, p in enumerate((0.1, 0.0, 0.5))]
    words.draw()
    for path in paths:
        made, stays = path(torch.ones(4000, 1)), 1 - path.p
        assert made[made > 0].unique().tolist() == pytest.approx([1 / stays])
        share = float((made > 0).double().mean())
        assert abs(share - stays) <= 4.5 * (stays * path.p / 4000) ** 0.5


@pytest.mark.parametrize("layer", [DropPath, Dropout])
def test_drops_are_a_function_of_counters_and_place(layer: type[DropPath | Dropout]) -> None:
    x = kept(layer)
    assert torch.equal(x, kept(layer))
    assert torch.equal(x, kept(layer, step=torch.tensor(0)))
    place = torch.tensor([17, 3, 3999, 0])
    assert torch.equal(x[place], kept(layer, place=place))
    changes: list[dict[str, int]] = [{"step": 1}, {"block": 1}, {"attempt": 1}, {"seed": 1}]
    for change in changes:
        differing = float((x != kept(layer, **change)).double().mean())
        assert differing == pytest.approx(2 * 0.3 * 0.7, abs=0.04), change


def test_drops_do_nothing_in_evaluation() -> None:
    x = torch.ones(3, 6)
    counters = Counters(0)
    path, dropout = DropPath(0.3, 0, PathWords(counters)), Dropout(0.3, 0, counters)
    assert path.eval()(x) is x and dropout.eval()(x) is x


def test_paths_are_drawn_together() -> None:
    """The words of one Philox call for three blocks; anew for other places, steps, attempts."""
    counters = Counters(3, place=torch.tensor([5, 9]))
    words = PathWords(counters)
    paths = [DropPath(0.5, block, words).train() for block in range(3)]
    for change in ({}, {"step": 4}, {"attempt": 1}, {"place": torch.tensor([9, 5])}):
        for name, value in change.items():
            setattr(counters, name, value)
        words.draw()
        for path in paths:
            counter = (counters.step, counters.place, path.block, 0)
            kept = philox(counter, counters.key(Use.DROP))[:, 0] >= 2**31
            assert path(torch.ones(2)).tolist() == (2 * kept).tolist()
    with pytest.raises(UsageError, match=r"backbone\.set_place\(torch\.arange"):
        paths[0](torch.ones(3, 2))
    with pytest.raises(UsageError, match=r"backbone\.set_place\(torch\.arange"):
        Dropout(0.5, 3, counters).train()(torch.ones(3, 2))


@pytest.mark.parametrize("name", ["vit_micro", "t2t_vit_7"])
@pytest.mark.parametrize("size", [(48, 48), (32, 48)])
def test_images_of_another_size_are_one_sentence(name: str, size: tuple[int, int]) -> None:
    told = rf"images of 32 x 32 px, not {size[0]} x {size[1]}: .*Run\.backbone\(resolution=\.\.\.\)"
    with pytest.raises(UsageError, match=told):
        build(name, resolution=32).eval()(torch.zeros(1, 3, *size))


def test_a_pyramid_takes_any_size() -> None:
    model = build("pvtv2_b0", resolution=32).eval()
    assert model(torch.zeros(1, 3, 64, 48)).shape == (1, 256)


# --- loading ------------------------------------------------------------------------------------


def test_a_state_loads_whole() -> None:
    source, target = build("vit_micro"), build("vit_micro", seed=1)
    said = load_weights(target, source.state_dict(), source="here")
    num = len(source.state_dict())
    assert said == f"{num} of {num} tensors"
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


@pytest.mark.parametrize(("small", "large"), [(56, 112), (112, 224), (224, 56)])
def test_positions_are_resized_bicubically(small: int, large: int) -> None:
    """DeiT's 7 x 7 grid to 14 x 14, as `vit_micro`'s at 56 and 112 px; and down again."""
    state = build("vit_micro", resolution=small).state_dict()
    target = build("vit_micro", resolution=large, seed=1)
    load_weights(target, state, source="here")
    before, after = state["model.pos_embed"], target.state_dict()["model.pos_embed"]
    grid = before[0, 1:].T.reshape(1, 128, small // 8, small // 8)
    side = large // 8
    resized = nn.functional.interpolate(
        grid.double(), (side, side), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(after[0, 0], before[0, 0], rtol=0, atol=0)
    torch.testing.assert_close(after[0, 1:].double(), resized[0].flatten(1).T, rtol=1e-5, atol=1e-6)


def foreign_states() -> dict[str, dict[str, Tensor]]:
    """States that are not of `vit_micro` at 32 px."""
    own = build("vit_micro").state_dict()
    last = list(own)[-1]
    return {
        "incomplete": {key: value for key, value in own.items() if key != last},
        "with a stranger": {**own, "model.extra": torch.zeros(1)},
        "of another shape": {**own, last: own[last][:-1]},
        "of another family": build("pvtv2_b0").state_dict(),
        "of another width": build("deit_tiny").state_dict(),
        "empty": {},
        "without a class token": {**own, "model.pos_embed": torch.zeros(1, 49, 128)},
        "not square": {**own, "model.pos_embed": torch.zeros(1, 13, 128)},
    }


@pytest.mark.parametrize(
    "kind",
    [
        "incomplete",
        "with a stranger",
        "of another shape",
        "of another family",
        "of another width",
        "empty",
        "without a class token",
        "not square",
    ],
)
def test_a_foreign_state_is_refused_and_nothing_changes(kind: str) -> None:
    encoder = build("vit_micro", seed=1)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(UsageError, match="is of another backbone"):
        load_weights(encoder, foreign_states()[kind], source="there")
    assert all(torch.equal(encoder.state_dict()[key], before[key]) for key in before)
