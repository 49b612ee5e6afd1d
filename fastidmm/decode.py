"""Decode photographs into RGB pixels, on every core."""

import os
import stat
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Named, because Pillow would also hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif"),
    *(".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"),
)
MAX_PIXELS = 50_000_000
MODES = {"1": "gray", "L": "gray", "LA": "gray", "P": "palette", "PA": "palette"}


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded photograph."""

    pixels: bytes  # (height, width, 3) row by row
    height: int
    width: int
    digest: str  # SHA-256 of the pixels
    conversions: tuple[str, ...]  # what was done to make it RGB and upright


Pictures = Generator[Picture | str, None, None]


def decode(path: Path, max_side: int) -> Picture | str:
    """The photograph upright in RGB, no side longer than `max_side`; or why it is unusable."""
    try:
        return _decode(path, max_side)
    except UnidentifiedImageError:
        return "not an image"
    except Image.DecompressionBombError:
        return _too_large()
    except PermissionError:
        return "no permission to read it"
    except FileNotFoundError:
        return "no such file, or a link to nothing"
    # Pillow's readers raise whatever their format's parser happens to meet.
    except Exception as problem:
        return "truncated" if "truncated" in str(problem) else f"broken: {problem}"


def _decode(path: Path, max_side: int) -> Picture | str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if not found.st_size:
        return "empty"
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            return _too_large()
        conversions = _conversions(image)
        if max_side:
            # JPEG decodes to a half, quarter or eighth for less; twice the size is left.
            image.draft(None, (2 * max_side, 2 * max_side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        rgb = _shrunk(_rgb(image), max_side)
    pixels = rgb.tobytes()
    return Picture(pixels, rgb.height, rgb.width, sha256(pixels).hexdigest(), conversions)


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 1_000_000} million pixels"


def _conversions(image: Image.Image) -> tuple[str, ...]:
    """What has to be done to an opened image, in words to count."""
    done = []
    if image.mode != "RGB" and image.mode != "RGBA":
        done.append("16-bit" if image.mode.startswith("I") else MODES.get(image.mode, image.mode))
    if image.has_transparency_data:
        done.append("transparent")
    # A phone's MPO holds the same photograph several times.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        done.append("animated")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        done.append("rotated")
    return tuple(done)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, with white behind what is transparent."""
    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit gray as 8-bit gray: 65535 becomes 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels; save it with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """The same picture with its long side at most `max_side`, unless that is 0."""
    long = max(image.size)
    if not max_side or long <= max_side:
        return image
    wide, high = (max(1, round(side * max_side / long)) for side in image.size)
    return image.resize((wide, high), Image.Resampling.LANCZOS)


def decode_all(paths: Sequence[Path], *, max_side: int, workers: int | None) -> Pictures:
    """Decode in order over `workers` threads, by default one per core."""
    workers = max(workers, 1) if workers is not None else num_cores()
    # Threads, since Pillow and hashlib decode and hash outside Python's lock: 2.8 ms an image of
    # 500 x 667 on one core; two processes took 4 to 5 ms, most of it to hand the pixels over.
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Picture | str]] = deque()
    with warnings.catch_warnings():
        # Large files and damaged EXIF are judged by `decode`, by name.
        warnings.simplefilter("ignore")
        try:
            for path in paths:
                waiting.append(pool.submit(decode, path, max_side))
                # Bounds what is decoded and not yet written, whatever the dataset.
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
