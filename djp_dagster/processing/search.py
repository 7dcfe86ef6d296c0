"""The search for the first failing record of a batch, by probes that are written down before they start."""

import msgspec

from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.cutting import nth_position, prefix
from djp_dagster.processing.effects import Position
from djp_dagster.processing.failures import HandlerError, blocked, describe, systemic
from djp_dagster.processing.handling import Handling
from djp_dagster.streams.contracts import Coordinator
from djp_dagster.streams.model import PROCESS_DIED, Intent, Lease, Poison, Probe

_replace = msgspec.structs.replace
DIED = "the process died handling it"


def searchable(intent: Intent) -> int:
    """How many records of the batch are not known to be poison."""
    if intent.kind == "redrive":
        return len(intent.dead_letters)
    return sum(part.end - part.start for part in intent.ranges) - len(intent.poison)


def poison_of(intent: Intent) -> frozenset[Position]:
    """The positions known to be poison."""
    return frozenset(found.position for found in intent.poison)


def idle(probe: Probe | None) -> Probe | None:
    """The probe with nothing under way: its process has said how it ended."""
    return None if probe is None else _replace(probe, trying=None, died=0)


def find_poison(
    coordinator: Coordinator, consumer: Consumer, handling: Handling, lease: Lease, intent: Intent
) -> Intent:
    """Find the first failing record; the intent with it among the poison, ready for another run of the rest.

    A probe that fails with an exception is believed. One whose process died may have been killed for reasons of its
    own, so it only narrows the search: what it leads to is tried again until that, too, has died as often as the retry
    budget says, or is cleared. If nothing fails again, the intent comes back without a probe and without new poison.

    Raises:
        HandlerError: a probe failed transiently.
        PoisonBlockedError, SystemicFailureError: the record must not be skipped.
    """
    probe = intent.probe
    assert probe is not None
    size, skip = searchable(intent), poison_of(intent)
    while (step := _next_step(probe, consumer.retry.max_attempts)) is not None:
        probe, length = step
        intent = _replace(intent, probe=probe)
        coordinator.update(lease, intent)
        try:
            handling.run(lease, intent, prefix(intent.ranges, skip, length), _inside(intent, skip, length))
        except HandlerError as failure:
            if consumer.retry.judge(failure.cause) == "transient":
                raise
            probe = Probe(probe.good, length, None, *describe(failure.cause), observed=True)
            continue
        if length < probe.bad:
            probe = _replace(probe, good=length, trying=None, died=0)
        elif length < size:
            probe = Probe(length, size, None, PROCESS_DIED, DIED)  # a false trail; what fails lies behind it
        else:
            return _found(coordinator, lease, intent)
    position = nth_position(intent.ranges, skip, probe.bad - 1)
    poison = Poison(*position, probe.error_type, probe.error)
    if consumer.on_poison == "block":
        raise blocked(intent.group, poison)
    if len(intent.poison) >= consumer.max_poison:
        count = len(intent.poison)
        raise systemic(intent.group, consumer.max_poison, intent.batch_id, count, poison.error_type, poison.error)
    return _found(coordinator, lease, _replace(intent, poison=(*intent.poison, poison)))


def _found(coordinator: Coordinator, lease: Lease, intent: Intent) -> Intent:
    intent = _replace(intent, probe=None, deaths=0)
    coordinator.update(lease, intent)
    return intent


def _next_step(probe: Probe, budget: int) -> tuple[Probe, int] | None:
    """The next probe and the length of its prefix; None when ``bad - 1`` is the record at fault."""
    if probe.trying is not None and probe.trying < probe.bad:
        probe = Probe(probe.good, probe.trying, None, PROCESS_DIED, DIED)
    if probe.bad - probe.good > 1:
        length = (probe.good + probe.bad) // 2
        return _replace(probe, trying=length, died=0), length
    if probe.observed or (probe.error_type == PROCESS_DIED and probe.died >= budget):
        return None
    return _replace(probe, trying=probe.bad), probe.bad


def _inside(intent: Intent, skip: frozenset[Position], length: int) -> frozenset[Position]:
    """The skipped positions inside the prefix of that length."""
    inside = prefix(intent.ranges, skip, length)
    return frozenset(
        position
        for position in skip
        for part in inside
        if (part.topic, part.partition) == position[:2] and part.start <= position[2] < part.end
    )
