"""T2T-ViT: soft splits, attention by random features, positions, and its place in timm."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from recorded import Recorded
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastidmm import chance
from fastidmm.backbones.build import (
    BackboneOptions,
    Encoder,
    backbone,
    build_encoder,
    load_weights,
)
from fastidmm.backbones.drop import Dropout, DropPath
from fastidmm.backbones.t2t import TokenBlock, TokensToToken, sinusoids, soft_split
from fastidmm.chance import Counters
from fastidmm.kernels import words
from fastidmm.kernels.linear_performer import performer


def build(name: str = "t2t_vit_7", *, resolution: int = 32, seed: int = 0) -> Encoder:
    options = BackboneOptions(drop_path=0.2)
    return build_encoder(name, options, resolution=resolution, counters=Counters(seed))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "num", "trained"),
    [("t2t_vit_7", 4_310_222, 4_255_694), ("t2t_vit_14", 21_545_550, 21_465_806)],
)
def test_parameters_are_as_many_as_published(name: str, num: int, trained: int) -> None:
    """At 224 px with 1000 classes; directions and positions count, and are not trained."""
    with torch.device("meta"):
        model = timm.create_model(name)
    frozen = {key: p.numel() for key, p in model.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in model.parameters()) == num
    assert num - sum(frozen.values()) == trained
    assert {key.rsplit(".")[-1] for key in frozen} == {"w", "pos_embed"} and len(frozen) == 3


@pytest.mark.parametrize(
    ("name", "resolution", "gmac"),
    [("t2t_vit_7", 112, 0.264), ("t2t_vit_7", 224, 1.147), ("t2t_vit_14", 224, 4.783)],
)
def test_products_are_as_many_as_measured(name: str, resolution: int, gmac: float) -> None:
    model, image = timm.create_model(name, img_size=resolution), noise(1, 3, *[resolution] * 2)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.0005)


@pytest.mark.parametrize(("resolution", "tokens"), [(32, 5), (112, 50), (224, 197), (448, 785)])
def test_an_image_becomes_the_published_tokens(resolution: int, tokens: int) -> None:
    model: Any = backbone("t2t_vit_7").build(resolution, 0.2).eval()
    assert model.pos_embed.shape == (1, tokens, 256)
    with torch.inference_mode():
        found = model.forward_features(torch.zeros(2, 3, resolution, resolution))
    assert found.shape == (2, tokens, 256)


# --- tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "size", "stride", "padding", "grid"),
    [(112, 7, 4, 2, 28), (28, 3, 2, 1, 14), (14, 3, 2, 1, 7), (8, 7, 4, 2, 2)],
)
def test_a_soft_split_is_unfold(side: int, size: int, stride: int, padding: int, grid: int) -> None:
    maps = noise(2, 5, side, side)
    tokens = soft_split(maps, size, stride, padding)
    assert tokens.shape == (2, grid**2, 5 * size**2)
    unfolded = functional.unfold(maps, size, stride=stride, padding=padding)
    assert torch.equal(tokens, unfolded.transpose(1, 2))


def test_tokens_are_the_published_sequence() -> None:
    """Split, attend, split, attend, split, project; by unfold and a product, in float64.

    The first split pads 2 px of an image, not the 3 that would centre its patches.
    """
    torch.manual_seed(0)
    module = TokensToToken(3, 24).eval()
    tokens = functional.unfold(noise(2, 3, 32, 32), 7, stride=4, padding=2).mT
    for block, side in ((module.attention1, 8), (module.attention2, 4)):
        maps = block(tokens).mT.reshape(2, 64, side, side)
        tokens = functional.unfold(maps, 3, stride=2, padding=1).mT
    expected = tokens.double() @ module.project.weight.double().T + module.project.bias.double()
    torch.testing.assert_close(module(noise(2, 3, 32, 32)).double(), expected, rtol=1e-5, atol=1e-5)


def features(x: Tensor, w: Tensor) -> Tensor:
    return torch.exp(x @ w.mT - 0.5 * (x**2).sum(-1, keepdim=True)) / math.sqrt(len(w))


def attended(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """The definition in float64, every pair of tokens."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    pairs = features(q, w) @ features(k, w).mT
    return pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-8)


