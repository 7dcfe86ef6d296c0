"""The two contracts of a stream backend: `EventLog`, what happened, and `Coordinator`, what has been done about it.

Both speak in the plain data of `djp_dagster.streams.model`. Nothing here knows SQL; nothing above this module may know
which backend it talks to.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from djp_dagster.streams.model import (
    Appended,
    Backlog,
    Capabilities,
    Commit,
    DeadLetter,
    Deadline,
    GroupInfo,
    GroupSpec,
    GroupView,
    Intent,
    Lease,
    MemberInfo,
    Membership,
    NewSnapshot,
    Output,
    PartitionSpan,
    ProducerStamp,
    ReaderPosition,
    Request,
    Snapshot,
    Start,
    TaskInfo,
    TopicInfo,
    TrimReport,
)
from djp_dagster.streams.records import EncodedBatch, StoredBatch, TopicPartition
from djp_dagster.streams.topics import Topic


class Watcher(Protocol):
    """Notices that something was appended or requested, without polling tables."""

    def wait(self, timeout_s: float, *, eager: bool = False) -> bool:
        """Wait until something changed since the last call, at most ``timeout_s`` seconds; whether it did.

        A backend that has to look again and again looks more often when ``eager``: say so while there is work.
        """

    def close(self) -> None:
        """Release the connection."""


class EventLog(Protocol):
    """Topics, partitions, offsets and records. Safe to use from any thread and process."""

    @property
    def capabilities(self) -> Capabilities:
        """What this backend can do."""

    @property
    def incarnation(self) -> str:
        """The identity of this log; positions kept elsewhere carry it and are void in any other log."""

    def create_topic(self, topic: Topic) -> TopicInfo:
        """Create the topic, or return it if it was declared alike; raises `TopicMismatchError` if not."""

    def topic(self, name: str) -> TopicInfo:
        """The topic; raises `UnknownTopicError`."""

    def topics(self) -> list[TopicInfo]:
        """All topics, by name."""

    def delete_topic(self, name: str) -> None:
        """Delete the topic and its records; raises while a group reads it."""

    def open_producer(self, name: str) -> ProducerStamp:
        """A new epoch for the named producer, with the sequence last appended; older epochs are fenced."""

    def append(self, batches: Sequence[EncodedBatch], stamp: ProducerStamp | None = None) -> list[Appended]:
        """Append all batches or none. Empty if the stamp's sequence was appended before."""

    def read(self, at: TopicPartition, offset: int, *, end: int, max_bytes: int) -> list[StoredBatch]:
        """The record batches holding ``offset`` up to ``end``, at most ``max_bytes`` but one at least."""

    def spans(self, topics: Sequence[str]) -> dict[TopicPartition, PartitionSpan]:
        """Begin and end of every partition of the topics."""

    def offset_at(self, at: TopicPartition, micros: int) -> int:
        """The offset of the first record appended at or after the time; the end if there is none."""

    def with_event_times(
        self, at: TopicPartition, first: int, last: int, *, start: int, end: int
    ) -> list[tuple[int, int]]:
        """Ranges between ``start`` and ``end`` outside of which no event time is ``first <= time < last``."""

    def append_time_of(self, at: TopicPartition, offset: int) -> int | None:
        """The append time of the record at ``offset``; None at the end."""

    def backlog(self, positions: Mapping[TopicPartition, int]) -> Backlog:
        """What lies beyond the positions. Costs two index look-ups a partition, whatever the backlog."""

    def cut(self, at: TopicPartition, start: int, end: int, *, max_bytes: int) -> int:
        """The largest offset up to ``end`` such that the records from ``start`` stay within ``max_bytes``."""

    def trim(self, now_micros: int | None = None) -> list[TrimReport]:
        """Apply every topic's retention; reports what went."""

    def watch(self) -> Watcher:
        """A new `Watcher`; close it after use."""

    def now_micros(self) -> int:
        """The store's clock."""


