"""`MapReduceResult`: what came out, and how it went."""

import contextlib
import heapq
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidSettingError, SourceError, TableSchemaError
from djp_dagster.mapreduce.keys import encode_key, keys_of
from djp_dagster.mapreduce.place import Piece, WorkPlace
from djp_dagster.mapreduce.runs import Rows, read_run
from djp_dagster.mapreduce.sources.base import Bad
from djp_dagster.mapreduce.values import kind_of, values_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.stream import EventStream
    from djp_dagster.streams.topics import Topic

_CHUNK = 1000
_MANIFEST = "_manifest.json"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How a job went.

    Attributes:
        engine, engine_why, workers: who did it, and why they.
        sources: how many splits of which files, objects or topics; at most 1,000 of these.
        records, bytes: of the source, bad records included; ``pairs``: what the mapper gave.
        bad_records: kept aside.
        results: how many keys, or pairs of the reducer.
        map_tasks, reduce_tasks: how many; ``resumed``: of these, done by an earlier run of the same job.
        lost, raised, duplicates: attempts that died or stood still; that raised; second ones beside slow ones.
        spilled_bytes: written to temporary files; ``shuffled_bytes``: from mappers to reducers.
        skew: the largest partition in units of the average one.
        plan_seconds, map_seconds, reduce_seconds: by the clock.
        counters: of mapper and reducer.
    """

    engine: str
    engine_why: str
    workers: int
    sources: Mapping[str, int]
    records: int
    bytes: int
    pairs: int
    bad_records: int
    results: int
    map_tasks: int
    reduce_tasks: int
    resumed: int
    lost: int
    raised: int
    duplicates: int
    spilled_bytes: int
    shuffled_bytes: int
    skew: float
    plan_seconds: float
    map_seconds: float
    reduce_seconds: float
    counters: Mapping[str, int]


class MapReduceResult:
    """The results of a job, sorted by key within each partition; and how it went.

    Large results lie in the job's work place until this is closed, or nobody holds it any more. Use it as a context
    manager where that matters.

    Attributes:
        report: how it went.
        bad_records: the records that were kept aside, at most 10,000 of each task.
    """

    def __init__(
        self,
        name: str,
        place: WorkPlace,
        pieces: Sequence[Sequence[Piece]],
        report: Report,
        bad_records: Sequence[Bad],
        cleanup: Callable[[], None],
    ) -> None:
        self.name, self.report, self.bad_records = name, report, bad_records
        self._place, self._pieces = place, [list(one) for one in pieces]
        self._finalizer = weakref.finalize(self, cleanup)

    def __enter__(self) -> "MapReduceResult":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"MapReduceResult({self.name!r}, {len(self)} results)"

    def __len__(self) -> int:
        return self.report.results

    def close(self) -> None:
        """Remove what the job has left; results that are not read by then are gone."""
        self._finalizer()

    def partitions(self) -> Iterator[Iterator[tuple[Any, Any]]]:
        """The results of each partition, as pairs, one partition after the other."""
        for pieces in self._pieces:
            yield (pair for rows in self._rows(pieces) for pair in rows.pairs())

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """All results as pairs, in bounded memory: sorted if the keys are, which they are not if a reducer yields."""
        partitions = list(self.partitions())
        if len(partitions) == 1:
            return partitions[0]
        return (pair for partition in partitions for pair in partition)

    def items(self) -> Iterator[tuple[Any, Any]]:
        """The same as iterating over it."""
        return iter(self)

    def to_dict(self) -> dict[Any, Any]:
        """All results in memory, in the order of their keys where these can be compared."""
        pairs = list(self)
        with contextlib.suppress(TypeError):
            pairs.sort(key=_key)
        return dict(pairs)

    def top(self, count: int) -> list[tuple[Any, Any]]:
        """The results with the greatest values; the first ones if values cannot be compared."""
        try:
            return heapq.nlargest(count, self, key=_value)
        except TypeError:
            return list(islice(self, count))

    # Tables

    def batches(self, columns: Sequence[str] = ("key", "value")) -> "pa.RecordBatchReader":
        """The results as Arrow batches, in bounded memory.

        Args:
            columns: the names of the columns. Keys, or values, that are tuples become as many columns as they have
                items, if that many names are given.

        Raises:
            TableSchemaError: keys or values of no one type; iterate over the result, or let the job give others.
            InvalidSettingError: another number of names.
        """
        import pyarrow as pa

        tables = (_table(rows, columns) for pieces in self._pieces for rows in self._rows(pieces))
        first = next(tables, None)
        if first is None:
            return pa.RecordBatchReader.from_batches(pa.schema([pa.field(name, pa.null()) for name in columns]), [])

        def all_of() -> Iterator[pa.RecordBatch]:
            yield first
            for one in tables:
                yield one if one.schema.equals(first.schema) else _cast(one, first.schema)

        return pa.RecordBatchReader.from_batches(first.schema, all_of())

    def to_arrow(self, columns: Sequence[str] = ("key", "value")) -> "pa.Table":
        """All results as one table; see `batches`."""
        return self.batches(columns).read_all()

    def to_pandas(self, columns: Sequence[str] = ("key", "value")) -> "pd.DataFrame":
        """All results as a DataFrame; see `batches`."""
        import pandas as pd

        if not len(self):
            return pd.DataFrame(columns=list(columns))
        frame: pd.DataFrame = self.to_arrow(columns).to_pandas()
        return frame

    def write_parquet(
        self, target: "str | Path | PayloadStore", columns: Sequence[str] = ("key", "value")
    ) -> list[str]:
        """Write the results as Parquet files, one per partition, and a manifest that names them; the files' URIs.

        The files have new names each time; ``_manifest.json`` is replaced in one step when all of them are there, so
        whoever reads by it sees the results of one job. Files of earlier jobs stay.

        Args:
            target: a folder, ``s3://bucket/prefix``, or a payload store.
            columns: see `batches`.
        """
        import uuid

        from djp_dagster.claim_check.location import open_payload_store
        from djp_dagster.claim_check.serializers.kinds import PARQUET
        from djp_dagster.claim_check.serializers.tables import write_table
        from djp_dagster.claim_check.writing import uploading

        store = open_payload_store(target) if isinstance(target, str | Path) else target
        job, parts = uuid.uuid4().hex[:12], []
        for number, pieces in enumerate(self._pieces):
            reader = MapReduceResult._of(self, [pieces]).batches(columns)
            with uploading(store, f"part-{number:05}-{job}.parquet", PARQUET) as upload:
                rows = write_table(reader, upload.file).rows
                if rows:
                    ref = upload.finish()
                    parts.append({"file": ref.key, "rows": rows, "bytes": ref.bytes, "sha256": ref.sha256})
        manifest = {"version": 1, "job": self.name, "columns": list(columns), "parts": parts}
        store.objects.replace_document(_MANIFEST, json.dumps(manifest, indent=1).encode())
        return [f"{store.uri}/{part['file']}" for part in parts]

    def publish(
        self, stream: "EventStream", topic: "Topic", event: Callable[[Any, Any], Mapping[str, Any]], *, producer: str
    ) -> int:
        """Publish each result as an event, in the order of keys; how many. Once, also if it is repeated.

        That takes the same results: of a reducer that yields pairs, also the same ``reducers=``.

        Args:
            stream: where to.
            topic: to which topic, which is created if need be.
            event: the arguments of ``topic.event`` for a key and its value.
            producer: a name for these results, which no other results have: a job and its partition or day.
        """
        stream.create_topic(topic)
        named = stream.producer(producer)
        pairs = heapq.merge(*self.partitions(), key=_encoded)
        number = published = 0
        while chunk := list(islice(pairs, _CHUNK)):
            number += 1
            named.publish(topic.name, [topic.event(**event(key, value)) for key, value in chunk], sequence=number)
            published += len(chunk)
        return published

    @classmethod
    def _of(cls, other: "MapReduceResult", pieces: Sequence[Sequence[Piece]]) -> "MapReduceResult":
        return cls(other.name, other._place, pieces, other.report, (), lambda: None)

    def _rows(self, pieces: Sequence[Piece]) -> Iterator[Rows]:
        if pieces and not self._finalizer.alive:
            raise SourceError(f"the results of {self.name!r} were removed when it was closed", uri=self.name)
        for piece in pieces:
            with self._place.open(piece) as file:
                yield from read_run(file)


def _key(pair: tuple[Any, Any]) -> Any:
    return pair[0]


def _encoded(pair: tuple[Any, Any]) -> bytes:
    return encode_key(pair[0])


def _value(pair: tuple[Any, Any]) -> Any:
    return pair[1]


def _table(rows: Rows, columns: Sequence[str]) -> "pa.RecordBatch":
    import pyarrow as pa

    keys, values = _key_columns(rows), _value_columns(rows)
    for one, other in ((keys, values), (keys, None), (None, values), (None, None)):
        if len(columns) == (len(one) if one else 1) + (len(other) if other else 1):
            found = [*(one or [_keys(rows)]), *(other or [_values(rows)])]
            return pa.RecordBatch.from_arrays(found, names=list(columns))
    raise InvalidSettingError(
        f"columns={list(columns)!r}: a result has {len(keys or [0])} columns of keys and {len(values or [0])} of "
        "values; give as many names, or two",
        setting="columns",
        value=list(columns),
    )


def _key_columns(rows: Rows) -> "list[pa.Array[Any]] | None":
    """The columns that keys which are tuples consist of; None if they are none."""
    if rows.kind != "encoded":
        return None
    keys = keys_of(rows.kind, rows.keys)
    if not all(type(key) is tuple and len(key) == len(keys[0]) for key in keys):
        return None
    return [_column(items) for items in zip(*keys, strict=True)]


def _value_columns(rows: Rows) -> "list[pa.Array[Any]] | None":
    return list(rows.values.flatten()) if kind_of(rows.field) == "tuple" else None


def _keys(rows: Rows) -> "pa.Array[Any]":
    return rows.keys if rows.kind != "encoded" else _column(keys_of(rows.kind, rows.keys))


def _values(rows: Rows) -> "pa.Array[Any]":
    if kind_of(rows.field) in ("pickle", "tuple"):
        return _column(values_of(rows.field, rows.values))
    return rows.values


def _column(values: Sequence[Any]) -> "pa.Array[Any]":
    import pyarrow as pa

    try:
        return pa.array([sorted(value) if isinstance(value, (set, frozenset)) else value for value in values])
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise TableSchemaError(
            f"the results cannot become columns: {error}; iterate over them, or let the job give keys and values of "
            "one type each"
        ) from error


def _cast(batch: "pa.RecordBatch", schema: "pa.Schema") -> "pa.RecordBatch":
    import pyarrow as pa

    try:
        arrays = [column.cast(field.type) for column, field in zip(batch.columns, schema, strict=True)]
    except pa.ArrowException as error:
        raise TableSchemaError(
            f"the results change their type from {schema} to {batch.schema}: {error}; let the job give one"
        ) from error
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
