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
from djp_dagster.processing.handling import add_figures
from djp_dagster.processing.isolation import handle_each
from djp_dagster.processing.views import Views
from djp_dagster.replaying.plan import ReplayPlan
from djp_dagster.replaying.shadowing import ShadowEffects
from djp_dagster.streams.model import Intent
from djp_dagster.streams.records import Record, Undecodable
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic


class ReplayReport(msgspec.Struct, frozen=True):
    """What a replay did.

    Attributes:
        value: what the handler returned; None if there was no record to call it for.
        events: that it was given.
        bytes: the encoded size of what was read.
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
    """Run the consumer's handler on the records of a plan, as one batch; if there are none, it is not called.

    Records that it fails, or, isolated, fails on, are counted, and nothing becomes of them; more than ``max_poison`` of
    the latter end the replay, as they would end a batch. ``on_poison="block"`` blocks nothing here.

    Args:
        stream: where the records are.
        consumer: whose handler; one without state, because state belongs to the whole of a stream: rebuild it.
        plan: which records.
        emit_to: the shadow topic of each topic it emits to; what is emitted to others is dropped.
        resources: the handler's further parameters.
        max_events_per_second: how fast records are read, wanted or not, so that live consumers do not have to wait.
        state_folder: where replicas of tables lie.
        stop: set it to end in the middle, with `InterruptedError`.

    Raises:
        InvalidSettingError: the consumer keeps state, a shadow topic is one it reads or emits to, or the plan is of
            other topics.
        SystemicFailureError: more than ``max_poison`` records failed, or are no events.
    """
    require_replayable(consumer, emit_to or {})
    _require_read(consumer, plan)
    started = time.perf_counter()
    for topic in (*consumer.topics, *consumer.emits, *(emit_to or {}).values()):
        stream.create_topic(topic)
    batch_id = _batch_id(consumer, plan)
    effects = ShadowEffects(stream, consumer, batch_id, emit_to or {})
    source = _Source(stream, consumer, plan, _Pace(max_events_per_second, stop or threading.Event()))
    views = Views(stream, consumer, state_folder)
    now = stream.log.now_micros()
    batch = _ReplayBatch(
        Intent(batch_id, consumer.group, "cut", _tasks_of(plan), plan.ranges, "replay", now),
        source=source,
        size=source.size(),
        effects=effects,
        topics={topic.name: stream.log.topic(topic.name) for topic in consumer.topics},
        fencing_token=0,
        payloads=stream.payloads if stream.has_payloads else None,
        max_poison=consumer.max_poison,
        views=views,
    )
    try:
        value = _run(consumer, batch, consumer.resources_from(resources or {}))
        effects.flush()
    finally:
        views.close()
    seconds = time.perf_counter() - started
    failed, counts, gauges = len(effects.failed), effects.counts, effects.gauges
    return ReplayReport(value, source.events, source.count.total, effects.shadowed, failed, seconds, counts, gauges)


def _run(consumer: Consumer, batch: Batch, resources: Mapping[str, Any]) -> Any:
    if next(batch.chunks(), None) is None:
        return None  # no handler is ever called without records, and few are made for it
    value = None
    if consumer.isolate == "batch":
        value = consumer.handle(batch, resources)
    else:
        handle_each(consumer, batch, resources, None)
    add_figures(batch.effects, resources)
    return value


def _require_read(consumer: Consumer, plan: ReplayPlan) -> None:
    read = sorted({topic.name for topic in consumer.topics})
    for part in plan.ranges:
        if part.topic not in read:
            raise InvalidSettingError(
                f"the plan names topic {part.topic!r}, and {consumer.group!r} reads {read}",
                setting="plan",
                value=part.topic,
            )


def require_replayable(consumer: Consumer, emit_to: Mapping[Topic, Topic]) -> None:
    """Refuse what no replay can do.

    Raises:
        InvalidSettingError: as `replay`.
    """
    if consumer.stateful:
        raise InvalidSettingError(
            f"consumer {consumer.group!r} keeps state, which belongs to the whole of its stream; rebuild it beside the "
            "live one instead: build_rebuild_job, or djp_dagster.follow and promote",
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
    """Holds reading up to the wanted rate; what took long before does not let more pass at once later."""

    def __init__(self, per_second: float | None, stop: threading.Event) -> None:
        if per_second is not None and not per_second > 0:
            raise InvalidSettingError(
                f"max_events_per_second={per_second!r} must be above 0",
                setting="max_events_per_second",
                value=per_second,
            )
        self._per_second, self._stop = per_second, stop
        self._free_at = 0.0

    def passes(self, events: int) -> None:
        """So many more; returns when they may."""
        early_s = 0.0
        if self._per_second is not None:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + events / self._per_second
            early_s = self._free_at - now
        if self._stop.wait(early_s) if early_s > 0 else self._stop.is_set():
            raise InterruptedError(
                "the replay was told to stop; it moves no offsets, so nothing is lost: start it again"
            )


class _Source:
    """The records of a plan, piece by piece, as often as they are wanted.

    Attributes:
        events: how many a reader was given, at most.
        count: of the bytes read.
    """

    def __init__(self, stream: EventStream, consumer: Consumer, plan: ReplayPlan, pace: _Pace) -> None:
        self._stream, self._plan, self._pace = stream, plan, pace
        self._scope = f"{stream.incarnation[:12]}/{consumer.group}"
        self._keys = {topic.name: topic.key for topic in consumer.topics}
        self.count = ByteCount()
        self.events = 0

    def __call__(self) -> Iterator[tuple[list[Record], list[Undecodable]]]:
        stream, plan, given = self._stream, self._plan, 0
        pieces = read_ranges(stream.log, plan.ranges, frozenset(), self._scope, self.count, stream.claimed)
        for read, bad in pieces:
            self._pace.passes(len(read))
            records = read if plan.is_whole else plan.pick(read, self._keys)
            given += len(records)
            self.events = max(self.events, given)
            yield records, bad

    def size(self) -> int:
        """How many records there are; -1: reading them tells."""
        if self._plan.is_whole:
            return sum(part.end - part.start for part in self._plan.ranges)
        return -1
