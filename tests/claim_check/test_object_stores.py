"""What `ObjectStore` promises, of a folder, of an S3 server, and of an emulator of one."""

import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.objects import DocumentChanged, ObjectStore
from djp_dagster.claim_check.spool import FileContent, Spool
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadCorruptError,
    PayloadMissingError,
    PayloadStoreRefusedError,
)
from tests.claim_check.kit import MIB, Place, at_once, content, keys

PART = 8 * MIB
BYTES = "application/octet-stream"


@pytest.fixture
def objects(any_place: Place) -> ObjectStore:
    return any_place.objects()


def put(objects: ObjectStore, key: str, data: bytes = b"", *, replace: bool = False) -> bool:
    with content(data) as spool:
        return objects.put(key, spool, media_type=BYTES, replace=replace)


def read(objects: ObjectStore, key: str, **how: Any) -> bytes:
    with objects.open(key, **how) as file:
        return file.read()


class TestPut:
    """All of it, or nothing; the first one wins."""

    def test_create_and_replace(self, objects: ObjectStore, any_place: Place) -> None:
        assert objects.info("a/b") is None
        assert put(objects, "a/b", b"first")
        first = objects.info("a/b")
        assert first is not None
        assert (first.key, first.bytes) == ("a/b", 5)
        assert not put(objects, "a/b", b"second")
        assert objects.info("a/b") == first
        assert put(objects, "a/b", b"second", replace=True)
        second = objects.info("a/b")
        assert second is not None
        assert second.version != first.version
        assert put(objects, "new", b"third", replace=True)
        assert [read(any_place.objects(), key) for key in ("a/b", "new")] == [b"second", b"third"]
        assert keys(objects) == ["a/b", "new"]

    @pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 12_345])
    def test_sizes(self, place: Place, seed: random.Random, size: int) -> None:
        objects, data = place.objects(), seed.randbytes(size)
        for replace in (False, True):
            assert put(objects, "k", data, replace=replace)
        assert not put(objects, "k", data)
        info = objects.info("k")
        assert info is not None
        assert info.bytes == size
        assert read(objects, "k", expected_bytes=size) == read(objects, "k") == data
        assert objects.abandoned_uploads(-10, remove=False) == 0

    @pytest.mark.parametrize("part_bytes", [5 * MIB, 5 * MIB + 1, 7_654_321, 9 * MIB, 20 * MIB])
    def test_parts_of_other_sizes(self, s3: Place, seed: random.Random, part_bytes: int, tmp_path: Path) -> None:
        objects, data = s3.objects(part_bytes=part_bytes, threads=2), seed.randbytes(17 * MIB + 3)
        assert put(objects, "spooled", data)
        path = tmp_path / "file"
        path.write_bytes(data)
        with path.open("rb") as file:
            assert objects.put("file", FileContent(file), media_type=BYTES)
        assert read(objects, "spooled") == read(objects, "file", expected_bytes=len(data)) == data

    def test_16_race_and_one_wins(self, place: Place, seed: random.Random) -> None:
        objects = place.objects()  # the emulator looks, and then writes
        for attempt in range(3):
            contents = [seed.randbytes(1000 + n) for n in range(16)]
            won = at_once([lambda data=data, key=f"r/{attempt}": put(objects, key, data) for data in contents])
            assert sorted(won) == [False] * 15 + [True]
            assert read(objects, f"r/{attempt}") == contents[won.index(True)]
        assert len(keys(objects)) == 3
        assert objects.abandoned_uploads(-10, remove=False) == 0

    def test_large_ones_race_and_the_result_is_one_of_them(self, place: Place, seed: random.Random) -> None:
        contents = [seed.randbytes(PART + 1000 + n) for n in range(4)]
        objects = place.objects()
        won = at_once([lambda data=data: put(objects, "r", data) for data in contents])
        assert set(won) <= {True, False}, won
        # SeaweedFS checks the condition of a multipart upload, but not under a lock.
        assert won.count(True) == 1 or not place.is_folder
        assert read(objects, "r") in [data for data, created in zip(contents, won, strict=True) if created]
        assert objects.abandoned_uploads(-10, remove=False) == 0

    def test_readers_beside_writers_see_whole_objects(self, place: Place, seed: random.Random) -> None:
        objects, contents = place.objects(), [seed.randbytes(200_000) for _ in range(8)]
        put(objects, "k", contents[0])
        done = threading.Event()

        def write() -> None:
            for data in contents * 3:
                put(objects, "k", data, replace=True)
            done.set()

        def look() -> int:
            count = 0
            while not done.is_set():
                assert read(objects, "k") in contents
                count += 1
            return count

        found = at_once([write, look, look])
        assert found[0] is None
        assert all(isinstance(count, int) and count > 0 for count in found[1:]), found

    def test_a_link_to_the_content_is_none_to_the_spool(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path / "o")
        spool = Spool(objects.spool_folder)
        spool.write(b"x" * (PART + 1))
        assert objects.put("k", spool, media_type=BYTES)
        assert not objects.put("k", spool, media_type=BYTES)
        assert objects.put("k2", spool, media_type=BYTES)
        spool.close()
        assert read(objects, "k") == read(objects, "k2") == b"x" * (PART + 1)
        assert not list((tmp_path / "o").glob(".upload-*"))


