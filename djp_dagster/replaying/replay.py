"""`replay`: run a consumer's handler on a plan; steps 3 and 4 of `djp_dagster.replaying`."""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from djp_dagster.errors import InvalidSettingError
from djp_dagster.processing.batch import Batch, ByteCount, read_ranges
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.effects import Effects, EmitScope
from djp_dagster.processing.isolation import handle_each
from djp_dagster.replaying.plan import ReplayPlan
from djp_dagster.state.view import StateView
from djp_dagster.streams.model import Intent
from djp_dagster.streams.records import Record, Undecodable
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic, key_of

_EMITS_PER_PUBLISH = 5_000


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay did.

    Attributes:
        value: what the handler returned.
        events, bytes: that it was given, and their encoded size.
        emitted: to shadow topics; what was dropped is not counted.
        failed: records that an isolated handler failed on; nothing becomes of them.
        counts, gauges: as handlers make them.
    """

    value: Any
    events: int
    bytes: int
    emitted: int
    failed: int
    seconds: float
    counts: Mapping[str, int]
    gauges: Mapping[str, float]


def replay(
    stream: EventStream,
    consumer: Consumer,
    plan: ReplayPlan,
    *,
    emit_to: Mapping[Topic, Topic] | None = None,
    resources: Mapping[str, Any] | None = None,
    max_events_per_second: float | None = None,
    state_folder: Path | None = None,
    stop: threading.Event | None = None,
) -> ReplayReport:
    """Run the consumer's handler on the records of a plan, as one batch.

    Args:
        stream: where the records are.
        consumer: whose handler; one without state, because state belongs to the whole of a stream: rebuild it.
        plan: which records.
        emit_to: the shadow topic of each topic it emits to; what is emitted to others is dropped.
        resources: the handler's further parameters.
        max_events_per_second: so that live consumers do not have to wait for the disk.
        state_folder: where replicas of tables lie.
        stop: set it to end in the middle, with `InterruptedError`.

    Raises:
        InvalidSettingError: the consumer keeps state, or a shadow topic is one it reads or emits to.
    """
    _require_replayable(consumer, emit_to or {})
    started = time.perf_counter()
    for topic in (*consumer.topics, *consumer.emits, *(emit_to or {}).values()):
        stream.create_topic(topic)
    effects = _ReplayEffects(stream, consumer, plan, emit_to or {})
    count = ByteCount()
    pace = _Pace(max_events_per_second, stop or threading.Event())
    source = _Source(stream, consumer, plan, count, pace)
    views: dict[str, StateView] = {}

    def view(table: Consumer) -> StateView:
        if table.group not in views:
            views[table.group] = StateView(stream, table, folder=state_folder)
        return views[table.group]

    batch = _ReplayBatch(
        Intent(_batch_id(consumer, plan), consumer.group, "cut", _tasks_of(plan), plan.ranges, "replay", 0),
        source=source,
        size=source.size(),
        effects=effects,
        topics={topic.name: stream.log.topic(topic.name) for topic in consumer.topics},
        fencing_token=0,
        payloads=stream.payloads if stream.has_payloads else None,
        max_poison=consumer.max_poison,
        views=view if consumer.tables else None,
    )
    try:
        value = _run(consumer, batch, consumer.resources_from(resources or {}))
        effects.flush()
    finally:
        for opened in views.values():
            opened.close()
    seconds = time.perf_counter() - started
    return ReplayReport(
        value, pace.events, count.total, effects.shadowed, len(effects.failed), seconds, effects.counts, effects.gauges
    )


def _run(consumer: Consumer, batch: Batch, resources: Mapping[str, Any]) -> Any:
    if consumer.isolate == "batch":
        return consumer.handle(batch, resources)
    handle_each(consumer, batch, resources, None)
    return None


def _require_replayable(consumer: Consumer, emit_to: Mapping[Topic, Topic]) -> None:
    if consumer.stateful:
        raise InvalidSettingError(
            f"consumer {consumer.group!r} keeps state, which belongs to the whole of its stream; rebuild it beside the "
            "live one instead (djp_dagster.Rebuild, or its rebuild job)",
            setting="consumer",
            value=consumer.group,
        )
    emits = {topic.name for topic in consumer.emits}
    for topic, shadow in emit_to.items():
        if topic.name not in emits:
            raise InvalidSettingError(
                f"emit_to names {topic.name!r}, which {consumer.group!r} does not emit to; it emits to {sorted(emits)}",
                setting="emit_to",
                value=topic.name,
            )
        if (shadow.partitions, shadow.key) != (topic.partitions, topic.key):
            raise InvalidSettingError(
                f"the shadow topic {shadow.name!r} must have the partitions and the key of {topic.name!r}: "
                f"{topic.partitions} by {topic.key!r}",
                setting="emit_to",
                value=shadow.name,
            )
        if shadow.name in emits | {one.name for one in consumer.topics}:
            raise InvalidSettingError(
                f"a replay of {consumer.group!r} must not emit to {shadow.name!r}, where live events are; name another "
                "topic in emit_to",
                setting="emit_to",
                value=shadow.name,
            )


def _tasks_of(plan: ReplayPlan) -> tuple[int, ...]:
    return tuple(sorted({part.partition for part in plan.ranges})) or (0,)


def _batch_id(consumer: Consumer, plan: ReplayPlan) -> str:
    """The same for the same records, so that what a replay does outside can be told from what it did before."""
    said = msgspec.json.encode(
        [consumer.group, plan.ranges, plan.window, sorted(map(str, plan.keys or ())), sorted(plan.ids or ())]
    )
    return f"replay-{hashlib.blake2b(said, digest_size=12).hexdigest()}"


class _ReplayBatch(Batch):
    is_replay = True

    def __len__(self) -> int:
        """How many records it holds; if the plan picks some, they are read for it, once."""
        if self._size < 0:
            self._size = sum(len(records) for records, _ in self._source())
        return self._size

    def set_deadline(self, *_: Any, **__: Any) -> None:
        """A replay waits for nothing."""

    def clear_deadline(self, *_: Any, **__: Any) -> None:
        """A replay waits for nothing."""


class _Pace:
    """Counts events, and holds them up to the wanted rate."""

    def __init__(self, per_second: float | None, stop: threading.Event) -> None:
        if per_second is not None and not per_second > 0:
            raise InvalidSettingError(
                f"max_events_per_second={per_second!r} must be above 0",
                setting="max_events_per_second",
                value=per_second,
            )
        self._per_second, self._stop = per_second, stop
        self._began = time.monotonic()
        self.events = self._passed = 0

    def restart(self) -> None:
        """The batch is read from its beginning."""
        self.events = 0

    def passes(self, events: int) -> None:
        """So many more; returns when they may."""
        self.events += events
        self._passed += events
        early_s = 0.0
        if self._per_second is not None:
            early_s = self._began + self._passed / self._per_second - time.monotonic()
        if self._stop.wait(early_s) if early_s > 0 else self._stop.is_set():
            raise InterruptedError(
                "the replay was told to stop; it moves no offsets, so nothing is lost: start it again"
            )


class _Source:
    """The records of a plan, piece by piece, as often as they are wanted."""

    def __init__(
        self, stream: EventStream, consumer: Consumer, plan: ReplayPlan, count: ByteCount, pace: _Pace
    ) -> None:
        self._stream, self._plan, self._count, self._pace = stream, plan, count, pace
        self._scope = f"{stream.incarnation[:12]}/{consumer.group}"
        self._keys = {topic.name: topic.key for topic in consumer.topics}

    def __call__(self) -> Iterator[tuple[list[Record], list[Undecodable]]]:
        self._pace.restart()
        stream, plan = self._stream, self._plan
        pieces = read_ranges(stream.log, plan.ranges, frozenset(), self._scope, self._count, stream.claimed)
        for read, bad in pieces:
            records = read if plan.is_whole else [record for record in read if self._wants(record)]
            self._pace.passes(len(records))
            yield records, bad

    def _wants(self, record: Record) -> bool:
        plan = self._plan
        if not plan.wants(record) or (plan.ids is not None and record.id not in plan.ids):
            return False
        return plan.keys is None or key_of(record, self._keys.get(record.topic), record.topic) in plan.keys

    def size(self) -> int:
        """How many records there are; -1: reading them tells."""
        if self._plan.is_whole:
            return sum(part.end - part.start for part in self._plan.ranges)
        return -1


class _ReplayEffects(Effects):
    """Emits of a replay: dropped, or published to a shadow topic some thousand at a time."""

    def __init__(
        self, stream: EventStream, consumer: Consumer, plan: ReplayPlan, emit_to: Mapping[Topic, Topic]
    ) -> None:
        scope = EmitScope(stream.incarnation, consumer.group, _batch_id(consumer, plan))
        super().__init__(scope, [stream.log.topic(topic.name) for topic in consumer.emits], 1 << 62)
        self._stream, self._shadows = stream, {topic.name: shadow for topic, shadow in emit_to.items()}
        self.shadowed = 0
        self._held = 0
        for emits in self._emits.values():
            shadow = emits.topic.name in self._shadows
            emits.causes = _Counted(self._one_more) if shadow else _Dropped()
            emits.events = [] if shadow else _Dropped()
        self._producer = None if not emit_to else stream.producer(f"replay-{scope.batch_id}")
        self._sequence = 0

    def _one_more(self) -> None:
        self._held += 1
        if self._held >= _EMITS_PER_PUBLISH:
            self.flush()

    def flush(self) -> None:
        """Publish what is held; what an earlier try of the same replay has published is passed over."""
        if self._producer is None or not self._held:
            return
        for emits in self._emits.values():
            if emits.topic.name not in self._shadows:
                continue
            shadow = self._shadows[emits.topic.name].name
            placed = [msgspec.structs.replace(batch, topic=shadow) for batch in self._encode(emits)]
            self._sequence += 1
            if self._sequence > self._producer.last_sequence:
                self._producer.append(placed, sequence=self._sequence)
            self.shadowed += len(emits.events)
            emits.events.clear()
            emits.causes.clear()
        self._held = 0

    def encode_emits(self) -> tuple[Any, ...]:
        """Nothing is left to be committed."""
        return ()


class _Dropped(list[Any]):
    """Takes everything, keeps nothing."""

    def append(self, _: object) -> None:
        """Nothing."""

    def extend(self, _: object) -> None:
        """Nothing."""


class _Counted(list[Any]):
    """Says when something is added."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self._told = told

    def append(self, cause: object) -> None:
        """One more."""
        super().append(cause)
        self._told()
