"""Memory is bounded, whatever the size of a payload: measured in processes of their own."""

import json
import random
from pathlib import Path

from tests.claim_check.kit import MIB, Place, finish, start

SIZE = 256 * MIB
LIMIT = 64 * MIB

CODE = """
import hashlib
store = place.open()
size, seed, path = int(args[0]), int(args[1]), Path(args[2])

def read(way):
    digest = hashlib.sha256()
    with (store.fetch(claim) if way == "fetch" else store.open(claim)) as file:
        while piece := file.read(MIB):
            digest.update(piece)
    assert digest.hexdigest() == claim.sha256

for media_type in ("a/b", "text/plain"):  # clients, pyarrow
    claim = store.put(b"a line of text\\n" * 1000, media_type=media_type).claim
    for way in ("open", "fetch"):
        read(way)
memory = Memory()
with memory.peak("put a stream"):
    claim = store.put(LongStream(size, seed), media_type="a/b").claim
with memory.peak("open"):
    read("open")
with memory.peak("put text"), store.writer(media_type="text/plain") as writing:
    for number in range(size // 4 // 1000):
        writing.file.write((b"%019d\\n" % number) * 50)
claim = writing.stored.claim
assert writing.stored.stored_bytes < claim.size / 2
with memory.peak("open text"):
    read("open")
with path.open("wb") as file:
    shorter = LongStream(size // 4, seed)
    while piece := shorter.read(MIB):
        file.write(piece)
with memory.peak("put a file"):
    stored = store.put(path)
claim = stored.claim
assert not stored.deduplicated
with memory.peak("put a file that is there"):
    assert store.put(path).deduplicated
with memory.peak("fetch"):
    read("fetch")
with memory.peak("download"):
    store.download(claim, path)
with memory.peak("verify"):
    assert store.verify(claim) == size // 4
print(json.dumps(memory.risen))
"""


def test_of_every_way(place: Place, seed: random.Random, tmp_path: Path) -> None:
    risen = json.loads(finish(start(CODE, place, SIZE, seed.getrandbits(32), tmp_path / "source"), timeout_s=240))
    print({way: f"{rise / MIB:.1f} MiB" for way, rise in risen.items()})
    assert len(risen) == 9
    assert {way: rise for way, rise in risen.items() if rise >= LIMIT} == {}


def test_what_measures_it_would_see_more(tmp_path: Path) -> None:
    code = (
        "memory = Memory()\n"
        "with memory.peak('x'):\n    x = bytearray(70 * MIB); x[::4096] = bytes(len(x[::4096])); del x\n"
        "print(memory.risen['x'])"
    )
    assert int(finish(start(code, Place(str(tmp_path))))) > 65 * MIB