class TestOpen:
    """The object, of the size expected, in order."""

    @pytest.mark.parametrize("size", [0, 5, PART + 5])
    def test_of_another_size(self, place: Place, size: int) -> None:
        objects = place.objects()
        put(objects, "k", b"x" * size)
        for expected in {0, size - 1, size + 1, 10 * size + 7, 10**15} - {size, -1}:
            with pytest.raises(PayloadCorruptError, match=rf"'k' has {size} bytes, its reference says {expected}"):
                objects.open("k", expected_bytes=expected)

    def test_missing(self, objects: ObjectStore) -> None:
        put(objects, "a/b", b"x")
        put(objects, "a/c/d", b"x")
        for key in ("k", "a", "a/c", "a/b/c", "a/b/c/d", "a/b.c", "x" * 300, "x" * 900):
            for how in ({}, {"expected_bytes": 0}, {"expected_bytes": 5}):
                with pytest.raises(PayloadMissingError) as caught:
                    objects.open(key, **how)
                assert caught.value.facts["key"] == key
            assert objects.info(key) is None
            assert objects.read_document(key) is None
            objects.delete([key])
        assert keys(objects) == ["a/b", "a/c/d"]

    def test_in_pieces_of_any_size(self, place: Place, seed: random.Random) -> None:
        objects, data = place.objects(), seed.randbytes(3 * PART + 777)
        put(objects, "k", data)
        with objects.open("k") as file:
            position = 0
            while piece := file.read(seed.choice([1, 1000, 64 << 10, MIB, PART, 2 * PART])):
                assert piece == data[position : position + len(piece)]
                position += len(piece)
            assert position == len(data)
            assert file.read(10) == b""

    def test_several_at_once_and_ends_early(self, place: Place, seed: random.Random) -> None:
        objects, data = place.objects(), seed.randbytes(4 * PART)
        put(objects, "k", data)
        files = [objects.open("k") for _ in range(3)]
        for file in files:
            assert file.read(10) == data[:10]
        files[0].close()
        files[0].close()
        assert files[1].read() == data[10:]
        for file in files:
            file.close()

    def test_replaced_while_it_is_read(self, place: Place, seed: random.Random) -> None:
        objects, data = place.objects(threads=1) if not place.is_folder else place.objects(), seed.randbytes(5 * PART)
        put(objects, "k", data)
        with objects.open("k", expected_bytes=len(data)) as file:
            assert file.read(100) == data[:100]
            place.replace("k", seed.randbytes(5 * PART))
            if place.is_folder:
                assert file.read() == data[100:]
            else:
                for _ in range(2):  # who tries again must not get something else
                    with pytest.raises(PayloadCorruptError, match="changed while it was read"):
                        file.read()

    def test_deleted_while_it_is_read(self, place: Place, seed: random.Random) -> None:
        objects, data = place.objects(threads=1) if not place.is_folder else place.objects(), seed.randbytes(5 * PART)
        put(objects, "k", data)
        with objects.open("k") as file:
            objects.delete(["k"])
            if place.is_folder:
                assert file.read() == data
            else:
                with pytest.raises(PayloadMissingError):
                    file.read()


