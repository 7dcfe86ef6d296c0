"""The sample media are what they say they are."""

import struct
import zlib

import pytest

from demo.media import IMAGES, MP4, PNG, VIDEOS, measure, medium


@pytest.mark.parametrize("number", range(IMAGES + VIDEOS))
def test_each_is_megabytes_and_says_how_large_it_is(number: int, seed: int) -> None:
    found = medium(number, seed)
    assert found == medium(number, seed)
    assert 1_000_000 < len(found.content) < 7_000_000
    said = measure(found.content[:256])
    if number < IMAGES:
        assert found.media_type == PNG
        assert said.seconds is None
        assert len(pixels(found.content)) == said.height * (1 + 3 * said.width)  # type: ignore[operator]
    else:
        assert found.media_type == MP4
        assert said.width is None
        assert said.seconds is not None
        assert 5 <= said.seconds < 60


def pixels(png: bytes) -> bytes:
    """What an independent look at the chunks of a PNG file finds, checksums compared."""
    at, found = 8, b""
    while at < len(png):
        (size,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        body = png[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0]
        found += body if kind == b"IDAT" else b""
        at += 12 + size
    return zlib.decompress(found)


@pytest.mark.parametrize("head", [b"", b"\x89PNG", b"a tax return" * 30, b"\0\0\0\x18ftypisom" + b"\0" * 300])
def test_nothing_else_has_a_size(head: bytes) -> None:
    with pytest.raises(ValueError, match="neither"):
        measure(head[:256])
