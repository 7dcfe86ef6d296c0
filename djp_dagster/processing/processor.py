"""`Processor`: steps 2 to 8 of the protocol, for one batch at a time of one consumer under a lease."""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import (
    DeadlineOvertakenError,
    DjpError,
    FencedError,
    PoisonBlockedError,
    RedriveFailedError,
    RetriesExhaustedError,
    SystemicFailureError,
    TransientError,
)
from djp_dagster.processing.committing import Committer
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.failures import OUTAGES, HandlerError, Patience, describe, systemic
from djp_dagster.processing.handling import Handling
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.search import DIED, find_poison, idle, poison_of, searchable
from djp_dagster.state.stores import TaskStores
from djp_dagster.streams.model import PROCESS_DIED, Commit, Intent, Lease, Probe
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration

_log = logging.getLogger(__name__)
_replace = msgspec.structs.replace


class Processor:
    """Does batches of one consumer. Not thread-safe: one per thread.

    Args:
        stream: where everything lies.
        consumer: what to do.
        resources: the handler's further parameters, by name.
        state_folder: where local state lies; needed by stateful consumers.
        stop: set by whoever wants waiting to end early.
        patience: how long an outage of the stream is waited for.
    """

    def __init__(
        self,
        stream: EventStream,
        consumer: Consumer,
        *,
        resources: Mapping[str, Any] | None = None,
        state_folder: Path | None = None,
        stop: threading.Event | None = None,
        patience: Duration = "10min",
    ) -> None:
        self._coordinator, self._log, self._consumer = stream.coordinator, stream.log, consumer
        self._stores = TaskStores(stream, consumer.group, state_folder, consumer.snapshots)
        self._patience = Patience(stop if stop is not None else threading.Event(), patience)
        self._handling = Handling(stream, consumer, resources or {}, self._stores, state_folder)
        self._committer = Committer(stream, self._stores, self._patience)

    def close(self) -> None:
        """Release the local state files."""
        self._handling.close()
        self._stores.close()

    def drop_state(self, tasks: Sequence[int]) -> None:
        """Close the local state of tasks given away, so that whoever holds them next finds it free."""
        self._stores.drop(tasks)

    def snapshot_if_due(self, lease: Lease, tasks: Sequence[int]) -> None:
        """Take snapshots of the state of those tasks for which they are due.

        Raises:
            FencedError: the lease was lost.
        """
        self._stores.snapshot_if_due(lease, tasks)

    def process(self, lease: Lease, intent: Intent, *, resumed: bool) -> BatchReport:
        """Do the batch: attempt it until it is committed.

        Args:
            lease: covers the intent's tasks.
            intent: an open one, or one just begun.
            resumed: it was found open, so its next attempt must be begun first.

        Raises:
            FencedError: the lease was lost; whoever holds it now continues.
            RetriesExhaustedError: transient failures used up the retry budget; the offsets stay.
            SystemicFailureError, PoisonBlockedError: nothing was dead-lettered; the offsets stay.
        """
        while True:
            try:
                if resumed:
                    intent = self._coordinator.resume(lease, intent.batch_id)
                    resumed = False
                    intent = self._resumed(lease, intent)
                if intent.probe is None:
                    return self._attempt(lease, intent)
                found = find_poison(self._coordinator, self._consumer, self._handling, lease, intent)
                intent, before = found, intent
                _require_finding(before, found)
            except OUTAGES as error:
                intent, resumed = self._after_outage(lease, intent, error), False
            except DeadlineOvertakenError:
                intent = self._cut_longer(lease, intent)
            except HandlerError as failure:
                try:
                    intent = self._after_failure(lease, intent, failure.cause)
                except OUTAGES as error:
                    intent = self._after_outage(lease, intent, error)
            except (SystemicFailureError, PoisonBlockedError):
                # Forget what was found: after a fix the whole batch is tried again.
                self._end_attempt(lease, _replace(intent, poison=(), probe=None, deaths=0))
                raise
            except BaseException:
                # Told to stop, not killed: the next holder need not count a death.
                self._end_attempt(lease, intent)
                raise

    def _end_attempt(self, lease: Lease, intent: Intent) -> None:
        with contextlib.suppress(FencedError, *OUTAGES):
            self._coordinator.update(lease, _replace(intent, running=False, probe=idle(intent.probe)))

    def begin(self, lease: Lease, intent: Intent) -> None:
        """Write a new intent down, once, whatever becomes of the connection meanwhile.

        Raises:
            FencedError: the lease was lost.
        """
        unclear = False
        while True:
            try:
                if not (unclear and self._is_written(lease, intent)):
                    unclear = True
                    self._coordinator.begin(lease, intent)
            except OUTAGES as error:
                self._patience.wait_out(error)
            else:
                self._patience.came_back()
                return

    def _is_written(self, lease: Lease, intent: Intent) -> bool:
        try:
            self._coordinator.update(lease, intent)
        except FencedError:
            return False  # not there, or not ours: beginning it tells
        return True

    def _resumed(self, lease: Lease, intent: Intent) -> Intent:
        reach("2.intent")
        self._patience.pause((intent.not_before_micros - self._log.now_micros()) / 1e6)
        if intent.deaths < self._consumer.retry.max_attempts or intent.probe is not None:
            return intent
        return self._after_terminal(lease, intent, PROCESS_DIED, DIED)

    def _after_outage(self, lease: Lease, intent: Intent, error: DjpError) -> Intent:
        """The next attempt after an outage, which is nobody's failure and nobody's death."""
        while True:
            try:
                self._patience.wait_out(error)
            except OUTAGES:
                self._end_attempt(lease, intent)
                raise
            try:
                self._coordinator.update(lease, _replace(intent, running=False, probe=idle(intent.probe)))
                intent = self._coordinator.resume(lease, intent.batch_id)
            except OUTAGES as again:
                error = again
            else:
                return intent

    def _attempt(self, lease: Lease, intent: Intent) -> BatchReport:
        started = time.perf_counter()
        attempt = self._handling.run(lease, intent, intent.ranges, poison_of(intent))
        handled = time.perf_counter()
        reach("4.handled")
        output = self._committer.store_output(intent, attempt.value)
        reach("5.stored")
        commit = self._committer.prepare(lease, intent, attempt, output)
        committing = time.perf_counter()
        self._committer.commit(commit)
        reach("6.committed")
        self._committer.apply(commit, attempt.changes)
        self._handling.add_figures(attempt.effects)
        reach("7.applied")
        finished = time.perf_counter()
        return BatchReport(
            batch_id=intent.batch_id,
            group=intent.group,
            kind=intent.kind,
            reason=intent.reason,
            attempt=intent.attempt,
            ranges=intent.ranges,
            events=searchable(intent),
            bytes=attempt.bytes,
            emitted=attempt.effects.emitted,
            dead_letters=len(commit.dead_letters) + len(commit.redrive_failed),
            state_changes=len(attempt.changes),
            deadlines=len(commit.deadlines) + len(intent.deadlines),
            output=output,
            seconds=finished - started,
            handler_seconds=handled - started,
            commit_seconds=finished - committing,
            counts=attempt.effects.counts,
            gauges=attempt.effects.gauges,
            per_task=frozenset(attempt.effects.per_task),
        )

    def _after_failure(self, lease: Lease, intent: Intent, error: Exception) -> Intent:
        _log.warning(
            "handler %s failed on batch %s, attempt %d", intent.group, intent.batch_id, intent.attempt, exc_info=error
        )
        if self._consumer.retry.judge(error) == "transient":
            return self._retry(lease, intent, error)
        try:
            return self._after_terminal(lease, intent, *describe(error))
        except DjpError as stop:
            raise stop from error

    def _after_terminal(self, lease: Lease, intent: Intent, error_type: str, error: str) -> Intent:
        """Begin the search for the record at fault, or stop if no record can be."""
        if intent.kind == "redrive":
            failed = tuple((number, error_type, error) for number in intent.dead_letters)
            commit = Commit(lease.part(intent.tasks), intent, redrive_failed=failed, requests=intent.requests)
            self._committer.commit(commit)
            raise RedriveFailedError(
                f"dead letters {list(intent.dead_letters)} of group {intent.group!r} failed again with {error_type}: "
                f"{error}; they stay pending",
                group=intent.group,
                ids=intent.dead_letters,
            )
        size = searchable(intent)
        if size == 0:
            self._end_attempt(lease, _replace(intent, poison=(), probe=None, deaths=0))
            raise systemic(
                intent.group, self._consumer.max_poison, intent.batch_id, len(intent.poison), error_type, error
            )
        return _replace(intent, probe=Probe(0, size, None, error_type, error))

    def _retry(self, lease: Lease, intent: Intent, error: Exception) -> Intent:
        policy = self._consumer.retry
        failures = intent.failures + 1
        pause_s = policy.pause_s(failures)
        exhausted = failures >= policy.max_attempts
        _log.warning(
            "batch %s of group %s failed (%d of %d): %s",
            intent.batch_id,
            intent.group,
            failures,
            policy.max_attempts,
            type(error).__name__,
        )
        ended = _replace(
            intent,
            running=False,
            # The next run starts with a fresh budget: nothing says that the cause is in the data.
            failures=0 if exhausted else failures,
            probe=idle(intent.probe),
            not_before_micros=self._log.now_micros() + round(pause_s * 1e6),
        )
        self._coordinator.update(lease, ended)
        if exhausted:
            raise RetriesExhaustedError(
                f"batch {intent.batch_id} of group {intent.group!r} failed {failures} times in a row, last with "
                f"{type(error).__name__}: {error}; its offsets stay and the next run tries again",
                batch_id=intent.batch_id,
                group=intent.group,
                failures=failures,
            ) from error
        self._patience.pause(pause_s)
        return self._coordinator.resume(lease, intent.batch_id)

    def _cut_longer(self, lease: Lease, intent: Intent) -> Intent:
        """Grow the ranges as far as records are not younger than what the batch has promised to hold."""
        latest = max((deadline.due_micros for deadline in intent.deadlines), default=0)
        latest = max(latest, intent.horizon_micros)
        ranges = tuple(
            _replace(part, end=max(part.end, self._log.offset_at(part.at, latest + 1))) for part in intent.ranges
        )
        self._coordinator.update(lease, _replace(intent, ranges=ranges, running=False))
        return self._coordinator.resume(lease, intent.batch_id)


def _require_finding(before: Intent, found: Intent) -> None:
    """A search begun by an exception must have found a record to blame; else whatever failed is not in the data."""
    probe = before.probe
    if probe is None or probe.error_type == PROCESS_DIED or len(found.poison) > len(before.poison):
        return
    raise HandlerError(
        TransientError(f"it failed with {probe.error_type} ({probe.error}), but no part of it failed again")
    )