class TestListAndDelete:
    """What is there, and no more than was asked for."""

    def test_prefixes(self, objects: ObjectStore) -> None:
        there = ["a", "ab", "a-b", "a.b", "b/a", "b/ab/c", "b/ab/d", "b/abc", "b/b", "c/d/e/f"]
        for key in there:
            put(objects, key, key.encode())
        assert keys(objects) == sorted(there)
        for prefix in (
            "a",
            "ab",
            "a-",
            "b",
            "b/",
            "b/a",
            "b/ab",
            "b/ab/",
            "b/ab/c",
            "b/ab/cc",
            "c/d/e/",
            "d",
            "d/e",
            "b/a/",
        ):
            assert keys(objects, prefix) == sorted(key for key in there if key.startswith(prefix)), prefix
        for found in objects.list():
            assert found == objects.info(found.key)

    def test_an_empty_store(self, objects: ObjectStore) -> None:
        assert list(objects.list()) == list(objects.list("a/b")) == []
        objects.delete([])
        objects.delete(["a", "b/c"])
        assert objects.abandoned_uploads(0, remove=True) == 0

    def test_more_than_a_page(self, place: Place) -> None:
        objects = place.objects()
        there = [f"{n % 7}/{n:04}" for n in range(1100)]
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda key: put(objects, key), there))
        assert keys(objects) == sorted(there)
        assert keys(objects, "3/") == sorted(key for key in there if key.startswith("3/"))
        first = next(iter(objects.list()))
        assert first.key in there
        objects.delete([*there[50:], "not-there", *there[50:60]])
        assert keys(objects) == sorted(there[:50])

    def test_deleting_while_listing(self, place: Place) -> None:
        objects = place.objects()
        for n in range(20):
            put(objects, f"k/{n}")
        for found in objects.list("k/"):
            objects.delete([found.key, f"k/{(int(found.key[2:]) + 1) % 20}"])
        assert keys(objects) == []

    def test_temporary_files_are_no_objects(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path / "o")
        put(objects, "k")
        objects.write_document("d/e", b"", expected=None)
        for name in (".upload-x", ".lock", "d/.upload-y"):
            (tmp_path / "o" / name).write_bytes(b"")
        (tmp_path / "o" / ".hidden").mkdir()
        (tmp_path / "o" / ".hidden" / "file").write_bytes(b"")
        assert keys(objects) == ["d/e", "k"]


class TestDocuments:
    """Compare and set."""

    def test_one_step_after_another(self, objects: ObjectStore) -> None:
        assert objects.read_document("d/e") is None
        with pytest.raises(DocumentChanged):
            objects.write_document("d/e", b"x", expected='"0"')
        first = objects.write_document("d/e", b"one", expected=None)
        document = objects.read_document("d/e")
        assert document is not None
        assert (document.body, document.version) == (b"one", first)
        with pytest.raises(DocumentChanged):
            objects.write_document("d/e", b"x", expected=None)
        second = objects.write_document("d/e", b"two", expected=first)
        with pytest.raises(DocumentChanged):
            objects.write_document("d/e", b"x", expected=first)
        objects.replace_document("d/e", b"three")
        with pytest.raises(DocumentChanged):
            objects.write_document("d/e", b"x", expected=second)
        document = objects.read_document("d/e")
        assert document is not None
        assert document.body == b"three"
        assert objects.write_document("d/e", b"", expected=document.version)
        assert (objects.read_document("d/e") or document).body == b""
        objects.delete(["d/e"])
        assert objects.read_document("d/e") is None
        objects.replace_document("d/f", b"four")
        assert keys(objects) == ["d/f"]

    def test_no_update_is_lost(self, any_place: Place) -> None:
        threads, times = 6, 4

        def count() -> int:
            objects, tried = any_place.objects(), 0
            for _ in range(times):
                while True:
                    tried += 1
                    document = objects.read_document("counter")
                    number = int(document.body) if document is not None else 0
                    try:
                        objects.write_document(
                            "counter",
                            b"%d" % (number + 1),
                            expected=document.version if document is not None else None,
                        )
                    except DocumentChanged:
                        continue
                    break
            return tried

        tried = at_once([count] * threads)
        assert all(isinstance(one, int) for one in tried), tried
        document = any_place.objects().read_document("counter")
        assert document is not None
        assert int(document.body) == threads * times
        assert sum(tried) > threads * times, "nobody met anybody"

    def test_one_of_16_creates_it(self, objects: ObjectStore) -> None:
        def create(number: int) -> str:
            return objects.write_document("d", b"%d" % number, expected=None)

        made = at_once([lambda number=number: create(number) for number in range(16)])
        winners = [number for number, version in enumerate(made) if isinstance(version, str)]
        assert len(winners) == 1
        assert all(isinstance(other, DocumentChanged) for other in made if not isinstance(other, str))
        document = objects.read_document("d")
        assert document is not None
        assert (document.body, document.version) == (b"%d" % winners[0], made[winners[0]])


