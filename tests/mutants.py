"""Plants mistakes in the kernels, one at a time, and sees whether the tests notice.

    python tests/mutants.py [NAME ...]

Works on a copy of the checkout; about a quarter of a minute a mistake. Exit status 1 if any lives.
"""

# ruff: noqa: E501  (a mistake a line)

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS, TILES = "kernels/instance_loss_rows.py", "kernels/instance_loss_tiles.py"
LOGITS, STREAM = "kernels/instance_loss_logits.py", "kernels/instance_loss_stream.py"
VIEWS, VIEWS_CALL = "kernels/views_programs.py", "kernels/views.py"
DRAWS, DRAWS_CALL = "kernels/draws_program.py", "kernels/draws.py"
VIEWS_CPU, WORDS = "kernels/views_cpu.py", "kernels/words.py"
# The tests that must notice a mistake in a file: tests/test_NAME.py.
TESTS = {
    ROWS: "instance_loss_fused", LOGITS: "instance_loss_fused", TILES: "instance_loss_stream",
    STREAM: "instance_loss_stream", VIEWS: "views", VIEWS_CALL: "views", DRAWS: "draws",
    DRAWS_CALL: "draws", VIEWS_CPU: "views_cpu", WORDS: "chance",
}  # fmt: skip

# Name: the file, and pairs of what stands there and what is put in its place.
MUTANTS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "gradient without smoothing": (ROWS, [(" - w * (smoothing / num)\n", "\n")]),
    "loss without smoothing": (ROWS, [(" - tl.where(soft == 0, 0.0, soft * q)", "")]),
    "smoothing over N - 1 (gradient)": (
        ROWS, [("w * (smoothing / num)", "w * (smoothing / (num - 1 + (num == 1)))")],
    ),
    "smoothing over N - 1 (loss)": (
        ROWS, [("1 - smoothing, smoothing / num", "1 - smoothing, smoothing / (num - 1 + (num == 1))")],
    ),
    "shares swapped (gradient)": (
        ROWS, [("o == row, hard * lam, 0", "o == row, hard * (1 - lam), 0"),
               ("o == other, hard * (1 - lam), 0", "o == other, hard * lam, 0")],
    ),
    "shares swapped (loss)": (ROWS, [("lam * own + (1 - lam) * pasted", "lam * pasted + (1 - lam) * own")]),
    "row weight ignored (gradient)": (
        ROWS, [("hard = w * (1 - smoothing)", "hard = 1 - smoothing"),
               ("g = w * (e * r) - w * (smoothing / num)", "g = e * r - smoothing / num")],
    ),
    "row weight ignored (loss)": (ROWS, [("w * tl_loss(", "tl_loss(")]),
    "target not reduced by smoothing": (ROWS, [("hard = w * (1 - smoothing)", "hard = w")]),
    "own partner not added": (ROWS, [("tl.where(o == other, hard", "tl.where((o == other) & (o != row), hard")]),
    "loss in unshifted logits": (
        ROWS, [("tl.where(o == row, y, 0.0)", "tl.where(o == row, x, 0.0)"),
               ("tl.where(o == other, y, 0.0)", "tl.where(o == other, x, 0.0)"),
               ("q = tl.sum(tl.where(o < num, y, 0.0), 0)", "q = tl.sum(tl.where(o < num, x, 0.0), 0)"),
               ("w * tl_loss(s, own, pasted, q, lam, smoothing, num)",
                "w * (top + tl_loss(s, own, pasted, q, lam, smoothing, num))")],
    ),
    "masked by the pitch": (ROWS, [('x = tl.where(o < num, x, float("-inf"))', "")]),
    "pad columns not zeroed": (ROWS, [("g = tl.where(o < num, g, 0.0)\n        tl.store", "tl.store")]),
    "offsets in 32 bits": (
        ROWS, [('b = tl.program_id(0).to(tl.int64)\n    row, other, lam, w, valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)\n    o = tl',
                'b = tl.program_id(0)\n    row, other, lam, w, valid = tl_targets(b, ROWS, PARTNER, LAM, SHARE, share, num)\n    o = tl')],
    ),
    "lse for log s in the gradient": (
        ROWS, [("tl_gradient(e, 1 / s, o", "tl_gradient(tl.exp(y - top - tl.log(s)), 1.0, o")],
    ),
    "dW not times the upstream gradient": (LOGITS, [("(z * gradient).to(z.dtype)", "z")]),
    "dz not times the upstream gradient": (LOGITS, [("product(g, right) * gradient", "product(g, right)")]),
    "NaN swallowed": (ROWS, [("    s = tl.sum(e, 0)\n", "    s = tl.sum(tl.where(e == e, e, 0.0), 0)\n")]),
    "rows out of range not marked": (ROWS, [('s = tl.where(valid, s, float("nan"))', "s = s")]),
    "rows narrowed before the check": (
        ROWS, [("row = tl.load(ROWS + b).to(tl.int64)", "row = tl.load(ROWS + b).to(tl.int32)")],
    ),
    "partner not checked": (ROWS, [("inside = inside & (other >= 0) & (other < num)", "inside = inside")]),
    "hit by the last of equals": (ROWS, [("tl.min(tl.where(x == top, o, BLOCK), 0)", "tl.max(tl.where(x == top, o, -1), 0)")]),
    "bias left out of the logits": (ROWS, [("x += tl.load(BIAS + o, mask=o < pitch, other=0.0)", "x += 0.0")]),
    "bf16 logits": (LOGITS, [("return torch.mm(a.float(), b.float())", "return torch.mm(a.float(), b.float()).bfloat16().float()")]),
    "only the last part's dW": (LOGITS, [("else d_weight.add_(found)", "else found")]),
    "long rows: sum not moved to the new maximum": (ROWS, [("s = s * tl.exp(top - new) + ", "s = s + ")]),
    "long rows: mean not moved": (ROWS, [("q = q + seen * (top - new) + ", "q = q + ")]),
    "long rows: own logit without bias": (ROWS, [("x += tl.load(BIAS + column, mask=column >= 0, other=0.0)", "x += 0.0")]),
    "F: dz without smoothing": (TILES, [(" - (smoothing / num) * u", "")]),
    "F: shares swapped in dz": (TILES, [("hard * lam * w_i - hard * (1 - lam) * w_j", "hard * (1 - lam) * w_i - hard * lam * w_j")]),
    "F: dW without smoothing": (TILES, [("[None, :]) - smoothing / num", "[None, :])")]),
    "F: own partner not added": (TILES, [("k[:, None] == other[None, :], hard", "(k[:, None] == other[None, :]) & (k[:, None] != row[None, :]), hard")]),
    "F: row weight ignored in dW": (TILES, [("g * (share_b * gradient)", "g * gradient")]),
    "F: upstream gradient ignored in dW": (TILES, [("g * (share_b * gradient)", "g * share_b")]),
    "F: rows beyond the batch counted": (TILES, [("g = tl.where((o < batch)[None, :], g * (share_b * gradient), 0.0)", "g = g * (share_b * gradient)")]),
    "F: classes beyond N counted": (TILES, [('x = tl.where((o < num)[None, :], x, float("-inf"))', "")]),
    "F: average not moved to the new maximum": (TILES, [("grown = out[c] * shrink[:, None]", "grown = out[c]")]),
    "F: sum not moved to the new maximum": (TILES, [("s = s * shrink + tl.sum(e, 1)", "s = s + tl.sum(e, 1)")]),
    "F: mean not moved": (TILES, [("q += (top - new) * (start - begin)", "q += 0.0")]),
    "F: splits' mean not moved": (TILES, [("+ (highest - new) * here", "")]),
    "F: splits' sum not moved": (TILES, [("tl.load(place + batch) * grow", "tl.load(place + batch)")]),
    "F: hit by any of equals": (TILES, [("(own == top) & (own > early)", "own == top")]),
    "F: rows out of range not marked": (TILES, [('s = tl.where(valid, s, float("nan"))', "s = s")]),
    "F: unshifted own logit": (TILES, [("tl_loss(s, own - top,", "tl_loss(s, own,")]),
    "F: first chunk only": (TILES, [("x = tl.dot(a[c], tl.trans(b[c]), x, ", "x = tl.dot(a[0], tl.trans(b[0]), x, ")]),
    "F: the last split is not launched": (STREAM, [("tiles.rows), splits)]", "tiles.rows), max(splits - 1, 1))]")]),
    "V: centres half a pixel off": (VIEWS, [("(place.to(tl.float64) + 0.5) * scale", "place.to(tl.float64) * scale")]),
    "V: no antialiasing": (VIEWS, [("stretch = tl.maximum(scale, 1.0)", "stretch = scale * 0.0 + 1.0")]),
    "V: cubic cut short": (VIEWS, [("support = 2.0 if CUBIC else 1.0", "support = 1.0")]),
    "V: pixels beyond the window": (VIEWS, [("return tl.where((source >= first) & (source < last), weight, 0.0)", "return weight")]),
    "V: hue for saturation": (VIEWS, [("if now == 3:", "if now == 2:")]),
    "V: contrast's mean after all": (VIEWS, [("going = going and (now != 1)", "going = going")]),
    "V: mean over the block": (VIEWS, [("tl.sum(total, 0) / (size * size)", "tl.sum(total, 0) / BLOCK")]),
    "V: another luma": (VIEWS, [("0.587 * green", "0.5 * green")]),
    "V: hue turns green amiss": (VIEWS, [("sixths + 3.0", "sixths + 1.0")]),
    "V: blur shifted down": (VIEWS, [("tall[None, :] - RADIUS - tl.arange(0, ROWS)[:, None]", "tall[None, :] - tl.arange(0, ROWS)[:, None]")]),
    "V: blur of the first columns": (VIEWS, [("begin_x + wide - RADIUS", "wide - RADIUS")]),
    "V: blur not normalised": (VIEWS, [("/ total_y[:, None]", "")]),
    "V: solarize from 100": (VIEWS, [("128 / 255, 1.0 - red", "100 / 255, 1.0 - red")]),
    "V: no flip": (VIEWS, [("last - x, x)", "x, x)")]),
    "V: own box not left out": (VIEWS, [("here & ~_in_box(box, crop, y, x)", "here")]),
    "V: own box pasted": (VIEWS, [("here & _in_box(box, there, y, x)", "here & _in_box(box, crop, y, x)")]),
    "V: deviation forgotten": (VIEWS, [("(red - mean_r) / std_r", "red - mean_r")]),
    "V: gray in red alone": (VIEWS, [("shade, shade, shade", "shade, green, blue")]),
    "V: partners not inverted": (VIEWS_CALL, [("goes_to[plan.partner] = torch.arange(num, device=device)", "goes_to = plan.partner")]),
    "V: radius of one sigma": (VIEWS_CALL, [("_radius(group) if group.blur", "_radius(group) // 4 if group.blur")]),
    "V: first rows everywhere": (VIEWS, [("y = tl.program_id(1) * ROWS + tl.arange(0, ROWS)", "y = tl.arange(0, ROWS)")]),
    "D: the last try that fits": (DRAWS, [("tl.where(fits & ~found, tall, height)", "tl.where(fits, tall, height)")]),
    "D: halves rounded up": (DRAWS, [("((x + 4503599627370496.0) - 4503599627370496.0)", "tl.floor(x + 0.5)")]),
    "D: whole width refused": (DRAWS, [("(width <= wide)", "(width < wide)")]),
    "D: another entry of the table": (DRAWS, [("ratio_word >> 16", "ratio_word >> 15 & 65535")]),
    "D: last row never": (DRAWS, [("high - height + 1", "high - height")]),
    "D: order from another word": (DRAWS, [("_below(a, 24)", "_below(b, 24)")]),
    "D: sigma from another word": (DRAWS, [("_between(d, ranges, 5)", "_between(c, ranges, 5)")]),
    "D: central crop of other shapes": (DRAWS, [("tl.where(ratio < least", "tl.where(ratio < most")]),
    "D: operations by the crop's key": (DRAWS, [("operation_key, epoch, row, view, 2 * turn)", "key, epoch, row, view, 2 * turn)")]),
    "D: levels from 0": (DRAWS, [("1 + _below(c, 9)", "_below(c, 9)")]),
    "D: solarize by blur's chance": (DRAWS, [("a < tl.load(chances + 4)", "a < tl.load(chances + 3)")]),
    "C: no antialiasing": (VIEWS_CPU, [("antialias=True", "antialias=False")]),
    "C: always bilinear": (VIEWS_CPU, [("mode=crops.interpolation", 'mode="bilinear"')]),
    "C: pixels of the row above": (VIEWS_CPU, [("3 * (top * wide + left)", "3 * (top * (wide - 1) + left)")]),
    "C: memory's offset forgotten": (VIEWS_CPU, [("base + start +", "start +")]),
    "C: evaluation from the corner": (VIEWS_CPU, [("whole[:, top : top + size, left : left + size]", "whole[:, :size, :size]")]),
    "C: chances of another crop": (VIEWS_CPU, [("sigma, solarize = chances[i]", "sigma, solarize = chances[i - 1]")]),
    "C: flip before RandAugment": (VIEWS_CPU, [("if flip and not group.randaugment else", "if flip else"), ("changed.flip(-1) if flip else changed", "changed")]),
    "C: gray by two channels": (VIEWS_CPU, [("self.bytes[:2], self.bytes[1:]", "self.bytes[:1], self.bytes[1:2]")]),
    "C: brightness leaves the lift": (VIEWS_CPU, [("self.lift = base + (self.lift - base) * amount", "self.lift += base * (1 - amount)")]),
    "C: brightness not clamped": (VIEWS_CPU, [("        self._clamp(factor)\n\n    def _clamp", "\n    def _clamp")]),
    "C: saturation not clamped": (VIEWS_CPU, [("1 - factor)\n        self._clamp(factor)", "1 - factor)")]),
    "C: clamped by levels": (VIEWS_CPU, [("clamp_(-self.lift / self.gain, (255 - self.lift) / self.gain)", "clamp_(0, 255)")]),
    "C: contrast about the values' mean": (VIEWS_CPU, [("self.gain * total / self.planes[0].numel() + self.lift", "total / self.planes[0].numel()")]),
    "C: another luma": (VIEWS_CPU, [("torch.tensor([LUMA])", "torch.tensor([[0.3, 0.5, 0.2]])")]),
    "C: hue turned back": (VIEWS_CPU, [("6 * turns - own", "-6 * turns - own")]),
    "C: green and blue swapped": (VIEWS_CPU, [("zip((0, 2, 4), self.aways", "zip((0, 4, 2), self.aways")]),
    "C: circle not closed": (VIEWS_CPU, [(".abs_().sub_(chroma, alpha=3).abs_()", ".abs_().neg_().add_(chroma, alpha=3)")]),
    "C: solarize of values": (VIEWS_CPU, [("(255 - 2 * self.lift) / self.gain", "255")]),
    "C: blur too narrow": (VIEWS_CPU, [("math.ceil(4 * sigma)", "math.ceil(2 * sigma)")]),
    "C: blur not normalised": (VIEWS_CPU, [("    taps /= taps[0].sum()\n", "")]),
    "C: odd blocks left": (VIEWS_CPU, [("    torch.mm(odd[:, :reach], taps.T, out=pairs[:-1, block:])\n", "")]),
    "C: black beyond the edge": (VIEWS_CPU, [('mode="replicate"', 'mode="constant"')]),
    "C: deviation forgotten": (VIEWS_CPU, [("alpha=self.gain / (255 * std)", "alpha=self.gain / 255")]),
    "C: pasted from pasted": (VIEWS_CPU, [("left:right].clone()))", "left:right]))")]),
    "C: shares swapped": (VIEWS_CPU, [("torch.lerp(x[plan.partner], x,", "torch.lerp(x, x[plan.partner],")]),
    "C: mixed after rounding": (VIEWS_CPU, [('torch.float32 if plan.mix == "mixup" else dtype', "dtype"), ("plan.weight[:, None", "plan.weight.to(x.dtype)[:, None")]),
    "C: threads as they are": (VIEWS_CPU, [("    torch.set_num_threads(1)\n", "")]),
    "W: key not raised": (WORDS, [("k0, k1 = (k0 + 0x9E3779B9)", "k0, k1 = (k0 + 0)")]),
    "W: counters not cut": (WORDS, [(".astype(np.uint64) & word for", ".astype(np.uint64) for")]),
    "D: halves of the key swapped": (DRAWS_CALL, [("low | high << 32", "high | low << 32")]),
}  # fmt: skip


