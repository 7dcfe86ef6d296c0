"""`Effects`: what a handler wants to happen, collected in memory until the one commit."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from djp_dagster.errors import CommitTooLargeError, InvalidEventError, InvalidSettingError
from djp_dagster.events import Event, generated_id_prefix
from djp_dagster.streams.model import NewDeadLetter, Poison
from djp_dagster.streams.publishing import encode, partitioner
from djp_dagster.streams.records import EncodedBatch, Origin, Record

if TYPE_CHECKING:
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.model import TopicInfo

Position = tuple[str, int, int]
_as_tuple = msgspec.structs.astuple


class EmitScope(NamedTuple):
    """What the ids of emitted events are derived from."""

    incarnation: str
    group: str
    batch_id: str


class Mark(NamedTuple):
    """A point of an attempt, to come back to."""

    deadlines: int
    emits: tuple[int, ...]
    failed: int
    letters: int
    counts: dict[str, int]
    gauges: dict[str, float]


class Emits:
    """Events for one topic, each with the record that caused it (None: the batch)."""

    __slots__ = ("causes", "events", "topic")

    def __init__(self, topic: "TopicInfo") -> None:
        self.topic = topic
        self.events: list[Event] = []
        self.causes: list[Record | None] = []


class Effects:
    """Emits, failed records, deadlines and figures of one attempt at one batch.

    Attributes:
        failed: records of the batch that go to the dead letters.
        letters: dead letters of records of earlier batches, which a handler kept.
    """

    def __init__(
        self,
        scope: EmitScope,
        topics: Sequence["TopicInfo"],
        max_emit_bytes: int,
        payloads: "PayloadStore | None" = None,
    ) -> None:
        self._scope, self._payloads = scope, payloads
        self._emits = {topic.name: Emits(topic) for topic in topics}
        self.only = next(iter(self._emits.values())) if len(self._emits) == 1 else None
        self._max_emit_bytes = max_emit_bytes
        self.failed: dict[Position, Poison] = {}
        self.letters: list[NewDeadLetter] = []
        self.counts: dict[str, int] = {}
        self.gauges: dict[str, float] = {}
        self.per_task: set[str] = set()
        self.deadlines: dict[tuple[int, str], int | None] = {}
        self._undo_deadlines: list[tuple[tuple[int, str], dict[tuple[int, str], int | None]]] = []

    def emits_to(self, event: Event, topic: str | None) -> "Emits":
        """What is emitted to ``topic`` (None: the only declared one, or the one of the event's type)."""
        if self.only is not None and topic in (None, self.only.topic.name):
            return self.only
        _require_event(event)
        emits = self._emits.get(event.type if topic is None else topic)
        if emits is None:
            raise InvalidSettingError(
                f"group {self._scope.group!r} emits to {sorted(self._emits)}, not to {topic or event.type!r}; declare "
                "it with @consumer(emits=[...]), or name the topic: batch.emit(event, topic=...)",
                setting="emits",
                value=topic or event.type,
            )
        return emits

    def set_deadline(self, task: int, key: str, due_micros: int | None) -> None:
        """Remember a due time; None forgets one."""
        at = (task, key)
        self._undo_deadlines.append((at, {at: self.deadlines[at]} if at in self.deadlines else {}))
        self.deadlines[at] = due_micros

    def child(self) -> "Effects":
        """Effects of one record, to be taken in with `take_in`, or forgotten."""
        topics = [emits.topic for emits in self._emits.values()]
        return Effects(self._scope, topics, self._max_emit_bytes, self._payloads)

    def take_in(self, child: "Effects") -> None:
        """Add what a `child` holds."""
        for name, emits in child._emits.items():
            self._emits[name].events.extend(emits.events)
            self._emits[name].causes.extend(emits.causes)
        self.failed.update(child.failed)
        self.letters.extend(child.letters)
        self.gauges.update(child.gauges)
        self.per_task.update(child.per_task)
        for at, due in child.deadlines.items():
            self.set_deadline(*at, due)
        for name, number in child.counts.items():
            self.counts[name] = self.counts.get(name, 0) + number

    @property
    def emitted(self) -> int:
        """How many events were emitted."""
        return sum(len(emits.events) for emits in self._emits.values())

    def mark(self) -> Mark:
        """A point to come back to with `undo`. Figures are few; they are copied."""
        emitted = tuple([len(emits.events) for emits in self._emits.values()])
        return Mark(
            len(self._undo_deadlines),
            emitted,
            len(self.failed),
            len(self.letters),
            self.counts.copy(),
            self.gauges.copy(),
        )

    def undo(self, mark: Mark) -> None:
        """Take back everything emitted, failed, set or counted since ``mark``."""
        while len(self._undo_deadlines) > mark.deadlines:
            at, before = self._undo_deadlines.pop()
            del self.deadlines[at]
            self.deadlines.update(before)
        for emits, length in zip(self._emits.values(), mark.emits, strict=True):
            del emits.events[length:]
            del emits.causes[length:]
        while len(self.failed) > mark.failed:
            self.failed.popitem()
        del self.letters[mark.letters :]
        self.counts, self.gauges = mark.counts.copy(), mark.gauges.copy()

    def encode_emits(self) -> tuple[EncodedBatch, ...]:
        """The emitted events as record batches, with derived ids.

        A record passed on keeps its id. An event whose maker gave no id gets one derived from (stream, group, source
        position, topic, ordinal), or, not tied to a record, from (batch id, topic, ordinal): the same at every attempt.

        Raises:
            MissingKeyError, InvalidEventError, EventTooLargeError: naming the event.
            CommitTooLargeError: more than one commit may carry.
        """
        encoded: list[EncodedBatch] = []
        for emits in self._emits.values():
            if emits.events:
                encoded.extend(self._encode(emits))
        total = sum(len(batch.blob) for batch in encoded)
        if total > self._max_emit_bytes:
            raise CommitTooLargeError(
                f"a batch of group {self._scope.group!r} emitted {total} bytes, one commit carries "
                f"{self._max_emit_bytes}; raise its max_emit_bytes; or lower its max_batch and void the "
                "open batch with stream.seek",
                group=self._scope.group,
                bytes=total,
                limit=self._max_emit_bytes,
            )
        return tuple(encoded)

    def _encode(self, emits: Emits) -> list[EncodedBatch]:
        topic = emits.topic
        buckets: list[list[tuple[Any, ...]]] = [[] for _ in range(topic.partitions)]
        # Everything below runs once per emitted event.
        partition_for, derived = partitioner(topic), DerivedIds(self._scope, topic.name)
        id_of, generated = derived.of, generated_id_prefix()
        for event, cause in zip(emits.events, emits.causes, strict=True):
            # A record passed on, whole or as its bare event, stays the event it is.
            if type(event) is not Event or not event.id.startswith(generated) or (cause and event.id == cause.id):
                _require_event(event)
                row = _as_tuple(event)[: len(_FIELDS)]
            else:
                time = event.time if event.time is not None or cause is None else cause.time
                row = (
                    id_of(cause) if cause is not None else derived.of_batch(),
                    event.source,
                    event.type,
                    event.data,
                    time,
                    event.subject,
                    event.datacontenttype,
                    event.dataschema,
                    event.ext,
                )
            buckets[partition_for(event)].append(row)
        return [
            batch for partition, rows in enumerate(buckets) for batch in encode(topic, partition, rows, self._payloads)
        ]


def _require_event(event: object) -> None:
    if not isinstance(event, Event):
        raise InvalidEventError(
            f"only Event objects can be emitted, not {type(event).__name__}; make one with Topic.event(...)",
            attribute=None,
        )


_FIELDS = ("id", "source", "type", "data", "time", "subject", "datacontenttype", "dataschema", "ext")
assert Event.__struct_fields__ == _FIELDS, "an emitted event is encoded as the tuple of its fields, in this order"


class DerivedIds:
    """Ids of emitted events: a hash of what is constant, then offset and ordinal."""

    def __init__(self, scope: EmitScope, topic: str) -> None:
        self._scope, self._topic = scope, topic
        self._partitions: dict[tuple[str, int], tuple[str, dict[int, int]]] = {}
        self._origin: Origin | None = None
        self._prefix, self._ordinals = "", {0: 0}
        self._of_batch = 0

    def of(self, cause: Record) -> str:
        """The next id of an event caused by ``cause``."""
        if cause.origin is not self._origin:
            self._turn_to(cause.origin)
        offset, ordinals = cause.offset, self._ordinals
        ordinal = ordinals.get(offset, 0)
        ordinals[offset] = ordinal + 1
        return f"{self._prefix}-{offset}-{ordinal}"

    def of_batch(self) -> str:
        """The next id of an event not tied to a record."""
        ordinal, self._of_batch = self._of_batch, self._of_batch + 1
        return f"{self._hash(self._scope.batch_id)}-{ordinal}"

    def _turn_to(self, origin: Origin) -> None:
        source = (origin.topic, origin.partition)
        if source not in self._partitions:
            self._partitions[source] = (self._hash(origin.topic, str(origin.partition)), {})
        self._origin = origin
        self._prefix, self._ordinals = self._partitions[source]

    def _hash(self, *source: str) -> str:
        parts = (self._scope.incarnation, self._scope.group, *source, self._topic)
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