class TestWithin:
    """A part of a store is a store, and sees nothing else of it."""

    def test_it(self, objects: ObjectStore) -> None:
        inner = objects.within("a").within("b/c")
        assert inner.uri == f"{objects.uri}/a/b/c"
        assert inner.spool_folder == objects.spool_folder
        put(inner, "k", b"inner")
        inner.replace_document("d/e", b"document")
        put(objects, "k", b"outer")
        put(objects, "a/b/cc", b"beside")
        put(objects, "a/b/c-", b"beside")
        assert keys(objects) == sorted(["k", "a/b/c/k", "a/b/c/d/e", "a/b/cc", "a/b/c-"])
        assert keys(inner) == ["d/e", "k"]
        assert keys(inner, "d") == ["d/e"]
        assert read(inner, "k") == read(objects, "a/b/c/k") == b"inner"
        inner.delete(["k", "d/e"])
        assert keys(objects) == sorted(["k", "a/b/cc", "a/b/c-"])

    @pytest.mark.parametrize("prefix", ["", "/", "a/", "..", "a/../b", "a//b", ".a", "a b"])
    def test_no_other_prefixes(self, objects: ObjectStore, prefix: str) -> None:
        with pytest.raises(InvalidSettingError):
            objects.within(prefix)

    def test_a_bucket_as_a_whole(self, s3: Place) -> None:
        whole = s3.at(f"s3://{s3.bucket}").objects()
        put(s3.objects(), "k", b"x")
        assert whole.uri == f"s3://{s3.bucket}"
        assert keys(whole) == ["pre/k"]
        assert keys(whole.within("pre")) == ["k"]


class TestTime:
    """The store's own clock, and what it says of objects."""

    def test_now(self, objects: ObjectStore) -> None:
        before = objects.now()
        assert abs(before - time.time()) < 5
        put(objects, "k")
        info = objects.info("k")
        assert info is not None
        # Servers tell whole seconds.
        assert before - 1.1 <= info.modified <= objects.now() + 1.1

    def test_when_it_was_put_there(self, place: Place) -> None:
        """Not when it was written to a temporary file: a writer may take its time."""
        import os

        objects = place.objects()
        spool = Spool(objects.spool_folder)
        spool.write(b"x" * (PART + 1))
        assert spool._path is not None
        os.utime(spool._path, (1_000_000, 1_000_000))
        before = objects.now()
        objects.put("k", spool, media_type=BYTES)
        spool.close()
        info = objects.info("k")
        assert info is not None
        assert before - 1.1 <= info.modified <= objects.now() + 1.1


class TestAbandonedUploads:
    """Counted and removed if they are old enough, and the store's own."""

    def test_parts_of_a_bucket(self, s3: Place) -> None:
        objects, client = s3.objects(), s3.server.client()
        content = f"sha256/ab/{'c' * 62}"
        ours = [f"pre/{content}", f"pre/{content}.zst", f"pre/expiring/2026-01-01/{content}", "pre/attempts/1/x"]
        others = ["pre/x", "pre/sha256/ab/x", f"pre/registry/{content}", f"pre2/{content}", content, f"xpre/{content}"]
        for key in (*ours, *others):
            upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
            client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x")
        assert keys(objects) == []
        assert objects.abandoned_uploads(3600, remove=True) == 0
        assert objects.abandoned_uploads(-10, remove=False) == len(ours)
        assert objects.abandoned_uploads(-10, remove=True) == len(ours)
        assert objects.abandoned_uploads(-10, remove=True) == 0
        left = client.list_multipart_uploads(Bucket=s3.bucket)["Uploads"]
        assert sorted(upload["Key"] for upload in left) == sorted(others)

    def test_temporary_files_of_a_folder(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path / "o")
        put(objects, "k")
        for name in (".upload-a", ".upload-b", ".other", "upload-c"):
            (tmp_path / "o" / name).write_bytes(b"x")
        assert objects.abandoned_uploads(3600, remove=True) == 0
        assert objects.within("a/b").abandoned_uploads(-1, remove=False) == 2
        assert objects.abandoned_uploads(-1, remove=True) == 2
        assert objects.abandoned_uploads(-1, remove=True) == 0
        assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [".other", "k", "upload-c"]