def passes(part: str, place: Path) -> bool:
    """Whether that part's tests pass in the copy at `place`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{part}.py"],
        cwd=place, env=os.environ | {"PYTHONPATH": str(place)}, capture_output=True, check=False,
    )  # fmt: skip
    # A wild read may end the process; other statuses mean that pytest was not run.
    assert done.returncode in (0, 1) or done.returncode < 0, done.stdout.decode()[-2000:]
    return done.returncode == 0


def noticed(name: str, place: Path) -> bool:
    """Whether the tests of the file fail with the mistake planted in the copy at `place`."""
    file, edits = MUTANTS[name]
    original = (ROOT / file).read_text()
    text = original
    for old, new in edits:
        assert old in text, f"{name}: {file} no longer holds {old!r}"
        text = text.replace(old, new)
    (place / file).write_text(text)
    caught = not passes(TESTS[file], place)
    (place / file).write_text(original)
    return caught


def main() -> None:
    """Plant all, or those named; print what became of each."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        shutil.copytree(
            ROOT, place, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs")
        )
        alive = []
        asked = sys.argv[1:] or list(MUTANTS)
        for part in {TESTS[MUTANTS[name][0]] for name in asked}:
            assert passes(part, place), f"broken without a mistake: {part}"
        for name in asked:
            caught = noticed(name, place)
            print("caught" if caught else "ALIVE ", name, flush=True)
            alive += [] if caught else [name]
    print(f"{len(alive)} alive")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
