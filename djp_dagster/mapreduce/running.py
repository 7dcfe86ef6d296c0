"""`map_reduce`: a job, from the plan to its result. The protocol is in the docstring of `djp_dagster.mapreduce`."""

import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import BadRecordsError, InvalidSettingError
from djp_dagster.mapreduce.engines.base import Engine, Setup, Task
from djp_dagster.mapreduce.engines.inline import Inline
from djp_dagster.mapreduce.engines.processes import Processes
from djp_dagster.mapreduce.job import Mapper, MapReduce, as_job
from djp_dagster.mapreduce.place import WorkPlace
from djp_dagster.mapreduce.progress import Progress, terminal_progress
from djp_dagster.mapreduce.results import MapReduceResult, Report
from djp_dagster.mapreduce.scheduling import Phase, decoded
from djp_dagster.mapreduce.sources.base import Source, Split, form_of
from djp_dagster.mapreduce.tasks import MapAnswer, ReduceAnswer, bad_record

_SMALL_BYTES = 32 << 20
_MOST_NAMED = 1000
_LEAST_FOR_FRACTION = 1000
"""Before so many records are mapped, nobody can tell what part of them is bad."""


def map_reduce(
    mapper: "Mapper | MapReduce",
    source: Source,
    *,
    engine: str | Engine = "auto",
    work: "str | Path | PayloadStore | None" = None,
    temp_folder: str | Path | None = None,
    progress: "Progress | bool" = False,
    **settings: Any,
) -> MapReduceResult:
    """Run a job over a source, without Dagster.

    Args:
        mapper: the mapper, or a `MapReduce`.
        source: `TextFiles`, `JsonLines`, `CsvFiles`, `ParquetFiles`, `TopicRange` or `Items`.
        engine: ``"inline"``, ``"processes"``, or an engine such as ``Processes(4)`` or ``Dask(address)``; ``"auto"``
            takes this process for less than 32 MiB, and all processors for more.
        work: a folder, ``s3://bucket/prefix`` or a payload store for what tasks hand to each other. If a job with one
            ends before it is done, the same job goes on from there, unless it has less than 32 MiB to read. A temporary
            folder unless given.
        temp_folder: for temporary files; the system's unless given.
        progress: True for bars in the terminal; or whoever wants to be told.
        **settings: of `MapReduce`, such as ``combine``.

    Raises:
        InvalidSettingError: of the job, or of the engine.
        SourceError: the source is missing, damaged, or changes meanwhile.
        BadRecordsError: more records are bad than the job allows.
        MapReduceFailedError, WorkerDiedError: a task failed for good.
        ShuffleSpaceError: no space for temporary files.

    Example:
        >>> from djp_dagster import Items, Sum, map_reduce
        >>> result = map_reduce(lambda n: [(n % 3, n)], Items(range(10)), combine=Sum())
        >>> result.to_dict(), result.report.engine
        ({0: 18, 1: 12, 2: 15}, 'inline')
    """
    job = as_job(mapper, settings)
    with ExitStack() as stack:
        return _Run(job, source, stack, work, temp_folder).result(engine, progress)


