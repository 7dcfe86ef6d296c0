"""The worker sensor: keeps a number of worker runs at work, all of them on the code the sensor was loaded with.

The sensor asks for ``workers`` runs, each in a slot of its own. A tick, for each slot:

1. A run under way that has died (`djp_dagster.orchestration.standing` tells how that shows) is fenced off and reported
   to Dagster as failed.
2. A run on other code than the sensor's, asked for by a sensor on other code, is outdated; so is one older than
   ``max_runtime``. It goes on until another is ready. (A run this code asked for may be ahead of it: runs load the
   files there are, and Dagster's daemon loads the sensor anew only once a minute.)
3. If the slot has no run under way that is not outdated, one is asked for, told whom it replaces: once ready, it asks
   them to leave, and they finish the batch under way and give everything back.
4. If the new run is at work and another one still is, or if the new one does not come to work for long (the other may
   be what takes the last place in the queue, or in a pool), the tick itself asks the other to leave. So it does in
   slots that are no longer wanted.

A run key names the last run of the slot that ended, the one to replace, and one that is waited for no more; so a tick
evaluated twice asks once. Runs that end soon after their start are followed by ever longer pauses. Everything a tick
reads may be wiped: a second worker in a slot shares the tasks with the first, and the next tick finds both.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

import dagster as dg

from djp_dagster.orchestration.runs import FINISHED, in_flight, left_to_wait
from djp_dagster.orchestration.standing import Lookout, Standing, Suspects, tasks_of
from djp_dagster.orchestration.tags import ASKED_BY_TAG, CODE_TAG, PLACE_TAG, SLOT_TAG, WORKER_TAG, owner_of
from djp_dagster.processing.consumer import Consumer
from djp_dagster.streams.stream import EventStream

_TOO_LONG_S = 60.0
_SHORT_LIFE_S = 60.0
_PAUSES_S = (0.0, 0.0, 10.0, 30.0, 60.0, 300.0)
_RUN_KEY_TAG = "dagster/run_key"


class Crew(NamedTuple):
    """What a worker sensor wants: who works, on what code, and how long.

    Attributes:
        tag: tells its runs from those of all other worker sensors.
    """

    tag: str
    consumers: tuple[Consumer, ...]
    workers: int
    code_version: str
    max_runtime_s: float | None

    @property
    def groups(self) -> list[str]:
        """The groups it works for."""
        return [consumer.group for consumer in self.consumers]


def crew_code_version(consumers: Sequence[Consumer], settings: Mapping[str, object]) -> str:
    """Changes when the code of any consumer does, or how the workers are set."""
    versions = [(consumer.group, consumer.code_version) for consumer in consumers]
    return hashlib.sha256(repr((sorted(versions), sorted(settings.items()))).encode()).hexdigest()[:12]


class Launch(NamedTuple):
    """A run to ask for."""

    run_key: str
    tags: dict[str, str]
    replaces: list[str]


def supervise(
    instance: dg.DagsterInstance, stream: EventStream, crew: Crew, suspects: Suspects
) -> tuple[list[Launch], list[str]]:
    """One tick: the runs to ask for, and what to say of the other slots."""
    slots: dict[str, list[Seen]] = {}
    ignored: dict[str, list[Seen]] = {}
    lookout = Lookout(instance, stream, crew.groups, suspects)
    for record in in_flight(instance, {WORKER_TAG: crew.tag}):
        standing = lookout.standing_of(record)
        seen = Seen(record, standing, _is_outdated(record, crew))
        known = slots if standing.counts else ignored
        known.setdefault(record.dagster_run.tags.get(SLOT_TAG, ""), []).append(seen)
    wanted = [str(slot) for slot in range(crew.workers)]
    missing = [slot for slot in wanted if all(seen.outdated for seen in slots.get(slot, []))]
    ended = {slot: _ended(instance, crew, slot) for slot in missing}
    launches: list[Launch] = []
    told: list[str] = []
    for slot in wanted:
        under_way = slots.get(slot, [])
        if slot not in missing:
            told.append(f"worker {slot}: {_settle(stream, crew, under_way)}")
        elif (wait_s := left_to_wait(_PAUSES_S, _short_lives(ended[slot]), time.time())) > 0:
            told.append(f"worker {slot} ended soon after its start; trying again in {wait_s:.0f} s")
        else:
            launches.append(_launch(instance, crew, slot, ended[slot], under_way, ignored.get(slot, [])))
    for slot in set(slots) - set(wanted):
        _ask_to_leave(stream, crew, slots[slot])
    return launches, told


class Seen(NamedTuple):
    """A run under way, as a tick sees it."""

    record: dg.RunRecord
    standing: Standing
    outdated: bool

    @property
    def run_id(self) -> str:
        """Its id."""
        return self.record.dagster_run.run_id


def _settle(stream: EventStream, crew: Crew, under_way: Sequence[Seen]) -> str:
    """A slot that has what it needs: see to it that whoever else is in it goes."""
    newest = next(seen for seen in under_way if not seen.outdated)
    others = [seen for seen in under_way if seen is not newest]
    if others and (newest.standing.at_work or _is_held_up(newest.record)):
        _ask_to_leave(stream, crew, others)
    return newest.standing.told


def _launch(
    instance: dg.DagsterInstance,
    crew: Crew,
    slot: str,
    ended: Sequence[dg.RunRecord],
    outdated: Sequence[Seen],
    ignored: Sequence[Seen],
) -> Launch:
    before = [record.dagster_run.run_id for record in ended[:1]]
    before += [seen.run_id for seen in (*outdated[:1], *ignored[:1])]
    return Launch(
        run_key=_fresh_key(instance, ":".join([crew.tag, slot, crew.code_version, *(run_id[:8] for run_id in before)])),
        # A limit on the runtime of all runs is not meant for those that stay; `max_runtime` is.
        # Nor are retries: the sensor sees to that.
        tags={
            WORKER_TAG: crew.tag,
            SLOT_TAG: slot,
            PLACE_TAG: _place(crew, slot),
            ASKED_BY_TAG: crew.code_version,
            "dagster/max_runtime": "0",
            "dagster/max_retries": "0",
        },
        replaces=[seen.run_id for seen in outdated],
    )


def _fresh_key(instance: dg.DagsterInstance, key: str) -> str:
    """The key, or one that goes on from it if a run has had it and was submitted: Dagster would skip it for ever.

    Whatever else a tick reads (tags, finished runs) may have been wiped while that run was left.
    """
    count = 0
    while True:
        wanted = f"{key}:{count}" if count else key
        runs = instance.get_runs(dg.RunsFilter(tags={_RUN_KEY_TAG: wanted}))
        if all(run.status == dg.DagsterRunStatus.NOT_STARTED for run in runs):
            return wanted
        count += 1


def _ended(instance: dg.DagsterInstance, crew: Crew, slot: str) -> Sequence[dg.RunRecord]:
    """The last runs of a slot that have ended, the newest first."""
    filters = dg.RunsFilter(tags={PLACE_TAG: _place(crew, slot)}, statuses=FINISHED)
    return instance.get_run_records(filters, limit=len(_PAUSES_S))


def _place(crew: Crew, slot: str) -> str:
    return f"{crew.tag}#{slot}"


def _is_outdated(record: dg.RunRecord, crew: Crew) -> bool:
    if record.dagster_run.status == dg.DagsterRunStatus.CANCELING:
        return True
    if record.dagster_run.status != dg.DagsterRunStatus.STARTED:
        return False  # it will load the code there is when it starts
    started = record.start_time or time.time()
    too_old = crew.max_runtime_s is not None and time.time() - started > crew.max_runtime_s
    tags = record.dagster_run.tags
    return too_old or crew.code_version not in (tags.get(CODE_TAG), tags.get(ASKED_BY_TAG))


def _is_held_up(record: dg.RunRecord) -> bool:
    return time.time() - record.create_timestamp.timestamp() > _TOO_LONG_S


def _ask_to_leave(stream: EventStream, crew: Crew, outdated: Sequence[Seen]) -> None:
    for seen in outdated:
        for group in crew.groups:
            if tasks_of(stream, group):
                stream.coordinator.ask_to_leave(group, owner_of(seen.run_id))


def _short_lives(last: Sequence[dg.RunRecord]) -> Sequence[dg.RunRecord]:
    """Those of the last runs, from the last one back, that ended soon after their start and not in order."""
    return list(takewhile(_was_short, last))


def _was_short(record: dg.RunRecord) -> bool:
    lived_s = (record.end_time or 0.0) - (record.start_time or record.end_time or 0.0)
    return record.dagster_run.status == dg.DagsterRunStatus.FAILURE and lived_s <= _SHORT_LIFE_S
