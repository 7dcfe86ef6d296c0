"""Sorted runs: tables of key and value in Arrow IPC, written to files, and merged again in bounded memory.

A run's columns are ``key``, ``value``, and, where values are sorted too, ``order``: key and sort key, encoded as one.
Rows are sorted by ``order`` if it is there, else by ``key``; equal ones keep the order in which they came. What kinds
of columns these are stands in the schema; it may change within a run.

Merging takes turns: of each run one batch is in memory. The least of their last rows is the bound: whatever is still on
disk comes after it. Rows up to the bound are taken from every batch, joined, sorted by one call into Arrow, and given
out; then the batches that are used up are replaced. At least one is, each time.
"""

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

from djp_dagster.mapreduce.keys import KeyKind, as_encoded, encode_key, encode_order, key_array, keys_of
from djp_dagster.mapreduce.values import as_pickled, value_array, values_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1 << 12
"""Of a batch in a run; of each run that is merged, one is in memory, and the same again while they are sorted."""
BATCH_BYTES = 1 << 17
_KIND = b"djp.keys"


@dataclass(frozen=True)
class Rows:
    """Some rows of a run: keys and values as columns."""

    kind: KeyKind
    keys: "pa.Array[Any]"
    field: "pa.Field[Any]"
    values: "pa.Array[Any]"
    order: "pa.Array[Any] | None" = None

    @property
    def sorted_by(self) -> "pa.Array[Any]":
        """The column they are sorted by."""
        return self.keys if self.order is None else self.order

    @property
    def nbytes(self) -> int:
        """In memory."""
        return int(self.keys.nbytes + self.values.nbytes + (0 if self.order is None else self.order.nbytes))

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, length: int | None = None) -> "Rows":
        """Some of them."""
        order = None if self.order is None else self.order.slice(start, length)
        return replace(self, keys=self.keys.slice(start, length), values=self.values.slice(start, length), order=order)

    def take(self, indices: "pa.Array[Any]") -> "Rows":
        """These, in that order."""
        order = None if self.order is None else self.order.take(indices)
        return replace(self, keys=self.keys.take(indices), values=self.values.take(indices), order=order)

    def pairs(self) -> Iterator[tuple[Any, Any]]:
        """Keys and values as Python objects."""
        return zip(keys_of(self.kind, self.keys), values_of(self.field, self.values), strict=True)

    def schema(self) -> "pa.Schema":
        """Of the run they are of."""
        import pyarrow as pa

        fields = [pa.field("key", self.keys.type, metadata={_KIND: self.kind.encode()}), self.field]
        if self.order is not None:
            fields.append(pa.field("order", self.order.type))
        return pa.schema(fields)

    def batch(self) -> "pa.RecordBatch":
        """As Arrow knows it."""
        import pyarrow as pa

        columns = [self.keys, self.values, *(() if self.order is None else (self.order,))]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema())


def rows_of(keys: Sequence[Any], values: Sequence[Any], sort_keys: Sequence[Any] | None = None) -> Rows:
    """Rows of Python objects, in the order in which they are given.

    Raises:
        InvalidValueError: a key or value that cannot be shuffled.
    """
    import pyarrow as pa

    kind, key_column = key_array(keys)
    field, value_column = value_array(values)
    order = None
    if sort_keys is not None:
        both = zip(keys, sort_keys, strict=True)
        order = pa.array([encode_key(key) + encode_order(by) for key, by in both], pa.binary())
    return Rows(kind, key_column, field, value_column, order)


