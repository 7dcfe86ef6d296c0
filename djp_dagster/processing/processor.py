"""`Processor`: steps 2 to 8 of the protocol, for one batch at a time of one consumer under a lease."""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.claim_check.serializers import store_value
from djp_dagster.errors import (
    DeadlineOvertakenError,
    DjpError,
    FencedError,
    PoisonBlockedError,
    RedriveFailedError,
    RetriesExhaustedError,
    StateMismatchError,
    SystemicFailureError,
)
from djp_dagster.processing.batch import Batch, read_ranges
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.cutting import nth_position, prefix
from djp_dagster.processing.effects import Effects, EmitScope, Position
from djp_dagster.processing.failures import OUTAGES, describe
from djp_dagster.state.store import Change, TaskState, TaskStore
from djp_dagster.streams.contracts import (
    PROCESS_DIED,
    Commit,
    DeadLetter,
    Intent,
    Lease,
    NewDeadLetter,
    PayloadRef,
    Poison,
    Probe,
    Range,
)
from djp_dagster.streams.records import (
    CODEC_CHANGES,
    EncodedBatch,
    Origin,
    Record,
    TopicPartition,
    Undecodable,
    decode_one,
    encode_changes,
    raw_records,
)
from djp_dagster.streams.sql.groups import changelog_of
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)
_replace = msgspec.structs.replace
_DIED = "the process died handling it"


class BatchReport(msgspec.Struct, frozen=True):
    """What a committed batch did, for logs, metadata and metrics.

    Attributes:
        seconds: from the start of its last attempt to its commit.
        handler_seconds, commit_seconds: the parts of that.
    """

    batch_id: str
    group: str
    kind: str
    reason: str
    attempt: int
    ranges: tuple[Range, ...]
    events: int
    emitted: int
    dead_letters: int
    state_changes: int
    deadlines: int
    output: PayloadRef | None
    seconds: float
    handler_seconds: float
    commit_seconds: float


