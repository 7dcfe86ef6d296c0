"""Partial results that are merged later, without reading their input again: accumulators as a table, and back."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import InvalidSettingError, SourceError
from djp_dagster.mapreduce.combining import CombineFn
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.mapreduce.keys import decode_key, encode_key
from djp_dagster.mapreduce.sources.base import Block, Form
from djp_dagster.mapreduce.values import pack, unpack

if TYPE_CHECKING:
    import pyarrow as pa

    from djp_dagster.mapreduce.results import MapReduceResult

COLUMNS = ("key", "accumulator")
_ROWS = 1 << 13


class _On(CombineFn[Any, Any, Any]):
    """What stands on another CombineFn."""

    def __init__(self, combine: CombineFn[Any, Any, Any]) -> None:
        self.combine, self.adds = combine, combine.adds

    def create(self) -> Any:
        """See `CombineFn`."""
        return self.combine.create()

    def merge(self, one: Any, other: Any) -> Any:
        """See `CombineFn`."""
        return self.combine.merge(one, other)


class Keeping(_On):
    """A CombineFn whose results are the accumulators of another."""

    def add(self, accumulator: Any, value: Any) -> Any:
        """See `CombineFn`."""
        return self.combine.add(accumulator, value)

    def fold(self, table: MutableMapping[Any, Any], pairs: Any) -> None:
        """See `CombineFn`."""
        self.combine.fold(table, pairs)


class Merging(_On):
    """A CombineFn whose values are the accumulators of another."""

    def add(self, accumulator: Any, value: Any) -> Any:
        """See `CombineFn`."""
        return self.combine.merge(accumulator, value)

    def extract(self, accumulator: Any) -> Any:
        """See `CombineFn`."""
        return self.combine.extract(accumulator)

    def fold(self, table: MutableMapping[Any, Any], pairs: Any) -> None:
        """See `CombineFn`."""
        merge = self.combine.merge
        for key, accumulator in pairs:
            table[key] = merge(table[key], accumulator) if key in table else accumulator


def keeping_accumulators(job: MapReduce) -> MapReduce:
    """The job, whose results are accumulators.

    Raises:
        InvalidSettingError: it has none.
    """
    if job.combine is None:
        raise InvalidSettingError(
            f"job {job.name!r} has a reduce=, whose results cannot be merged; give a combine=",
            setting="combine",
            value=None,
        )
    import copy

    kept = copy.copy(job)
    kept.combine = Keeping(job.combine)
    return kept


def accumulators(result: "MapReduceResult") -> "pa.RecordBatchReader":
    """The results of such a job as a table of two binary columns; exactly, whatever they are."""
    import pyarrow as pa

    schema = pa.schema([pa.field(name, pa.binary()) for name in COLUMNS])

    def batches() -> Iterator[pa.RecordBatch]:
        pairs: list[tuple[bytes, bytes]] = []
        for key, accumulator in result:
            pairs.append((encode_key(key), pack(accumulator)))
            if len(pairs) == _ROWS:
                yield pa.RecordBatch.from_arrays([pa.array(one) for one in zip(*pairs, strict=True)], schema=schema)
                pairs = []
        if pairs:
            yield pa.RecordBatch.from_arrays([pa.array(one) for one in zip(*pairs, strict=True)], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


class Accumulators:
    """Tables that `accumulators` has made, as a source of pairs; for the engine ``inline``.

    Args:
        tables: Arrow tables or DataFrames, by their names.
    """

    def __init__(self, tables: Sequence[tuple[str, Any]]) -> None:
        self._tables = tables

    def forms(self) -> tuple[Form, ...]:
        """See `Source`."""
        return ("records",)

    def plan(self) -> "Sequence[_Split]":
        """See `Source`."""
        return [_Split(name, table) for name, table in self._tables]


class _Split:
    """See `Split`."""

    def __init__(self, name: str, table: Any) -> None:
        import pyarrow as pa

        if hasattr(table, "read_all"):
            table = table.read_all()
        self.uri = name
        self._table: pa.Table = table if isinstance(table, pa.Table) else pa.Table.from_pandas(table)
        if set(COLUMNS) - set(self._table.column_names):
            raise SourceError(
                f"{name} has no accumulators, but columns {self._table.column_names}; materialize it with "
                "output='accumulators'",
                uri=name,
            )
        self.size = self._table.nbytes

    def identity(self) -> str:
        """See `Split`; what is in memory is never the same again."""
        return f"{self.uri} {id(self._table)}"

    def blocks(self, form: Form) -> Iterator[Block]:
        """See `Split`."""
        start = 0
        for batch in self._table.select(list(COLUMNS)).to_batches(_ROWS):
            keys, found = (column.to_pylist() for column in batch.columns)
            records = [(decode_key(key), unpack(one)) for key, one in zip(keys, found, strict=True)]
            yield Block(records=records, size=batch.nbytes, count=len(records), locate=_locate(start))
            start += len(records)


def _locate(start: int) -> Any:
    return lambda number: (start + number, b"")


def merge_accumulators(tables: Sequence[tuple[str, Any]], combine: CombineFn[Any, Any, Any]) -> "MapReduceResult":
    """The results of all tables together.

    Raises:
        SourceError: a table is no such thing.
        PayloadForbiddenError: somebody else wrote its bytes.
    """
    from djp_dagster.mapreduce.running import map_reduce

    job = MapReduce(_itself, combine=Merging(combine), name="merge")
    return map_reduce(job, Accumulators(tables), engine="inline")


def _itself(pair: tuple[Any, Any]) -> tuple[tuple[Any, Any]]:
    return (pair,)
