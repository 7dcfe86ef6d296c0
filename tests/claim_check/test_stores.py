"""Payload stores: what is put comes back, once, whole, in bounded memory, or is refused by name."""

import hashlib
import json
import logging
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from djp_dagster import Claim, PayloadStore, open_payload_store
from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.claim_check.writing import uploading
from djp_dagster.errors import (
    PayloadCorruptError,
    PayloadExpiredError,
    PayloadForbiddenError,
    PayloadMissingError,
    PayloadTooLargeError,
)
from tests.claim_check.kit import MIB, Place, finish, key_of, keys, left_behind, piped, start, text_of


@pytest.fixture
def store(place: Place) -> PayloadStore:
    return place.open()


class TestDeduplication:
    """One content, one object."""

    @pytest.mark.parametrize("size", [0, 1000, 17 * MIB])
    def test_the_second_put(self, place: Place, seed: random.Random, tmp_path: Path, size: int) -> None:
        data = seed.randbytes(size)
        first = place.open().put(data)
        info = place.objects().info(first.ref.key)
        (tmp_path / "source").write_bytes(data)
        with piped(data) as pipe:
            for source in (data, pipe, tmp_path / "source"):
                again = place.open().put(source)
                assert (again.claim, again.deduplicated) == (first.claim, True)
        assert keys(place.objects()) == [first.ref.key]
        assert place.objects().info(first.ref.key) == info
        assert left_behind(place.open(), tmp_path) == []

    def test_a_large_one_is_not_sent_again(self, faulty: Place, faulty_s3: Any, seed: random.Random) -> None:
        store, data = faulty.open(), seed.randbytes(20 * MIB)
        store.put(data)
        faulty_s3.clear()
        assert store.put(data).deduplicated
        assert {method for method, _ in faulty_s3.counts} <= {"HEAD", "GET"}

    def test_another_media_type_is_another_claim_of_one_object(self, store: PayloadStore) -> None:
        claims = [store.put(b"abc", media_type=kind, compress=False).claim for kind in ("text/plain", "a/b")]
        assert [claim.media_type for claim in claims] == ["text/plain", "a/b"]
        assert len(keys(store)) == 1

    def test_processes_at_once(self, place: Place, seed: random.Random, tmp_path: Path) -> None:
        path = tmp_path / "source"
        path.write_bytes(seed.randbytes(9 * MIB))
        code = (
            "store = place.open(); store.put(b'warm up')\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "for source in (Path(args[0]), b'small'):\n"
            "    stored = store.put(source); print(json.dumps([stored.deduplicated, stored.claim.to_dict()]))\n"
            "    assert store.verify(stored.claim) == stored.claim.size\n"
        )
        processes = [start(code, place, path) for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = [[json.loads(line) for line in finish(process).splitlines()] for process in processes]
        for number in range(2):
            assert len({json.dumps(one[number][1], sort_keys=True) for one in found}) == 1
            created = [one[number][0] for one in found].count(False)
            # SeaweedFS checks the condition of a multipart upload, but not under a lock.
            assert created == 1 or (number == 0 and created > 1 and not place.is_folder)
        store = place.open()
        assert store.read(Claim.from_dict(found[0][0][1])) == path.read_bytes()
        assert len(keys(store)) == 3
        assert left_behind(store, tmp_path) == []

    @pytest.mark.parametrize("damage", [b"", b"x", b"damaged" * 1000])
    def test_a_damaged_object_is_repaired(
        self, place: Place, seed: random.Random, damage: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, data = place.open(), seed.randbytes(5000)
        stored = store.put(data)
        place.replace(stored.ref.key, damage)
        with pytest.raises(PayloadCorruptError):
            store.read(stored.claim)
        with caplog.at_level(logging.WARNING):
            again = place.open().put(data)
        assert again.claim == stored.claim
        assert "it is replaced" in caplog.text
        assert store.read(stored.claim) == data

    def test_another_release_compresses_otherwise(
        self, place: Place, seed: random.Random, caplog: pytest.LogCaptureFixture
    ) -> None:
        store, data = place.open(), text_of(seed, 20_000)
        stored = store.put(data, media_type="text/plain")
        other = bytes(pa.Codec("zstd", compression_level=19).compress(data, asbytes=True))
        assert len(other) != stored.stored_bytes
        place.replace(stored.ref.key, other)
        assert store.put(data, media_type="text/plain").claim == stored.claim
        assert caplog.text == ""
        assert place.stored(stored.ref.key) == other
        place.replace(stored.ref.key, other[:-9])
        assert store.put(data, media_type="text/plain").claim == stored.claim
        assert store.read(stored.claim) == data


class TestCompression:
    """Where it pays."""

    @pytest.mark.parametrize("lines", [100, 100_000])
    def test_text_shrinks(self, store: PayloadStore, seed: random.Random, lines: int, tmp_path: Path) -> None:
        data = text_of(seed, lines)
        (tmp_path / "source").write_bytes(data)
        stored = store.put(data, media_type="text/csv; charset=utf-8")
        assert stored.claim.encoding == "zstd"
        assert stored.ref.key == key_of(data) + ".zst"
        assert stored.stored_bytes < len(data) / 2
        assert store.info(stored.claim).bytes == stored.stored_bytes
        assert (stored.claim.size, stored.claim.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert store.read(stored.claim) == data
        assert store.verify(stored.claim) == len(data)
        with store.fetch(stored.claim) as file:
            assert file.seek(50) == 50
            assert file.read(10) == data[50:60]
        again = store.put(tmp_path / "source", media_type="text/csv")
        assert again.deduplicated
        assert store.put(tmp_path / "source", compress=True).deduplicated

    def test_whatever_the_pieces_it_is_one_object(self, store: PayloadStore, seed: random.Random) -> None:
        data = text_of(seed, 50_000)
        for _ in range(4):
            with store.writer(compress=True) as writing:
                rest = data
                while rest:
                    size = seed.choice([1, 1000, 200_000, MIB])
                    writing.file.write(rest[:size])
                    rest = rest[size:]
        assert writing.stored.deduplicated
        assert len(keys(store)) == 1

    def test_random_does_not(self, store: PayloadStore, seed: random.Random) -> None:
        data = seed.randbytes(300_000)
        for compress in (None, True):
            stored = store.put(data, media_type="text/plain", compress=compress)
            assert (stored.claim.encoding, stored.stored_bytes) == (None, len(data))

    def test_told_not_to(self, store: PayloadStore, seed: random.Random) -> None:
        data = text_of(seed, 1000)
        stored = store.put(data, media_type="text/plain", compress=False)
        assert (stored.ref.key, stored.stored_bytes) == (key_of(data), len(data))
        packed = store.put(data, media_type="text/plain")
        assert not packed.deduplicated
        assert len(keys(store)) == 2
        assert store.read(stored.claim) == store.read(packed.claim) == data

    @pytest.mark.parametrize("media_type", ["image/png", "video/mp4", "application/vnd.apache.parquet"])
    def test_not_what_is_compressed_already(self, tmp_path: Path, media_type: str) -> None:
        assert open_payload_store(tmp_path).put(b"a" * 10_000, media_type=media_type).claim.encoding is None

    @pytest.mark.parametrize("media_type", ["application/json", "a/b+json", "TEXT/HTML", "image/svg+xml; a=b"])
    def test_all_kinds_of_text(self, tmp_path: Path, media_type: str) -> None:
        assert open_payload_store(tmp_path).put(b"a" * 10_000, media_type=media_type).claim.encoding == "zstd"


class TestExpiry:
    """Whole days; what expired is not read."""

    def test_where_it_lies(self, store: PayloadStore) -> None:
        before = datetime.now(timezone.utc)
        stored = store.put(b"abc", expires_in="36h")
        expires = stored.claim.expires
        assert expires is not None
        assert expires - before >= timedelta(hours=36)
        assert expires - before <= timedelta(hours=60, seconds=60)
        assert expires == expires.replace(hour=0, minute=0, second=0, microsecond=0)
        assert stored.ref.key == f"expiring/{expires:%Y-%m-%d}/{key_of(b'abc')}"
        assert store.read(stored.claim) == b"abc"
        if before.hour != 23:  # or midnight may pass by
            assert store.put(b"abc", expires_in="36h").deduplicated
        assert not store.put(b"abc").deduplicated
        assert len(keys(store)) == 2

    def test_expired(self, store: PayloadStore, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = store.put(b"abc", expires_in=0)
        uses: list[Callable[[], Any]] = [
            lambda: store.read(stored.claim),
            lambda: store.open(stored.claim),
            lambda: store.verify(stored.claim),
            lambda: store.info(stored.claim),
            lambda: store.resolve(stored.claim),
        ]
        assert stored.claim.expires_at is not None
        monkeypatch.setattr(time, "time", lambda: stored.claim.expires_at - 1.0)
        assert store.resolve(stored.claim) == stored.ref
        monkeypatch.setattr(time, "time", lambda: float(stored.claim.expires_at or 0))
        for use in uses:
            with pytest.raises(PayloadExpiredError, match=rf"expired on {stored.claim.expires:%Y-%m-%d} 00:00 UTC"):
                use()

    def test_an_old_claim(self, store: PayloadStore) -> None:
        claim = store.put(b"abc").claim
        for expires in (0, 1, 1_700_000_000):
            with pytest.raises(PayloadExpiredError):
                store.read(msgspec.structs.replace(claim, expires_at=expires))

    def test_tagged_on_s3(self, s3: Place) -> None:
        stored = s3.open(tags={"team": "a b&c=d"}).put(b"abc", expires_in="1d")
        plain = s3.open().put(b"abcd")
        client, expires = s3.server.client(), stored.claim.expires
        assert expires is not None
        tags = client.get_object_tagging(Bucket=s3.bucket, Key=f"pre/{stored.ref.key}")["TagSet"]
        assert {tag["Key"]: tag["Value"] for tag in tags} == {
            "team": "a b&c=d",
            "djp-expires": f"{expires:%Y-%m-%d}",
        }
        assert client.get_object_tagging(Bucket=s3.bucket, Key=f"pre/{plain.ref.key}")["TagSet"] == []


class TestReading:
    """Within limits, verified, and into files that appear whole."""

    @pytest.mark.parametrize("size", [0, 5, 9 * MIB, 20 * MIB])
    def test_every_way(self, store: PayloadStore, seed: random.Random, tmp_path: Path, size: int) -> None:
        data = seed.randbytes(size)
        claim = store.put(data).claim
        assert store.read(claim) == data
        assert store.verify(claim) == size
        with store.fetch(claim) as file:
            assert file.read() == data
            file.seek(size // 2)
            assert file.read() == data[size // 2 :]
        (tmp_path / "out").write_bytes(b"was there")
        store.download(claim, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == data
        assert left_behind(store, tmp_path) == []

    def test_it_ends_early(self, store: PayloadStore, seed: random.Random, tmp_path: Path) -> None:
        data = seed.randbytes(30 * MIB)
        claim = store.put(data).claim
        with store.open(claim) as file:
            assert file.read(10) == data[:10]
        with pytest.raises(KeyError), store.fetch(claim) as file:
            assert file.read(10) == data[:10]
            raise KeyError
        assert left_behind(store, tmp_path) == []

    def test_no_more_than_max_read_bytes(self, place: Place, seed: random.Random) -> None:
        store, data = place.open(max_read_bytes=1000), seed.randbytes(1001)
        assert store.read(store.put(data[:1000]).claim) == data[:1000]
        claim = store.put(data).claim
        for one in (claim, msgspec.structs.replace(claim, size=None)):
            with pytest.raises(PayloadTooLargeError, match="open it as a stream, or raise max_read_bytes"):
                store.read(one)
            with store.open(one) as file:
                assert file.read() == data

    def test_no_more_than_max_payload_bytes(self, place: Place, seed: random.Random) -> None:
        claim = place.open().put(seed.randbytes(1001)).claim
        with pytest.raises(PayloadTooLargeError, match="raise its max_payload_bytes"):
            place.open(max_payload_bytes=1000).open(claim)
        assert place.open(max_payload_bytes=1001).verify(claim) == 1001

    def test_missing(self, store: PayloadStore, tmp_path: Path) -> None:
        claim = store.put(b"abc").claim
        store.objects.delete([store.resolve(claim).key])
        uses: list[Callable[[], Any]] = [
            lambda: store.read(claim),
            lambda: store.open(claim),
            lambda: store.verify(claim),
            lambda: store.info(claim),
            lambda: store.download(claim, tmp_path / "out"),
            lambda: store.fetch(claim).__enter__(),
        ]
        for use in uses:
            with pytest.raises(PayloadMissingError) as caught:
                use()
            assert caught.value.facts["key"] == key_of(b"abc")
        assert not (tmp_path / "out").exists()

    def test_corrupt_is_not_downloaded(self, place: Place, seed: random.Random, tmp_path: Path) -> None:
        store, data = place.open(), seed.randbytes(10 * MIB)
        claim = store.put(data).claim
        place.replace(key_of(data), data[:-1] + bytes([data[-1] ^ 1]))
        (tmp_path / "out").write_bytes(b"was there")
        with pytest.raises(PayloadCorruptError):
            store.download(claim, tmp_path / "out")
        with pytest.raises(PayloadCorruptError), store.fetch(claim):
            pytest.fail("handed out")
        assert (tmp_path / "out").read_bytes() == b"was there"
        assert left_behind(store, tmp_path) == []

    def test_fetch_makes_the_spool_folder(self, s3: Place, seed: random.Random, tmp_path: Path) -> None:
        data = seed.randbytes(9 * MIB)
        claim = s3.open().put(data).claim
        with s3.open(spool_folder=tmp_path / "not" / "yet").fetch(claim) as file:
            assert file.read() == data


class TestParts:
    """Stores in stores, and stores that moved."""

    def test_within(self, place: Place) -> None:
        store = place.open(max_read_bytes=10, max_payload_bytes=20)
        inner = store.within("a/b")
        claim = inner.put(b"abc").claim
        assert claim.uri == f"{store.uri}/a/b/{key_of(b'abc')}"
        assert keys(store) == [f"a/b/{key_of(b'abc')}"]
        assert store.read(claim) == inner.read(claim) == b"abc"
        outer = store.put(b"abcd").claim
        for other in (inner, store.within("a/bb"), store.within("a/b/c")):
            assert not other.holds(outer)
            with pytest.raises(PayloadForbiddenError):
                other.read(outer)
        with pytest.raises(PayloadTooLargeError):
            inner.read(inner.put(b"x" * 11).claim)
        with pytest.raises(PayloadTooLargeError):
            inner.put(b"x" * 21)

    def test_former_uris(self, place: Place) -> None:
        store = place.open()
        claim = store.put(b"abc").claim
        old = msgspec.structs.replace(claim, uri=f"s3://former/place/{key_of(b'abc')}")
        with pytest.raises(PayloadForbiddenError, match="former_uris"):
            store.read(old)
        moved = place.open(former_uris=("file:///elsewhere", "s3://former/place/"))
        assert moved.read(old) == moved.read(claim) == b"abc"
        assert moved.holds(old)
        for uri in ("s3://former/place2/", "s3://former/", "file:///", "s3://former/place/../"):
            assert not moved.holds(msgspec.structs.replace(claim, uri=uri + key_of(b"abc")))
        inner = msgspec.structs.replace(claim, uri=f"s3://former/place/a/b/{key_of(b'x')}")
        moved.within("a/b").put(b"x")
        assert moved.within("a/b").read(msgspec.structs.replace(inner, size=1, sha256=None)) == b"x"

    def test_rooms(self, place: Place) -> None:
        assert place.open().rooms() == set()
        place.open().put(b"x")
        for room in ("stream-1", "assets", "stream-1"):
            place.open(room=room).put(b"abc")
        assert place.open().rooms() == {"stream-1", "assets"}
        with place.open(room="by-path").create("k", "a/b").file:
            pass
        assert place.open().rooms() == {"stream-1", "assets"}
        with uploading(place.open(room="by-path"), "k", "a/b") as upload:
            upload.finish()
        assert place.open().rooms() == {"stream-1", "assets", "by-path"}


class TestByPath:
    """Payloads under a path of their own: they exist once finished, and not before."""

    @pytest.mark.parametrize("size", [3, 9 * MIB])
    def test_not_before(self, place: Place, seed: random.Random, size: int) -> None:
        store, data = place.open(), seed.randbytes(size)
        with uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(data)
            assert keys(store) == []
            ref = upload.finish()
            assert place.stored("a/k") == data
        assert ref == PayloadRef("a/k", size, hashlib.sha256(data).hexdigest(), "text/plain")
        assert keys(store) == ["a/k"]

    @pytest.mark.parametrize("size", [3, 9 * MIB])
    def test_abandoned_leaves_nothing(self, store: PayloadStore, tmp_path: Path, size: int) -> None:
        with uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(b"x" * size)
        with pytest.raises(KeyboardInterrupt), uploading(store, "a/k", "text/plain") as upload:
            upload.file.write(b"x" * size)
            raise KeyboardInterrupt
        upload.abandon()
        assert keys(store) == []
        assert left_behind(store, tmp_path) == []

    def test_abandoning_what_is_finished_keeps_it(self, store: PayloadStore) -> None:
        upload = store.create("k", "a/b")
        upload.finish()
        upload.abandon()
        assert keys(store) == ["k"]

    def test_the_same_attempt_may_write_again(self, store: PayloadStore, seed: random.Random) -> None:
        for size in (5, 9 * MIB, 7):
            data = seed.randbytes(size)
            with uploading(store, "k", "a/b") as upload:
                upload.file.write(data)
                ref = upload.finish()
            assert store.read(ref) == data
        assert keys(store) == ["k"]
