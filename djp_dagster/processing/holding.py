"""`Holding`: what the holder of a lease does next: finish what is open, do what was asked for, else cut and go on."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast
from uuid import uuid4

from djp_dagster.errors import RedriveFailedError, StateLostError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.cutting import cut_aligned, cut_ranges, deadlines_within, divided, read_up_to
from djp_dagster.processing.processor import Processor
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.threshold import Threshold
from djp_dagster.streams.model import Deadline, Intent, Lease, Range, Request
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.stream import EventStream

_log = logging.getLogger(__name__)
_MAX_DEADLINES = 10_000
OnReport = Callable[[BatchReport], None]
OnBegin = Callable[[Intent], None]
Positions = dict[TopicPartition, int]


class Holding:
    """The leased tasks of one group, and where they stand.

    Between commits nobody else can move the group's offsets or deadlines, so they are read once and kept.
    """

    def __init__(
        self,
        stream: EventStream,
        consumer: Consumer,
        processor: Processor,
        lease: Lease,
        on_report: OnReport,
        on_begin: OnBegin,
    ) -> None:
        self._stream, self._consumer, self._processor = stream, consumer, processor
        self._coordinator, self._log = stream.coordinator, stream.log
        self._on_report, self._on_begin = on_report, on_begin
        self.lease = lease
        self._positions: Positions = {}
        self._next_due: int | None = None
        self._refresh()

    def _refresh(self) -> None:
        tasks = set(self.lease.epochs)
        found = self._coordinator.positions(self.lease.group)
        self._positions = {at: offset for at, offset in found.items() if at.partition in tasks}
        self._next_due = self._coordinator.next_deadline(self.lease.group, sorted(tasks))

    @property
    def positions(self) -> Mapping[TopicPartition, int]:
        """The committed offsets of the leased tasks."""
        return self._positions

    @property
    def next_due_micros(self) -> int | None:
        """When the next deadline of the leased tasks is due; None for a follower, whose deadlines await others."""
        return self._next_due if self._consumer.follows is None else None

    def finish_open(self) -> list[BatchReport]:
        """Do the batches found open when the lease was taken."""
        reports = []
        for intent in self.lease.intents:
            report = self._do(intent, resumed=True)
            if report is not None:
                reports.append(report)
        self.lease = self.lease.part(sorted(self.lease.epochs))
        return reports

    def next_batch(
        self,
        tasks: Sequence[int],
        *,
        bound: Threshold,
        reason: str,
        until: Mapping[TopicPartition, int] | None = None,
    ) -> BatchReport | None:
        """Cut a batch of ``tasks`` towards ``until`` (unless given, the ends as of now) and do it."""
        intent = self._cut(tasks, bound, reason, until)
        if intent is None:
            return None
        return self._begin(intent)

    def shares(
        self, bound: Threshold, sets: Sequence[Sequence[int]], until: Mapping[TopicPartition, int]
    ) -> list[Threshold]:
        """What each task set may take of ``bound``: in proportion to what is pending in it, one record at least."""
        pending = [
            sum(max(until.get(at, start) - start, 0) for at, start in self._positions.items() if at.partition in tasks)
            for tasks in sets
        ]
        if not any(pending):
            return [bound] * len(sets)  # for deadlines
        events, size = (
            [None] * len(sets) if limit is None else [max(share, 1) for share in divided(limit, pending)]
            for limit in (bound.max_events, bound.max_bytes)
        )
        return [Threshold(events=some, bytes=much) for some, much in zip(events, size, strict=True)]

    def _begin(self, intent: Intent) -> BatchReport | None:
        """Write the intent of a new batch down, and do it."""
        self._processor.begin(self.lease, intent)
        reach("2.intent")
        return self._do(intent, resumed=False)

    def _cut(
        self, tasks: Sequence[int], bound: Threshold, reason: str, until: Mapping[TopicPartition, int] | None
    ) -> Intent | None:
        wanted = set(tasks)
        positions = {at: offset for at, offset in self._positions.items() if at.partition in wanted}
        if until is None:
            until = self._consumer.ends(self._stream)
        if self._consumer.aligned:
            ranges, horizon = cut_aligned(
                self._log, positions, until, bound, follows=self._consumer.follows is not None
            )
        else:
            ranges, horizon = cut_ranges(self._log, positions, until, bound), 0
        now = present = self._log.now_micros()
        fired: tuple[Deadline, ...] = ()
        if self._next_due is not None and self._next_due <= now:
            present = self._consumer.present(self._stream, wanted, now)
            due = self._coordinator.due_deadlines(self.lease.group, sorted(wanted), present, _MAX_DEADLINES)
            fired = deadlines_within(self._log, due, positions, ranges)
        if fired and len(wanted) == 1:
            # Whoever swept by deadlines one by one would need a batch for each; this says how far all is read.
            unread = read_up_to(self._log, positions, ranges)
            horizon = max(horizon, now if unread is None else min(now, unread - 1))
            horizon = horizon if present == now else min(horizon, present)
        if not ranges and not fired:
            return None
        return Intent(
            batch_id=uuid4().hex,
            group=self.lease.group,
            kind="cut",
            tasks=tuple(sorted(wanted)),
            ranges=_with_empty(ranges, positions, wanted if horizon else {deadline.task for deadline in fired}),
            reason=reason if ranges else "deadline",
            now_micros=now,
            deadlines=fired,
            horizon_micros=horizon,
        )

    def _do(self, intent: Intent, *, resumed: bool) -> BatchReport | None:
        self._on_begin(intent)
        try:
            report = self._processor.process(self.lease, intent, resumed=resumed)
        except RedriveFailedError as error:
            _log.warning("%s", error)
            return None
        if intent.kind == "cut":
            # A batch may have been cut longer than the intent said when it was found.
            self._positions.update({part.at: part.end for part in report.ranges})
        if report.deadlines:
            self._next_due = self._coordinator.next_deadline(self.lease.group, sorted(self.lease.epochs))
        self._on_report(report)
        reach("8.reported")
        if self._consumer.stateful:
            self._processor.snapshot_if_due(self.lease, intent.tasks)
        return report

    def do_requests(self) -> list[BatchReport]:
        """Do the open requests that concern the leased tasks."""
        reports = []
        for request in self._coordinator.requests(self.lease.group):
            if request.kind == "redrive" and request.body.get("task") in self.lease.epochs:
                reports.extend(self._redrive(request))
            elif request.kind == "cut":
                reports.extend(self._cut_as_asked(request))
            elif request.kind == "command" and request.body.get("task") in self.lease.epochs:
                reports.extend(self._do_as_asked(request))
        return reports

    def _redrive(self, request: Request) -> list[BatchReport]:
        reports = []
        ids = cast(Sequence[int], request.body["ids"])
        before = dict(zip(ids, cast(Sequence[int], request.body["redrives"]), strict=True))
        # What is done, discarded, or was tried for this request by a holder that is gone, is left alone.
        letters = [
            letter
            for letter in self._coordinator.dead_letters_by_id(self.lease.group, ids)
            if letter.status == "pending" and letter.redrives == before[letter.id]
        ]
        for letter in letters:
            # One at a time: what fails again must not take others with it.
            intent = Intent(
                batch_id=uuid4().hex,
                group=self.lease.group,
                kind="redrive",
                tasks=(cast(int, request.body["task"]),),
                ranges=(),
                reason="redrive",
                now_micros=self._log.now_micros(),
                dead_letters=(letter.id,),
                requests=(request.id,) if letter is letters[-1] else (),
            )
            report = self._begin(intent)
            if report is not None:
                reports.append(report)
        if not letters:
            self._coordinator.finish_request(self.lease, request.id, "done")
        return reports

    def _do_as_asked(self, request: Request) -> list[BatchReport]:
        try:
            return self.do_command(request.body, requests=(request.id,))
        except StateLostError as error:
            self._coordinator.finish_request(self.lease, request.id, f"failed: {error}")
            return []

    def do_command(self, command: Mapping[str, object], *, requests: tuple[int, ...] = ()) -> list[BatchReport]:
        """A batch without records: what the command says is done to the task it names."""
        task = cast(int, command["task"])
        positions = {at: offset for at, offset in self._positions.items() if at.partition == task}
        if command["kind"] == "rebuild":
            self._require_history(positions)
        intent = Intent(
            batch_id=uuid4().hex,
            group=self.lease.group,
            kind="cut",
            tasks=(task,),
            ranges=_with_empty((), positions, {task}),
            reason=str(command["kind"]),
            now_micros=self._log.now_micros(),
            command=command,
            requests=requests,
        )
        report = self._begin(intent)
        return [] if report is None else [report]

    def _require_history(self, positions: Positions) -> None:
        spans = self._log.spans([at.topic for at in positions])
        for at in positions:
            if spans[at].begin > 0:
                raise StateLostError(
                    f"table {self.lease.group!r} cannot be made anew from {at.topic!r} partition {at.partition}: "
                    f"retention has removed what was before offset {spans[at].begin}; the table itself is kept",
                    topic=at.topic,
                    partition=at.partition,
                    begin=spans[at].begin,
                )

    def _cut_as_asked(self, request: Request) -> list[BatchReport]:
        reports = []
        asked = cast(Sequence[tuple[str, int, int]], request.body["until"])
        until = {TopicPartition(topic, partition): end for topic, partition, end in asked}
        if set(until) - set(self._positions):
            return []  # some of it is somebody else's; a request names partitions of one holder
        for tasks in task_sets(self._consumer, sorted({at.partition for at in until})):
            while report := self.next_batch(tasks, bound=self._consumer.max_batch, reason="requested", until=until):
                reports.append(report)
        self._coordinator.finish_request(self.lease, request.id, "done")
        return reports


def task_sets(consumer: Consumer, tasks: Sequence[int]) -> list[tuple[int, ...]]:
    """The task sets of a run's batches: all tasks at once, or one by one where state belongs to a task."""
    return [(task,) for task in tasks] if consumer.stateful else [tuple(tasks)]


def _with_empty(ranges: Sequence[Range], positions: Mapping[TopicPartition, int], tasks: set[int]) -> tuple[Range, ...]:
    """The ranges, and an empty one for every other input of ``tasks``, so that the commit looks at all their inputs."""
    covered = {part.at for part in ranges}
    empty = [
        Range(at.topic, at.partition, offset, offset)
        for at, offset in positions.items()
        if at.partition in tasks and at not in covered
    ]
    return (*ranges, *empty)
