"""What the two contracts of a stream speak in: plain, immutable data.

All times are whole microseconds since 1970 by the *store's* clock.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.streams.records import EncodedBatch, TopicPartition
from djp_dagster.streams.topics import Retention

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
    """A topic as it was created. ``identity`` differs from any other topic's that ever had the name."""

    name: str
    partitions: int
    key: str | None
    max_event_bytes: int
    retention: Retention
    created_micros: int
    identity: str = ""
    offload_above: int | None = None


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


class GroupSpec(msgspec.Struct, frozen=True):
    """The declaration of a consumer group.

    Attributes:
        version_of: the group of which this is another version: it begins where the state of that one has begun.
        from_what_is_left: though retention may have removed some of it.
    """

    name: str
    topics: tuple[str, ...]
    start: Start = "earliest"
    stateful: bool = False
    code_version: str | None = None
    version_of: str | None = None
    from_what_is_left: bool = False


class GroupInfo(msgspec.Struct, frozen=True):
    """A consumer group as the store knows it. ``code_version`` is that of the consumer that first made it."""

    name: str
    topics: tuple[str, ...]
    tasks: int
    stateful: bool
    created_micros: int
    code_version: str | None = None


class TaskInfo(msgspec.Struct, frozen=True):
    """Task *i* of a group: partition *i* of all its topics, and who works on it.

    Attributes:
        worth_asking: `Coordinator.acquire` may grant it: nobody holds it, the lease has run out, or it claims to live
            longer than a lease can, so that the store's clock must have gone back.
        fired_micros: the moment of its last batch: what was due before then and is there no more, has been fired.
    """

    task: int
    epoch: int
    owner: str | None
    expires_micros: int
    worth_asking: bool
    last_batch: str | None
    last_attempt: int
    fired_micros: int


class MemberInfo(msgspec.Struct, frozen=True):
    """Who is there to work for a group: a worker, or a run.

    Attributes:
        live: it has said so less than a lease ago. If not, it died: whoever ends in order is no member any more.
        paused: it wants no share: a worker that waits after a failure, or a run, which leases all tasks or none.
        asked_to_leave: somebody replaces it.
    """

    owner: str
    live: bool
    paused: bool
    asked_to_leave: bool


class Membership(msgspec.Struct, frozen=True):
    """What a member learns when it says that it is there: how many want a share; and whether to leave."""

    members: int
    asked_to_leave: bool


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


class Snapshot(msgspec.Struct, frozen=True):
    """A copy of a task's state in the payload store.

    Attributes:
        offset: of the changelog, up to which it is.
        payload: a SQLite file, as `djp_dagster.state.file` writes it.
        mentions: keys of payloads that its values refer to, and that must live as long as it does.
    """

    number: int
    task: int
    offset: int
    payload: PayloadRef
    mentions: bytes
    created_micros: int


class NewSnapshot(msgspec.Struct, frozen=True):
    """A snapshot that is stored and not yet known; see `Snapshot`."""

    task: int
    offset: int
    payload: PayloadRef
    mentions: bytes


class GroupView(msgspec.Struct, frozen=True):
    """What a group's state is made of, as of one moment.

    Attributes:
        positions: the committed offsets.
        changelog: the end of each task's changelog.
        backlog: what is pending.
        identity: of the changelog; a seek, or another version of the group, puts another one in its place.
    """

    positions: Mapping[TopicPartition, int]
    changelog: Mapping[int, int]
    backlog: Backlog
    identity: str | None = None


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
        observed: a probe of length ``bad`` has raised; not only a run of the whole, or a death.
    """

    good: int
    bad: int
    trying: int | None
    error_type: str = ""
    error: str = ""
    died: int = 0
    observed: bool = False


class Intent(msgspec.Struct, frozen=True):
    """A cut batch, written down before anything of it is read; whoever finds it open finishes it unchanged.

    Attributes:
        attempt: counts every start, for paths; never goes back.
        failures, deaths: what the retry budget counts: failed handlers and holders that vanished while handling.
        running: an attempt has begun and has not said how it ended.
        now_micros: the store's clock when the batch was cut; deadlines up to it are due.
        horizon_micros: of a batch of one task: everything appended up to then is in it, or in one before; 0: nothing
            is said.
        command: something else to be done than to handle records; its ``kind`` says what.
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
    horizon_micros: int = 0
    command: Mapping[str, Any] | None = None
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


class ReaderPosition(msgspec.Struct, frozen=True):
    """How far a named reader of a group's outputs has come.

    Attributes:
        sequence: everything up to this output is done with.
        proposed: it was given everything up to this output, and nobody has told yet that it succeeded.
        proposer: who was given that, e.g. a run and its step.
    """

    sequence: int = 0
    proposed: int | None = None
    proposer: str | None = None


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
