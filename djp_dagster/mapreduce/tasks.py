"""Tasks: what an attempt at mapping a split, or at reducing a partition, does. Steps 2 and 4 of the protocol."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from operator import length_hint
from typing import Any

import msgspec

from djp_dagster.errors import BadRecordsError, DjpError
from djp_dagster.mapreduce.buffers import Buffer, CombiningBuffer, GroupingBuffer, release_unused, wrong_pairs
from djp_dagster.mapreduce.grouping import combined, extracted, reduced
from djp_dagster.mapreduce.job import MapReduce, pairs_of
from djp_dagster.mapreduce.place import Piece, WorkPlace, attempt_name
from djp_dagster.mapreduce.runs import ROWS, Rows, merged, read_run
from djp_dagster.mapreduce.sources.base import Bad, Block, Form, Split, cut

_MOST_RUNS = 64
"""Merged at once; more are merged in several rounds."""
_MOST_BAD = 10_000
"""Kept aside of one task; more are only counted."""

# What a mapper raises although its record is good: an outage, or what it decides itself.
_NOT_THE_RECORD = (DjpError, OSError, MemoryError)

Beat = Callable[[int], None]
"""Called with the number of records done since it was last called: the task is alive."""


class MapTask:
    """What a mapper or reducer may ask for by naming a parameter ``task``.

    Attributes:
        source: the file, object or topic being mapped; empty in a reducer.
    """

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.counters: Counter[str] = Counter()

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter of the job. Retried tasks, and records that are bad, are not counted twice."""
        self.counters[name] += by


class MapAnswer(msgspec.Struct, frozen=True):
    """What an attempt at a map task has done.

    Attributes:
        pairs: how many the mapper gave.
        bad: how many records cannot be mapped; ``kept`` are the first of them.
    """

    pieces: list[Piece]
    records: int
    bytes: int
    pairs: int
    bad: int
    kept: list[Bad]
    counters: dict[str, int]
    spilled_bytes: int
    seconds: float


class ReduceAnswer(msgspec.Struct, frozen=True):
    """What an attempt at a reduce task has done.

    Attributes:
        pieces: the results.
        rows_in: how many accumulators or pairs it got.
    """

    pieces: list[Piece]
    rows_in: int
    bytes_in: int
    counters: dict[str, int]
    seconds: float


def run_map(
    job: MapReduce,
    split: Split,
    form: Form,
    partitions: int,
    name: str,
    number: int,
    place: WorkPlace,
    beat: Beat,
) -> bytes:
    """Map one split; the encoded answer.

    Raises:
        BadRecordsError: a record is bad, and the job allows none.
        SourceError, InvalidValueError: of the split, or of what the mapper gives.
    """
    started = time.monotonic()
    mapping = _Mapping(job, split, form)
    with closing(_buffer(job, partitions, place)) as buffer:
        for block in split.blocks(form):
            mapping.take(block, buffer)
            buffer.relieve()
            beat(block.count)
        attempt = attempt_name(name, number)
        pieces = []
        for partition, rows in buffer.finish():
            pieces.append(place.write(attempt, partition, _beating(rows, beat)))
        spilled = buffer.spilled_bytes
    release_unused()
    answer = MapAnswer(
        pieces=pieces,
        records=mapping.records,
        bytes=mapping.bytes,
        pairs=mapping.pairs,
        bad=mapping.bad,
        kept=mapping.kept,
        counters=dict(mapping.task.counters),
        spilled_bytes=spilled,
        seconds=time.monotonic() - started,
    )
    return msgspec.msgpack.encode(answer)


def _buffer(job: MapReduce, partitions: int, place: WorkPlace) -> Buffer:
    arguments = (place.temp_folder, partitions, job.partition_by, job.budget_bytes)
    if job.combine is not None:
        return CombiningBuffer(job.combine, *arguments)
    return GroupingBuffer(job.sort_by, *arguments)


def _beating(rows: Iterator[Rows], beat: Beat) -> Iterator[Rows]:
    for one in rows:
        beat(0)
        yield one


