"""A map-reduce in a step of Dagster: how far it is, now and then; and what is shown of its result."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.engines.base import Engine
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.mapreduce.progress import Progress
from djp_dagster.mapreduce.results import MapReduceResult
from djp_dagster.mapreduce.running import map_reduce
from djp_dagster.mapreduce.sources.base import Source
from djp_dagster.mapreduce.sources.topics import TopicRange
from djp_dagster.orchestration.tags import STREAM_KEY, topic_key
from djp_dagster.resources.payload_stores import default_payload_store

if TYPE_CHECKING:
    from djp_dagster.resources.event_stream import SqlEventStream

Context = dg.OpExecutionContext | dg.AssetExecutionContext
AnySource = Source | Callable[[str], Source]
EngineChoice = str | Callable[[], Engine]

_TELL_EVERY_S = 10.0
_ROWS = 20
_MOST_SHOWN = 200


class _StepProgress(Progress):
    """A line in the run's log, now and then: an event of Dagster costs some milliseconds."""

    def __init__(self, context: Context) -> None:
        self._context, self._phase = context, ""
        self._tasks = self._done = self._records = 0
        self._last = time.monotonic()

    def begin(self, phase: str, tasks: int, size: int) -> None:
        """See `Progress`."""
        self._phase, self._tasks, self._done, self._records = phase, tasks, 0, 0

    def tell(self, records: int, task_done: bool) -> None:
        """See `Progress`."""
        self._records += records
        self._done += task_done
        now = time.monotonic()
        if now - self._last >= _TELL_EVERY_S:
            self._last = now
            self._context.log.info(
                "%s: %d of %d tasks, %d records", self._phase, self._done, self._tasks, self._records
            )


def run_in_step(
    context: Context,
    job: MapReduce,
    source: AnySource,
    *,
    engine: EngineChoice,
    work: "PayloadStore | str | None",
) -> MapReduceResult:
    """Run the job in a step. If the step is terminated, what was begun is killed."""
    return map_reduce(
        job,
        _source_of(context, source),
        engine=engine if isinstance(engine, str) else engine(),
        work=work if work is not None else default_payload_store(),
        progress=_StepProgress(context),
    )


def resources_of(source: AnySource) -> set[str]:
    """The keys of the resources that a step needs to read a source."""
    return {STREAM_KEY} if isinstance(source, TopicRange) and source.open is None else set()


def topics_of(source: AnySource) -> list[dg.AssetKey]:
    """The assets of the topics that a source reads."""
    return [topic_key(source.topic)] if isinstance(source, TopicRange) else []


def _source_of(context: Context, source: AnySource) -> Source:
    if not hasattr(source, "plan"):
        if not context.has_partition_key:
            raise InvalidSettingError(
                "source= is a function of a partition's key, and this run has none: give the asset a partitions_def, "
                "and run each partition by itself",
                setting="source",
                value=None,
            )
        source = source(context.partition_key)
    if isinstance(source, TopicRange) and source.open is None:
        if not hasattr(context.resources, STREAM_KEY):
            raise InvalidSettingError(
                f"topic {source.topic!r} of which stream? A function that makes the source gives "
                "TopicRange(..., stream=), or its asset asset={'required_resource_keys': {'event_stream'}}",
                setting="stream",
                value=None,
            )
        resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
        source = source.within(resource.opener())
    return source  # type: ignore[return-value]


def report_metadata(result: MapReduceResult, columns: Sequence[str]) -> dict[str, Any]:
    """What is shown: numbers that can be plotted; counters, bad records and the results with the greatest values."""
    report = result.report
    numbers = {
        name: getattr(report, name)
        for name in (
            "records",
            "bytes",
            "pairs",
            "bad_records",
            "results",
            "map_tasks",
            "reduce_tasks",
            "resumed",
            "lost",
            "spilled_bytes",
            "shuffled_bytes",
            "skew",
            "map_seconds",
            "reduce_seconds",
        )
    }
    shown: dict[str, Any] = {
        name: round(number, 3) if isinstance(number, float) else number for name, number in numbers.items()
    }
    seconds = report.map_seconds + report.reduce_seconds
    shown["mb_per_second"] = round(report.bytes / 1e6 / seconds, 3) if seconds else 0.0
    shown["engine"] = f"{report.engine} x {report.workers}: {report.engine_why}"
    top = [dg.TableRecord({"key": _shown(key), "value": _shown(value)}) for key, value in result.top(_ROWS)]
    shown["top"] = dg.MetadataValue.table(top, schema=_schema({"key": "string", "value": "string"}))
    shown["sources"] = _table({"source": list(report.sources), "splits": list(report.sources.values())})
    if report.counters:
        shown["counters"] = _table({"counter": list(report.counters), "count": list(report.counters.values())})
    if result.bad_records:
        bad = result.bad_records[:_ROWS]
        shown["bad"] = _table(
            {
                "source": [one.source for one in bad],
                "position": [one.position for one in bad],
                "reason": [one.reason for one in bad],
            }
        )
    shown["columns"] = ", ".join(columns)
    return shown


def _shown(value: Any) -> Any:
    return value if isinstance(value, int | float) else str(value)[:_MOST_SHOWN]


def _table(columns: dict[str, list[Any]]) -> dg.TableMetadataValue:
    names = list(columns)
    rows = [
        dg.TableRecord(dict(zip(names, map(_shown, row), strict=True))) for row in zip(*columns.values(), strict=True)
    ]
    kinds = {
        name: "int" if values and all(type(value) is int for value in values) else "string"
        for name, values in columns.items()
    }
    return dg.MetadataValue.table(rows[:_ROWS], schema=_schema(kinds))


def _schema(columns: dict[str, str]) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()])