class Coordinator(Protocol):
    """Groups, offsets, leases, intents, dead letters, outputs, deadlines, requests; and the one atomic commit."""

    def ensure_group(self, spec: GroupSpec) -> GroupInfo:
        """Create the group at its start position, or return it; raises `GroupMismatchError` if declared otherwise."""

    def group(self, name: str) -> GroupInfo:
        """The group; raises `UnknownGroupError`."""

    def groups(self) -> list[GroupInfo]:
        """All groups, by name."""

    def delete_group(self, name: str) -> None:
        """Delete the group, its offsets, dead letters and output references; raises `LeaseBusyError` while leased."""

    def positions(self, group: str) -> dict[TopicPartition, int]:
        """The committed offsets."""

    def pending(self, group: str) -> Backlog:
        """The backlog of the group: `EventLog.backlog` of its positions."""

    def tasks(self, group: str) -> list[TaskInfo]:
        """The group's tasks and their holders."""

    def acquire(self, group: str, tasks: Sequence[int] | None, owner: str, ttl_s: float) -> Lease:
        """Lease the tasks (None: all), and with them the whole set of every open intent they belong to; all or none.

        Raises:
            LeaseBusyError: naming the holder and when its lease ends.
        """

    def heartbeat(self, leases: Sequence[Lease]) -> None:
        """Prolong the leases by their ``ttl_s``; raises `FencedError` if one is lost."""

    def release(self, lease: Lease) -> None:
        """Give the tasks back; a lost lease is no error."""

    def intents(self, group: str) -> list[Intent]:
        """The open batches of the group."""

    def join(self, group: str, owner: str, ttl_s: float, *, paused: bool = False) -> Membership:
        """State that ``owner`` is there for ``ttl_s`` more seconds and, unless paused, wants a share of the group."""

    def members(self, group: str) -> list[MemberInfo]:
        """Who is there to work for the group, by name."""

    def ask_to_leave(self, group: str, name: str) -> int:
        """Ask the members whose owner's name begins with ``name`` to leave; how many of them live."""

    def leave(self, group: str, owner: str) -> None:
        """Take that back."""

    def begin(self, lease: Lease, intent: Intent) -> None:
        """Write a new intent down, and prolong the lease of its tasks; raises `FencedError`."""

    def resume(self, lease: Lease, batch_id: str) -> Intent:
        """Begin the next attempt of an open intent; a previous attempt that never ended counts as a death."""

    def update(self, lease: Lease, intent: Intent) -> None:
        """Write the intent's mutable part: poison, probe, failures, deaths, running, not_before."""

    def commit(self, commit: Commit) -> list[Appended]:
        """Step 6, atomically: where emits and changelog records went.

        Raises:
            FencedError: another epoch, or other committed offsets, than expected; nothing changed.
            DeadlineOvertakenError: an input holds an unread record stamped before a fired deadline; nothing changed.
            StreamUnavailableError: the outcome may be unknown; `settle` tells.
        """

    def settle(self, commit: Commit) -> bool:
        """After an unclear `commit`: True, it took effect; False, it did not, send it again; else `FencedError`."""

    def add_snapshot(self, lease: Lease, snapshot: NewSnapshot, *, keep: int) -> None:
        """Make a stored snapshot known; forget all but the newest ``keep``, and of the changelog what these cover.

        Nothing of the changelog goes before there are ``keep`` of them.

        Raises:
            FencedError: the lease was lost; nothing changed.
        """

    def snapshots(self, group: str, task: int) -> list[Snapshot]:
        """The known snapshots of the task's changelog, newest first."""

    def take_over(self, group: str, owner: str, ttl_s: float) -> Lease:
        """Lease all tasks, whoever holds them: their holders are fenced. Open batches stay open, and count no death."""

    def swap(self, live: Lease, follower: Lease, *, becomes: str) -> None:
        """Exchange what came of two groups, all of it at once or nothing; the ``follower`` is then called ``becomes``.

        That is their changelogs, snapshots, deadlines, dead letters and code versions. Outputs with their readers,
        requests and members stay, and offsets are equal. What the live group had discarded stays discarded. Open
        batches are void, all epochs are raised, and nobody holds a task of either any more. A third group that was
        called ``becomes`` is deleted.

        Raises:
            FencedError: a lease was lost; nothing changed.
            NotCaughtUpError: their committed offsets differ; nothing changed.
        """

    def view(self, group: str) -> GroupView:
        """Committed offsets, changelog ends and backlog, as of one moment."""

    def seek(
        self, group: str, to: Start | Mapping[TopicPartition, int], *, reset_state: bool = False
    ) -> dict[TopicPartition, int]:
        """Move the committed offsets of a group nobody works on, and void its open batches. Bumps every epoch.

        Raises:
            LeaseBusyError: a task is leased.
            OffsetOutOfRangeError: a position is outside what the log holds.
            InvalidSettingError: ``reset_state`` must be given for a stateful group, whose state then begins empty.
        """

    def due_deadlines(self, group: str, tasks: Sequence[int], until_micros: int, limit: int) -> list[Deadline]:
        """Deadlines due at the time, oldest first."""

    def next_deadline(self, group: str, tasks: Sequence[int]) -> int | None:
        """When the next deadline of the tasks is due."""

    def outputs(self, group: str, *, after: int = 0, limit: int = 1000) -> list[Output]:
        """Committed outputs with a sequence above ``after``, in commit order."""

    def last_output(self, group: str) -> Output | None:
        """The output committed last."""

    def reader(self, group: str, name: str) -> ReaderPosition:
        """How far the named reader of the group's outputs has come; at the beginning if it was never here."""

    def move_reader(self, group: str, name: str, position: ReaderPosition) -> None:
        """Set the named reader's position."""

    def dead_letters(
        self, group: str | None = None, *, status: str | None = None, after: int = 0, limit: int = 1000
    ) -> list[DeadLetter]:
        """Dead letters by number."""

    def dead_letters_by_id(self, group: str, ids: Sequence[int]) -> list[DeadLetter]:
        """The group's dead letters of these numbers, by number."""

    def count_dead_letters(self, group: str, status: str) -> int:
        """How many dead letters of the group have the status."""

    def discard_dead_letters(self, group: str, ids: Sequence[int]) -> int:
        """Mark pending dead letters as discarded; how many were."""

    def references(self) -> Iterator[bytes]:
        """All that may refer to a payload, as of one moment: records, changelogs, dead letters, outputs."""

    def request(self, group: str, kind: str, body: Mapping[str, object]) -> int:
        """Ask the group's lease holder for something; the request's number."""

    def requests(self, group: str, *, status: str = "open") -> list[Request]:
        """The group's requests."""

    def request_status(self, request_id: int) -> str:
        """``open``, ``done``, or ``failed: <why>``."""

    def finish_request(self, lease: Lease, request_id: int, status: str) -> None:
        """Close a request that needs no batch."""