class _Mapping:
    """Blocks to pairs; what is bad is kept aside."""

    def __init__(self, job: MapReduce, split: Split, form: Form) -> None:
        self._job, self._split, self._form = job, split, form
        self.task = MapTask(split.uri)
        self.records = self.bytes = self.pairs = self.bad = 0
        self.kept: list[Bad] = []

    def take(self, block: Block, buffer: Buffer) -> None:
        """Map a block into the buffer."""
        self.records, self.bytes = self.records + block.count, self.bytes + block.size
        for bad in block.bad:
            self._keep(bad)
        if self._form == "records":
            pairs: Sequence[tuple[Any, Any]] = self._pairs(block)
        elif block.whole is not None:
            pairs = pairs_of(self._call(block.whole))
        else:
            return
        self.pairs += len(pairs)
        try:
            buffer.fold(pairs)
        except (TypeError, ValueError) as error:
            raise wrong_pairs(pairs, error) from error

    def _call(self, given: Any) -> Any:
        if self._job.mapper_wants_task:
            return self._job.mapper(given, task=self.task)
        return self._job.mapper(given)

    def _pairs(self, block: Block) -> list[tuple[Any, Any]]:
        """All pairs of a block. Only if a record raises, they are mapped one by one, so that nothing of it counts."""
        before = self.task.counters.copy()
        records = iter(block.records)
        call = self._call if self._job.mapper_wants_task else self._job.mapper
        try:
            return [pair for record in records for pair in call(record)]
        except _NOT_THE_RECORD:
            raise
        except Exception as error:
            if not self._job.max_bad_fraction:
                raise self._failed(block, len(block.records) - length_hint(records) - 1, error) from error
        self.task.counters = before
        pairs: list[tuple[Any, Any]] = []
        for number, record in enumerate(block.records):
            counted = self.task.counters.copy()
            try:
                pairs += list(call(record))
            except _NOT_THE_RECORD:
                raise
            except Exception as error:  # noqa: BLE001  whatever it is, the record is kept aside and it is said
                self.task.counters = counted
                position, raw = block.locate(number)
                self._keep(Bad(self._split.uri, position, f"{type(error).__name__}: {error}", cut(raw)))
        return pairs

    def _keep(self, bad: Bad) -> None:
        if not self._job.max_bad_fraction:
            raise bad_record(bad)
        self.bad += 1
        if len(self.kept) < _MOST_BAD:
            self.kept.append(bad)

    def _failed(self, block: Block, number: int, error: Exception) -> BadRecordsError:
        position, raw = block.locate(max(0, number))
        return bad_record(Bad(self._split.uri, position, f"{type(error).__name__}: {error}", cut(raw)))


def bad_record(bad: Bad) -> BadRecordsError:
    """The error for a record that no job may pass over. It does not repeat the record."""
    return BadRecordsError(
        f"{bad.source}, record at {bad.position}: {bad.reason}; correct the input or the mapper, or allow for some "
        "with max_bad_fraction=",
        source=bad.source,
        position=bad.position,
        reason=bad.reason,
    )


def run_reduce(
    job: MapReduce, partition: int, pieces: Sequence[Piece], name: str, number: int, place: WorkPlace, beat: Beat
) -> bytes:
    """Reduce one partition; the encoded answer.

    Raises:
        PayloadError, InvalidValueError: of what the map tasks have left, or of what the reducer gives.
    """
    started = time.monotonic()
    task = MapTask()
    left = list(pieces)
    attempt = attempt_name(name, number)
    rounds = 0
    while len(left) > _MOST_RUNS:
        rounds += 1
        with _merging(job, left[:_MOST_RUNS], place, beat) as windows:
            left = [*left[_MOST_RUNS:], place.write(f"{attempt}/round-{rounds}", partition, windows)]
    with _merging(job, left, place, beat) as windows:
        made = place.write(f"{attempt}/results", partition, _results(job, windows, task))
    answer = ReduceAnswer(
        pieces=[made],
        rows_in=sum(one.rows for one in pieces),
        bytes_in=sum(one.size for one in pieces),
        counters=dict(task.counters),
        seconds=time.monotonic() - started,
    )
    return msgspec.msgpack.encode(answer)


@contextmanager
def _merging(job: MapReduce, pieces: Sequence[Piece], place: WorkPlace, beat: Beat) -> Iterator[Iterator[Rows]]:
    """The rows of several runs, sorted; combined if the job can."""
    with ExitStack() as stack:
        windows = merged([read_run(stack.enter_context(place.open(piece))) for piece in pieces])
        yield _beating(windows if job.combine is None else combined(windows, job.combine), beat)


def _results(job: MapReduce, windows: Iterator[Rows], task: MapTask) -> Iterator[Rows]:
    if job.combine is not None:
        return extracted(windows, job.combine)
    reducer = job.reduce
    assert reducer is not None
    if job.reducer_wants_task:
        reducer = partial(reducer, task=task)
    return reduced(windows, reducer, yields=job.reducer_yields, rows_at_once=ROWS)
