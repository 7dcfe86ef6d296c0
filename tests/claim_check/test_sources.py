"""What can be put into a payload store, and how."""

import gc
import gzip
import hashlib
import io
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Claim, PayloadStore, open_payload_store
from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadTooLargeError,
)
from tests.claim_check.kit import MIB, Place, key_of, keys, left_behind, piped

SIZES = [0, 1, 8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 25 * MIB]


@pytest.fixture
def store(place: Place) -> PayloadStore:
    return place.open()


class TestSources:
    """Bytes, paths, files, streams, of any size."""

    @pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "path", "file", "pipe", "BytesIO", "writer"])
    def test_all_kinds(self, store: PayloadStore, seed: random.Random, tmp_path: Path, kind: str) -> None:
        for size in (0, 1, 70_000) if kind in ("path", "pipe") else (70_000, 8 * MIB + 1):
            self.check(store, seed.randbytes(size), kind, tmp_path)
        assert left_behind(store, tmp_path) == []

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("kind", ["path", "pipe"])
    def test_all_sizes(self, store: PayloadStore, seed: random.Random, tmp_path: Path, kind: str, size: int) -> None:
        self.check(store, seed.randbytes(size), kind, tmp_path)
        assert left_behind(store, tmp_path) == []

    def check(self, store: PayloadStore, data: bytes, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "source"
        path.write_bytes(data)
        if kind == "writer":
            with store.writer(media_type="a/b") as writing:
                for start_of in range(0, len(data), 777_777):
                    writing.file.write(data[start_of : start_of + 777_777])
                assert writing.file.tell() == len(data)
            stored = writing.stored
        elif kind in ("file", "pipe", "BytesIO"):
            with {"file": lambda: path.open("rb"), "pipe": lambda: piped(data), "BytesIO": lambda: io.BytesIO(data)}[
                kind
            ]() as file:
                stored = store.put(file, media_type="a/b")
                assert not file.closed
        else:
            source: Any = {"bytes": data, "bytearray": bytearray(data), "memoryview": memoryview(data), "path": path}[
                kind
            ]
            stored = store.put(source, media_type="a/b")
        digest = hashlib.sha256(data).hexdigest()
        assert stored.claim == Claim(uri=f"{store.uri}/{key_of(data)}", size=len(data), sha256=digest, media_type="a/b")
        assert stored.ref == store.resolve(stored.claim) == PayloadRef(key_of(data), len(data), digest, "a/b")
        assert (stored.deduplicated, stored.stored_bytes) == (False, len(data))
        assert 0 < stored.seconds < 60
        for payload in (stored.claim, stored.ref):
            with store.open(payload) as file:
                assert file.read() == data
        assert store.info(stored.claim).bytes == len(data)

    def test_from_where_it_stands(self, store: PayloadStore, seed: random.Random, tmp_path: Path) -> None:
        path, data = tmp_path / "source", seed.randbytes(9 * MIB)
        path.write_bytes(data)
        with path.open("rb") as file:
            assert file.read(5) == data[:5]
            assert store.read(store.put(file).claim) == data[5:]

    def test_a_file_that_decompresses(self, tmp_path: Path, seed: random.Random) -> None:
        store, data = open_payload_store(tmp_path / "p"), seed.randbytes(9 * MIB)
        with gzip.open(tmp_path / "x", "wb", compresslevel=1) as file:
            file.write(data)
        with gzip.open(tmp_path / "x", "rb") as file, io.BufferedReader(file) as again:
            assert store.put(file).ref.key == key_of(data)
            file.seek(0)
            assert store.put(again).ref.key == key_of(data)  # type: ignore[arg-type]

    def test_temporary_files(self, store: PayloadStore, seed: random.Random) -> None:
        data = seed.randbytes(9 * MIB)
        for make in (tempfile.TemporaryFile, tempfile.NamedTemporaryFile, lambda: tempfile.SpooledTemporaryFile(1000)):
            with make() as file:
                file.write(data)
                file.seek(0)
                assert store.put(file).ref.key == key_of(data)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "source", ["a text", None, 7, io.StringIO("text"), ["x"]], ids=["str", "none", "number", "text file", "list"]
    )
    def test_nothing_else(self, tmp_path: Path, source: Any) -> None:
        with pytest.raises(InvalidSettingError, match=type(source).__name__):
            open_payload_store(tmp_path / "p").put(source)

    def test_a_missing_file_is_the_callers(self, tmp_path: Path) -> None:
        store = open_payload_store(tmp_path / "p")
        with pytest.raises(FileNotFoundError):
            store.put(tmp_path / "none")
        assert not (tmp_path / "p").exists()

    @pytest.mark.parametrize("source", ["bytes", "pipe", "path", "writer"])
    def test_too_large(self, place: Place, seed: random.Random, tmp_path: Path, source: str) -> None:
        store = place.open(max_payload_bytes=9 * MIB)
        store.put(seed.randbytes(9 * MIB))
        there, data = keys(store), seed.randbytes(9 * MIB + 1)
        (tmp_path / "source").write_bytes(data)
        with pytest.raises(PayloadTooLargeError, match="raise its max_payload_bytes") as caught, piped(data) as pipe:
            if source == "writer":
                with store.writer() as writing:
                    writing.file.write(data)
            else:
                store.put({"bytes": data, "pipe": pipe, "path": tmp_path / "source"}[source])  # type: ignore[arg-type]
        assert caught.value.facts["limit"] == 9 * MIB
        assert keys(store) == there
        assert left_behind(store, tmp_path) == []


class TestWriter:
    """Stored when the block ends, forgotten if that raises."""

    @pytest.mark.parametrize("size", [10, 300_000, 9 * MIB, 17 * MIB])
    @pytest.mark.parametrize("compress", [False, True])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_abandoned(
        self, store: PayloadStore, seed: random.Random, tmp_path: Path, size: int, compress: bool, error: Any
    ) -> None:
        with pytest.raises(error), store.writer(compress=compress) as writing:
            writing.file.write(seed.randbytes(size))
            raise error
        with pytest.raises(AssertionError, match="after the block"):
            _ = writing.stored
        assert keys(store) == []
        assert left_behind(store, tmp_path) == []

    def test_abandoned_while_compressing_says_nothing(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        store = open_payload_store(tmp_path / "p")
        with pytest.raises(KeyError), store.writer(compress=True) as writing:
            writing.file.write(b"some text\n" * 200_000)
            raise KeyError
        del writing
        gc.collect()
        assert capfd.readouterr() == ("", "")

    def test_it_is_a_file_to_others(self, store: PayloadStore) -> None:
        with store.writer(media_type="text/csv") as writing:
            text = io.TextIOWrapper(writing.file)
            text.write("a,b\n")
            text.detach()
        assert store.read(writing.stored.claim) == b"a,b\n"
        with store.writer() as writing, gzip.open(writing.file, "wb") as zipped:
            zipped.write(b"abc")
        assert gzip.decompress(store.read(writing.stored.claim)) == b"abc"

    def test_not_after_the_block(self, store: PayloadStore) -> None:
        with store.writer() as writing:
            writing.file.write(b"abc")
        with pytest.raises((ValueError, OSError)):
            writing.file.write(b"x")
        assert store.read(writing.stored.claim) == b"abc"
