"""What a tick finds out: whether a run is due for a consumer, and why. Reads the stream only; writes nothing.

Its cost does not depend on how much is pending, nor on how many runs there have been.
"""

import hashlib
from typing import NamedTuple

from djp_dagster.errors import UnknownGroupError, UnknownTopicError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.threshold import Threshold
from djp_dagster.streams.model import Backlog, TaskInfo
from djp_dagster.streams.stream import EventStream

_MUST_BEGIN = "the group must begin before what it is to handle is appended"


class Look(NamedTuple):
    """What a tick saw of a group.

    Attributes:
        reason: why a run is due; None if it is not.
        why_not: what to tell if it is not.
        holder: who holds every task; a run could only wait for it.
        digest: what has been done and asked for, as a text that changes with every commit, but not with a run that
            leased, failed and left everything as it was.
    """

    reason: str | None
    why_not: str
    holder: str | None = None
    digest: str = ""


def look(stream: EventStream, consumer: Consumer, threshold: Threshold | None = None) -> Look:
    """Whether a run of ``consumer`` is due now.

    Args:
        stream: where to look.
        consumer: whose group to look at.
        threshold: how much must have piled up; anything unless given.
    """
    group = consumer.group
    try:
        tasks = stream.coordinator.tasks(group)
    except UnknownGroupError:
        return _first_look(stream, consumer, threshold)
    pending = stream.coordinator.pending(group)
    reason = _reason(stream, group, tasks, pending, threshold)
    if reason is None:
        return Look(None, _waiting_for(pending, threshold))
    holders = {task.owner for task in tasks if not task.worth_asking}
    held_by = sorted(holder for holder in holders if holder is not None)
    all_held = bool(tasks) and all(not task.worth_asking for task in tasks)
    return Look(reason, "", ", ".join(held_by) if all_held else None, _digest(stream, consumer, tasks))


def _reason(
    stream: EventStream, group: str, tasks: list[TaskInfo], pending: Backlog, threshold: Threshold | None
) -> str | None:
    if threshold is None and pending.events:
        return f"{pending.events} events pending"
    if threshold is not None and (reached := threshold.reached(pending)) is not None:
        return f"{reached} reached: {_size(pending)}"
    due = stream.coordinator.next_deadline(group, [task.task for task in tasks])
    if due is not None and due <= pending.now_micros:
        return "a deadline is due"
    if stream.coordinator.requests(group):
        return "requests are open"
    return "a batch was left open" if threshold is not None and stream.coordinator.intents(group) else None


def _first_look(stream: EventStream, consumer: Consumer, threshold: Threshold | None) -> Look:
    """Before the group exists: its first run creates it, at its start position."""
    try:
        spans = stream.log.spans([topic.name for topic in consumer.topics])
    except UnknownTopicError as error:
        if consumer.start != "earliest":
            return Look(_MUST_BEGIN, "", None, _first_digest(stream, consumer))
        return Look(None, f"nothing was published yet: topic {error.facts.get('topic')!r} does not exist")
    backlog = stream.log.backlog({at: span.begin for at, span in spans.items()})
    if threshold is not None and consumer.start == "earliest":
        reached = threshold.reached(backlog)
        reason = None if reached is None else f"{reached} reached: {_size(backlog)}"
    elif consumer.start == "earliest":
        reason = "first events" if backlog.events else None
    else:
        reason = _MUST_BEGIN
    return Look(reason, _waiting_for(backlog, threshold), None, _first_digest(stream, consumer))


def _first_digest(stream: EventStream, consumer: Consumer) -> str:
    return _hash(stream.incarnation, consumer.group, consumer.code_version)


def _waiting_for(pending: Backlog, threshold: Threshold | None) -> str:
    if pending.events == 0:
        return "nothing is pending"
    return f"{_size(pending)} pending; waiting for {describe_threshold(threshold)}"


def _size(pending: Backlog) -> str:
    size = "" if pending.bytes is None else f" of {pending.bytes / 1e6:.1f} MB"
    return f"{pending.events} events{size}, the oldest {pending.age_s:.0f} s old"


def describe_threshold(threshold: Threshold | None) -> str:
    """The threshold in words."""
    if threshold is None:
        return "any"
    limits = {"bytes": threshold.bytes, "events": threshold.events, "age": threshold.age, "idle": threshold.idle}
    return " or ".join(f"{name} {limit}" for name, limit in limits.items() if limit is not None)


def _digest(stream: EventStream, consumer: Consumer, tasks: list[TaskInfo]) -> str:
    group = consumer.group
    positions = sorted(stream.positions(group).items())
    # Positions alone come back after a seek.
    commits = [task.last_batch for task in tasks]
    asked = [request.id for request in stream.coordinator.requests(group)]
    due = stream.coordinator.next_deadline(group, [task.task for task in tasks])
    # What the search for a poison record has learnt is progress, too, though it costs a run's life each time.
    learnt = [(one.batch_id, one.deaths, one.probe, one.poison) for one in stream.coordinator.intents(group)]
    # New code may do better at once.
    return _hash(stream.incarnation, group, consumer.code_version, positions, commits, asked, due, learnt)


def _hash(*seen: object) -> str:
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
