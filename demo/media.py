"""Sample media of the shop: images and videos of some megabytes, made up from a seed; and how large one says it is.

The containers are real and can be opened (PNG; an MP4 without a playable track), what is in them is noise, which does
not compress: like real media, only uglier. There are few of them, and sellers send them again and again.
"""

import random
import struct
import zlib
from functools import cache
from typing import NamedTuple

PNG, MP4 = "image/png", "video/mp4"
IMAGES, VIDEOS = 8, 3
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


class Medium(NamedTuple):
    """An image or a video."""

    media_type: str
    content: bytes


class Measure(NamedTuple):
    """What the beginning of a medium says of it: the size of an image, the seconds of a video."""

    width: int | None = None
    height: int | None = None
    seconds: float | None = None


@cache
def medium(number: int, seed: int) -> Medium:
    """One of ``IMAGES + VIDEOS`` media: 1 to 3 MB an image, 4 to 6 MB a video."""
    chance = random.Random(f"medium/{seed}/{number}")  # noqa: S311
    if number % (IMAGES + VIDEOS) < IMAGES:
        return Medium(PNG, _png(chance, 640 + chance.randrange(320), 600 + chance.randrange(320)))
    return Medium(MP4, _mp4(chance, 5 + chance.randrange(55), 4_000_000 + chance.randrange(2_000_000)))


def measure(head: bytes) -> Measure:
    """What the first 256 bytes of a medium say.

    Raises:
        ValueError: it is neither PNG nor MP4.
    """
    if head.startswith(_PNG_MAGIC) and head[12:16] == b"IHDR":
        width, height = struct.unpack(">II", head[16:24])
        return Measure(width=width, height=height)
    found = head.find(b"mvhd")
    if head[4:8] == b"ftyp" and 0 < found < len(head) - 24:
        scale, duration = struct.unpack(">II", head[found + 16 : found + 24])
        return Measure(seconds=duration / scale)
    raise ValueError("neither a PNG image nor an MP4 video")


def _png(chance: random.Random, width: int, height: int) -> bytes:
    rows = b"".join(b"\0" + chance.randbytes(3 * width) for _ in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return _PNG_MAGIC + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _mp4(chance: random.Random, seconds: int, size: int) -> bytes:
    scale = 1000
    movie_header = struct.pack(">IIIII", 0, 0, 0, scale, seconds * scale) + bytes(80)
    return (
        _box(b"ftyp", b"isom" + struct.pack(">I", 512) + b"isomiso2mp41")
        + _box(b"moov", _box(b"mvhd", movie_header))
        + _box(b"mdat", chance.randbytes(size))
    )


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body
