"""Decode photographs into RGB pixels, on every core."""

import ctypes
import stat
import warnings
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Condition

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from fastidmm.facts import num_cores
from fastidmm.preparing.lookalike import look

# Named, because Pillow would also hand PostScript to an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif"),
    *(".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"),
)
MAX_PIXELS = 50_000_000
MAX_FILE = 1 << 28  # bytes; some of Pillow's readers take a file in whole before they look
ROOM = 1 << 30  # bytes for what is being decoded or waits to be written
LARGE = 1 << 26  # bytes held by a picture after which freed memory is worth handing back
# Pillow keeps four bytes a pixel and, with transparency, four such pictures at a time; libjpeg
# keeps six bytes a pixel of a progressive JPEG, whatever size is asked for.
BYTES_DECODED, BYTES_READ = 16, 6
MODES = {"1": "gray", "L": "gray", "LA": "gray", "P": "palette", "PA": "palette"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a decoded photograph beside its pixels."""

    height: int
    width: int
    digest: str  # SHA-256 of the pixels
    look: int | None  # see `lookalike.look`
    conversions: tuple[str, ...]  # what was done to make it RGB and upright


@dataclass(frozen=True, slots=True)
class Picture(Facts):
    """One decoded photograph."""

    pixels: bytes  # (height, width, 3) row by row


Pictures = Generator[Picture | str, None, None]


class Room:
    """Memory for pictures, given out in their order, so that the one awaited is never kept out."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._held, self._turn, self._closed = 0, 0, False
        self._change = Condition()

    def take(self, turn: int, num_bytes: int) -> None:
        """Wait for the turn and the room; more than all of it is granted when nothing is held."""

        def free() -> bool:
            fits = not self._held or self._held + num_bytes <= self.num_bytes
            return self._closed or (self._turn == turn and fits)

        with self._change:
            self._change.wait_for(free)
            if self._closed:
                raise CancelledError
            self._held += num_bytes
            self._turn += 1
            self._change.notify_all()

    def give_back(self, num_bytes: int) -> None:
        """Let others have it."""
        with self._change:
            self._held -= num_bytes
            self._change.notify_all()

    def close(self) -> None:
        """Make whoever waits, or will, give up."""
        with self._change:
            self._closed = True
            self._change.notify_all()


@dataclass(slots=True)
class Seat:
    """One picture's share of the room."""

    room: Room
    turn: int
    held: int | None = None  # bytes; None before it was asked for

    def take(self, num_bytes: int) -> None:
        """Wait until so much may be used."""
        self.room.take(self.turn, num_bytes)
        self.held = num_bytes

    def keep(self, num_bytes: int) -> None:
        """Give back all but this."""
        if self.held is None:
            self.take(num_bytes)  # the next one waits for this one's turn
        else:
            self.room.give_back(self.held - num_bytes)
            self.held = num_bytes


def decode(path: Path, max_side: int, seat: Seat) -> Picture | str:
    """The photograph upright in RGB, no side longer than `max_side`; or why it is unusable."""
    outcome = _judged(path, max_side, seat)
    if (seat.held or 0) > LARGE:
        _trim()
    seat.keep(len(outcome.pixels) if isinstance(outcome, Picture) else 0)
    return outcome


def _trim() -> None:
    """Hand freed memory back to the system, which glibc keeps for each thread by itself."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _judged(path: Path, max_side: int, seat: Seat) -> Picture | str:
    try:
        return _decode(path, max_side, seat)
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


def _decode(path: Path, max_side: int, seat: Seat) -> Picture | str:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if not found.st_size:
        return "empty"
    if found.st_size > MAX_FILE:
        return f"a file of more than {MAX_FILE >> 20} MiB"
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            return _too_large()
        num_bytes = BYTES_READ * image.width * image.height
        sketch(image, max_side)
        seat.take(num_bytes + BYTES_DECODED * image.width * image.height)
        conversions = _conversions(image)  # which loads a PNG
        rgb = upright(image, max_side)
    pixels = rgb.tobytes()
    digest = sha256(pixels).hexdigest()
    return Picture(rgb.height, rgb.width, digest, look(rgb), conversions, pixels)


def sketch(image: Image.Image, max_side: int) -> None:
    """Tell an opened JPEG that a half, quarter or eighth of its sides will do; twice is left."""
    if max_side:
        image.draft(None, (2 * max_side, 2 * max_side))


def upright(image: Image.Image, max_side: int) -> Image.Image:
    """An opened image as a store holds it: in RGB, upright, no side longer than `max_side`."""
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _shrunk(_rgb(image), max_side)


def _too_large() -> str:
    return f"more than {MAX_PIXELS // 1_000_000} million pixels"


def _conversions(image: Image.Image) -> tuple[str, ...]:
    """What has to be done to an opened image, in words to count."""
    done = []
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1  # loading a TIFF turns it
    if image.mode != "RGB" and image.mode != "RGBA":
        done.append(_depth(image) if image.mode[0] == "I" else MODES.get(image.mode, image.mode))
    if image.has_transparency_data:
        done.append("transparent")
    # A phone's MPO holds the same photograph several times.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        done.append("animated")
    if turned:
        done.append("rotated")
    return tuple(done)


def _depth(image: Image.Image) -> str:
    """What a gray picture's values are, in words to count; loads it."""
    return "32-bit of values below 256" if _shallow(image) else "16-bit"


def _shallow(image: Image.Image) -> bool:
    """Whether a 32-bit TIFF holds 8-bit values, as programs write that only know int.

    As 16-bit values they would be black. A PGM of more than 8 bits has the same mode, and says
    which value is white.
    """
    return image.format == "TIFF" and image.mode == "I" and int(np.asarray(image).max()) < 256


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
    """16-bit gray as 8-bit gray: 65535 becomes 255; 8-bit values in 32 bits as they are."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels; save it with 8 or 16 bits")
    if _shallow(image):
        return Image.fromarray(values.astype(np.uint8))
    values = values.astype(np.uint32)
    values *= 255
    values += 32767
    values //= 65535
    return Image.fromarray(values.astype(np.uint8))


def _shrunk(image: Image.Image, max_side: int) -> Image.Image:
    """The same picture with its long side at most `max_side`, unless that is 0."""
    long = max(image.size)
    if not max_side or long <= max_side:
        return image
    wide, high = (max(1, round(side * max_side / long)) for side in image.size)
    return image.resize((wide, high), Image.Resampling.LANCZOS)


def decode_all(paths: Iterable[Path], *, max_side: int, workers: int | None) -> Pictures:
    """Decode in order over `workers` threads, by default one per core; `ROOM` bounds the memory."""
    workers = max(workers, 1) if workers is not None else num_cores()
    # Threads, since Pillow and hashlib decode and hash outside Python's lock: 2.8 ms an image of
    # 500 x 667 on one core; two processes took 4 to 5 ms, most of it to hand the pixels over.
    pool, room = ThreadPoolExecutor(workers), Room(ROOM)
    waiting: deque[tuple[Seat, Future[Picture | str]]] = deque()
    with warnings.catch_warnings():
        # Large files and damaged EXIF are judged by `decode`, by name.
        warnings.simplefilter("ignore")
        try:
            for turn, path in enumerate(paths):
                seat = Seat(room, turn)
                waiting.append((seat, pool.submit(decode, path, max_side, seat)))
                if len(waiting) > 2 * workers:
                    yield from _next(waiting)
            while waiting:
                yield from _next(waiting)
        finally:
            room.close()
            pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[Seat, Future[Picture | str]]]) -> Pictures:
    seat, picture = waiting.popleft()
    yield picture.result()
    seat.keep(0)  # by now it is written
