"""What Dagster shows of committed batches: numbers that can be plotted, and tables. Never a payload."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from djp_dagster.processing.reports import BatchReport
from djp_dagster.streams.model import Backlog
from djp_dagster.streams.records import TopicPartition

_MAX_ROWS = 50
_OF_ALL = -1


class Tally:
    """Adds up committed batches, in memory that does not grow with their number.

    Args:
        gauges: what tasks held when they were last heard of, by task and name; shared by tallies that follow each
            other.
    """

    def __init__(self, gauges: dict[tuple[int, str], float] | None = None) -> None:
        self._gauges = {} if gauges is None else gauges
        self._counts: Counter[str] = Counter()
        self.batches = self.events = self.bytes = self.emitted = self.dead_letters = self.state_changes = 0
        self.seconds = self.handler_seconds = self.commit_seconds = 0.0
        self.attempt = 0
        self._reasons: Counter[str] = Counter()
        self._spans: dict[TopicPartition, tuple[int, int]] = {}
        self._last: deque[BatchReport] = deque(maxlen=_MAX_ROWS)

    def add(self, report: BatchReport) -> None:
        """Count one more batch."""
        self.batches += 1
        self.events += report.events
        self.bytes += report.bytes
        self.emitted += report.emitted
        self.dead_letters += report.dead_letters
        self.state_changes += report.state_changes
        self.seconds += report.seconds
        self.handler_seconds += report.handler_seconds
        self.commit_seconds += report.commit_seconds
        self.attempt = max(self.attempt, report.attempt)
        self._counts.update(report.counts)
        task = report.ranges[0].partition if report.ranges else 0
        for name, value in report.gauges.items():
            self._gauges[(task if name in report.per_task else _OF_ALL, name)] = value
        self._reasons[report.reason] += 1
        self._last.append(report)
        for part in report.ranges:
            start, end = self._spans.get(part.at, (part.start, part.end))
            self._spans[part.at] = (min(start, part.start), max(end, part.end))

    def metadata(self, backlog: Backlog | None) -> dict[str, dg.MetadataValue[Any]]:
        """The figures, and those of what is still pending, if that is known.

        Numbers: ``events, bytes, batches, emitted, dead_letters, state_changes, seconds, handler_seconds,
        commit_seconds, events_per_second, attempt`` (the highest), ``lag_events, lag_age_seconds``, and what handlers
        counted and measured, by their names. Text: ``reason``,
        ``last_batch_id``. Tables: ``offsets``, ``last_batches``.
        """
        return {
            **self._figures(),
            "events": dg.MetadataValue.int(self.events),
            "bytes": dg.MetadataValue.int(self.bytes),
            "batches": dg.MetadataValue.int(self.batches),
            "emitted": dg.MetadataValue.int(self.emitted),
            "dead_letters": dg.MetadataValue.int(self.dead_letters),
            "state_changes": dg.MetadataValue.int(self.state_changes),
            "seconds": dg.MetadataValue.float(round(self.seconds, 6)),
            "handler_seconds": dg.MetadataValue.float(round(self.handler_seconds, 6)),
            "commit_seconds": dg.MetadataValue.float(round(self.commit_seconds, 6)),
            "events_per_second": dg.MetadataValue.float(round(self.events / self.seconds, 3) if self.seconds else 0.0),
            "attempt": dg.MetadataValue.int(self.attempt),
            **({} if backlog is None else lag_metadata(backlog)),
            "reason": dg.MetadataValue.text(", ".join(reason for reason, _ in self._reasons.most_common(5))),
            "last_batch_id": dg.MetadataValue.text(self._last[-1].batch_id if self._last else ""),
            "offsets": self._offsets_table(),
            "last_batches": _batches_table(self._last),
        }

    def _figures(self) -> dict[str, dg.MetadataValue[Any]]:
        held: dict[str, float] = {}
        for (_, name), value in self._gauges.items():
            held[name] = held.get(name, 0) + value
        return {name: _number(value) for name, value in sorted({**self._counts, **held}.items())}

    def _offsets_table(self) -> dg.TableMetadataValue:
        return dg.MetadataValue.table(
            [
                dg.TableRecord({"topic": at.topic, "partition": at.partition, "from": start, "to": end})
                for at, (start, end) in sorted(self._spans.items())[:_MAX_ROWS]
                if end > start
            ],
            schema=_schema({"topic": "string", "partition": "int", "from": "int", "to": "int"}),
        )


def _number(value: float) -> dg.MetadataValue[Any]:
    return dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(value)


def lag_metadata(backlog: Backlog) -> dict[str, dg.MetadataValue[Any]]:
    """How much is pending, and how old the oldest of it is."""
    return {
        "lag_events": dg.MetadataValue.int(backlog.events),
        "lag_age_seconds": dg.MetadataValue.float(round(backlog.age_s, 3)),
    }


def _batches_table(reports: Iterable[BatchReport]) -> dg.TableMetadataValue:
    columns = {
        "batch_id": "string",
        "reason": "string",
        "attempt": "int",
        "events": "int",
        "emitted": "int",
        "dead_letters": "int",
    }
    rows = [
        dg.TableRecord(
            {**{name: getattr(report, name) for name in columns}, "milliseconds": round(report.seconds * 1000, 1)}
        )
        for report in reports
    ]
    return dg.MetadataValue.table(rows, schema=_schema(columns | {"milliseconds": "float"}))


def _schema(columns: Mapping[str, str]) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(name, kind) for name, kind in columns.items()])