def test_attention_is_its_definition() -> None:
    q, k, v, w = noise(3, 11, 8), noise(3, 11, 8, seed=1), noise(3, 11, 8, seed=2), noise(6, 8)
    torch.testing.assert_close(
        performer(q, k, v, w).double(), attended(q, k, v, w), rtol=1e-5, atol=1e-6
    )


def test_a_token_block_is_its_definition() -> None:
    """Keys, queries, values in this order; the skip is the values'."""
    torch.manual_seed(0)
    block = TokenBlock(20).double().eval()
    p = dict(block.named_parameters())
    for name, parameter in p.items():
        if name != "w":
            nn.init.normal_(parameter, std=0.3)
    x = noise(2, 9, 20).double()
    normed = functional.layer_norm(x, (20,), p["norm1.weight"], p["norm1.bias"], 1e-5)
    k, q, v = (
        (normed @ p["kqv.weight"].T + p["kqv.bias"])[..., i * 64 :][..., :64] for i in range(3)
    )
    y = v + attended(q, k, v, p["w"]) @ p["proj.weight"].T + p["proj.bias"]
    hidden = functional.layer_norm(y, (64,), p["norm2.weight"], p["norm2.bias"], 1e-5)
    hidden = functional.gelu(hidden @ p["mlp.0.weight"].T + p["mlp.0.bias"])
    expected = y + hidden @ p["mlp.2.weight"].T + p["mlp.2.bias"]
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_attention_of_many_features_is_softmax() -> None:
    """By Gaussian directions: without bias, and the nearer the more there are of them."""
    q, k, v = (x * noise(4, 20, 8, seed=i) for i, x in enumerate((0.3, 0.3, 1)))
    softmax = (q.double() @ k.double().mT).softmax(-1) @ v.double()
    few, many = (
        float((performer(q, k, v, noise(num, 8, seed=9)) - softmax).square().mean().sqrt())
        for num in (256, 16384)
    )
    # Evenly mixed values would be 0.06 off.
    assert many < 0.01 < 0.02 < few


def test_exponentials_are_in_float32_whatever_autocast_says() -> None:
    """Of numbers that bfloat16 holds, what attention gives is right to bfloat16's last bit."""
    w = TokenBlock(8).w
    q, k, v = ((x * noise(2, 50, 64, seed=i)).bfloat16() for i, x in enumerate((0.9, 0.9, 1)))
    expected = attended(q, k, v, w)
    with torch.autocast("cpu", torch.bfloat16):
        found = performer(q, k, v, w)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5)


def test_nothing_overflows_and_nothing_is_divided_by_zero() -> None:
    """The largest features are exp(16) / sqrt(32); far tokens' vanish, and they attend to none."""
    w = TokenBlock(8).w
    near = performer(w[None], w[None], torch.ones(1, 32, 64), w)
    torch.testing.assert_close(near, torch.ones(1, 32, 64))
    far = (100 * noise(1, 7, 64)).requires_grad_()
    found = performer(far, far, torch.ones(1, 7, 64), w)
    found.sum().backward()
    assert not found.any() and far.grad is not None and far.grad.isfinite().all()


# --- first weights ------------------------------------------------------------------------------


def test_directions_are_orthogonal_drawn_by_the_seed_and_fixed() -> None:
    encoders = [build(), build(), build(seed=1)]
    blocks: list[Any] = [encoder.model.tokens_to_token for encoder in encoders]
    one, again, other = ([b.attention1.w, b.attention2.w] for b in blocks)
    for w in one:
        torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])


def test_positions_are_sines_and_cosines_by_turns() -> None:
    table = sinusoids(50, 256)[0]
    for place in (0, 1, 7, 49):
        for i in (0, 17, 127):
            angle = place / 10000 ** (2 * i / 256)
            assert table[place, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    model: Any = build(resolution=112).model
    assert torch.equal(model.pos_embed[0], table)


def test_first_weights_are_as_published() -> None:
    for name, p in build(resolution=112).model.named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.requires_grad:
            assert float(p.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert float(p.detach().abs().max()) <= 2, name
    model: Any = build("t2t_vit_14").model
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {b.attn.scale for b in model.blocks} == {64**-0.5}
    assert all(b.attn.qkv.bias is None for b in model.blocks)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "depth"), [("t2t_vit_7", 7), ("t2t_vit_14", 14)])
