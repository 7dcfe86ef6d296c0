"""`TaskStores`: the local state of the tasks one process works on, and when snapshots of it are due."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from djp_dagster.errors import PayloadStoreRefusedError, StateMismatchError
from djp_dagster.processing.crash_points import reach
from djp_dagster.processing.failures import OUTAGES
from djp_dagster.state.snapshots import SnapshotPolicy, take
from djp_dagster.state.store import TaskStore
from djp_dagster.streams.model import Lease
from djp_dagster.streams.records import TopicPartition
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import changelog_of

_log = logging.getLogger(__name__)
_FOLDER_VARIABLE = "DJP_STATE_FOLDER"


def state_folder(given: Path | None = None) -> Path:
    """Where local state lies: as given, else ``$DJP_STATE_FOLDER``, else ``.djp/state``."""
    return given if given is not None else Path(os.environ.get(_FOLDER_VARIABLE, ".djp/state"))


class _Growth:
    """How much a changelog has grown since the last snapshot, and how large that is."""

    __slots__ = ("bytes", "changes", "last_bytes")

    def __init__(self, changes: int, size: int, last_bytes: int) -> None:
        self.changes, self.bytes, self.last_bytes = changes, size, last_bytes


class TaskStores:
    """The local stores of the tasks one process works on.

    Args:
        stream: where the changelogs and the snapshots are.
        group: the consumer group.
        folder: where local state lies (``$DJP_STATE_FOLDER``, else ``.djp/state``).
        policy: when snapshots are taken; None for never.
    """

    def __init__(self, stream: EventStream, group: str, folder: Path | None, policy: SnapshotPolicy | None) -> None:
        self._stream, self._group = stream, group
        self._changelog = changelog_of(group)
        self._folder = state_folder(folder) / stream.incarnation[:12] / group
        self._payloads = stream.payloads if stream.has_payloads else None
        self._policy = policy if self._payloads is not None else None
        self._open: dict[int, TaskStore] = {}
        self._growth: dict[int, _Growth] = {}

    def __getitem__(self, task: int) -> TaskStore:
        return self._open[task]

    def caught_up(self, task: int) -> TaskStore:
        """The task's store, with every committed change applied."""
        store = self._open.get(task)
        if store is None:
            coordinator, group = self._stream.coordinator, self._group
            store = self._open[task] = TaskStore(
                self._folder / f"{task}.db",
                self._stream.log,
                TopicPartition(self._changelog, task),
                snapshots=lambda: coordinator.snapshots(group, task),
                payloads=self._payloads,
            )
        store.catch_up()
        return store

    def restore_later(self, tasks: Iterable[int], why: str) -> None:
        """Discard the stores of these tasks; they are restored when next caught up."""
        for task in tasks:
            if task in self._open:
                self._open[task].restore_later(why)

    def drop(self, tasks: Iterable[int]) -> None:
        """Close the stores of tasks given away, so that whoever holds them next finds them free."""
        for task in tasks:
            self._growth.pop(task, None)
            store = self._open.pop(task, None)
            if store is not None:
                store.close()

    def close(self) -> None:
        """Close all of them."""
        self.drop(list(self._open))

    def grown(self, task: int, changes: int, size: int) -> None:
        """The changelog of the task has grown by so many changes, of so many bytes."""
        growth = self._growth.get(task)
        if growth is not None:
            growth.changes += changes
            growth.bytes += size

    def snapshot_if_due(self, lease: Lease, tasks: Iterable[int]) -> None:
        """Take snapshots of those tasks for which they are due; whatever is in the way, the next batch sees to it.

        Raises:
            FencedError: the lease was lost; nothing is known of the snapshot.
        """
        for task in tasks:
            store = self._open.get(task)
            if store is None or self._policy is None:
                continue
            growth = self._growth.get(task) or self._measure(task)
            if self._policy.is_due(growth.changes, growth.bytes, growth.last_bytes):
                self._take(lease, task, store, self._policy)

    def _measure(self, task: int) -> _Growth:
        """What there is since the last snapshot; asked once a lease, then counted."""
        known = self._stream.coordinator.snapshots(self._group, task)
        since = known[0].offset if known else 0
        backlog = self._stream.log.backlog({TopicPartition(self._changelog, task): since})
        growth = _Growth(backlog.events, backlog.bytes or 0, known[0].payload.bytes if known else 0)
        self._growth[task] = growth
        return growth

    def _take(self, lease: Lease, task: int, store: TaskStore, policy: SnapshotPolicy) -> None:
        assert self._payloads is not None
        try:
            snapshot = take(store.file, task, self._payloads)
            reach("9.snapshot_stored")
            self._stream.coordinator.add_snapshot(lease, snapshot, keep=policy.keep)
        except (*OUTAGES, PayloadStoreRefusedError, OSError) as error:
            _log.warning("no snapshot of %s task %d for now: %s", self._group, task, error)
            return
        except StateMismatchError as error:
            store.restore_later(str(error))
            return
        reach("9.snapshot_known")
        self._growth[task] = _Growth(0, 0, snapshot.payload.bytes)
