"""The two contracts of a stream backend: `EventLog`, what happened, and `Coordinator`, what has been done about it.

Both speak in plain data, below. Nothing here knows SQL; nothing above this module may know which backend it talks to.
All times are whole microseconds since 1970 by the *store's* clock.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from djp_dagster.streams.records import EncodedBatch, StoredBatch, TopicPartition
from djp_dagster.streams.topics import Retention, Topic

Start = Literal["earliest", "latest"] | int
"""Where a new group begins: the oldest record, after the newest, or the first one appended at or after a time."""


class Capabilities(msgspec.Struct, frozen=True):
    """What a backend can do; ask instead of guessing.

    Attributes:
        exact_bytes: `Backlog.bytes` is known (else None).
        gapless: offsets have no holes, so ``end - start`` counts records.
        atomic_commit: emits, state, outputs, dead letters and offsets of a `Commit` become visible as one.
        retention_hold: nothing a registered group has yet to do is trimmed below the cap.
    """

    exact_bytes: bool
    gapless: bool
    atomic_commit: bool
    retention_hold: bool


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic as it was created."""

    name: str
    partitions: int
    key: str | None
    max_event_bytes: int
    retention: Retention
    created_micros: int


class PartitionSpan(msgspec.Struct, frozen=True):
    """The offsets a partition holds: ``begin <= offset < end``."""

    begin: int
    end: int
    last_append_micros: int


class Backlog(msgspec.Struct, frozen=True):
    """What has piled up behind a group's committed offsets.

    Attributes:
        events: records not yet committed.
        bytes: their encoded size; None where the backend cannot tell.
        estimated: ``bytes`` was prorated because a committed offset lies inside a stored record batch.
        oldest_micros, newest_micros: append times of the first and the last of them; None when nothing is pending.
        now_micros: the store's clock, never behind ``newest_micros``.
    """

    events: int
    bytes: int | None
    estimated: bool
    oldest_micros: int | None
    newest_micros: int | None
    now_micros: int

    @property
    def age_s(self) -> float:
        """Seconds since the oldest pending record was appended; 0 when nothing is pending."""
        return 0.0 if self.oldest_micros is None else (self.now_micros - self.oldest_micros) / 1e6

    @property
    def idle_s(self) -> float:
        """Seconds since the newest pending record was appended; 0 when nothing is pending."""
        return 0.0 if self.newest_micros is None else (self.now_micros - self.newest_micros) / 1e6


class ProducerStamp(NamedTuple):
    """Who appends, and as which of its publishes: an append of a sequence already seen changes nothing."""

    name: str
    epoch: int
    sequence: int


class Appended(msgspec.Struct, frozen=True):
    """Where records went: ``count`` of them from ``base_offset`` on."""

    topic: str
    partition: int
    base_offset: int
    count: int


class TrimReport(msgspec.Struct, frozen=True):
    """What retention removed from one partition, and which groups lost records by the cap."""

    topic: str
    partition: int
    begin: int
    end: int
    lost_by: tuple[str, ...]


class Watcher(Protocol):
    """Notices that something was appended or requested, without polling tables."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until something changed since the last call, at most ``timeout_s`` seconds; whether it did."""

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


class GroupSpec(msgspec.Struct, frozen=True):
    """The declaration of a consumer group."""

    name: str
    topics: tuple[str, ...]
    start: Start = "earliest"
    stateful: bool = False


class GroupInfo(msgspec.Struct, frozen=True):
    """A consumer group as the store knows it."""

    name: str
    topics: tuple[str, ...]
    tasks: int
    stateful: bool
    created_micros: int


class TaskInfo(msgspec.Struct, frozen=True):
    """Task *i* of a group: partition *i* of all its topics, and who works on it.

    Attributes:
        worth_asking: `Coordinator.acquire` may grant it: nobody holds it, the lease has run out, or it claims to live
            longer than a lease can, so that the store's clock must have gone back.
    """

    task: int
    epoch: int
    owner: str | None
    expires_micros: int
    worth_asking: bool
    last_batch: str | None
    last_attempt: int


class Range(msgspec.Struct, frozen=True, array_like=True):
    """Records ``start <= offset < end`` of one partition."""

    topic: str
    partition: int
    start: int
    end: int

    @property
    def at(self) -> TopicPartition:
        """The partition."""
        return TopicPartition(self.topic, self.partition)


class Deadline(msgspec.Struct, frozen=True, array_like=True):
    """A wake-up a handler asked for: ``key`` of task ``task``, not before ``due_micros``."""

    task: int
    key: str
    due_micros: int


class Poison(msgspec.Struct, frozen=True, array_like=True):
    """A record found to fail, and how."""

    topic: str
    partition: int
    offset: int
    error_type: str
    error: str

    @property
    def position(self) -> tuple[str, int, int]:
        """(topic, partition, offset)."""
        return (self.topic, self.partition, self.offset)


PROCESS_DIED = "ProcessDied"
"""The error type of what is only known to have taken its process with it."""


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """A search for the first failing record: prefixes up to ``good`` pass, ``bad`` fails; ``trying`` is under way.

    Attributes:
        error_type, error: how the prefix of length ``bad`` failed.
        died: how often a process died at ``trying``.
    """

    good: int
    bad: int
    trying: int | None
    error_type: str = ""
    error: str = ""
    died: int = 0


