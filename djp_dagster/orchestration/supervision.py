"""The worker sensor: keeps a number of worker runs at work, all of them on the code the sensor was loaded with.

The sensor asks for ``workers`` runs, each in a slot of its own. A tick, for each slot:

1. A run under way whose process is gone (it has not said for a lease that it is there) is fenced off, by raising the
   epochs of what it held, and then reported to Dagster as failed.
2. A run on other code than the sensor's, started before the sensor was loaded, is outdated; so is one older than
   ``max_runtime``. It goes on until another is ready. (A run started later has read the same files, or newer: until
   Dagster has loaded the sensor anew, which takes the daemon a minute, workers may be ahead of it.)
3. If the slot has no run under way that is not outdated, one is asked for, told whom it replaces: once ready, it asks
   them to leave, and they finish the batch under way and give everything back.
4. If that run stays in Dagster's queue for long, the tick itself asks the outdated one to leave: it may be what takes
   the last place.

A run key names the last run of the slot that ended, and the one to replace, so a tick evaluated twice asks once. Runs
that end soon after their start are followed by ever longer pauses. Everything a tick reads may be wiped: a second
worker in a slot shares the tasks with the first, and the next tick finds both.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import dagster as dg

from djp_dagster.errors import UnknownGroupError
from djp_dagster.orchestration.runs import FINISHED, fence_off, has_lapsed, in_flight, report_dead, tasks_of
from djp_dagster.orchestration.tags import CODE_TAG, WORKER_TAG, owner_of, run_id_of
from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.model import MemberInfo
from djp_dagster.streams.stream import EventStream

_GRACE_S = 60.0
_QUEUED_TOO_LONG_S = 60.0
_SHORT_LIFE_S = 60.0
_PAUSES_S = (0.0, 0.0, 10.0, 30.0, 60.0, 300.0)


class Crew(NamedTuple):
    """What a worker sensor wants: who works, on what code, and how long.

    Attributes:
        loaded_at: when this code was loaded, in seconds since 1970.
    """

    name: str
    consumers: tuple[Consumer, ...]
    workers: int
    code_version: str
    loaded_at: float
    max_runtime_s: float | None


def crew_code_version(consumers: Sequence[Consumer]) -> str:
    """Changes when the code of any consumer does."""
    versions = [(consumer.group, consumer.code_version) for consumer in consumers]
    return hashlib.sha256(repr(sorted(versions)).encode()).hexdigest()[:12]


class Launch(NamedTuple):
    """A run to ask for."""

    slot: int
    run_key: str
    tags: dict[str, str]
    replaces: list[str]


def supervise(instance: dg.DagsterInstance, stream: EventStream, crew: Crew) -> tuple[list[Launch], list[str]]:
    """One tick: the runs to ask for, and what to say of the other slots."""
    members = _members(stream, crew.consumers)
    launches: list[Launch] = []
    told: list[str] = []
    for slot in range(crew.workers):
        outcome = _tend(instance, stream, crew, slot, members)
        if isinstance(outcome, Launch):
            launches.append(outcome)
        else:
            told.append(f"worker {slot} {outcome}")
    return launches, told


def _members(stream: EventStream, consumers: Sequence[Consumer]) -> dict[str, list[MemberInfo]]:
    """The memberships of each run, in all groups."""
    found: dict[str, list[MemberInfo]] = {}
    for consumer in consumers:
        try:
            members = stream.coordinator.members(consumer.group)
        except UnknownGroupError:
            continue
        for member in members:
            run_id = run_id_of(member.owner)
            if run_id is not None:
                found.setdefault(run_id, []).append(member)
    return found


def _tend(
    instance: dg.DagsterInstance, stream: EventStream, crew: Crew, slot: int, members: dict[str, list[MemberInfo]]
) -> Launch | str:
    tag = f"{crew.name}:{slot}"
    under_way = [
        record
        for record in in_flight(instance, WORKER_TAG, tag)
        if not _reported_dead(instance, stream, crew, record, members)
    ]
    outdated = [record for record in under_way if _is_outdated(record, crew)]
    current = [record for record in under_way if record not in outdated]
    if current:
        newest = current[0]
        if outdated and _is_stuck_in_queue(newest):
            _ask_to_leave(stream, crew, outdated)
        return _state(newest, members)
    last = instance.get_run_records(dg.RunsFilter(tags={WORKER_TAG: tag}, statuses=FINISHED), limit=len(_PAUSES_S))
    wait_s = _left_to_wait(last)
    if wait_s > 0:
        return f"ended soon after its start {_short_lives(last)} times in a row; trying again in {wait_s:.0f} s"
    before = ":".join(record.dagster_run.run_id[:8] for record in (*last[:1], *outdated[:1]))
    return Launch(
        slot=slot,
        run_key=f"{tag}:{crew.code_version}:{before or 'first'}",
        # A limit on the runtime of all runs is not meant for those that stay; `max_runtime` is.
        tags={WORKER_TAG: tag, CODE_TAG: crew.code_version, "dagster/max_runtime": "0"},
        replaces=[record.dagster_run.run_id for record in outdated],
    )


def _reported_dead(
    instance: dg.DagsterInstance,
    stream: EventStream,
    crew: Crew,
    record: dg.RunRecord,
    members: dict[str, list[MemberInfo]],
) -> bool:
    """Report a worker run as failed that was there, or should be by now, and is not; whether it was."""
    run = record.dagster_run
    if run.status not in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING):
        return False
    mine = members.get(run.run_id, [])
    if any(member.live for member in mine):
        return False
    owner = owner_of(run.run_id)
    lapsed = any(has_lapsed(task, owner) for consumer in crew.consumers for task in tasks_of(stream, consumer.group))
    never_came = time.time() - (record.start_time or time.time()) > _GRACE_S
    if not (mine or lapsed or never_came):
        return False
    for consumer in crew.consumers:
        fence_off(stream, consumer.group, owner)
    report_dead(instance, run, "it has not been heard of for longer than a lease")
    return True


def _is_outdated(record: dg.RunRecord, crew: Crew) -> bool:
    if record.dagster_run.status == dg.DagsterRunStatus.CANCELING:
        return True
    if record.dagster_run.status != dg.DagsterRunStatus.STARTED:
        return False  # it will load the code there is when it starts
    started = record.start_time or time.time()
    too_old = crew.max_runtime_s is not None and time.time() - started > crew.max_runtime_s
    other_code = record.dagster_run.tags.get(CODE_TAG) != crew.code_version
    return too_old or (other_code and started < crew.loaded_at)


def _is_stuck_in_queue(record: dg.RunRecord) -> bool:
    queued = record.dagster_run.status == dg.DagsterRunStatus.QUEUED
    return queued and time.time() - record.create_timestamp.timestamp() > _QUEUED_TOO_LONG_S


def _ask_to_leave(stream: EventStream, crew: Crew, outdated: Sequence[dg.RunRecord]) -> None:
    for record in outdated:
        for consumer in crew.consumers:
            stream.coordinator.ask_to_leave(consumer.group, owner_of(record.dagster_run.run_id))


def _state(record: dg.RunRecord, members: dict[str, list[MemberInfo]]) -> str:
    run = record.dagster_run
    if run.status == dg.DagsterRunStatus.QUEUED:
        return f"waits in the queue (run {run.run_id[:8]})"
    mine = members.get(run.run_id, [])
    if not mine:
        return f"is starting (run {run.run_id[:8]})"
    paused = sum(member.paused for member in mine)
    return f"is at work (run {run.run_id[:8]})" + (f", {paused} of its consumers paused" if paused else "")


def _short_lives(last: Sequence[dg.RunRecord]) -> int:
    """How many of the last runs, from the last one back, ended soon after their start and not in order."""
    count = 0
    for record in last:
        lived_s = (record.end_time or 0.0) - (record.start_time or record.end_time or 0.0)
        if record.dagster_run.status != dg.DagsterRunStatus.FAILURE or lived_s > _SHORT_LIFE_S:
            break
        count += 1
    return count


def _left_to_wait(last: Sequence[dg.RunRecord]) -> float:
    short = _short_lives(last)
    if short == 0:
        return 0.0
    return _PAUSES_S[min(short, len(_PAUSES_S) - 1)] - (time.time() - (last[0].end_time or 0.0))
