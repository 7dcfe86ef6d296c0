"""`run_pending`: run mode. Lease all tasks, do what is pending up to the ends seen at the start, and stop."""

import logging
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import LeaseBusyError, TransientError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.holding import Holding, OnBegin, OnReport, task_sets
from djp_dagster.processing.leases import DEFAULT_LEASE_S, LeaseKeeper, new_owner
from djp_dagster.processing.processor import Processor
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.threshold import Threshold
from djp_dagster.streams.model import Intent, Lease
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)


class RunReport(msgspec.Struct, frozen=True):
    """What a run did.

    Attributes:
        batches: its committed batches, in order.
        waited_for: who held the group meanwhile and did the work, if somebody else did.
    """

    batches: tuple[BatchReport, ...]
    waited_for: str | None = None

    @property
    def events(self) -> int:
        """Records in all batches."""
        return sum(batch.events for batch in self.batches)


def run_pending(
    stream: EventStream,
    consumer: Consumer,
    *,
    threshold: Threshold | None = None,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "10min",
    lease: Duration = DEFAULT_LEASE_S,
    stop: threading.Event | None = None,
    on_report: OnReport | None = None,
    on_begin: OnBegin | None = None,
    owner: str | None = None,
    only_requests: bool = False,
) -> RunReport:
    """Do what is pending for the consumer, up to the ends seen now, and return.

    If somebody else holds the group, wait for them; if they did the work meanwhile, that is success.

    Args:
        stream: the stream; topics and group are created when missing.
        consumer: what to do.
        threshold: only what reaches it, in batches of that size, which the tasks of a stateful group share; a remainder
            stays pending. Everything unless given.
        resources: the handler's further parameters.
        state_folder: where local state lies (``$DJP_STATE_FOLDER``, else ``.djp/state``).
        wait: how long to wait for another holder.
        lease: how long a lease lives without a heartbeat.
        stop: set it to end after the batch under way.
        on_report: called after each commit.
        on_begin: called with each batch before it is read.
        owner: a name for the holder, for whoever looks.
        only_requests: do what was asked for (redrives, cuts) and finish open batches, but cut nothing new.

    Raises:
        LeaseBusyError: another holder kept the group for longer than ``wait``.
        RetriesExhaustedError, SystemicFailureError, PoisonBlockedError: see `Processor.process`; what was committed
            before has been reported.
    """
    consumer.register(stream)
    stop = stop if stop is not None else threading.Event()
    reports: list[BatchReport] = []

    def keep(report: BatchReport) -> None:
        reports.append(report)
        if on_report is not None:
            on_report(report)

    until = consumer.ends(stream)
    keeper = LeaseKeeper(stream.coordinator, owner=new_owner(owner), ttl_s=parse_seconds(lease, name="lease"))
    processor = Processor(stream, consumer, resources=resources, state_folder=state_folder, stop=stop)
    with closing(processor), keeper:
        # There, wanting no share of workers' tasks: who waits or works here can be told from who has died.
        keeper.join(consumer.group, paused=True)
        asked = None if only_requests else until
        held = _lease_all(stream, consumer, keeper, asked, parse_seconds(wait, name="wait"), stop)
        if isinstance(held, str):
            return RunReport((), waited_for=held)
        reach("1.leased")
        holding = Holding(stream, consumer, processor, held, keep, on_begin or _ignore)
        holding.finish_open()
        holding.do_requests()
        if only_requests:
            return RunReport(tuple(reports))
        _cut_while_due(stream, consumer, threshold, holding, until, stop)
    tidy(stream)
    return RunReport(tuple(reports))


def _cut_while_due(
    stream: EventStream,
    consumer: Consumer,
    threshold: Threshold | None,
    holding: Holding,
    until: Mapping[TopicPartition, int],
    stop: threading.Event,
) -> None:
    """Cut and do batches, round by round: what is due now, shared out among the task sets."""
    sets = task_sets(consumer, sorted(holding.lease.epochs))
    fired: str | None = None
    while not stop.is_set():
        reason, bound = _due(stream, consumer, threshold, holding)
        if reason in ("age", "idle"):
            fired = reason  # then all of it is due, up to the ends seen, though what is left is younger
        reason = reason or fired
        if reason is None:
            return
        # A threshold is the group's. What reaches it is each task's share, not only that of whose turn is first.
        shared = threshold is not None and fired is None and len(sets) > 1
        bounds = holding.shares(bound, sets, until) if shared else [bound] * len(sets)
        done = [
            holding.next_batch(tasks, bound=share, reason=reason, until=until)
            for tasks, share in zip(sets, bounds, strict=True)
            if not stop.is_set()
        ]
        if not any(done):
            return


def _ignore(intent: Intent) -> None:
    """Nobody wants to know."""


def tidy(stream: EventStream) -> None:
    """Apply retention; if the stream is busy or away, whoever comes next will."""
    try:
        stream.apply_retention()
    except TransientError as error:
        _log.info("retention is left to the next: %s", error)


def _due(
    stream: EventStream, consumer: Consumer, threshold: Threshold | None, holding: Holding
) -> tuple[str | None, Threshold]:
    """Why a batch is cut now (None: it is not), and its bound."""
    if threshold is None:
        return "pending", consumer.max_batch
    reason = threshold.reached(stream.pending(consumer.group))
    if reason is None and holding.next_due_micros is not None and holding.next_due_micros <= stream.log.now_micros():
        reason = "deadline"  # it cannot fire before what was appended earlier is handled
    bounded = threshold.max_bytes is not None or threshold.max_events is not None
    return reason, threshold if bounded else consumer.max_batch


def _lease_all(
    stream: EventStream,
    consumer: Consumer,
    keeper: LeaseKeeper,
    until: Mapping[TopicPartition, int] | None,
    wait_s: float,
    stop: threading.Event,
) -> Lease | str:
    """The lease of all tasks; or who held them and did everything up to ``until`` (None: nobody can have)."""
    give_up = time.monotonic() + wait_s
    pause_s = 0.02
    while True:
        try:
            return keeper.acquire(consumer.group)
        except LeaseBusyError as busy:
            if until is not None and _is_done(stream, consumer, until):
                _log.info("%s has done the work", busy.facts["holder"])
                return str(busy.facts["holder"])
            if time.monotonic() >= give_up or stop.is_set():
                raise
        stop.wait(pause_s)
        pause_s = min(pause_s * 1.5, 0.5)


def _is_done(stream: EventStream, consumer: Consumer, until: Mapping[TopicPartition, int]) -> bool:
    committed = stream.positions(consumer.group)
    return all(committed[at] >= end for at, end in until.items())