def test_drop_path_grows_with_depth_and_tokens_have_dropout(name: str, depth: int) -> None:
    with torch.device("meta"):
        modules = list(build(name).modules())
    rates = [m.p for m in modules if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * b / (depth - 1) for b in range(1, depth) for _ in "12"])
    assert [m.p for m in modules if isinstance(m, Dropout) and m.p > 0] == [0.1] * 4


def shallow() -> Encoder:
    """Two blocks of the seven."""
    shape = {"img_size": 32, "num_classes": 0, "drop_path_rate": 0.3, "depth": 2}
    return Encoder(timm.create_model("t2t_vit_7", **shape), Counters(0)).train()


def test_one_graph_holds_the_whole_model() -> None:
    """Dropout's words too, which a CPU otherwise has from NumPy."""
    encoder, images = shallow(), noise(3, 3, 32, 32)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for step in (2, 3):
        encoder.counters.step = torch.tensor(step)
        encoder.set_place(torch.tensor([4, 0, 9]))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(images), encoder(images))


def test_a_pass_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device; a replay drops what its own step does, to the bit."""
    monkeypatch.setattr(chance, "words", words.reference)
    encoder, images, place = shallow(), noise(4, 3, 32, 32), torch.arange(4)
    encoder.counters.step = step = torch.zeros((), dtype=torch.int64)
    trained = [p for p in encoder.parameters() if p.requires_grad]

    def work() -> list[Tensor]:
        encoder.set_place(place)
        loss = encoder(images).square()[:, ::2].sum()
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    work()  # as every kind of step is made before it is captured
    graph = Recorded()
    found = graph.record(work)
    first = [t.clone() for t in found]
    step.fill_(5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, work(), strict=True))
    assert not torch.equal(found[0], first[0])


# --- loading ------------------------------------------------------------------------------------


def test_a_model_of_112_px_goes_on_at_224() -> None:
    """Positions are the old table resized, as the paper's; directions come along."""
    state = build(resolution=112).state_dict()
    target = build(resolution=224, seed=1)
    num = len(state)
    assert load_weights(target, state, source="here") == f"{num} of {num} tensors"
    own = target.state_dict()
    before, after = state.pop("model.pos_embed"), own["model.pos_embed"]
    assert all(torch.equal(own[key], value) for key, value in state.items())
    grid = before[0, 1:].T.reshape(1, 256, 7, 7).double()
    resized = functional.interpolate(grid, (14, 14), mode="bicubic", align_corners=False)
    assert torch.equal(after[0, 0], before[0, 0])
    torch.testing.assert_close(after[0, 1:].double(), resized[0].flatten(1).T, rtol=1e-5, atol=1e-5)
    model: Any = target.model
    assert not model.pos_embed.requires_grad


def test_timm_builds_and_loads_it(tmp_path: Path) -> None:
    model = timm.create_model("t2t_vit_7", img_size=64, num_classes=3, in_chans=1).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"input_size": [1, 64, 64], "fixed_input_size": True, "classifier": "head"}
    about = {"architecture": "t2t_vit_7", "num_classes": 3, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(about))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    image = noise(2, 1, 64, 64)
    with torch.no_grad():
        scores = loaded(image)
        assert scores.shape == (2, 3) and torch.equal(scores, model(image))
        tokens = model.forward_features(image)[:, 0]
        torch.testing.assert_close(scores, tokens @ model.head.weight.T + model.head.bias)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("t2t_vit_7", pretrained=True)


def test_it_has_one_name_here_and_one_in_timm() -> None:
    found = [backbone(name).build(32, 0.2) for name in ("t2t_vit_7", "timm:t2t_vit_7")]
    shapes = [{key: t.shape for key, t in model.state_dict().items()} for model in found]
    assert shapes[0] == shapes[1]
    assert backbone("t2t_vit_7").lr == 1e-3 and backbone("t2t_vit_7").warmup_epochs == 10