class _Attempt(msgspec.Struct):
    """One successful run of the handler, ready to commit."""

    effects: Effects
    emits: tuple[EncodedBatch, ...]
    changes: list[Change]
    value: Any
    undecodable: Mapping[Position, Undecodable]


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
        self._stream, self._consumer = stream, consumer
        self._coordinator, self._log = stream.coordinator, stream.log
        self._resources = consumer.resources_from(resources or {})
        self._state_folder = state_folder
        self._stop = stop if stop is not None else threading.Event()
        self._patience_s = parse_seconds(patience, name="patience")
        self._away_since: float | None = None
        self._emit_topics = [stream.log.topic(topic.name) for topic in consumer.emits]
        self._input_topics = {topic.name: stream.log.topic(topic.name) for topic in consumer.topics}
        self._stores: dict[int, TaskStore] = {}
        self._scope = f"{stream.incarnation[:12]}/{consumer.group}"

    def close(self) -> None:
        """Release the local state files."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def drop_state(self, tasks: Sequence[int]) -> None:
        """Close the local state of tasks given away, so that whoever holds them next finds it free."""
        for task in tasks:
            store = self._stores.pop(task, None)
            if store is not None:
                store.close()

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
        if resumed:
            intent = self._resume(lease, intent)
        while True:
            try:
                if intent.probe is not None:
                    intent = self._search(lease, intent)
                return self._attempt(lease, intent)
            except OUTAGES as error:
                intent = self._after_outage(lease, intent, error)
            except DeadlineOvertakenError:
                intent = self._cut_longer(lease, intent)
            except _HandlerError as failure:
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
            self._coordinator.update(lease, _replace(intent, running=False, probe=_idle(intent.probe)))

    def _resume(self, lease: Lease, intent: Intent) -> Intent:
        intent = self._coordinator.resume(lease, intent.batch_id)
        reach("2.intent")
        self._pause((intent.not_before_micros - self._log.now_micros()) / 1e6)
        if intent.deaths < self._consumer.retry.max_attempts or intent.probe is not None:
            return intent
        return self._after_terminal(lease, intent, PROCESS_DIED, _DIED)

    def _after_outage(self, lease: Lease, intent: Intent, error: DjpError) -> Intent:
        """The next attempt after an outage, which is nobody's failure and nobody's death."""
        while True:
            try:
                self._wait_out(error)
            except OUTAGES:
                self._end_attempt(lease, intent)
                raise
            try:
                self._coordinator.update(lease, _replace(intent, running=False, probe=_idle(intent.probe)))
                return self._coordinator.resume(lease, intent.batch_id)
            except OUTAGES as again:
                error = again

    def _attempt(self, lease: Lease, intent: Intent) -> BatchReport:
        started = time.perf_counter()
        attempt = self._handle(lease, intent, intent.ranges, _skip(intent))
        handled = time.perf_counter()
        reach("4.handled")
        output = self._store_output(intent, attempt.value)
        reach("5.stored")
        commit = self._commit_of(lease, intent, attempt, output)
        committing = time.perf_counter()
        self._commit(commit)
        self._away_since = None
        reach("6.committed")
        self._apply(commit, attempt.changes)
        reach("7.applied")
        finished = time.perf_counter()
        return BatchReport(
            batch_id=intent.batch_id,
            group=intent.group,
            kind=intent.kind,
            reason=intent.reason,
            attempt=intent.attempt,
            ranges=intent.ranges,
            events=self._searchable(intent),
            emitted=attempt.effects.emitted,
            dead_letters=len(commit.dead_letters) + len(commit.redrive_failed),
            state_changes=len(attempt.changes),
            deadlines=len(commit.deadlines) + len(intent.deadlines),
            output=output,
            seconds=finished - started,
            handler_seconds=handled - started,
            commit_seconds=finished - committing,
        )

    # Steps 3 and 4: read and handle.

    def _handle(self, lease: Lease, intent: Intent, ranges: Sequence[Range], skip: frozenset[Position]) -> _Attempt:
        consumer = self._consumer
        effects = Effects(
            EmitScope(self._stream.incarnation, consumer.group, intent.batch_id),
            self._emit_topics,
            consumer.max_emit_bytes,
        )
        state = self._state_of(intent)
        letters = self._letters_of(intent)
        batch = Batch(
            intent,
            source=lambda: (
                _letter_records(letters, self._scope)
                if intent.kind == "redrive"
                else read_ranges(self._log, ranges, skip, self._scope)
            ),
            size=len(letters) or sum(part.end - part.start for part in ranges) - len(skip),
            effects=effects,
            topics=self._input_topics,
            fencing_token=max(lease.epochs[task] for task in intent.tasks),
            state=state,
            # A redrive that fails says nothing about what is pending.
            max_poison=len(letters) if intent.kind == "redrive" else consumer.max_poison,
            blocks=consumer.on_poison == "block" and intent.kind != "redrive",
        )
        reach("4.handling")
        try:
            value = self._call(batch, effects, state)
            emits = effects.encode_emits()
            changes = state.changes() if state is not None else []
        except Exception as error:
            if consumer.retry.judge(error) in ("outage", "fatal"):
                raise
            raise _HandlerError(error) from error
        return _Attempt(effects, emits, changes, value, batch.undecodable)

    def _call(self, batch: Batch, effects: Effects, state: TaskState | None) -> Any:
        consumer = self._consumer
        if consumer.isolate == "batch":
            return consumer.handler(batch, **self._resources)
        resources = {**self._resources, "batch": batch} if consumer.wants_batch else self._resources
        for record in batch:
            mark, state_mark = effects.mark(), state.mark() if state is not None else 0
            try:
                consumer.handler(record, **resources)
            except Exception as error:
                if consumer.retry.judge(error) != "terminal":
                    raise
                effects.undo(mark)
                if state is not None:
                    state.undo(state_mark)
                batch.fail(record, error)
                self._require_tolerable(batch, record, effects)
        return None

    def _require_tolerable(self, batch: Batch, record: Record, effects: Effects) -> None:
        poison = effects.failed[record.position]
        if batch.blocks:
            raise _blocked(self._consumer.group, poison)
        if len(effects.failed) > batch.max_poison:
            raise self._systemic(batch.id, len(effects.failed), poison.error_type, poison.error)

    def _state_of(self, intent: Intent) -> TaskState | None:
        if not self._consumer.stateful:
            return None
        (task,) = intent.tasks
        store = self._stores.get(task)
        if store is None:
            if self._state_folder is None:
                self._state_folder = Path(os.environ.get("DJP_STATE_FOLDER", ".djp/state"))
            path = self._state_folder / self._stream.incarnation[:12] / self._consumer.group / f"{task}.db"
            changelog = TopicPartition(changelog_of(self._consumer.group), task)
            store = self._stores[task] = TaskStore(path, self._log, changelog)
        store.catch_up()
        return TaskState(store)

    def _letters_of(self, intent: Intent) -> list[DeadLetter]:
        if intent.kind != "redrive":
            return []
        letters = self._coordinator.dead_letters_by_id(intent.group, intent.dead_letters)
        return [letter for letter in letters if letter.status == "pending"]

    # Failure: retry, search, or stop.

    def _after_failure(self, lease: Lease, intent: Intent, error: Exception) -> Intent:
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
            self._commit(Commit(lease.part(intent.tasks), intent, redrive_failed=failed, requests=intent.requests))
            raise RedriveFailedError(
                f"dead letters {list(intent.dead_letters)} of group {intent.group!r} failed again with {error_type}: "
                f"{error}; they stay pending",
                group=intent.group,
                ids=intent.dead_letters,
            )
        size = self._searchable(intent)
        if size == 0:
            self._end_attempt(lease, _replace(intent, poison=(), probe=None, deaths=0))
            raise self._systemic(intent.batch_id, len(intent.poison), error_type, error)
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
            probe=_idle(intent.probe),
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
        self._pause(pause_s)
        return self._coordinator.resume(lease, intent.batch_id)

    def _searchable(self, intent: Intent) -> int:
        """How many records of the batch are not known to be poison."""
        if intent.kind == "redrive":
            return len(intent.dead_letters)
        return sum(part.end - part.start for part in intent.ranges) - len(intent.poison)

    def _search(self, lease: Lease, intent: Intent) -> Intent:
        """Find the first failing record; the intent with it among the poison, ready for another run of the rest.

        A probe that fails with an exception is believed. One whose process died may have been killed for reasons of its
        own, so it only narrows the search: what it leads to is tried again until that, too, has died as often as the
        retry budget says, or is cleared.
        """
        probe = intent.probe
        assert probe is not None
        size, skip = self._searchable(intent), _skip(intent)
        while (step := _next_step(probe, self._consumer.retry.max_attempts)) is not None:
            probe, length = step
            intent = _replace(intent, probe=probe)
            self._coordinator.update(lease, intent)
            try:
                self._handle(lease, intent, prefix(intent.ranges, skip, length), _inside(intent, skip, length))
            except _HandlerError as failure:
                if self._consumer.retry.judge(failure.cause) == "transient":
                    raise
                probe = Probe(probe.good, length, None, *describe(failure.cause))
                continue
            if length < probe.bad:
                probe = _replace(probe, good=length, trying=None, died=0)
            elif length < size:
                probe = Probe(length, size, None, PROCESS_DIED, _DIED)  # a false trail; what fails lies behind it
            else:
                return self._without_probe(lease, intent)
        position = nth_position(intent.ranges, skip, probe.bad - 1)
        found = Poison(*position, probe.error_type, probe.error)
        if self._consumer.on_poison == "block":
            raise _blocked(intent.group, found)
        if len(intent.poison) >= self._consumer.max_poison:
            raise self._systemic(intent.batch_id, len(intent.poison), found.error_type, found.error)
        return self._without_probe(lease, _replace(intent, poison=(*intent.poison, found)))

    def _without_probe(self, lease: Lease, intent: Intent) -> Intent:
        intent = _replace(intent, probe=None, deaths=0)
        self._coordinator.update(lease, intent)
        return intent

    def _systemic(self, batch_id: str, count: int, error_type: str, error: str) -> SystemicFailureError:
        return SystemicFailureError(
            f"batch {batch_id} of group {self._consumer.group!r} fails beyond {count} poison records "
            f"(max_poison={self._consumer.max_poison}), last with {error_type}: {error}; nothing was dead-lettered. "
            "Fix the handler or what it depends on, or raise max_poison",
            batch_id=batch_id,
            group=self._consumer.group,
            error_type=error_type,
        )

    # Step 5: store the output.

    def _store_output(self, intent: Intent, value: Any) -> PayloadRef | None:
        if value is None:
            return None
        key = f"attempts/{intent.group}/{intent.batch_id}/{intent.attempt}/output"
        return store_value(self._stream.payloads, key, value)

    # Step 6: commit.

    def _commit_of(self, lease: Lease, intent: Intent, attempt: _Attempt, output: PayloadRef | None) -> Commit:
        poison = {found.position: found for found in intent.poison} | attempt.effects.failed
        redrive = intent.kind == "redrive"
        failed = {(found.topic, found.partition, found.offset): found for found in poison.values()}
        letters = self._letters_of(intent)
        return Commit(
            lease=lease.part(intent.tasks),
            intent=intent,
            emits=attempt.emits,
            changelog=self._changelog_of(intent, attempt.changes),
            output=output,
            dead_letters=() if redrive else tuple(self._dead_letter(found) for found in poison.values()),
            redriven=tuple(
                letter.id for letter in letters if (letter.topic, letter.partition, letter.offset) not in failed
            ),
            redrive_failed=tuple(
                (letter.id, found.error_type, found.error)
                for letter in letters
                if (found := failed.get((letter.topic, letter.partition, letter.offset))) is not None
            ),
            deadlines=attempt.effects.deadlines,
            requests=intent.requests,
        )

    def _changelog_of(self, intent: Intent, changes: list[Change]) -> tuple[tuple[EncodedBatch, int], ...]:
        if not changes:
            return ()
        (task,) = intent.tasks
        blob = encode_changes(changes)
        encoded = EncodedBatch(changelog_of(intent.group), task, len(changes), blob, CODEC_CHANGES)
        return ((encoded, self._stores[task].offset),)

    def _dead_letter(self, found: Poison) -> NewDeadLetter:
        at = TopicPartition(found.topic, found.partition)
        (stored,) = self._log.read(at, found.offset, end=found.offset + 1, max_bytes=1)
        raw = raw_records(stored)[found.offset - stored.base_offset]
        return NewDeadLetter(*found.position, stored.append_micros, raw, found.error_type, found.error)

    def _commit(self, commit: Commit) -> None:
        """Commit, and settle what an outage leaves open."""
        unclear = False
        while True:
            try:
                if unclear and self._coordinator.settle(commit):
                    return
                unclear = True
                self._coordinator.commit(commit)
            except OUTAGES as error:
                self._wait_out(error)
            else:
                return

    # Step 7: apply.

    def _apply(self, commit: Commit, changes: list[Change]) -> None:
        for encoded, offset in commit.changelog:
            try:
                self._stores[encoded.partition].apply(changes, offset, offset + encoded.count)
            except (StateMismatchError, sqlite3.Error) as error:
                # The commit stands; the local store is only a cache, and catches up when it is opened anew.
                _log.warning("local state is left behind: %s", error)
                self.drop_state([encoded.partition])

    def _cut_longer(self, lease: Lease, intent: Intent) -> Intent:
        """Grow the ranges to the inputs' current ends, so that nothing older than a fired deadline is left out."""
        topics = sorted({part.topic for part in intent.ranges})
        spans = self._log.spans(topics)
        ranges = tuple(_replace(part, end=spans[part.at].end) for part in intent.ranges)
        self._coordinator.update(lease, _replace(intent, ranges=ranges, running=False))
        return self._coordinator.resume(lease, intent.batch_id)

    def _wait_out(self, error: DjpError) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if self._stop.is_set() or now - self._away_since > self._patience_s:
            raise error
        _log.warning("waiting for the stream: %s", error)
        self._pause(0.5)

    def _pause(self, seconds: float) -> None:
        longest = 60.0  # a clock that went back must not make anybody wait for it
        if seconds > 0:
            self._stop.wait(min(seconds, longest))


