"""Pointers: their keys, what a bad one does, and what collection learns from them."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djp_dagster import Claim, PayloadStore, open_payload_store
from djp_dagster.claim_check.collection import collect
from djp_dagster.claim_check.objects import MAX_KEY_BYTES, is_key
from djp_dagster.claim_check.pointers import (
    Pointer,
    PointerRoom,
    asset_key,
    op_key,
    read_pointer,
    values_of,
    write_pointer,
)
from djp_dagster.claim_check.values import Inline
from djp_dagster.errors import PayloadCorruptError
from tests.claim_check.kit import MIB, Place, finish, keys, start

EVIL = [
    "",
    ".",
    "..",
    "/",
    "a/b",
    "a",
    "=value",
    "=partitions",
    "==",
    "=2E",
    "a=b",
    "b",
    "ü",
    "|",
    "a" * 300,
    "ü" * 300,
]
parts = st.sampled_from(EVIL) | st.text(max_size=150)


def inline(content: bytes = b"x", **changes: Any) -> Pointer:
    payload = Inline(content, hashlib.sha256(content).hexdigest(), "application/octet-stream")
    return Pointer(**{"kind": "bytes", "run_id": "r", "stored_at": 1.0, "inline": payload, **changes})


def claimed(store: PayloadStore, content: bytes, **changes: Any) -> Pointer:
    claim = store.put(content, expires_in=changes.pop("expires_in", None)).claim
    return Pointer(**{"kind": "bytes", "run_id": "r", "stored_at": 1.0, "claim": claim, **changes})


@pytest.fixture
def store(place: Place) -> PayloadStore:
    return used(values_of(place.open()))


@pytest.fixture
def folder(tmp_path: Path) -> PayloadStore:
    return used(values_of(open_payload_store(tmp_path / "payloads")))


def used(store: PayloadStore) -> PayloadStore:
    """Not new: of a folder with nothing in it, nobody can say whether it is new or away."""
    store.announce()
    return store


class TestKeys:
    def test_they_are_readable(self) -> None:
        assert asset_key(["shop", "daily_sales"]) == "pointers/assets/shop/daily_sales/=value"
        assert asset_key(["shop"], "2026-01-02") == "pointers/assets/shop/=partitions/2026-01-02"
        assert (
            asset_key(["shop"], "de|2026-01-02 10:00") == "pointers/assets/shop/=partitions/de=7C2026-01-02=2010=3A00"
        )
        assert op_key(["4f-a", "sub.step[a]", "result", "m"]) == "pointers/ops/4f-a/sub.step=5Ba=5D/result/m"

    @given(st.lists(st.tuples(st.lists(parts, min_size=1, max_size=12), st.none() | parts), max_size=30))
    @settings(max_examples=100, deadline=None)
    def test_different_ones_for_different_things(self, things: list[tuple[list[str], str | None]]) -> None:
        found = {(tuple(path), partition): asset_key(path, partition) for path, partition in things}
        assert len(set(found.values())) == len(found)
        for key in found.values():
            assert is_key(key)
            assert len(key) <= MAX_KEY_BYTES // 2
            assert all(len(segment) <= 200 for segment in key.split("/")), "a file system has limits, too"

    def test_evil_ones_pairwise(self) -> None:
        things = [([one, other], None) for one in EVIL for other in EVIL]
        things += [([one], other) for one in EVIL for other in EVIL]  # type: ignore[misc]
        things += [([one], None) for one in EVIL]
        found = [asset_key(path, partition) for path, partition in things]
        assert len(set(found)) == len(found)
        assert not any(one.startswith(f"{other}/") for one in found for other in found), "a file is no folder"

    @given(st.lists(parts, min_size=3, max_size=4))
    @settings(max_examples=100, deadline=None)
    def test_ops_are_not_assets(self, identifier: list[str]) -> None:
        assert is_key(op_key(identifier))
        assert op_key(identifier).startswith("pointers/ops/")

    def test_every_evil_key_works_in_a_store(self, store: PayloadStore) -> None:
        for number, part in enumerate(EVIL):
            write_pointer(store, asset_key([part]), inline(b"%d" % number))
            write_pointer(store, asset_key(["a"], part), inline(b"p%d" % number))
        for number, part in enumerate(EVIL):
            for key, content in ((asset_key([part]), b"%d" % number), (asset_key(["a"], part), b"p%d" % number)):
                found = read_pointer(store, key)
                assert found is not None
                assert found.inline is not None
                assert found.inline.content == content
        assert len(keys(store, "pointers/assets/")) == 2 * len(EVIL)
        assert keys(store)[2 * len(EVIL) :] == ["rooms/pointers"]


class TestDocuments:
    def test_round_trip(self, store: PayloadStore, seed: random.Random) -> None:
        assert read_pointer(store, "pointers/assets/a/=value") is None
        for pointer in (inline(seed.randbytes(4 * MIB)), claimed(store, b"x" * 1000), inline(expires_at=2.5)):
            write_pointer(store, "pointers/assets/a/=value", pointer)
            assert read_pointer(store, "pointers/assets/a/=value") == pointer

    def test_the_newest_wins_and_readers_see_whole_ones(self, store: PayloadStore) -> None:
        key, done, seen = asset_key(["a"]), threading.Event(), set()

        def read() -> None:
            while not done.is_set():
                found = read_pointer(store, key)
                if found is not None and found.inline is not None:
                    seen.add(found.inline.content[:1] * len(found.inline.content) == found.inline.content)

        readers = [threading.Thread(target=read, name=f"at-once-{n}") for n in range(2)]
        for reader in readers:
            reader.start()
        for number in range(40):
            write_pointer(store, key, inline(b"%d" % (number % 10) * 300_000))
        done.set()
        for reader in readers:
            reader.join(60)
        assert seen == {True}
        last = read_pointer(store, key)
        assert last is not None
        assert last.inline is not None
        assert last.inline.content[:1] == b"9"

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda d: d | {"kind": "dagster.OpDefinition"}, "kind"),
            (lambda d: d | {"kind": "os.system"}, "kind"),
            (lambda d: d | {"v": 2}, "v"),
            (lambda d: d | {"class": "os.system"}, "class"),
            (lambda d: d | {"inline": d["inline"] | {"loader": "os"}}, "loader"),
            (lambda d: d | {"inline": d["inline"] | {"content": b"another"}}, "not what its hash says"),
            (lambda d: d | {"inline": d["inline"] | {"content": "text"}}, "content"),
            (lambda d: d | {"inline": None}, "neither"),
            (lambda d: d | {"claim": {"v": 1, "uri": "s3://b/k"}}, "both a claim"),
            (lambda d: d | {"inline": None, "claim": {"v": 1, "uri": "no uri\n"}}, "uri"),
            (lambda d: d | {"inline": None, "claim": {"v": 9, "uri": "s3://b/k"}}, "v"),
            (lambda d: d | {"stored_at": "now"}, "stored_at"),
            (lambda d: [d], "object"),
            (lambda d: None, "None"),
        ],
    )
    def test_bad_ones(self, folder: PayloadStore, change: Callable[[Any], Any], why: str) -> None:
        document = msgspec.msgpack.decode(msgspec.msgpack.encode(inline()))
        folder.objects.replace_document("pointers/assets/a/=value", msgspec.msgpack.encode(change(document)))
        with pytest.raises(PayloadCorruptError, match=why) as error:
            read_pointer(folder, "pointers/assets/a/=value")
        assert "materialize it again" in str(error.value)

    @pytest.mark.parametrize("body", [b"", b"{}", b"\xff" * 100, b"\x91" * 100_000, b"x" * (5 * MIB)], ids=len)
    def test_other_bytes(self, store: PayloadStore, body: bytes) -> None:
        store.objects.replace_document("pointers/assets/a/=value", body)
        with pytest.raises(PayloadCorruptError, match="pointers/assets/a/=value"):
            read_pointer(store, "pointers/assets/a/=value")

    def test_a_large_one_is_not_read_into_memory(self, folder: PayloadStore, tmp_path: Path) -> None:
        path = tmp_path / "payloads" / "assets" / "pointers" / "assets" / "a" / "=value"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file:
            file.truncate(100 << 30)
        with pytest.raises(PayloadCorruptError, match="more than"):
            read_pointer(folder, "pointers/assets/a/=value")


def bodies(store: PayloadStore, **how: Any) -> bytes:
    return b"".join(PointerRoom(store, **how).references())


class TestRoom:
    def test_all_of_them(self, store: PayloadStore) -> None:
        written = {}
        for number in range(70):
            pointer = claimed(store, b"%d" % number) if number % 10 == 0 else inline(b"inline %d" % number)
            written[asset_key(["a"], str(number))] = pointer
            write_pointer(store, asset_key(["a"], str(number)), pointer)
        found = sorted(PointerRoom(store).references())
        assert found == sorted(msgspec.msgpack.encode(pointer) for pointer in written.values())
        assert PointerRoom(store).name in store.rooms()

    def test_expired_ones_are_skipped_and_removed_when_told(self, store: PayloadStore) -> None:
        now = time.time()
        write_pointer(store, op_key(["r", "s", "old"]), inline(b"old", expires_at=now - 1))
        write_pointer(store, op_key(["r", "s", "new"]), inline(b"new", expires_at=now + 3600))
        write_pointer(store, asset_key(["a"]), inline(b"asset"))
        for _ in range(2):
            found = bodies(store)
            assert b"old" not in found
            assert b"new" in found
            assert b"asset" in found
        assert len(keys(store, "pointers/")) == 3
        assert b"new" in bodies(store, remove_expired=True)
        assert keys(store, "pointers/") == [asset_key(["a"]), op_key(["r", "s", "new"])]

    def test_what_cannot_be_read_still_counts(self, store: PayloadStore) -> None:
        store.objects.replace_document("pointers/assets/a/=value", b"of a newer release: sha256/ab/cd")
        assert bodies(store, remove_expired=True) == b"of a newer release: sha256/ab/cd"

    def test_who_stops_asking_leaves_no_thread(self, store: PayloadStore) -> None:
        for number in range(70):
            write_pointer(store, asset_key(["a"], str(number)), inline())
        asked = PointerRoom(store).references()
        next(asked)
        asked.close()  # type: ignore[attr-defined]

    def test_collection_by_pointers(self, folder: PayloadStore, tmp_path: Path) -> None:
        """What a pointer names stays; what was replaced goes; what an inline value mentions stays, too."""
        first = claimed(folder, b"first")
        write_pointer(folder, asset_key(["a"]), first)
        write_pointer(folder, asset_key(["a"]), claimed(folder, b"second"))
        mentioned = folder.put(b"mentioned").claim
        write_pointer(folder, asset_key(["b"]), inline(mentioned.to_json()))
        write_pointer(
            folder, op_key(["r", "s", "o"]), claimed(folder, b"op", expires_in="1d", expires_at=time.time() + 9e4)
        )
        for path in (tmp_path / "payloads").rglob("*"):
            os.utime(path, (time.time() - 7200,) * 2)
        report = collect(folder, [PointerRoom(folder)], grace="1h", dry_run=True)
        assert first.claim is not None
        assert [found.key for found in report.garbage] == [folder.resolve(first.claim).key]
        assert (report.payloads, report.foreign) == (4, 0)


WRITER = """
from djp_dagster.claim_check.pointers import *
from djp_dagster.claim_check.values import *
store = values_of(place.open())
sys.stdin.readline()
for number in range(25):
    run_id = f"{args[0]}{number}"
    kept = keep(run_id.encode() * 100_000, Keeping(store=store, threshold=1000))
    write_pointer(store, asset_key(["a"]), Pointer(kind="bytes", run_id=run_id, stored_at=1.0, claim=kept.payload))
"""


def test_two_processes_at_once(place: Place) -> None:
    """Whoever reads while two write reads one of their values, whole."""
    store = used(values_of(place.open()))
    writers = [start(WRITER, place, name) for name in "xy"]
    seen = set()
    try:
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("go\n")
            writer.stdin.flush()
        while any(writer.poll() is None for writer in writers):
            pointer = read_pointer(store, asset_key(["a"]))
            if pointer is not None:
                assert isinstance(pointer.payload, Claim)
                assert store.read(pointer.payload) == pointer.run_id.encode() * 100_000
                seen.add(pointer.run_id)
    finally:
        for writer in writers:
            finish(writer)
    assert len(seen) > 1
