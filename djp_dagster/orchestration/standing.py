"""Whether a run under way is at work, may still come to it, or is dead.

Dagster says that a run has started; whether its process lives is told by the stream: whoever works or waits for a group
is a member of it, says so three times per lease, and takes itself away when it ends. So:

* a membership or a lease that has not run out: *at work*;
* memberships that ran out, and nothing else, at two looks several seconds apart: *dead*. Its epochs are raised, so that
  it can commit nothing if it wakes up, and it is reported to Dagster as failed. One look is not enough: the stream may
  have stood still for longer than a lease, for everybody;
* none at all: proves nothing. The run has not come to its step yet, or has left it. It is waited for while it is young,
  and ignored afterwards, which is harmless: leases keep two runs apart.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import dagster as dg
import msgspec

from djp_dagster.errors import LeaseBusyError, UnknownGroupError
from djp_dagster.orchestration.tags import DIGEST_TAG, WORKER_TAG, run_id_of
from djp_dagster.processing.leases import new_owner
from djp_dagster.streams.model import TaskInfo
from djp_dagster.streams.stream import EventStream

_CONFIRM_S = 4.0
_YOUNG_S = 600.0
_STARTING_S = 180.0  # after which Dagster's own run monitoring gives a run up


class Standing(NamedTuple):
    """How a run under way stands: whether it is waited for, whether it is at work, and what to say of it."""

    counts: bool
    at_work: bool
    told: str


class Suspects:
    """Runs that looked dead, and since when. Kept in the sensor's cursor, a hint: without it they are watched anew."""

    def __init__(self, cursor: str | None) -> None:
        try:
            self._before = msgspec.json.decode(cursor or "{}", type=dict[str, float])
        except msgspec.MsgspecError:
            self._before = {}
        self._now: dict[str, float] = {}

    @property
    def cursor(self) -> str:
        """The runs that look dead as of this tick."""
        return msgspec.json.encode(self._now).decode()

    def is_confirmed(self, run_id: str) -> bool:
        """Whether the run, which looks dead now, already did so a while ago."""
        now = time.time()
        since = min(self._before.get(run_id, now), now)
        self._now[run_id] = since
        return now - since >= _CONFIRM_S


class Lookout:
    """One tick's view of who is there, in some groups of a stream."""

    def __init__(
        self, instance: dg.DagsterInstance, stream: EventStream, groups: Sequence[str], suspects: Suspects
    ) -> None:
        self._instance, self._stream, self._groups, self._suspects = instance, stream, groups, suspects
        self._signs = self._look()

    def _look(self) -> dict[str, list[bool]]:
        """By run: for each of its memberships and leases, whether it has not run out."""
        signs: dict[str, list[bool]] = {}
        for group in self._groups:
            tasks = tasks_of(self._stream, group)
            members = self._stream.coordinator.members(group) if tasks else []
            found = [(task.owner or "", not task.worth_asking) for task in tasks]
            for owner, lives in [*found, *((member.owner, member.live) for member in members)]:
                run_id = run_id_of(owner)
                if run_id is not None:
                    signs.setdefault(run_id, []).append(lives)
        return signs

    def standing_of(self, record: dg.RunRecord) -> Standing:
        """How a run under way stands; one found dead is fenced off and reported."""
        run = record.dagster_run
        name = f"run {run.run_id[:8]}"
        if run.status == dg.DagsterRunStatus.QUEUED:
            return Standing(True, False, f"{name} is in the queue")
        signs = self._signs.get(run.run_id, [])
        if any(signs):
            return Standing(True, True, f"{name} is at work")
        if signs:
            if self._suspects.is_confirmed(run.run_id) and self._bury(run.run_id):
                return Standing(False, False, f"{name} has died")
            return Standing(True, False, f"{name} has not been heard of for longer than a lease")
        # A run of somebody's own, past this package's step, does other things.
        ours = DIGEST_TAG in run.tags or WORKER_TAG in run.tags
        starting = run.status == dg.DagsterRunStatus.STARTING
        age_s = time.time() - (record.start_time or record.update_timestamp.timestamp())
        young = age_s < (_STARTING_S if starting else _YOUNG_S)
        canceled = run.status == dg.DagsterRunStatus.CANCELING
        return Standing(ours and young, False, f"{name} is {'being canceled' if canceled else 'starting'}")

    def _bury(self, run_id: str) -> bool:
        """Fence a run off and report it as failed, unless it turns out to live, or to have ended; whether it was."""
        fenced = [self._fence_off(group, run_id) for group in self._groups]
        if not all(fenced) or any(self._look().get(run_id, [])):
            return False
        run = self._instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            self._instance.report_run_failed(
                run,
                "The process of this run is gone or stands still: it has not been heard of for longer than a lease. "
                "Whoever works for its consumers next takes its batch over.",
            )
        return True

    def _fence_off(self, group: str, run_id: str) -> bool:
        """Raise the epochs of what the run held; False if it holds it after all."""
        held = [task.task for task in tasks_of(self._stream, group) if task.worth_asking and _is_of(task, run_id)]
        if not held:
            return True
        coordinator = self._stream.coordinator
        try:
            coordinator.release(coordinator.acquire(group, held, new_owner("supervisor"), ttl_s=5.0))
        except LeaseBusyError:
            # Taken over by somebody else, which raised the epoch; or prolonged at this very moment.
            return not any(_is_of(task, run_id) for task in tasks_of(self._stream, group))
        return True


def tasks_of(stream: EventStream, group: str) -> list[TaskInfo]:
    """The group's tasks; none before its first run."""
    try:
        return stream.coordinator.tasks(group)
    except UnknownGroupError:
        return []


def _is_of(task: TaskInfo, run_id: str) -> bool:
    return run_id_of(task.owner or "") == run_id