class _Run:
    """One run of one job."""

    def __init__(
        self,
        job: MapReduce,
        source: Source,
        stack: ExitStack,
        work: "str | Path | PayloadStore | None",
        temp_folder: str | Path | None,
    ) -> None:
        started = time.monotonic()
        self._job, self._stack = job, stack
        self._form = form_of(source, job.batch)
        self._splits: Sequence[Split] = source.plan()
        self._temp = Path(temp_folder) if temp_folder is not None else Path(tempfile.gettempdir())
        self._work = work
        self._plan_s = time.monotonic() - started
        self._records = self._bad = 0

    def result(self, engine: str | Engine, progress: "Progress | bool") -> MapReduceResult:
        """Do everything."""
        doer, why = self._engine(engine)
        store, cleanup = self._store(doer)
        self._stack.callback(doer.close)  # first of all: what it has under way writes to the store
        partitions = self._job.reducers or doer.slots
        job_id = self._identity(partitions)
        total = sum(split.size for split in self._splits)
        # What is done again in a moment is not worth writing down.
        durable = self._work is not None and total >= _SMALL_BYTES
        place = WorkPlace(store, job_id, durable=durable, temp_folder=self._temp)
        maps = [Task(f"map-{number:05}", split=split) for number, split in enumerate(self._splits)]
        answers = self._committed(place, maps, partitions)
        resumed = len(answers)
        with self._shown(progress) as shown:
            doer.start(Setup(self._job, self._form, partitions, store, job_id, str(self._temp)))
            started = time.monotonic()
            shown.begin("map", len(maps), total)
            phase = Phase(self._job, doer, place, tell=shown.tell, stop_at=self._watch)
            phase.run(maps, answers)
            mapped = [decoded(answers[task.name], MapAnswer) for task in maps]
            self._require_good(mapped)
            map_s, started = time.monotonic() - started, time.monotonic()
            reduces = self._reduce_tasks(mapped, partitions)
            shown.begin("reduce", len(reduces), sum(piece.rows for task in reduces for piece in task.pieces))
            second = Phase(self._job, doer, place, tell=shown.tell)
            second.run(reduces, answers)
            reduced = [decoded(answers[task.name], ReduceAnswer) for task in reduces]
        doer.close()
        report = _report(
            mapped,
            reduced,
            engine=doer.name,
            engine_why=why,
            workers=doer.slots,
            sources=dict(Counter(split.uri for split in self._splits).most_common(_MOST_NAMED)),
            resumed=resumed,
            lost=phase.counts.lost + second.counts.lost,
            raised=phase.counts.raised + second.counts.raised,
            duplicates=phase.counts.duplicates + second.counts.duplicates,
            plan_seconds=self._plan_s,
            map_seconds=map_s,
            reduce_seconds=time.monotonic() - started,
        )
        cleanup = cleanup or place.remove
        self._stack.pop_all()
        return MapReduceResult(
            self._job.name,
            place,
            [one.pieces for one in reduced],
            report,
            [bad for one in mapped for bad in one.kept],
            cleanup,
        )

    def _engine(self, engine: str | Engine) -> tuple[Engine, str]:
        total, why = sum(split.size for split in self._splits), "asked for"
        if engine == "auto":
            processors = len(os.sched_getaffinity(0))
            if total < _SMALL_BYTES:
                engine, why = "inline", f"{total} bytes are done before other processes have started"
            elif processors == 1 or len(self._splits) == 1:
                engine, why = "inline", "one processor" if processors == 1 else "one split, such as one compressed file"
            else:
                engine, why = "processes", f"{total} bytes in {len(self._splits)} splits, and {processors} processors"
        if isinstance(engine, str):
            if engine not in ("inline", "processes"):
                raise InvalidSettingError(
                    f"engine={engine!r} must be 'auto', 'inline', 'processes', or an engine such as Processes(4)",
                    setting="engine",
                    value=engine,
                )
            engine = Inline() if engine == "inline" else Processes()
        return engine, why

    def _store(self, engine: Engine) -> "tuple[PayloadStore, Callable[[], None] | None]":
        """Where the shuffle lies; and what removes all of that, if it is temporary."""
        if isinstance(self._work, PayloadStore):
            return self._work, None
        if self._work is not None:
            return open_payload_store(self._work), None
        if not engine.shares_disks:
            raise InvalidSettingError(
                f"engine {engine.name!r} works on several machines: give work=, a folder that all of them share, or "
                "s3://bucket/prefix",
                setting="work",
                value=None,
            )
        folder = tempfile.TemporaryDirectory(prefix="djp-map-reduce-", dir=self._temp)
        self._stack.callback(folder.cleanup)
        return open_payload_store(folder.name), folder.cleanup

    def _identity(self, partitions: int) -> str:
        digest = hashlib.sha256(f"{self._job.identity()} {self._form} {partitions}".encode())
        for split in self._splits:
            digest.update(f"\n{split.identity()}".encode())
        return digest.hexdigest()[:32]

    def _committed(self, place: WorkPlace, maps: Sequence[Task], partitions: int) -> dict[str, bytes]:
        """The answers of an earlier run of the same job, as far as what they refer to is there."""
        if not place.any_committed():
            return {}
        known: dict[str, bytes] = {}
        names = [(task.name, MapAnswer) for task in maps] + [(_reduce(one), ReduceAnswer) for one in range(partitions)]
        for name, kind in names:
            answer = place.committed(name)
            if answer is None:
                continue
            if place.holds(decoded(answer, kind).pieces):
                known[name] = answer
            else:
                place.forget(name)
        return known

    def _watch(self, answer: bytes) -> None:
        """End a job early that has far too many bad records already."""
        done: MapAnswer = decoded(answer, MapAnswer)
        self._records, self._bad = self._records + done.records, self._bad + done.bad
        if self._records >= _LEAST_FOR_FRACTION and self._bad > 2 * self._job.max_bad_fraction * self._records:
            self._require_good([done])

    def _require_good(self, mapped: Sequence[MapAnswer]) -> None:
        records, bad = sum(one.records for one in mapped), sum(one.bad for one in mapped)
        if bad <= self._job.max_bad_fraction * records:
            return
        first = next(kept for one in mapped for kept in one.kept)
        raise BadRecordsError(
            f"{bad} of {records} records of {self._job.name!r} cannot be mapped, more than max_bad_fraction="
            f"{self._job.max_bad_fraction}; the first: {bad_record(first)}",
            bad=bad,
            records=records,
            source=first.source,
            position=first.position,
            reason=first.reason,
        )

    def _reduce_tasks(self, mapped: Sequence[MapAnswer], partitions: int) -> list[Task]:
        pieces: list[list[Any]] = [[] for _ in range(partitions)]
        for one in mapped:
            for piece in one.pieces:
                pieces[piece.partition].append(piece)
        return [
            Task(_reduce(partition), partition=partition, pieces=tuple(found))
            for partition, found in enumerate(pieces)
            if found
        ]

    @staticmethod
    def _shown(progress: "Progress | bool") -> AbstractContextManager[Progress]:
        if isinstance(progress, bool):
            return terminal_progress() if progress else nullcontext(Progress())
        return nullcontext(progress)


def _reduce(partition: int) -> str:
    return f"reduce-{partition:05}"


def _report(mapped: Sequence[MapAnswer], reduced: Sequence[ReduceAnswer], **known: Any) -> Report:
    counters: Counter[str] = Counter()
    for counted in [*(one.counters for one in mapped), *(one.counters for one in reduced)]:
        counters.update(counted)
    sizes = [one.rows_in for one in reduced]
    return Report(
        records=sum(one.records for one in mapped),
        bytes=sum(one.bytes for one in mapped),
        pairs=sum(one.pairs for one in mapped),
        bad_records=sum(one.bad for one in mapped),
        results=sum(piece.rows for one in reduced for piece in one.pieces),
        map_tasks=len(mapped),
        reduce_tasks=len(reduced),
        spilled_bytes=sum(one.spilled_bytes for one in mapped),
        shuffled_bytes=sum(one.bytes_in for one in reduced),
        skew=round(max(sizes) * len(sizes) / max(1, sum(sizes)), 3) if sizes else 1.0,
        counters=dict(sorted(counters.items())),
        **known,
    )
