"""Tables of pandas, Arrow and polars as Parquet and back, beside the table in little memory.

Tables are written slice by slice, each becoming a row group, and read into pandas a few columns at a time: each step
needs some 64 MiB, whatever the table's size. Only text is dictionary-encoded, and zstd's lowest level compresses: with
numbers, dictionaries cost more time than anything else and save little.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from djp_dagster.errors import InvalidSettingError, PayloadCorruptError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

_SLICE_BYTES = 64 << 20
_MOST_ROWS = 1 << 18
_LEAST_ROWS = 1 << 10
_ZSTD: dict[str, Any] = {"compression": "zstd", "compression_level": 1}


class TableFacts(msgspec.Struct, frozen=True):
    """Of a table: how many rows, and the names and types of its columns."""

    rows: int
    columns: list[tuple[str, str]]


def write_table(value: Any, file: BinaryIO) -> TableFacts:
    """Write a DataFrame of pandas or polars, or an Arrow table, batch or reader, as Parquet.

    Raises:
        InvalidSettingError: a column has values of several types, or of one that Parquet has not.
    """
    package, name = type(value).__module__.partition(".")[0], type(value).__name__
    if package == "polars":
        return _write_polars(value, file)
    with _storable(f"{package} {name}"):
        if package == "pandas":
            return _write_pandas(value, file)
        return _write_batches(value, file) if name == "RecordBatchReader" else _write_arrow(value, file)


def write_lazy(lazy: Any, path: Path) -> TableFacts:
    """Write what a polars LazyFrame computes as a Parquet file, in bounded memory if its plan allows.

    Raises:
        InvalidSettingError: a column has a type that Parquet has not.
        PolarsError: its plan fails.
    """
    import pyarrow.parquet as pq

    columns = _polars_columns(lazy.collect_schema())
    lazy.sink_parquet(path, **_ZSTD)
    return TableFacts(pq.read_metadata(path).num_rows, columns)


def _write_polars(frame: Any, file: BinaryIO) -> TableFacts:
    import polars as pl

    columns = _polars_columns(frame.schema)
    recorder = _Recorder(file)
    try:
        frame.write_parquet(recorder, **_ZSTD)
    except (pl.exceptions.PolarsError, OSError) as error:
        if recorder.error is not None:
            raise recorder.error from None
        raise _not_storable("polars DataFrame", error) from error
    return TableFacts(frame.height, columns)


def _polars_columns(schema: Any) -> list[tuple[str, str]]:
    columns = [(name, str(kind)) for name, kind in schema.items()]
    if objects := [name for name, kind in columns if kind.startswith("Object")]:
        raise _not_storable("polars table", f"column {objects[0]!r} holds Python objects")
    return columns


class _Recorder:
    """A file that remembers why it could not be written to: polars raises something of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        """See `BinaryIO.write`."""
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Nothing waits."""


def _write_pandas(frame: "pd.DataFrame", file: BinaryIO) -> TableFacts:
    import pandas as pd
    import pyarrow as pa

    if not isinstance(frame.columns, pd.MultiIndex) and frame.columns.inferred_type.startswith("mixed"):
        raise ValueError("its column names are of several types")
    if len(frame) and not len(frame.columns) and isinstance(frame.index, pd.RangeIndex):
        raise ValueError(f"it has {len(frame)} rows and no columns")
    # Of the whole table: a slice may hold nothing but None, or whole numbers where others have fractions.
    schema = pa.Schema.from_pandas(frame)
    schema.empty_table().to_pandas()  # if that fails, nobody could read it
    names = schema.names[: len(frame.columns)]
    width = int(frame.memory_usage(index=False).sum()) // max(1, len(frame)) + 8 * len(names)
    rows = _rows_per_slice(width)
    with _writer(file, schema) as writer:
        for start in range(0, len(frame), rows):
            piece = frame.iloc[start : start + rows]
            piece.columns = names  # Arrow looks for its own names, which are text
            writer.write_table(pa.Table.from_pandas(piece, schema=schema))
    return _facts(schema, len(frame))


def _write_arrow(value: "pa.Table | pa.RecordBatch", file: BinaryIO) -> TableFacts:
    import pyarrow as pa

    table = pa.Table.from_batches([value]) if isinstance(value, pa.RecordBatch) else value
    rows = _rows_per_slice(table.nbytes // max(1, table.num_rows))
    with _writer(file, table.schema) as writer:
        # Row groups of their own: of chunks with different dictionaries, one row group cannot be made.
        for start in range(0, table.num_rows, rows):
            writer.write_table(table.slice(start, rows).unify_dictionaries())
    return _facts(table.schema, table.num_rows)


def _write_batches(reader: "pa.RecordBatchReader", file: BinaryIO) -> TableFacts:
    import pyarrow as pa

    total, waiting, waiting_bytes = 0, [], 0
    with _writer(file, reader.schema) as writer:
        for batch in reader:
            waiting.append(batch)
            total, waiting_bytes = total + batch.num_rows, waiting_bytes + batch.nbytes
            if waiting_bytes >= _SLICE_BYTES or sum(map(len, waiting)) >= _MOST_ROWS:
                writer.write_table(pa.Table.from_batches(waiting).unify_dictionaries())
                waiting, waiting_bytes = [], 0
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting).unify_dictionaries())
    return _facts(reader.schema, total)


def _writer(file: BinaryIO, schema: "pa.Schema") -> "pq.ParquetWriter":
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: pa.DataType) -> bool:
        binary = pa.types.is_large_binary(kind) or pa.types.is_binary(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        return bool(binary or text or pa.types.is_dictionary(kind))

    return pq.ParquetWriter(file, schema, use_dictionary=[one.name for one in schema if is_text(one.type)], **_ZSTD)


def _rows_per_slice(row_bytes: int) -> int:
    return max(_LEAST_ROWS, min(_MOST_ROWS, _SLICE_BYTES // max(1, row_bytes)))


def _facts(schema: "pa.Schema", rows: int) -> TableFacts:
    return TableFacts(rows, [(field.name, str(field.type)) for field in schema])


@contextmanager
def _storable(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise _not_storable(what, error) from error


def _not_storable(what: str, why: object) -> InvalidSettingError:
    return InvalidSettingError(
        f"a {what} cannot be written as Parquet: {why}; give its columns one type each, and names of their own",
        setting="output",
        value=what,
    )


# Reading


def read_arrow(file: BinaryIO) -> "pa.Table":
    """An Arrow table.

    Raises:
        PayloadCorruptError: the file is no Parquet.
    """
    with _readable("pa.Table"):
        parquet = _opened(file)
        return parquet.read() if parquet.num_row_groups else parquet.schema_arrow.empty_table()


def read_pandas(file: BinaryIO) -> "pd.DataFrame":
    """A DataFrame, with its index.

    Raises:
        PayloadCorruptError: the file is no Parquet, or has values that pandas has not.
    """
    import pandas as pd
    import pyarrow as pa

    frames: list[pd.DataFrame] = []
    with _readable("pd.DataFrame"):
        parquet = _opened(file)
        if not parquet.num_row_groups:  # older releases of Arrow cannot read that
            empty: pd.DataFrame = parquet.schema_arrow.empty_table().to_pandas()
            return empty
        groups = _column_groups(parquet)
        for columns in groups:
            # Not split_blocks: it hands out columns that cannot be written to.
            frames.append(parquet.read(columns, use_pandas_metadata=True).to_pandas(self_destruct=True))
            if len(groups) > 1:
                pa.default_memory_pool().release_unused()
        if len(frames) == 1:
            return frames[0]
        without_copy: dict[str, Any] = {"copy": False} if int(pd.__version__.partition(".")[0]) < 3 else {}
        return pd.concat(frames, axis=1, **without_copy)


def iterate_batches(file: BinaryIO) -> "tuple[pa.Schema, Iterator[pa.RecordBatch]]":
    """The schema, and the rows in Arrow batches.

    Raises:
        PayloadCorruptError: the file is no Parquet.
    """
    with _readable("pa.RecordBatchReader"):
        parquet = _opened(file)
        return parquet.schema_arrow, parquet.iter_batches() if parquet.num_row_groups else iter(())


def _opened(file: BinaryIO) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    # pre_buffer would hold all of the compressed bytes while they are decoded.
    return pq.ParquetFile(file, pre_buffer=False)


def _column_groups(parquet: "pq.ParquetFile") -> "list[list[str] | None]":
    """Columns to be read together; [None] for all of them."""
    schema, metadata = parquet.schema_arrow, parquet.metadata
    index = {name for name in (schema.pandas_metadata or {}).get("index_columns", ()) if isinstance(name, str)}
    names = [name for name in schema.names if name not in index]
    if len(set(names)) < len(names) or any("." in name for name in schema.names):
        return [None]  # columns are chosen by path, and these are ambiguous
    sizes = dict.fromkeys(schema.names, 0)
    for column in range(metadata.num_columns):
        name = metadata.schema.column(column).path.partition(".")[0]
        groups = (metadata.row_group(number).column(column) for number in range(metadata.num_row_groups))
        sizes[name] += max(8 * metadata.num_rows, sum(group.total_uncompressed_size for group in groups))
    found: list[list[str]] = [[]]
    room = _SLICE_BYTES
    for name in names:
        if found[-1] and sizes[name] > room:
            found.append([])
            room = _SLICE_BYTES
        found[-1].append(name)
        room -= sizes[name]
    return list(found) if len(found) > 1 else [None]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system; Arrow's own, about damaged bytes, have no number
        raise PayloadCorruptError(
            f"a payload whose media type is Parquet cannot be read as {what}: {error}; take it as "
            "bytes, or store it anew",
            wanted=what,
        ) from error