class _HandlerError(Exception):
    """The handler failed, transiently or terminally; never leaves this module."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _idle(probe: Probe | None) -> Probe | None:
    return None if probe is None else _replace(probe, trying=None, died=0)


def _next_step(probe: Probe, budget: int) -> tuple[Probe, int] | None:
    """The next probe and the length of its prefix; None when ``bad - 1`` is the record at fault."""
    if probe.trying is not None and probe.trying < probe.bad:
        probe = Probe(probe.good, probe.trying, None, PROCESS_DIED, _DIED)
    if probe.bad - probe.good > 1:
        length = (probe.good + probe.bad) // 2
        return _replace(probe, trying=length, died=0), length
    if probe.error_type == PROCESS_DIED and probe.died < budget:
        return _replace(probe, trying=probe.bad), probe.bad
    return None


def _skip(intent: Intent) -> frozenset[Position]:
    return frozenset(found.position for found in intent.poison)


def _inside(intent: Intent, skip: frozenset[Position], length: int) -> frozenset[Position]:
    """The skipped positions inside the prefix of that length."""
    inside = prefix(intent.ranges, skip, length)
    return frozenset(
        position
        for position in skip
        for part in inside
        if (part.topic, part.partition) == position[:2] and part.start <= position[2] < part.end
    )


def _blocked(group: str, found: Poison) -> PoisonBlockedError:
    return PoisonBlockedError(
        f"group {group!r} stops at record {found.offset} of topic {found.topic!r} partition {found.partition}, which "
        f"fails with {found.error_type}: {found.error}; fix the handler, or skip the record with stream.seek",
        group=group,
        position=found.position,
    )


def _letter_records(letters: Sequence[DeadLetter], scope: str) -> Any:
    for letter in letters:
        origin = Origin(letter.topic, letter.partition, letter.append_micros, scope)
        record = decode_one(letter.raw, letter.offset, origin)
        yield ([], [record]) if isinstance(record, Undecodable) else ([record], [])