class Intent(msgspec.Struct, frozen=True):
    """A cut batch, written down before anything of it is read; whoever finds it open finishes it unchanged.

    Attributes:
        attempt: counts every start, for paths; never goes back.
        failures, deaths: what the retry budget counts: failed handlers and holders that vanished while handling.
        running: an attempt has begun and has not said how it ended.
        now_micros: the store's clock when the batch was cut; deadlines up to it are due.
        not_before_micros: the next attempt waits until then.
    """

    batch_id: str
    group: str
    kind: Literal["cut", "redrive"]
    tasks: tuple[int, ...]
    ranges: tuple[Range, ...]
    reason: str
    now_micros: int
    deadlines: tuple[Deadline, ...] = ()
    dead_letters: tuple[int, ...] = ()
    requests: tuple[int, ...] = ()
    poison: tuple[Poison, ...] = ()
    probe: Probe | None = None
    attempt: int = 1
    failures: int = 0
    deaths: int = 0
    running: bool = True
    not_before_micros: int = 0


class Lease(msgspec.Struct, frozen=True):
    """The right to work on tasks of a group, until it expires or is fenced by a higher epoch.

    Attributes:
        epochs: the fencing epoch of each leased task.
        intents: the batches found open on these tasks, to be finished first.
    """

    group: str
    owner: str
    ttl_s: float
    epochs: Mapping[int, int]
    intents: tuple[Intent, ...] = ()

    def part(self, tasks: Sequence[int]) -> "Lease":
        """The same lease over fewer tasks."""
        return Lease(self.group, self.owner, self.ttl_s, {task: self.epochs[task] for task in tasks})


class PayloadRef(msgspec.Struct, frozen=True):
    """What a payload store keeps under ``key``, and how to tell that it is that."""

    key: str
    bytes: int
    sha256: str
    media_type: str


class NewDeadLetter(msgspec.Struct, frozen=True):
    """A record a group could not handle, whole, so that it outlives retention."""

    topic: str
    partition: int
    offset: int
    append_micros: int
    raw: bytes
    error_type: str
    error: str


class DeadLetter(msgspec.Struct, frozen=True):
    """A dead letter as stored. ``status``: pending, redriven or discarded."""

    id: int
    group: str
    topic: str
    partition: int
    offset: int
    append_micros: int
    raw: bytes
    error_type: str
    error: str
    status: str
    redrives: int
    batch_id: str
    created_micros: int


class Output(msgspec.Struct, frozen=True):
    """The committed output of a batch."""

    sequence: int
    group: str
    batch_id: str
    attempt: int
    payload: PayloadRef
    committed_micros: int


class Request(msgspec.Struct, frozen=True):
    """What a non-holder asks the lease holder to do; ``body`` depends on ``kind``."""

    id: int
    group: str
    kind: str
    body: Mapping[str, object]
    status: str
    created_micros: int


class Commit(msgspec.Struct, frozen=True):
    """Everything a batch changes; it becomes visible as one, or not at all.

    Attributes:
        intent: the batch; its ranges name the expected and the new committed offsets, its deadlines were fired.
        emits: record batches for other topics.
        changelog: record batches of state changes, and the offset each must be appended at.
        output: the stored output, if the handler returned one.
        dead_letters: new ones.
        redriven: numbers of dead letters handled now; ``redrive_failed``: those that failed again.
        deadlines: new due times by (task, key); None clears one.
        requests: numbers of requests done by this batch.
    """

    lease: Lease
    intent: Intent
    emits: tuple[EncodedBatch, ...] = ()
    changelog: tuple[tuple[EncodedBatch, int], ...] = ()
    output: PayloadRef | None = None
    dead_letters: tuple[NewDeadLetter, ...] = ()
    redriven: tuple[int, ...] = ()
    redrive_failed: tuple[tuple[int, str, str], ...] = ()
    deadlines: Mapping[tuple[int, str], int | None] = {}
    requests: tuple[int, ...] = ()


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

    def join(self, group: str, owner: str, ttl_s: float) -> int:
        """State that ``owner`` wants a share of the group for ``ttl_s`` more seconds; how many live owners do."""

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

    def seek(self, group: str, owner: str, to: Start | Mapping[TopicPartition, int]) -> dict[TopicPartition, int]:
        """Move the committed offsets of a group nobody works on; drops nothing else. Bumps every epoch.

        Raises:
            LeaseBusyError: a task is leased or an intent is open.
            OffsetOutOfRangeError: a position is outside what the log holds.
        """

    def due_deadlines(self, group: str, tasks: Sequence[int], until_micros: int, limit: int) -> list[Deadline]:
        """Deadlines due at the time, oldest first."""

    def next_deadline(self, group: str, tasks: Sequence[int]) -> int | None:
        """When the next deadline of the tasks is due."""

    def outputs(self, group: str, *, after: int = 0, limit: int = 1000) -> list[Output]:
        """Committed outputs with a sequence above ``after``, in commit order."""

    def dead_letters(
        self, group: str | None = None, *, status: str | None = None, after: int = 0, limit: int = 1000
    ) -> list[DeadLetter]:
        """Dead letters by number."""

    def dead_letters_by_id(self, group: str, ids: Sequence[int]) -> list[DeadLetter]:
        """The group's dead letters of these numbers, by number."""

    def discard_dead_letters(self, group: str, ids: Sequence[int]) -> int:
        """Mark pending dead letters as discarded; how many were."""

    def request(self, group: str, kind: str, body: Mapping[str, object]) -> int:
        """Ask the group's lease holder for something; the request's number."""

    def requests(self, group: str, *, status: str = "open") -> list[Request]:
        """The group's requests."""

    def request_status(self, request_id: int) -> str:
        """``open``, ``done``, or ``failed: <why>``."""

    def finish_request(self, lease: Lease, request_id: int, status: str) -> None:
        """Close a request that needs no batch."""
