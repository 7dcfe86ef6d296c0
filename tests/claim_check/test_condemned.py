"""What a writer does about a payload that collection is about to delete."""

import random
import time
from pathlib import Path

import msgspec
import pytest

from djp_dagster.claim_check.condemned import DOCUMENT, KNOWN_FOR_S, Condemned, Sentence, Sentences
from djp_dagster.claim_check.objects import ObjectStore
from tests.claim_check.kit import MIB, Place, at_once, finish, keys, start


def sentence(objects: ObjectStore, *keys: str, deleting: bool = False) -> None:
    def edit(sentences: Sentences) -> bool:
        sentences.update(dict.fromkeys(keys, Sentence(time.time(), deleting)))
        return True

    Condemned(objects).change(edit)


def listed(place: Place) -> set[str]:
    return set(Condemned(place.objects()).read())


@pytest.mark.parametrize("size", [10, 9 * MIB])
class TestSave:
    """A put takes its key off the list, or takes another key."""

    def test_condemned(self, place: Place, seed: random.Random, size: int) -> None:
        data = seed.randbytes(size)
        stored = place.open().put(data)
        sentence(place.objects(), stored.ref.key, "sha256/ab/other")
        again = place.open().put(data)
        assert (again.claim, again.deduplicated) == (stored.claim, True)
        assert listed(place) == {"sha256/ab/other"}

    def test_being_deleted(self, place: Place, seed: random.Random, size: int) -> None:
        data = seed.randbytes(size)
        stored = place.open().put(data)
        sentence(place.objects(), stored.ref.key, deleting=True)
        store = place.open()
        again = store.put(data)
        assert not again.deduplicated
        assert again.ref.key.startswith(stored.ref.key + ".")
        assert listed(place) == {stored.ref.key}
        place.objects().delete([stored.ref.key])
        assert store.read(again.claim) == data
        # Its hash can still be told by its key.
        assert store.read(msgspec.structs.replace(again.claim, sha256=None, size=None)) == data
        assert keys(store) == [again.ref.key]

    def test_deleted_in_between(self, place: Place, seed: random.Random, size: int) -> None:
        data = seed.randbytes(size)
        store = place.open()
        stored = store.put(data)
        place.objects().delete([stored.ref.key])
        assert not store.put(data).deduplicated
        assert store.read(stored.claim) == data


def test_compressed_and_expiring_ones(place: Place) -> None:
    data = b"a line of text\n" * 1000
    for how in ({}, {"expires_in": "3d"}):
        stored = place.open().put(data, media_type="text/plain", **how)
        sentence(place.objects(), stored.ref.key, deleting=True)
        store = place.open()
        again = store.put(data, media_type="text/plain", **how)
        assert again.ref.key != stored.ref.key
        assert again.ref.key.endswith(".zst")
        assert again.ref.key.rpartition("/")[0] == stored.ref.key.rpartition("/")[0]
        place.objects().delete([stored.ref.key])
        assert store.read(again.claim) == data


def test_a_writer_goes_by_what_it_read_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    stored = store.put(b"abc")
    store.put(b"abc")  # from now on it knows the list
    sentence(place.objects(), stored.ref.key)
    assert store.put(b"abc").deduplicated
    assert listed(place) == {stored.ref.key}
    later = time.monotonic() + KNOWN_FOR_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert store.put(b"abc").deduplicated
    assert listed(place) == set()


def test_writers_of_two_processes(place: Place, seed: random.Random, tmp_path: Path) -> None:
    contents = [b"%d" % seed.getrandbits(64) for _ in range(12)]
    stored = [place.open().put(data) for data in contents]
    names = [one.ref.key for one in stored]
    sentence(place.objects(), *names[:8])
    sentence(place.objects(), *names[8:], deleting=True)
    code = (
        "store = place.open(); print('ready', flush=True); sys.stdin.readline()\n"
        "for text in args: print(store.put(text.encode()).ref.key)\n"
    )
    processes = [start(code, place, *(one.decode() for one in contents[::step])) for step in (1, -1)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    taken = [finish(process).splitlines() for process in processes]
    for one in (taken[0], taken[1][::-1]):
        assert one[:8] == names[:8]
        assert not set(one[8:]) & set(names)
    assert listed(place) == set(names[8:])
    assert not set(taken[0][8:]) & set(taken[1][8:])
    assert len(keys(place.objects())) == 12 + 4 + 4


def test_no_edit_is_lost(place: Place) -> None:
    names = [f"sha256/ab/{n:04}" for n in range(40)]
    sentence(place.objects(), *names)
    saved = at_once([lambda n=n: [Condemned(place.objects()).save(key) for key in names[n:32:4]] for n in range(4)])
    assert saved == [[True] * 8] * 4
    assert listed(place) == set(names[32:])


def test_no_list_is_made_for_nothing(place: Place) -> None:
    store = place.open()
    for _ in range(2):
        store.put(b"abc")
    assert place.objects().read_document(DOCUMENT) is None