def in_order(rows: Rows) -> Rows:
    """The rows, sorted; equal ones stay in their order."""
    import pyarrow.compute as pc

    return rows.take(pc.array_sort_indices(rows.sorted_by)) if len(rows) > 1 else rows


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several runs one after the other; of the kinds that all of them can have."""
    import pyarrow as pa

    if len(parts) == 1:
        return parts[0]
    kind = parts[0].kind if len({part.kind for part in parts}) == 1 else "encoded"
    field = parts[0].field
    alike = all(part.field.equals(field, check_metadata=True) for part in parts)
    keys = [part.keys if part.kind == kind else as_encoded(part.kind, part.keys) for part in parts]
    values = [part.values for part in parts]
    if not alike:
        columns = [as_pickled(part.field, part.values) for part in parts]
        field, values = columns[0][0], [column for _, column in columns]
    order = [part.order for part in parts if part.order is not None]
    return Rows(
        kind, pa.concat_arrays(keys), field, pa.concat_arrays(values), pa.concat_arrays(order) if order else None
    )


def write_run(file: BinaryIO, parts: Iterable[Rows]) -> int:
    """Write sorted rows as a run; how many. Where the kinds of columns change, another Arrow stream begins."""
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression="lz4")
    writer: Any = None
    schema: pa.Schema | None = None
    total = 0
    try:
        for rows in parts:
            if schema is None or not schema.equals(rows.schema(), check_metadata=True):
                if writer is not None:
                    writer.close()
                schema = rows.schema()
                writer = pa.ipc.new_stream(file, schema, options=options)
            total += len(rows)
            for piece in in_batches(rows):
                writer.write_batch(piece.batch())
    finally:
        if writer is not None:
            writer.close()
    return total


def in_batches(rows: Rows) -> Iterator[Rows]:
    """The rows in pieces of which one of many runs can be in memory at once."""
    step = max(1, min(ROWS, BATCH_BYTES * len(rows) // max(1, rows.nbytes)))
    for start in range(0, len(rows), step):
        yield rows.slice(start, step)


def read_run(file: BinaryIO) -> Iterator[Rows]:
    """The batches of a run, from where the file stands, which can be sought in. Closing it is the caller's."""
    import pyarrow as pa

    while file.read(1):
        file.seek(-1, io.SEEK_CUR)
        with pa.ipc.open_stream(file) as reader:
            field = reader.schema.field("value")
            kind: Any = reader.schema.field("key").metadata[_KIND].decode()
            ordered = "order" in reader.schema.names
            for batch in reader:
                yield Rows(kind, batch.column(0), field, batch.column(1), batch.column(2) if ordered else None)


class _Head:
    """A run that is being merged: its batch in memory, and how much of that is used up."""

    def __init__(self, batches: Iterator[Rows]) -> None:
        self._batches = batches
        self.rows: Rows | None = None
        self.next()

    def next(self) -> None:
        """Take the next batch into memory."""
        self.rows = next((rows for rows in self._batches if len(rows)), None)

    def last(self) -> Any:
        """What the last row in memory is sorted by."""
        assert self.rows is not None
        return _comparable(self.rows, self.rows.sorted_by[-1].as_py())

    def up_to(self, bound: Any, encoded: bool) -> Rows | None:
        """The rows up to the bound, the bound included; they are used up then."""
        rows = self.rows
        assert rows is not None
        column = _Column(rows, encoded)
        # Most often all of them, or none.
        count = len(rows) if column[len(rows) - 1] <= bound else bisect_right(column, bound)
        if count == len(rows):
            self.next()
        else:
            self.rows = rows.slice(count)
        return rows.slice(0, count) if count else None


class _Column:
    """What rows are sorted by as a sequence that `bisect` can look into, without making Python objects of all."""

    def __init__(self, rows: Rows, encoded: bool) -> None:
        self._rows, self._column = rows, rows.sorted_by
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, at: int) -> Any:
        found = self._column[at].as_py()
        return _comparable(self._rows, found) if self._encoded else found


def _comparable(rows: Rows, found: Any) -> bytes:
    """What a row is sorted by, as bytes that can be compared with those of a run of another kind."""
    return found if rows.order is not None or rows.kind == "encoded" else encode_key(found)


def merged(runs: Sequence[Iterator[Rows]]) -> Iterator[Rows]:
    """The rows of all runs, sorted; equal ones in the order of the runs. Groups of equal ones may be cut anywhere."""
    if len(runs) == 1:
        yield from runs[0]
        return
    heads = [head for head in map(_Head, runs) if head.rows is not None]
    while heads:
        kinds = {head.rows.kind for head in heads if head.rows is not None and head.rows.order is None}
        encoded = len(kinds) > 1
        bounds = [head.last() if encoded else head.rows.sorted_by[-1].as_py() for head in heads if head.rows]
        bound = min(bounds)
        parts = [part for head in heads if (part := head.up_to(bound, encoded)) is not None]
        yield parts[0] if len(parts) == 1 else in_order(joined(parts))
        heads = [head for head in heads if head.rows is not None]
