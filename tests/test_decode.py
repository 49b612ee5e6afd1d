"""Decoding against pictures made by hand and against Pillow's own arrays."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastidmm.preparing import decode
from fastidmm.preparing.decode import Picture, decode_all

Pixels = NDArray[np.uint8]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(path: Path, max_side: int = 0) -> tuple[Pixels, tuple[str, ...]]:
    (picture,) = decode_all([path], max_side=max_side, workers=1)
    assert isinstance(picture, Picture), picture
    pixels = np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, 3)
    return pixels, picture.conversions


def reason(path: Path) -> str:
    (why,) = decode_all([path], max_side=0, workers=1)
    assert isinstance(why, str)
    return why


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_rgb_is_kept(tmp_path: Path, suffix: str) -> None:
    truth = noise(7, 5)
    Image.fromarray(truth).save(tmp_path / f"a.{suffix}")
    pixels, conversions = decoded(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels, truth) and conversions == ()


@pytest.mark.parametrize(
    ("turn", "upright"),
    [
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (4, lambda x: x[::-1]),
        (5, lambda x: x.transpose(1, 0, 2)),
        (6, lambda x: np.rot90(x, -1)),
        (7, lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda x: np.rot90(x, 1)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, turn: int, upright, suffix: str) -> None:  # type: ignore[no-untyped-def]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(noise(4, 9)).save(tmp_path / f"a.{suffix}", exif=exif)
    pixels, conversions = decoded(tmp_path / f"a.{suffix}")
    assert np.array_equal(pixels, upright(noise(4, 9))) and conversions == ("rotated",)


def test_damaged_exif_is_no_reason_to_lose_a_picture(tmp_path: Path) -> None:
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03"
    Image.fromarray(noise(8, 8)).save(tmp_path / "a.jpg", exif=damaged)
    Image.fromarray(noise(8, 8)).save(tmp_path / "b.jpg")
    assert np.array_equal(decoded(tmp_path / "a.jpg")[0], decoded(tmp_path / "b.jpg")[0])


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        pixels, conversions = decoded(tmp_path / name)
        assert pixels[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 128, 255)]
        assert conversions == ("16-bit",)


def test_eight_bits_in_thirty_two_are_kept(tmp_path: Path) -> None:
    """A TIFF's values are 16-bit as soon as one needs more than 8; a PGM's by what is white."""
    shallow, deep = np.array([[0, 99, 255]], np.int32), np.array([[0, 257, 256]], np.int32)
    Image.fromarray(shallow).save(tmp_path / "shallow.tif")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    Image.fromarray(shallow.astype(np.uint16)).save(tmp_path / "dark.tif")
    Image.fromarray(shallow.astype(np.uint16)).save(tmp_path / "dark.pgm")
    pixels, conversions = decoded(tmp_path / "shallow.tif")
    assert pixels[0].tolist() == [[0] * 3, [99] * 3, [255] * 3]
    assert conversions == ("32-bit of values below 256",)
    for name, truth in (("deep.tif", [0, 1, 1]), ("dark.tif", [0, 0, 1]), ("dark.pgm", [0, 0, 1])):
        pixels, conversions = decoded(tmp_path / name)
        assert pixels[0].tolist() == [[v] * 3 for v in truth] and conversions == ("16-bit",)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(shallow).save(tmp_path / "turned.tif", exif=exif)
    pixels, conversions = decoded(tmp_path / "turned.tif")
    assert pixels[0].tolist() == [[255] * 3, [99] * 3, [0] * 3]
    assert conversions == ("32-bit of values below 256", "rotated")


def test_pixels_of_more_than_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.array([[0, 0.5]], np.float32)).save(tmp_path / "float.tif")
    assert "32-bit pixels" in reason(tmp_path / "int.tif")
    assert "floating-point pixels" in reason(tmp_path / "float.tif")


def test_transparency_is_put_on_white(tmp_path: Path) -> None:
    red, half, clear = (255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)
    Image.fromarray(np.array([[red, half, clear]], np.uint8)).save(tmp_path / "rgba.png")
    pixels, conversions = decoded(tmp_path / "rgba.png")
    assert pixels[0].tolist() == [[255, 0, 0], [255, 127, 127], [255, 255, 255]]
    assert conversions == ("transparent",)
    gray = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    gray.save(tmp_path / "la.png")
    pixels, conversions = decoded(tmp_path / "la.png")
    assert pixels[0].tolist() == [[10] * 3, [255] * 3] and conversions == ("gray", "transparent")


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palette_with_a_transparent_colour(tmp_path: Path, name: str) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 10, 20, 30, 210, 40, 50, 60, 220])
    image.putdata([0, 1, 2])
    image.save(tmp_path / name, transparency=1)
    pixels, conversions = decoded(tmp_path / name)
    assert pixels[0].tolist() == [[200, 10, 20], [255] * 3, [50, 60, 220]]
    assert conversions == ("palette", "transparent")


def test_cmyk_and_gray(tmp_path: Path) -> None:
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tif")
    pixels, conversions = decoded(tmp_path / "a.tif")
    assert pixels[0].tolist() == [[255] * 3, [0, 255, 255], [0] * 3] and conversions == ("CMYK",)
    Image.fromarray(np.array([[0, 99, 255]], np.uint8)).save(tmp_path / "b.png")
    assert decoded(tmp_path / "b.png")[0][0].tolist() == [[0] * 3, [99] * 3, [255] * 3]
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "c.png")
    assert decoded(tmp_path / "c.png")[0][0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame_counts(tmp_path: Path, name: str) -> None:
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    pixels, conversions = decoded(tmp_path / name)
    assert (pixels == (255, 0, 0)).all() and "animated" in conversions


def test_a_phone_s_double_jpeg_is_no_animation(tmp_path: Path) -> None:
    image = Image.fromarray(noise(8, 8))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image])
    assert decoded(tmp_path / "a.jpg")[1] == ()


def test_the_long_side_is_limited_and_small_ones_are_left(tmp_path: Path) -> None:
    Image.new("RGB", (400, 20), (9, 90, 200)).save(tmp_path / "long.png")
    Image.new("RGB", (30, 600), (9, 90, 200)).save(tmp_path / "high.png")
    Image.new("RGB", (999, 1), (9, 90, 200)).save(tmp_path / "thin.png")
    Image.new("RGB", (1, 1), (9, 90, 200)).save(tmp_path / "dot.png")
    shapes = {"long": (5, 100, 3), "high": (100, 5, 3), "thin": (1, 100, 3), "dot": (1, 1, 3)}
    for name, shape in shapes.items():
        pixels, _ = decoded(tmp_path / f"{name}.png", max_side=100)
        assert pixels.shape == shape and (pixels == (9, 90, 200)).all()
    assert decoded(tmp_path / "long.png")[0].shape == (20, 400, 3)


def test_shrinking_a_large_jpeg_is_close_to_shrinking_it_whole(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:900, :1200]
    smooth = np.stack([rows / 4, columns / 5, (rows + columns) / 9], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    pixels, _ = decoded(tmp_path / "a.jpg", max_side=200)
    truth = np.asarray(Image.fromarray(smooth).resize((200, 150), Image.Resampling.BOX))
    assert pixels.shape == truth.shape
    assert np.abs(pixels.astype(int) - truth)[2:-2, 2:-2].max() <= 3


def test_shrinking_is_by_lanczos_of_the_whole_or_of_twice_the_side(tmp_path: Path) -> None:
    """A JPEG is read at a half of its sides here; at a quarter it would lose detail."""
    Image.fromarray(noise(200, 300)).save(tmp_path / "a.png")
    Image.fromarray(noise(900, 1200)).save(tmp_path / "a.jpg")
    whole = Image.fromarray(noise(200, 300)).resize((100, 67), Image.Resampling.LANCZOS)
    assert np.array_equal(decoded(tmp_path / "a.png", max_side=100)[0], np.asarray(whole))
    with Image.open(tmp_path / "a.jpg") as image:
        image.draft(None, (400, 400))
        assert image.size == (600, 450)
        half = image.resize((200, 150), Image.Resampling.LANCZOS)
    assert np.array_equal(decoded(tmp_path / "a.jpg", max_side=200)[0], np.asarray(half))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-900])
    (tmp_path / "text.jpg").write_text("no photograph")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "drawing.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert reason(tmp_path / "cut.jpg") == "truncated"
    assert reason(tmp_path / "text.jpg") == "not an image"
    assert reason(tmp_path / "empty.jpg") == "empty"
    assert reason(tmp_path / "gone.jpg") == "no such file, or a link to nothing"
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path / "drawing.jpg") == "not an image"


@pytest.mark.parametrize("side", [7_200, 12_000, 30_000])
def test_a_bomb_is_refused_unopened(tmp_path: Path, side: int) -> None:
    header = f"P4\n{side} {side}\n".encode()
    (tmp_path / "bomb.ppm").write_bytes(header)
    assert reason(tmp_path / "bomb.ppm") == "more than 50 million pixels"


@pytest.mark.parametrize(
    "kind", ["ICO", "TGA", "PCX", "SGI", "DDS", "ICNS", "EPS", "PDF", "JPEG2000"]
)
def test_other_formats_are_not_opened_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.jpg", kind)
    assert reason(tmp_path / "a.jpg") == "not an image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_the_seven_formats_are_read_whatever_they_are_called(tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (9, 5), (0, 0, 255)).save(tmp_path / "a.txt", kind)
    pixels, _ = decoded(tmp_path / "a.txt")
    assert pixels.shape == (5, 9, 3) and np.abs(pixels - np.array([0, 0, 255])).max() < 8


def test_a_file_too_large_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.webp").open("wb") as file:
        file.truncate(decode.MAX_FILE + 1)
    assert reason(tmp_path / "a.webp") == "a file of more than 256 MiB"


def test_fifty_million_pixels_are_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a.pbm").write_bytes(b"P4\n10000 5000\n" + bytes(6_250_000))
    (tmp_path / "b.pbm").write_bytes(b"P4\n10000 5001\n" + bytes(6_251_250))
    assert decoded(tmp_path / "a.pbm", max_side=10)[0].shape == (5, 10, 3)
    assert reason(tmp_path / "b.pbm") == "more than 50 million pixels"


def test_memory_is_given_out_in_turn_and_within_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        Image.new("RGB", (10 + number % 4 * 30, 40), (number, 0, 0)).save(path)
    paths[7].write_text("no photograph")
    held: list[int] = []
    real = decode.Room.take

    def noting(room: decode.Room, turn: int, num_bytes: int) -> None:
        real(room, turn, num_bytes)
        held.append(room._held)

    monkeypatch.setattr(decode.Room, "take", noting)
    most = 22 * 100 * 40  # what the widest needs
    for num_bytes, bound in ((2 * most, 2 * most), (1, most)):
        held.clear()
        monkeypatch.setattr(decode, "ROOM", num_bytes)
        pictures = list(decode_all(paths, max_side=0, workers=4))
        rows = [p.pixels[0] for p in pictures if isinstance(p, Picture)]
        assert rows == [row for row in range(30) if row != 7] and pictures[7] == "not an image"
        assert len(held) == 30 and max(held) <= bound


PEAK = """
import sys
from pathlib import Path
from fastidmm.preparing import decode
decode.ROOM = 100 << 20
paths = [Path(sys.argv[1])] * 16
assert all(p.height == 2000 for p in decode.decode_all(paths, max_side=0, workers=8))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_many_threads_with_large_pictures_stay_small(tmp_path: Path) -> None:
    Image.new("RGBA", (2000, 2000), (9, 90, 200, 128)).save(tmp_path / "a.png")
    words = [sys.executable, "-c", PEAK, str(tmp_path / "a.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 250 << 10


def test_stopping_early_ends_the_threads_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "ROOM", 1)
    for number in range(20):
        Image.new("RGB", (50, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    pictures = decode_all(sorted(tmp_path.iterdir()), max_side=0, workers=3)
    assert isinstance(next(pictures), Picture)
    before = threading.active_count()
    pictures.close()
    assert threading.active_count() == before - 3


def test_many_threads_keep_the_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for number, path in enumerate(paths):
        Image.new("RGB", (1 + number % 7 * 60, 9), (number, 0, 0)).save(path)
    pictures = list(decode_all(paths, max_side=0, workers=4))
    assert [p.pixels[0] for p in pictures if isinstance(p, Picture)] == list(range(40))
