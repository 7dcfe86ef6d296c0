"""10 GiB go into a store and come back: the same bytes, in bounded memory. How long it takes is no matter."""

import filecmp
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.claim_check.kit import MIB, LongStream, Place, finish, start

pytestmark = pytest.mark.soak

SIZE = 10 << 30
LIMIT = 64 * MIB
COPIES = 3
SPARE = 2 << 30
PATIENCE_S = 3600.0

CODE = """
source, got = Path(args[0]), Path(args[1])
store = place.open()
store.read(store.put(b"first").claim)
memory = Memory()
with memory.peak("put"):
    stored = store.put(source)
with memory.peak("download"):
    store.download(stored.claim, got)
print(json.dumps({"risen": memory.risen, "size": stored.claim.size, "deduplicated": stored.deduplicated}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Room for the file, what is stored of it, and what comes back; empty at the end, for pytest keeps its folders."""
    needed = COPIES * SIZE + SPARE
    if shutil.disk_usage(tmp_path).free < needed:
        pytest.skip(f"less than {needed >> 30} GiB free in {tmp_path}")
    yield tmp_path
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.timeout(2 * PATIENCE_S)
def test_a_huge_file(folder: Path, place: Place, seed: random.Random) -> None:
    source, got = folder / "source", folder / "got"
    with source.open("wb") as file:
        file.writelines(_pieces(seed))
    told = json.loads(finish(start(CODE, place, source, got), timeout_s=PATIENCE_S))
    print({way: f"{rise / MIB:.1f} MiB" for way, rise in told["risen"].items()})
    assert told["size"] == SIZE
    assert not told["deduplicated"]
    assert filecmp.cmp(source, got, shallow=False)
    assert set(told["risen"]) == {"put", "download"}
    assert {way: rise for way, rise in told["risen"].items() if rise > LIMIT} == {}


def _pieces(seed: random.Random) -> Iterator[bytes]:
    stream = LongStream(SIZE, seed.getrandbits(32))
    while piece := stream.read():
        yield piece
