"""Runs as a tick sees them: which are under way, which changed nothing, which are dead; and what to ask for next.

A run key names what had been done when the run was asked for, and the last finished run that found the same; so a tick
that is evaluated twice asks for one run, and a run that changed nothing can be followed by another, after a pause.
"""

import time
from collections.abc import Mapping, Sequence

import dagster as dg

from djp_dagster.errors import LeaseBusyError, UnknownGroupError
from djp_dagster.orchestration.tags import DIGEST_TAG, GROUP_TAG, REASON_TAG, owner_of
from djp_dagster.orchestration.ticks import Look
from djp_dagster.processing.leases import new_owner
from djp_dagster.streams.model import TaskInfo
from djp_dagster.streams.stream import EventStream

IN_FLIGHT = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_PAUSES_S = (0.0, 10.0, 60.0, 300.0, 900.0)
_SILENT_S = 600.0
_CROWD = 200


def request_run(
    instance: dg.DagsterInstance,
    stream: EventStream,
    group: str,
    look: Look,
    *,
    run_config: Mapping[str, object] | None = None,
) -> dg.RunRequest | dg.SkipReason:
    """The run a due group needs, or why not now."""
    assert look.reason is not None
    if look.holder is not None and not look.holder.startswith("run-"):
        return dg.SkipReason(f"{look.reason}; {look.holder} is at work")
    under_way = in_flight(instance, GROUP_TAG, group)
    alive = [record for record in under_way if not _reported_dead(instance, stream, group, record)]
    if alive:
        return dg.SkipReason(f"{look.reason}; run {alive[0].dagster_run.run_id[:8]} is {_state(alive[0])}")
    if look.holder is not None:
        return dg.SkipReason(f"{look.reason}; {look.holder} is at work")
    finished = instance.get_run_records(
        dg.RunsFilter(tags={DIGEST_TAG: look.digest}, statuses=FINISHED), limit=len(_PAUSES_S)
    )
    wait_s = _left_to_wait(finished)
    if wait_s > 0:
        return dg.SkipReason(
            f"{look.reason}; {len(finished)} runs changed nothing, see the last; trying again in {wait_s:.0f} s"
        )
    last = finished[0].dagster_run.run_id[:8] if finished else "first"
    return dg.RunRequest(
        run_key=f"{group}:{look.digest}:{last}",
        tags={GROUP_TAG: group, DIGEST_TAG: look.digest, REASON_TAG: look.reason},
        run_config=run_config,
    )


def in_flight(instance: dg.DagsterInstance, tag: str, value: str) -> list[dg.RunRecord]:
    """The runs under way that carry the tag.

    Filtering by status alone is an index look-up; with a tag beside it, SQLite walks all runs that ever had the tag.
    """
    records = instance.get_run_records(dg.RunsFilter(statuses=IN_FLIGHT), limit=_CROWD)
    if len(records) == _CROWD:
        records = instance.get_run_records(dg.RunsFilter(tags={tag: value}, statuses=IN_FLIGHT), limit=_CROWD)
    return [record for record in records if record.dagster_run.tags.get(tag) == value]


def _left_to_wait(finished: Sequence[dg.RunRecord]) -> float:
    """Runs that changed nothing are repeated after ever longer pauses."""
    if not finished:
        return 0.0
    pause_s = _PAUSES_S[min(len(finished), len(_PAUSES_S) - 1)]
    return pause_s - (time.time() - max(record.end_time or 0.0 for record in finished))


def _state(record: dg.RunRecord) -> str:
    return {"QUEUED": "in the queue", "STARTING": "starting", "STARTED": "at work", "CANCELING": "being canceled"}[
        record.dagster_run.status.value
    ]


def _reported_dead(instance: dg.DagsterInstance, stream: EventStream, group: str, record: dg.RunRecord) -> bool:
    """Report a run as failed whose lease has run out, or which has long been silent; whether it was."""
    run = record.dagster_run
    if run.status not in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING):
        return False
    owner = owner_of(run.run_id)
    tasks = tasks_of(stream, group)
    lapsed = any(has_lapsed(task, owner) for task in tasks)
    nobody = all(task.worth_asking for task in tasks)
    silent = nobody and time.time() - (record.start_time or time.time()) > _SILENT_S and _is_alone(run)
    if not (lapsed or silent):
        return False
    fence_off(stream, group, owner)
    why = "its lease has run out" if lapsed else f"it has held no lease for {_SILENT_S:.0f} s"
    report_dead(instance, run, why)
    return True


def _is_alone(run: dg.DagsterRun) -> bool:
    """Whether the run is a sensor's or schedule's of this package, which does nothing beside its consumer."""
    return DIGEST_TAG in run.tags


def tasks_of(stream: EventStream, group: str) -> list[TaskInfo]:
    """The group's tasks; none before its first run."""
    try:
        return stream.coordinator.tasks(group)
    except UnknownGroupError:
        return []


def has_lapsed(task: TaskInfo, owner: str) -> bool:
    """Whether ``owner`` held the task until its lease ran out: it has not given it back, as whoever ends does."""
    return task.worth_asking and (task.owner or "").startswith(owner)


def fence_off(stream: EventStream, group: str, owner: str) -> None:
    """Raise the epochs of what ``owner`` held, so that it can commit nothing if it wakes up."""
    held = [task.task for task in tasks_of(stream, group) if has_lapsed(task, owner)]
    if held:
        try:
            stream.coordinator.release(stream.coordinator.acquire(group, held, new_owner("supervisor"), ttl_s=5.0))
        except LeaseBusyError:
            return  # somebody has taken it over meanwhile, which raised the epoch


def report_dead(instance: dg.DagsterInstance, run: dg.DagsterRun, why: str) -> None:
    """Tell Dagster that a run has failed whose process cannot tell it any more."""
    instance.report_run_failed(
        run, f"The process of this run is gone or stands still: {why}. Its batch is taken over by the next holder."
    )
