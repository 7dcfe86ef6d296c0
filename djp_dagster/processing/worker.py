"""`Worker`: worker mode. A resident loop over consumers; batches of one task, as soon as there is something.

Workers of a group share its tasks evenly: each states every third of a lease that it is there, counts how many are, and
gives away what exceeds its share at the next batch boundary. A worker that dies is missed after one lease. A worker
that replaces another, because its code is newer or the other has run for long enough, asks it to leave once it is ready
itself; the other finishes the batch under way and gives everything back.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from djp_dagster.errors import (
    DjpError,
    FencedError,
    LeaseBusyError,
    RetriesExhaustedError,
    TransientError,
    UnknownGroupError,
)
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.holding import Holding, OnReport
from djp_dagster.processing.leases import DEFAULT_LEASE_S, LeaseKeeper, new_owner
from djp_dagster.processing.processor import Processor
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import tidy
from djp_dagster.streams.contracts import Watcher
from djp_dagster.streams.model import Intent, Lease
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)
_REQUESTS_EVERY_S = 1.0
_LOOK_EVERY_S = 1.0
_TIDY_EVERY_S = 60.0
_EAGER_FOR_S = 1.0
_PAUSES_S = (5.0, 30.0, 120.0, 300.0)

OnFailure = Callable[[Consumer, DjpError], None]


class _Member:
    """One consumer of a worker: its processor, and the tasks it holds."""

    def __init__(self, consumer: Consumer, tasks: int, processor: Processor) -> None:
        self.consumer, self.tasks, self.processor = consumer, tasks, processor
        self.held: dict[tuple[int, ...], Holding] = {}
        self.paused_until = 0.0
        self.failures = 0


class Busy(NamedTuple):
    """What a worker is doing now."""

    group: str
    batch_id: str
    since: float


class Worker:
    """Runs consumers until told to stop.

    A consumer that gives up (`RetriesExhaustedError`), or finds more poison than it may skip, pauses, longer each time,
    while the others go on; its offsets stay. One that followed a live group is done with once it has been promoted, or
    abandoned; who has nothing else to do ends.

    Args:
        stream: the stream; topics and groups are created when missing.
        consumers: what to run.
        resources: the handlers' further parameters, by name.
        state_folder: where local state lies (``$DJP_STATE_FOLDER``, else ``.djp/state``).
        lease: how long a dead worker's tasks stay blocked.
        on_report: called after each commit.
        on_failure: called when a consumer pauses; without it the error ends the worker.
        on_beat: called between batches, about three times per ``lease``.
        owner: a name, for whoever looks.
        replaces: beginnings of the names of workers that are asked to leave once this one is ready.

    Attributes:
        busy: the batch under way and since when, by ``time.monotonic``; None between batches.
        replaced: another worker has asked this one to leave.
    """

    def __init__(
        self,
        stream: EventStream,
        consumers: Sequence[Consumer],
        *,
        resources: Mapping[str, Any] | None = None,
        state_folder: Path | None = None,
        lease: Duration = DEFAULT_LEASE_S,
        on_report: OnReport | None = None,
        on_failure: OnFailure | None = None,
        on_beat: Callable[[], None] | None = None,
        owner: str | None = None,
        replaces: Sequence[str] = (),
    ) -> None:
        self._replaces = tuple(replaces)
        self.busy: Busy | None = None
        self.replaced = False
        self._stream, self._consumers = stream, tuple(consumers)
        self._resources, self._state_folder = resources, state_folder
        self._lease_s = parse_seconds(lease, name="lease")
        self._on_report, self._on_failure, self._on_beat = on_report, on_failure, on_beat
        self.owner = new_owner(owner)

    def run(self, stop: threading.Event) -> None:
        """Work until ``stop`` is set or another worker takes over; finish the batch under way, give everything back.

        Raises:
            DjpError: what made a consumer pause, unless ``on_failure`` was given.
        """
        with ExitStack() as stack:
            members = []
            for consumer in self._consumers:
                info = consumer.register(self._stream)
                processor = Processor(
                    self._stream, consumer, resources=self._resources, state_folder=self._state_folder, stop=stop
                )
                stack.callback(processor.close)
                members.append(_Member(consumer, info.tasks, processor))
            keeper = stack.enter_context(LeaseKeeper(self._stream.coordinator, owner=self.owner, ttl_s=self._lease_s))
            watcher = self._stream.log.watch()
            stack.callback(watcher.close)
            self._loop(members, keeper, watcher, stop)
            self.replaced = keeper.replaced

    def _loop(
        self,
        members: list[_Member],
        keeper: LeaseKeeper,
        watcher: Watcher,
        stop: threading.Event,
    ) -> None:
        share_at = requests_at = 0.0
        tidy_at = time.monotonic() + _TIDY_EVERY_S
        eager_until = 0.0
        while members and not _ends(keeper, stop):
            now = time.monotonic()
            try:
                if now >= share_at:
                    self._share(members, keeper)
                    share_at = now + self._lease_s / 3
                    if self._on_beat is not None:
                        self._on_beat()
                    continue
                ask = now >= requests_at
                requests_at = now + _REQUESTS_EVERY_S if ask else requests_at
                worked = [self._serve(member, keeper, stop, now, ask) for member in members]
                if now >= tidy_at:
                    tidy(self._stream)
                    tidy_at = now + _TIDY_EVERY_S
                if any(worked):
                    eager_until = time.monotonic() + _EAGER_FOR_S
                else:
                    watcher.wait(self._idle_s(members, share_at), eager=time.monotonic() < eager_until)
            except RetriesExhaustedError:
                raise
            except TransientError as error:
                _log.warning("worker %s waits for the stream: %s", self.owner, error)
                share_at = 0.0
                stop.wait(0.5)

    def _idle_s(self, members: Sequence[_Member], share_at: float) -> float:
        """How long nothing can come due by itself."""
        left = min(_LOOK_EVERY_S, max(share_at - time.monotonic(), 0.0))
        due = [holding.next_due_micros for member in members for holding in member.held.values()]
        soonest = min((micros for micros in due if micros is not None), default=None)
        if soonest is not None:
            left = min(left, max((soonest - self._stream.log.now_micros()) / 1e6, 0.001))
        return left

    def _share(self, members: list[_Member], keeper: LeaseKeeper) -> None:
        """Take free tasks up to an even share; give away what exceeds it."""
        for member in list(members):
            try:
                self._share_one(member, keeper)
            except UnknownGroupError as error:
                if member.consumer.follows is None:
                    raise
                _log.info("the version that %s worked for is there no more: %s", self.owner, error)
                for tasks in list(member.held):
                    self._let_go(member, keeper, tasks)
                keeper.part_from(member.consumer.group)
                members.remove(member)
                self._consumers = tuple(one for one in self._consumers if one is not member.consumer)

    def _share_one(self, member: _Member, keeper: LeaseKeeper) -> None:
        group, paused = member.consumer.group, time.monotonic() < member.paused_until
        wanting = keeper.join(group, paused=paused)
        if paused:
            return
        self._replaces = tuple(name for name in self._replaces if self._ask_to_leave(name))
        share = -(-member.tasks // max(wanting, 1))
        while sum(map(len, member.held)) > share and len(member.held) > 1:
            self._give_back(member, keeper, max(member.held))
        mine = {task for tasks in member.held for task in tasks}
        for info in self._stream.coordinator.tasks(group):
            if sum(map(len, member.held)) >= share:
                break
            if info.task not in mine and (info.worth_asking or info.owner == self.owner):
                self._take(member, keeper, info.task)

    def _ask_to_leave(self, name: str) -> bool:
        """Whether any such worker is still there, in any group."""
        asked = [self._stream.coordinator.ask_to_leave(consumer.group, name) for consumer in self._consumers]
        return any(asked)

    def _take(self, member: _Member, keeper: LeaseKeeper, task: int) -> None:
        if any(task in tasks for tasks in member.held):
            return
        try:
            lease = keeper.acquire(member.consumer.group, [task])
        except LeaseBusyError:
            return
        reach("1.leased")
        holding = self._holding(member, lease)
        member.held[tuple(sorted(lease.epochs))] = holding

    def _holding(self, member: _Member, lease: Lease) -> Holding:
        return Holding(self._stream, member.consumer, member.processor, lease, self._report, self._begin)

    def _give_back(self, member: _Member, keeper: LeaseKeeper, tasks: tuple[int, ...]) -> None:
        holding = member.held.pop(tasks)
        member.processor.drop_state(tasks)
        keeper.release(holding.lease)

    def _let_go(self, member: _Member, keeper: LeaseKeeper, tasks: tuple[int, ...]) -> None:
        """Stop holding tasks whose lease is lost, or must be taken anew."""
        holding = member.held.pop(tasks)
        member.processor.drop_state(tasks)
        keeper.forget(holding.lease)

    def _begin(self, intent: Intent) -> None:
        self.busy = Busy(intent.group, intent.batch_id, time.monotonic())

    def _report(self, report: BatchReport) -> None:
        if self._on_report is not None:
            self._on_report(report)

    def _serve(self, member: _Member, keeper: LeaseKeeper, stop: threading.Event, now: float, ask: bool) -> bool:
        """One batch for each task set held; whether there was any."""
        if now < member.paused_until:
            return False
        worked = False
        for tasks in list(member.held):
            if _ends(keeper, stop):
                break
            if not keeper.holds(member.held[tasks].lease):
                self._let_go(member, keeper, tasks)
                continue
            try:
                worked |= self._serve_tasks(member, keeper, tasks, ask)
            except (FencedError, UnknownGroupError) as error:
                _log.info("%s", error)
                self._let_go(member, keeper, tasks)
            except DjpError as error:
                if isinstance(error, TransientError) and not isinstance(error, RetriesExhaustedError):
                    # A batch may have been left open, even one nobody knows was begun; leasing anew finds it.
                    self._let_go(member, keeper, tasks)
                    raise
                self._pause(member, keeper, error)
                return worked
            finally:
                self.busy = None
        return worked

    def _serve_tasks(self, member: _Member, keeper: LeaseKeeper, tasks: tuple[int, ...], ask: bool) -> bool:
        holding = member.held[tasks]
        worked = bool(holding.finish_open())
        if len(tasks) > 1:
            # Held together only to finish a batch that spans them; from now on one by one.
            del member.held[tasks]
            for task in tasks:
                part = holding.lease.part([task])
                member.held[(task,)] = self._holding(member, part)
            return True
        if ask:
            worked |= bool(holding.do_requests())
        report = holding.next_batch(tasks, bound=member.consumer.max_batch, reason="worker")
        if report is not None:
            member.failures = 0
        return worked or report is not None

    def _pause(self, member: _Member, keeper: LeaseKeeper, error: DjpError) -> None:
        pause_s = _PAUSES_S[min(member.failures, len(_PAUSES_S) - 1)]
        member.failures += 1
        member.paused_until = time.monotonic() + pause_s
        _log.error("group %s pauses for %.0f s: %s", member.consumer.group, pause_s, error)
        try:
            for tasks in list(member.held):
                self._give_back(member, keeper, tasks)
            keeper.join(member.consumer.group, paused=True)
        except TransientError as outage:
            _log.warning("what %s holds of %s runs out by itself: %s", self.owner, member.consumer.group, outage)
        if self._on_failure is None:
            raise error
        self._on_failure(member.consumer, error)


def _ends(keeper: LeaseKeeper, stop: threading.Event) -> bool:
    """Whether the batch under way is the last: told to stop, or asked to leave."""
    return stop.is_set() or keeper.replaced
