"""Values to payloads or inline, and back in the form that is wanted."""

import dataclasses
import datetime as dt
import decimal
import gc
import hashlib
import io
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from djp_dagster import Claim, PayloadStore, open_payload_store
from djp_dagster.claim_check.loading import Held, LoadedFiles, load
from djp_dagster.claim_check.serializers import store_value
from djp_dagster.claim_check.serializers.kinds import JSON, PARQUET, PICKLE, Kind, form_of
from djp_dagster.claim_check.values import Inline, Keeping, Kept, keep
from djp_dagster.errors import (
    InvalidClaimError,
    InvalidSettingError,
    PayloadCorruptError,
    PayloadForbiddenError,
    PayloadMissingError,
    PayloadTooLargeError,
)
from tests.claim_check.kit import MIB, Place, keys

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
TABLE = pa.table({"n": [1, 2, None], "s": ["a", None, "ü"]})


@dataclasses.dataclass
class Point:
    x: int
    seen: dt.datetime
    tags: tuple[str, int] = ("a", 1)


class Model(BaseModel):
    x: int
    seen: dt.datetime


class Record(msgspec.Struct):
    x: int
    kinds: set[int]


class Unknown:
    """Of no kind that can be stored."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown)

    def __hash__(self) -> int:
        return 0


@pytest.fixture
def store(place: Place) -> PayloadStore:
    return place.open()


@pytest.fixture
def folder_store(tmp_path: Path) -> PayloadStore:
    return open_payload_store(tmp_path / "payloads")


@pytest.fixture
def files() -> Iterator[LoadedFiles]:
    made = LoadedFiles()
    yield made
    made.close()


@pytest.fixture
def again(folder_store: PayloadStore, files: LoadedFiles) -> Callable[..., Any]:
    """What comes of a value that is stored and loaded."""
    return lambda value, wanted=Any, **how: round_trip(folder_store, files, value, wanted, **how)


def kept(store: PayloadStore, value: Any, threshold: int = 100, **how: Any) -> Kept:
    return keep(value, Keeping(store=store, threshold=threshold, **how))


def held(store: PayloadStore, found: Kept) -> Held:
    return Held(store, found.kind, found.payload)


def inline(store: PayloadStore, kind: Kind, content: bytes, media_type: str) -> Held:
    """As somebody has written it into the store."""
    return Held(store, kind, Inline(content, hashlib.sha256(content).hexdigest(), media_type))


def round_trip(
    store: PayloadStore, files: LoadedFiles, value: Any, wanted: Any = Any, *, reads_pickles: bool = False, **how: Any
) -> Any:
    found = held(store, kept(store, value, **how))
    return load(found, form_of(wanted), files, allow_pickle=reads_pickles or how.get("allow_pickle", False))


FRAMES = {
    "numbers": pd.DataFrame({"i": [1, 2], "f": [1.5, np.nan], "u": np.array([1, 2**64 - 1], "uint64")}),
    "no rows": pd.DataFrame({"a": pd.Series([], dtype="int32"), "s": pd.Series([], dtype="str")}),
    "nothing at all": pd.DataFrame(),
    "no columns": pd.DataFrame(index=[3, 4]),
    "a range as index": pd.DataFrame({"a": [1, 2, 3]}, index=pd.RangeIndex(10, 40, 10, name="r")),
    "an index of text": pd.DataFrame({"a": [1, 2]}, index=pd.Index(["x", "x"], name="k")),
    "an index like a column": pd.DataFrame({"index": [1]}, index=pd.Index([5], name="index")),
    "two indexes": pd.DataFrame(
        {"v": range(4)}, index=pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["k", "n"])
    ),
    "two levels of columns": pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)])),
    "columns that are numbers": pd.DataFrame({0: [1], 1: [2]}),
    "columns with dots": pd.DataFrame({"a.b": [1], "a": [2]}),
    "named columns": pd.DataFrame({"a": [1]}).rename_axis(columns="names"),
    "categories": pd.DataFrame({"c": pd.Categorical(["a", "b", None], categories=["b", "a", "z"], ordered=True)}),
    "nullable types": pd.DataFrame({"i": pd.array([1, None], dtype="Int64"), "b": pd.array([True, None], "boolean")}),
    "times": pd.DataFrame(
        {
            "t": pd.to_datetime(["2026-01-01 00:00:00.123456789"]).astype("datetime64[ns]"),
            "z": pd.to_datetime(["2026-01-01"]).tz_localize("Europe/Berlin"),
            "d": [dt.date(2026, 1, 1)],
            "p": pd.period_range("2026-01", periods=1, freq="M"),
        }
    ),
    "decimals and bytes": pd.DataFrame({"d": [decimal.Decimal("1.10"), None], "b": [b"\x00\xff", None]}),
    "nothing but None": pd.DataFrame({"n": [None, None]}),
    "of Arrow types": pd.DataFrame({"x": pd.array([1, 2], dtype="int64[pyarrow]")}),
}


class TestPandas:
    @pytest.mark.parametrize("name", FRAMES)
    def test_comes_back_as_it_was(self, again: Callable[..., Any], name: str) -> None:
        pd.testing.assert_frame_equal(again(FRAMES[name]), FRAMES[name])

    @pytest.mark.parametrize("name", FRAMES)
    def test_in_slices_and_groups_of_columns(
        self, again: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from djp_dagster.claim_check.serializers import tables

        for limit in ("_SLICE_BYTES", "_MOST_ROWS", "_LEAST_ROWS"):
            monkeypatch.setattr(tables, limit, 1)
        pd.testing.assert_frame_equal(again(FRAMES[name]), FRAMES[name])

    def test_a_large_one(self, store: PayloadStore, files: LoadedFiles, seed: random.Random) -> None:
        numbers = np.random.default_rng(seed.getrandbits(32))
        rows = 700_000
        frame = pd.DataFrame(
            {
                "n": numbers.integers(0, 2**62, rows),
                "late": [None] * (rows - 1) + ["text after a slice without any"],
                "mixed": pd.Series([1] * (rows - 1) + [2.5], dtype=object),
                "x": numbers.normal(size=rows),
                "c": pd.Categorical(numbers.choice(["a", "b"], rows)),
            },
            index=pd.Index(numbers.integers(0, 9, rows), name="k"),
        )
        found = kept(store, frame)
        assert found.table is not None
        assert (found.table.rows, found.table.columns[0]) == (rows, ("n", "int64"))
        with held(store, found).fetch() as file:
            assert pq.ParquetFile(file).metadata.num_row_groups > 1
        loaded = load(held(store, found), form_of(pd.DataFrame), files)
        assert loaded.index.equals(frame.index)
        for name in frame.columns:  # what pandas has for comparing takes half a minute
            there = frame[name].notna().to_numpy()
            assert (loaded[name].notna().to_numpy() == there).all()
            assert (loaded[name][there].to_numpy() == frame[name][there].to_numpy()).all()
        loaded.loc[:, "n"] = 5  # it is the reader's own

    def test_the_same_frame_gives_the_same_bytes(self, folder_store: PayloadStore, seed: random.Random) -> None:
        numbers = [seed.random() for _ in range(1000)]
        one, other = (kept(folder_store, pd.DataFrame({"a": numbers, "b": "x"})) for _ in range(2))
        assert one.content_hash == other.content_hash
        assert other.stored is not None
        assert other.stored.deduplicated
        assert kept(folder_store, pd.DataFrame({"a": numbers[::-1], "b": "x"})).content_hash != one.content_hash

    def test_the_columns_of_the_loaded_one_can_be_written_to(self, again: Callable[..., Any]) -> None:
        for name in ("numbers", "times", "nullable types"):
            loaded = again(FRAMES[name])
            for column in loaded.columns:
                loaded.loc[0, column] = loaded.loc[len(loaded) - 1, column]

    @pytest.mark.parametrize(
        ("frame", "why"),
        [
            (pd.DataFrame([[1, 2]], columns=["a", "a"]), "Duplicate column names"),
            (pd.DataFrame([[1, 2]], columns=["a", 1]), "column names are of several types"),
            (pd.DataFrame({"m": [1, "a"]}), "Could not convert 'a'"),
            (pd.DataFrame({"c": [1j]}), "Unsupported numpy type"),
            (pd.DataFrame({"o": [object()]}), "Could not convert"),
            (pd.DataFrame({"s": ["\ud800"]}, dtype=object), "surrogates not allowed"),
            (pd.DataFrame({"s": pd.arrays.SparseArray([0, 1])}), "Sparse"),
            (pd.DataFrame(index=pd.RangeIndex(4)), "4 rows and no columns"),
            (pd.DataFrame({"l": pd.array([[1]], pd.ArrowDtype(pa.list_(pa.int64())))}), "not understood"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_parquet_has_not(self, folder_store: PayloadStore, frame: pd.DataFrame, why: str) -> None:
        with pytest.raises(InvalidSettingError, match=why) as error:
            kept(folder_store, frame)
        assert "give its columns one type each" in str(error.value)
        assert keys(folder_store) == []

    def test_a_subclass_is_no_dataframe(self, folder_store: PayloadStore) -> None:
        class Shapes(pd.DataFrame):
            pass

        with pytest.raises(InvalidSettingError, match="Shapes"):
            kept(folder_store, Shapes({"a": [1]}))


def batches(count: int, rows: int = 1000) -> Iterator[pa.RecordBatch]:
    for number in range(count):
        yield pa.record_batch({"n": [number] * rows})


class TestArrowAndPolars:
    def test_tables_and_batches(self, store: PayloadStore, files: LoadedFiles) -> None:
        for threshold in (100, 10_000):
            assert round_trip(store, files, TABLE, threshold=threshold) == TABLE
            assert round_trip(store, files, TABLE.to_batches()[0], threshold=threshold) == TABLE
            reader = round_trip(store, files, TABLE, pa.RecordBatchReader, threshold=threshold)
            assert reader.schema == TABLE.schema
            assert reader.read_all() == TABLE

    @pytest.mark.parametrize(
        "table",
        [
            pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]),
            pa.table({"s": pa.nulls(3)}),
            pa.table({"l": [[1], None, []], "r": [{"a": 1}, {"a": None}, None]}),
            pa.table({"d": pa.chunked_array([pa.array(c).dictionary_encode() for c in (["a", "b"], ["c"])])}),
            pa.table({}),
            TABLE.slice(1),
            TABLE.schema.empty_table(),
        ],
        ids=lambda table: table.schema.to_string().replace("\n", ","),
    )
    def test_odd_tables(self, again: Callable[..., Any], table: pa.Table) -> None:
        assert again(table).to_pylist() == table.to_pylist()
        assert again(table).schema.names == table.schema.names

    def test_readers_become_few_row_groups(self, folder_store: PayloadStore, files: LoadedFiles) -> None:
        reader = pa.RecordBatchReader.from_batches(pa.schema([("n", pa.int64())]), batches(500))
        found = kept(folder_store, reader)
        assert found.table is not None
        assert found.table.rows == 500_000
        with held(folder_store, found).fetch() as file:
            assert pq.ParquetFile(file).metadata.num_row_groups == 2
        loaded = load(held(folder_store, found), form_of(pa.Table), files)
        assert loaded["n"].to_pylist()[::1000] == list(range(500))

    def test_a_reader_that_fails_leaves_nothing(self, folder_store: PayloadStore) -> None:
        def failing() -> Iterator[pa.RecordBatch]:
            yield from batches(400)
            raise RuntimeError("the source died")

        with pytest.raises(RuntimeError, match="the source died"):
            kept(folder_store, pa.RecordBatchReader.from_batches(pa.schema([("n", pa.int64())]), failing()))
        assert keys(folder_store) == []

    def test_polars(self, store: PayloadStore, files: LoadedFiles) -> None:
        frame = pl.DataFrame(
            {
                "n": [1, None],
                "e": pl.Series(["x", "y"], dtype=pl.Enum(["x", "y"])),
                "c": pl.Series(["x", "y"], dtype=pl.Categorical),
                "a": pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int8, 2)),
                "t": [dt.timedelta(1), None],
                "d": pl.Series([decimal.Decimal("1.1"), None], dtype=pl.Decimal(10, 1)),
            }
        )
        for threshold in (100, 100_000):
            for value in (frame, frame.lazy()):
                loaded = round_trip(store, files, value, threshold=threshold)
                assert loaded.schema == frame.schema
                assert loaded.equals(frame)
            assert round_trip(store, files, frame, pl.LazyFrame, threshold=threshold).collect().equals(frame)

    def test_the_same_polars_frame_gives_the_same_bytes(self, folder_store: PayloadStore, seed: random.Random) -> None:
        frame = pl.DataFrame({"a": [seed.random() for _ in range(100_000)], "b": ["x", "y"] * 50_000})
        hashes = {kept(folder_store, frame).content_hash for _ in range(3)}
        assert len(hashes) == 1
        lazy = frame.lazy().filter(pl.col("a") > 0.5)
        assert len({kept(folder_store, lazy).content_hash for _ in range(3)}) == 1

    @pytest.mark.parametrize(
        "make", [TABLE.to_pandas, lambda: TABLE, lambda: pl.from_arrow(TABLE)], ids=["pandas", "arrow", "polars"]
    )
    def test_each_converts_to_the_others(self, again: Callable[..., Any], make: Callable[[], Any]) -> None:
        value = make()
        for form in (pd.DataFrame, pd.DataFrame | None):
            assert again(value, form)["s"].tolist()[::2] == ["a", "ü"]
        assert again(value, pa.Table)["s"].to_pylist() == ["a", None, "ü"]
        assert again(value, pl.DataFrame)["s"].to_list() == ["a", None, "ü"]
        assert again(value, pl.LazyFrame).collect()["s"].to_list() == ["a", None, "ü"]
        assert again(value, pa.RecordBatchReader).read_all()["s"].to_pylist() == ["a", None, "ü"]

    @pytest.mark.parametrize("lazy", [False, True])
    def test_polars_objects_are_refused(self, folder_store: PayloadStore, lazy: bool) -> None:
        frame = pl.DataFrame({"o": pl.Series([object()], dtype=pl.Object)})
        with pytest.raises(InvalidSettingError, match="column 'o' holds Python objects"):
            kept(folder_store, frame.lazy() if lazy else frame)

    def test_a_plan_that_fails_is_the_users_own_error(self, folder_store: PayloadStore) -> None:
        plan = pl.LazyFrame({"o": ["x"]}).select(pl.col("o").cast(pl.Int64))
        with pytest.raises(pl.exceptions.InvalidOperationError):
            kept(folder_store, plan)

    @pytest.mark.parametrize("kind", [pl.DataFrame, pd.DataFrame, pa.table], ids=["polars", "pandas", "arrow"])
    def test_what_the_store_refuses_says_so(self, tmp_path: Path, kind: Callable[..., Any]) -> None:
        small = open_payload_store(tmp_path / "small", max_payload_bytes=5000)
        with pytest.raises(PayloadTooLargeError, match="max_payload_bytes"):
            kept(small, kind({"n": list(range(100_000))}))
        with pytest.raises(PayloadTooLargeError, match="max_payload_bytes"):
            store_value(small, "k", kind({"n": list(range(100_000))}))
        assert keys(small) == []


class TestThreshold:
    """Up to it, inline; above it, a claim; on encoded bytes."""

    @pytest.mark.parametrize(
        "value", [b"x" * 1000, "x" * 1000, pd.DataFrame({"a": range(9)}), {"a": "x" * 1000}, None], ids=type
    )
    def test_exactly(self, folder_store: PayloadStore, files: LoadedFiles, value: Any) -> None:
        size = kept(folder_store, value, threshold=4 * MIB).size
        assert size is not None
        assert isinstance(kept(folder_store, value, threshold=size).payload, Inline)
        assert keys(folder_store) == []
        above = kept(folder_store, value, threshold=size - 1)
        assert isinstance(above.payload, Claim)
        assert above.payload.size == size
        assert above.content_hash == kept(folder_store, value, threshold=size).content_hash
        assert above.stored_bytes == len(keys_content(folder_store, above))
        assert folder_store.info(above.payload).bytes == above.stored_bytes

    def test_a_file(self, folder_store: PayloadStore, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_bytes(b"a,b\n")
        assert isinstance(kept(folder_store, path, threshold=4).payload, Inline)
        assert isinstance(kept(folder_store, path, threshold=3).payload, Claim)

    def test_zero(self, folder_store: PayloadStore) -> None:
        assert isinstance(kept(folder_store, b"x", threshold=0).payload, Claim)
        assert isinstance(kept(folder_store, b"", threshold=0).payload, Inline)


def keys_content(store: PayloadStore, found: Kept) -> bytes:
    assert found.stored is not None
    document = store.objects.read_document(found.stored.ref.key)
    assert document is not None
    return document.body


def bytes_of(value: Any) -> bytes:
    with value as stream:
        content: bytes = stream.read()
    return content


class TestBytesAndFiles:
    def test_bytes(self, store: PayloadStore, files: LoadedFiles, seed: random.Random) -> None:
        for size in (0, 1, 100, 101, 9 * MIB):
            content = seed.randbytes(size)
            for value in (content, bytearray(content), memoryview(content), memoryview(content * 2)[: len(content)]):
                assert round_trip(store, files, value) == content
        assert round_trip(store, files, memoryview(b"abcd")[::2]) == b"ac"

    @given(st.text(st.characters(codec="utf-8")))
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_text(self, again: Callable[..., Any], value: str) -> None:
        assert again(value) == again(value, str) == value

    def test_text_that_is_none(self, again: Callable[..., Any]) -> None:
        with pytest.raises(InvalidSettingError, match="no valid Unicode"):
            again("\ud800")

    @pytest.mark.parametrize(
        ("name", "media_type", "suffix"),
        [
            ("a.csv", "text/csv", ".csv"),
            ("A.PNG", "image/png", ".png"),
            ("a.csv.gz", "application/gzip", ".gz"),
            ("a.parquet", PARQUET, ".parquet"),
            ("a.jsonl", "application/x-ndjson", ".jsonl"),
            ("a.nobody-knows", "application/octet-stream", ".bin"),
            ("a", "application/octet-stream", ".bin"),
        ],
    )
    def test_files(
        self, folder_store: PayloadStore, files: LoadedFiles, tmp_path: Path, name: str, media_type: str, suffix: str
    ) -> None:
        path = tmp_path / name
        path.write_bytes(b"a,b\n1,2\n" * 100)
        found = kept(folder_store, path)
        assert found.payload.media_type == media_type
        loaded = load(held(folder_store, found), form_of(Any), files)
        assert loaded.suffix == suffix
        assert loaded.read_bytes() == path.read_bytes()
        assert loaded != path
        loaded.write_bytes(b"a reader's own copy")
        assert load(held(folder_store, found), form_of(bytes), files) == path.read_bytes()

    def test_a_parquet_file_is_a_table(self, again: Callable[..., Any], tmp_path: Path) -> None:
        pq.write_table(TABLE, tmp_path / "a.parquet")
        assert again(tmp_path / "a.parquet", pa.Table) == TABLE
        pd.testing.assert_frame_equal(again(tmp_path / "a.parquet", pd.DataFrame), TABLE.to_pandas())

    def test_a_json_file_is_values(self, again: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('{"a": [1]}')
        assert again(tmp_path / "a.json", dict) == {"a": [1]}
        assert again(tmp_path / "a.json", str) == '{"a": [1]}'

    def test_no_files(self, again: Callable[..., Any], tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(InvalidSettingError, match="return the path of a file"):
                again(path)

    def test_streams(self, store: PayloadStore, files: LoadedFiles, tmp_path: Path, seed: random.Random) -> None:
        for size in (5, 9 * MIB + 5):
            content = seed.randbytes(size)
            (tmp_path / "f").write_bytes(content)
            opened = (tmp_path / "f").open("rb")
            pieces = iter([content[:3], memoryview(content)[3:4], bytearray(content[4:])])
            for value in (opened, io.BytesIO(content), pieces):
                assert bytes_of(round_trip(store, files, value)) == content
            assert opened.closed

    @pytest.mark.parametrize(
        "value",
        [io.StringIO("text"), iter(["text"]), iter([1]), iter([pd.DataFrame()])],
        ids=["file", "text", "number", "frame"],
    )
    def test_streams_of_other_things(self, folder_store: PayloadStore, value: Any) -> None:
        with pytest.raises(InvalidSettingError, match="instead of bytes"):
            kept(folder_store, value)
        assert keys(folder_store) == []

    def test_a_stream_that_fails(self, folder_store: PayloadStore) -> None:
        def failing() -> Iterator[bytes]:
            yield b"x" * 1000
            raise RuntimeError("the source died")

        with pytest.raises(RuntimeError, match="the source died"):
            kept(folder_store, failing())
        assert keys(folder_store) == []

    def test_media_types(self, folder_store: PayloadStore) -> None:
        found = kept(folder_store, b"x", media_type="image/png")
        assert found.payload.media_type == "image/png"
        with pytest.raises(InvalidClaimError, match="nonsense"):
            kept(folder_store, b"x", media_type="nonsense")
        for value in (TABLE, {"a": 1}, None):
            with pytest.raises(InvalidSettingError, match="is for bytes, text, files and streams"):
                kept(folder_store, value, media_type="image/png")

    @pytest.mark.parametrize("annotation", [BinaryIO, io.IOBase, io.BufferedIOBase, io.BufferedReader], ids=str)
    def test_as_a_stream(self, again: Callable[..., Any], annotation: Any) -> None:
        for value in (b"abc" * 100, TABLE):
            with again(value, annotation) as stream:
                assert isinstance(stream, annotation)
                assert stream.read(2)
                assert stream.seekable()
                stream.seek(0)
                assert stream.read() == again(value, bytes)

    def test_streams_are_opened_when_they_are_read(self, folder_store: PayloadStore, files: LoadedFiles) -> None:
        found = kept(folder_store, b"x" * 1000)
        stream = load(held(folder_store, found), form_of(BinaryIO), files)
        assert found.stored is not None
        folder_store.objects.delete([found.stored.ref.key])
        with pytest.raises(PayloadMissingError):
            stream.read()

    def test_lifetime(self, folder_store: PayloadStore) -> None:
        files = LoadedFiles()
        found = held(folder_store, kept(folder_store, TABLE))
        path = load(found, form_of(Path), files)
        stream = load(found, form_of(BinaryIO), files)
        stream.read(1)
        assert path.exists()
        files.close()
        assert not path.parent.exists()
        assert stream.closed
        later = load(found, form_of(Path), files)
        assert later.exists()
        del files
        gc.collect()
        assert not later.parent.exists()

    def test_claims(self, folder_store: PayloadStore, files: LoadedFiles) -> None:
        for threshold in (100, 10_000):
            found = kept(folder_store, b"x" * 1000, threshold=threshold)
            claim = load(held(folder_store, found), form_of(Claim), files)
            assert folder_store.read(claim) == b"x" * 1000
            forwarded = kept(folder_store, claim)
            assert (forwarded.kind, forwarded.payload, forwarded.stored) == ("claim", claim, None)
            assert forwarded.content_hash == found.content_hash
            assert forwarded.stored_bytes == folder_store.info(claim).bytes
            assert load(held(folder_store, forwarded), form_of(Any), files) == claim
            assert load(held(folder_store, forwarded), form_of(bytes), files) == b"x" * 1000
        table = folder_store.put(store_bytes(TABLE), media_type=PARQUET).claim
        assert load(held(folder_store, kept(folder_store, table)), form_of(pa.Table), files) == TABLE

    def test_claims_of_others(self, folder_store: PayloadStore, tmp_path: Path) -> None:
        other = open_payload_store(tmp_path / "other").put(b"x").claim
        with pytest.raises(PayloadForbiddenError, match=r"payloads\(\)\.put"):
            kept(folder_store, other)
        folder_store.put(b"another")
        gone = Claim(uri=f"{folder_store.uri}/sha256/aa/{'b' * 62}")
        with pytest.raises(PayloadMissingError):
            kept(folder_store, gone)


def store_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
lossy = (
    st.tuples(json_values)
    | st.sets(st.integers(), min_size=1)
    | st.dictionaries(st.integers(), st.integers(), min_size=1)
    | st.sampled_from([float("nan"), float("inf"), decimal.Decimal(1), NOW, Unknown(), object])
    | st.binary()
)


class TestJson:
    @given(json_values)
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_comes_back_as_it_was(self, again: Callable[..., Any], value: Any) -> None:
        loaded = again(value)
        assert loaded == value
        assert repr(loaded) == repr(value), "also in type"

    @given(st.lists(json_values, max_size=2), lossy, st.booleans())
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_or_not_at_all(self, folder_store: PayloadStore, before: list[Any], value: Any, nested: bool) -> None:
        with pytest.raises(InvalidSettingError, match="cannot be stored as JSON"):
            kept(folder_store, {"a": [*before, {"b": value}]} if nested else [value])

    @pytest.mark.parametrize(
        ("value", "where"),
        [
            ({"a": [1, (1,)]}, r"the tuple at \$\.a\[1\] would come back as list"),
            ({"a": {1: 2}}, r"its key '1' at \$\.a is a int"),
            ([1.0, float("nan")], r"JSON has no nan \(at \$\[1\]\)"),
            ({"a": Unknown()}, "an object of type Unknown"),
            ([Point(1, NOW)], r"the Point at \$\[0\] would come back as dict"),
            (pd.Series([1]), "an object of type Series"),
            (np.zeros(2), "an object of type ndarray"),
        ],
        ids=["tuple", "number as key", "nan", "object", "struct", "series", "array"],
    )
    def test_the_error_says_where(self, folder_store: PayloadStore, value: Any, where: str) -> None:
        with pytest.raises(InvalidSettingError, match=where) as error:
            kept(folder_store, value)
        assert "allow_pickle=True" in str(error.value)

    def test_what_holds_itself(self, folder_store: PayloadStore) -> None:
        value: list[Any] = []
        value.append(value)
        with pytest.raises(InvalidSettingError, match="cannot be stored as JSON"):
            kept(folder_store, value)

    def test_numbers_of_numpy_become_numbers(self, again: Callable[..., Any]) -> None:
        value = {"n": np.int64(3), "f": np.float32(0.1), "b": np.bool_(True)}
        assert again(value) == {"n": 3, "f": float(np.float32(0.1)), "b": True}
        assert [type(found) for found in again(value).values()] == [int, float, bool]

    @pytest.mark.parametrize("value", [Point(1, NOW), Model(x=1, seen=NOW), Record(1, {2})], ids=type)
    def test_objects_come_back_by_annotation(self, again: Callable[..., Any], value: Any) -> None:
        assert again(value, type(value)) == value
        assert again(value, type(value) | None) == value
        assert again(value)["x"] == 1
        assert again([value], list[type(value)], declared=list[type(value)]) == [value]  # type: ignore[misc]
        assert again({"a": value}, dict[str, type(value)], declared=dict[str, type(value)]) == {"a": value}  # type: ignore[misc]

    def test_an_object_that_does_not_come_back(self, folder_store: PayloadStore) -> None:
        @dataclasses.dataclass
        class Odd:
            thing: Unknown | int

        with pytest.raises(InvalidSettingError, match="does not come back as one"):
            kept(folder_store, Odd(1))

    def test_the_annotation_of_the_output_counts(self, again: Callable[..., Any]) -> None:
        assert again((1, 2), tuple, declared=tuple) == (1, 2)
        assert again({1, 2}, set, declared=set) == {1, 2}
        assert again({1: 2}, dict[int, int], declared=dict[int, int]) == {1: 2}

    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            ({"a": 1}, list[Any]),
            ({"a": 1}, dict[str, str]),
            ("4", int),
            ({"a": 1}, Unknown),
            ({"a": 1}, pd.Series),
            ({"a": 1}, str),
            ({"a": 1}, pd.DataFrame),
            (None, pd.DataFrame),
            (TABLE, dict),
            (TABLE, str),
            (b"x", str),
            (b"x", pa.Table),
            (b"x", dict),
            ("x", pl.DataFrame),
        ],
        ids=str,
    )
    def test_what_does_not_fit_names_both(self, again: Callable[..., Any], value: Any, wanted: Any) -> None:
        with pytest.raises(InvalidSettingError, match=r"was stored, and .* is wanted") as error:
            again(value, wanted)
        assert "djp.Claim" in str(error.value)

    def test_none_where_it_may_be(self, again: Callable[..., Any]) -> None:
        for wanted in (Any, object, pd.DataFrame | None, bytes | None, Path | None, int | None):
            assert again(None, wanted) is None


class Boom:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickles-ran",)


class TestPickles:
    def test_only_if_asked_for(self, again: Callable[..., Any]) -> None:
        value = {"a": (1, {2}), Unknown(): pd.DataFrame({"a": [1]})}
        with pytest.raises(InvalidSettingError):
            again(value)
        loaded = again(value, allow_pickle=True)
        assert loaded["a"] == (1, {2})
        assert again({1, 2}, set, allow_pickle=True) == {1, 2}

    def test_only_what_nothing_else_can_hold(self, folder_store: PayloadStore) -> None:
        for value in (b"x", "x", {"a": 1}, TABLE, FRAMES["numbers"], pl.DataFrame({"a": [1]})):
            assert kept(folder_store, value, allow_pickle=True).payload.media_type != PICKLE
        assert kept(folder_store, {1}, allow_pickle=True).kind == "pickle"

    def test_what_cannot_be_pickled(self, folder_store: PayloadStore) -> None:
        with pytest.raises(InvalidSettingError, match="neither as JSON nor as a pickle"):
            kept(folder_store, lambda: 1, allow_pickle=True)
        assert keys(folder_store) == []

    def test_a_large_one(self, store: PayloadStore, files: LoadedFiles, seed: random.Random) -> None:
        value = (seed.randbytes(9 * MIB),)
        assert round_trip(store, files, value, allow_pickle=True) == value

    @pytest.mark.parametrize("wanted", [Any, dict, Unknown, int], ids=str)
    def test_none_is_read_without_leave(
        self, folder_store: PayloadStore, files: LoadedFiles, wanted: Any, in_tmp: Path
    ) -> None:
        for kind in ("pickle", "json", "pandas", "bytes"):
            found = inline(folder_store, kind, pickle.dumps(Boom()), PICKLE)  # type: ignore[arg-type]
            if kind == "bytes" and wanted is Any:
                continue
            with pytest.raises(PayloadForbiddenError, match="pickle"):
                load(found, form_of(wanted), files)
        assert list(in_tmp.iterdir()) == [], "it ran"

    @pytest.mark.parametrize("wanted", [pd.DataFrame, pa.Table, pa.RecordBatchReader, pl.DataFrame, pl.LazyFrame, str])
    def test_none_where_something_else_is_expected(
        self, folder_store: PayloadStore, files: LoadedFiles, wanted: Any, in_tmp: Path
    ) -> None:
        found = inline(folder_store, "pickle", pickle.dumps(Boom()), PICKLE)
        with pytest.raises(PayloadForbiddenError, match="pickle"):
            load(found, form_of(wanted), files, allow_pickle=True)
        assert list(in_tmp.iterdir()) == [], "it ran"

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "polars", "text", "json"])
    def test_none_in_the_guise_of_another(
        self, folder_store: PayloadStore, files: LoadedFiles, kind: Kind, in_tmp: Path
    ) -> None:
        """The pointer says a table, its media type a pickle; or the media type lies, too."""
        for media_type, error in (
            (PICKLE, PayloadForbiddenError),
            (PARQUET, (PayloadCorruptError, InvalidSettingError)),
        ):
            found = inline(folder_store, kind, pickle.dumps(Boom()), media_type)
            with pytest.raises(error):
                load(found, form_of(Any), files, allow_pickle=True)
        assert list(in_tmp.iterdir()) == [], "it ran"

    def test_its_bytes_are_harmless(self, folder_store: PayloadStore, files: LoadedFiles, in_tmp: Path) -> None:
        found = inline(folder_store, "pickle", pickle.dumps(Boom()), PICKLE)
        assert load(found, form_of(bytes), files) == pickle.dumps(Boom())
        assert list(in_tmp.iterdir()) == []


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


class TestLies:
    """Media types and contents that do not go together."""

    @pytest.mark.parametrize(
        ("kind", "content", "media_type"),
        [
            ("pandas", b"no Parquet", PARQUET),
            ("pandas", b"PAR1" + b"\x00" * 100 + b"PAR1", PARQUET),
            ("arrow", b"", PARQUET),
            ("polars", b"no Parquet", PARQUET),
            ("json", b"no JSON", JSON),
            ("json", b"\xff", JSON),
            ("json", b"[" * 100_000, JSON),
            ("text", b"\xff", "text/plain"),
        ],
    )
    def test_contents(
        self, folder_store: PayloadStore, files: LoadedFiles, kind: Kind, content: bytes, media_type: str
    ) -> None:
        with pytest.raises(PayloadCorruptError):
            load(inline(folder_store, kind, content, media_type), form_of(Any), files)

    @pytest.mark.parametrize("kind", ["pandas", "arrow", "polars", "text", "json"])
    @pytest.mark.parametrize("media_type", ["image/png", "application/octet-stream", "__main__.Evil", "text/x-python"])
    def test_media_types(self, folder_store: PayloadStore, files: LoadedFiles, kind: Kind, media_type: str) -> None:
        if kind == "text" and media_type.startswith("text/"):
            return
        with pytest.raises(InvalidSettingError, match="was stored, and the value is wanted"):
            load(inline(folder_store, kind, b"{}", media_type), form_of(Any), files)

    def test_a_damaged_table(self, place: Place, files: LoadedFiles, seed: random.Random) -> None:
        store = place.open()
        frame = pd.DataFrame({"n": np.frombuffer(seed.randbytes(9 * MIB), np.int64)})
        found = kept(store, frame)
        assert found.stored is not None
        content = bytearray(place.stored(found.stored.ref.key))
        content[seed.randrange(len(content))] ^= 1
        place.replace(found.stored.ref.key, bytes(content))
        for wanted in (pd.DataFrame, pa.Table, pl.DataFrame, pl.LazyFrame, pa.RecordBatchReader, Path, bytes):
            with pytest.raises(PayloadCorruptError):
                load(held(store, found), form_of(wanted), files)