class TestPresign:
    """For whoever has the URL, for a while; a folder has none."""

    def test_it(self, s3: Place, seed: random.Random) -> None:
        objects, data = s3.objects(), seed.randbytes(100_000)
        put(objects, "a/k", data)
        put(objects, "a/other", b"other")
        url = objects.presign("a/k", expires_s=60)
        assert "X-Amz-Signature=" in url, "an old kind of signature"
        assert s3.settings["secret_access_key"] not in url
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert answer.read() == data
        short = objects.presign("a/k", expires_s=1)
        forged = (
            url.replace("a/k", "a/other"),
            url.replace("X-Amz-Expires=60", "X-Amz-Expires=600"),
            url.partition("?")[0],
        )
        for one in forged:
            assert one != url
            assert status(one) == 403
        give_up = time.monotonic() + 30
        while status(short) == 200:
            assert time.monotonic() < give_up
            time.sleep(0.2)
        assert status(short) == 403
        assert status(url) == 200

    def test_no_longer_than_a_week(self, s3: Place) -> None:
        with pytest.raises(InvalidSettingError, match="at most 7 days"):
            s3.objects().presign("k", expires_s=604_801)
        assert "X-Amz-Expires=604800" in s3.objects().presign("k", expires_s=604_800)

    def test_not_in_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(PayloadStoreRefusedError, match="djp claims get"):
            LocalObjects(tmp_path).presign("k", expires_s=60)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


class TestKeys:
    """No key reaches beyond the store, in any method."""

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "/",
            "/k",
            "k/",
            "a//b",
            "..",
            ".",
            "../k",
            "a/../b",
            "a/..",
            ".k",
            "a/.k",
            "a\\b",
            "a b",
            "a\n",
            "ü",
            "a%2eb",
        ],
    )
    def test_others_are_refused(self, objects: ObjectStore, key: str) -> None:
        uses: list[Callable[[], object]] = [
            lambda: put(objects, key),
            lambda: put(objects, key, replace=True),
            lambda: objects.info(key),
            lambda: objects.open(key),
            lambda: objects.delete(["k", key]),
            lambda: objects.read_document(key),
            lambda: objects.write_document(key, b"", expected=None),
            lambda: objects.replace_document(key, b""),
            lambda: objects.presign(key, expires_s=1),
            lambda: objects.within(key),
        ]
        for number, use in enumerate(uses):
            with pytest.raises((InvalidSettingError, PayloadStoreRefusedError)) as caught:
                use()
            assert isinstance(caught.value, InvalidSettingError) or (number == 8 and isinstance(objects, LocalObjects))
        assert keys(objects) == []

    def test_the_longest(self, objects: ObjectStore) -> None:
        key = "/".join(["x" * 99] * 9)
        assert len(key) == 899
        assert put(objects, key, b"x")
        assert read(objects, key) == b"x"
        assert keys(objects) == [key]


def test_a_store_that_is_away(place: Place) -> None:
    """A folder without anything in it may be a file system that is not mounted; a bucket says what it is."""
    objects = place.objects()
    assert objects.is_away() == objects.within("a").is_away() == place.is_folder
    put(objects.within("b"), "k")
    assert not objects.is_away()
    assert not objects.within("a").is_away()


def test_spool_folder(place: Place, tmp_path: Path) -> None:
    objects = place.objects()
    assert objects.spool_folder == (Path(place.target) if place.is_folder else tmp_path / "spool")
    if not place.is_folder:
        del place.settings["spool_folder"]
        assert place.objects().spool_folder is None
