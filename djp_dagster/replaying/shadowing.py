"""`ShadowEffects`: what a replay emits is dropped, or published to shadow topics, some thousand at a time."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from djp_dagster.events import Event, generated_id_prefix
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.effects import DerivedIds, Effects, Emits, EmitScope, Mark
from djp_dagster.streams.records import Origin, Record
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic

_EMITS_PER_PUBLISH = 5_000
_PAGE = 4_096
_BYTE = 255


class ShadowEffects(Effects):
    """Emits of a replay.

    They are published between records, never in the middle of one that may yet fail. Where they are divided follows
    from the records and the handler alone, so that a later try of the same replay divides them alike.

    Attributes:
        shadowed: how many went to shadow topics.
    """

    def __init__(self, stream: EventStream, consumer: Consumer, batch_id: str, emit_to: Mapping[Topic, Topic]) -> None:
        topics = [stream.log.topic(topic.name) for topic in consumer.emits]
        payloads = stream.payloads if stream.has_payloads else None
        super().__init__(EmitScope(stream.incarnation, consumer.group, batch_id), topics, 1 << 62, payloads)
        self._shadows = {topic.name: shadow.name for topic, shadow in emit_to.items()}
        self._shadowed = [emits for emits in self._emits.values() if emits.topic.name in self._shadows]
        self._ids = {emits.topic.name: _Ids(self._scope, emits.topic.name) for emits in self._shadowed}
        for emits in self._emits.values():
            if emits not in self._shadowed:
                emits.events, emits.causes = _Dropped(), _Dropped()
            elif consumer.isolate == "batch":
                emits.causes = _Watched(self._flush_if_many)
        self._producer = None if not emit_to else stream.producer(self._producer_name(stream, consumer))
        self._sequence = self.shadowed = 0

    def _producer_name(self, stream: EventStream, consumer: Consumer) -> str:
        """The same for the same records, code and shadow topics: what it has published need not be published again."""
        shadows = [[name, stream.log.topic(shadow).identity] for name, shadow in sorted(self._shadows.items())]
        said = msgspec.json.encode([self._scope.batch_id, consumer.code_version, shadows])
        return f"replay-{hashlib.blake2b(said, digest_size=12).hexdigest()}"

    def mark(self) -> Mark:
        """See `Effects.mark`; all records before are done with."""
        self._flush_if_many()
        return super().mark()

    def take_in(self, child: Effects) -> None:
        """See `Effects.take_in`; this record is done with."""
        super().take_in(child)
        self._flush_if_many()

    def _flush_if_many(self) -> None:
        if sum(len(emits.events) for emits in self._shadowed) >= _EMITS_PER_PUBLISH:
            self.flush()

    def flush(self) -> None:
        """Publish what is held; what an earlier try of the same replay has published is passed over."""
        held = sum(len(emits.events) for emits in self._shadowed)
        if self._producer is None or not held:
            return
        placed = []
        for emits in self._shadowed:
            self._settle(emits)
            shadow = self._shadows[emits.topic.name]
            placed += [msgspec.structs.replace(batch, topic=shadow) for batch in self._encode(emits)]
        self._sequence += 1
        if self._sequence > self._producer.last_sequence:
            self._producer.append(placed, sequence=self._sequence)
        for emits in self._shadowed:
            emits.events.clear()
            emits.causes.clear()
        self.shadowed += held

    def _settle(self, emits: Emits) -> None:
        """Give events the ids and times of the live consumer here: `Effects._encode` would begin to count anew."""
        generated, ids = generated_id_prefix(), self._ids[emits.topic.name]
        for index, (event, cause) in enumerate(zip(emits.events, emits.causes, strict=True)):
            if type(event) is Event and event.id.startswith(generated) and not (cause and event.id == cause.id):
                time = event.time if event.time is not None or cause is None else cause.time
                derived = ids.of(cause) if cause is not None else ids.of_batch()
                emits.events[index] = msgspec.structs.replace(event, id=derived, time=time)


class _Ids(DerivedIds):
    """The ids that the live consumer derives, in a byte of memory for each record."""

    def _turn_to(self, origin: Origin) -> None:
        source = (origin.topic, origin.partition)
        if source not in self._partitions:
            self._partitions[source] = (self._hash(origin.topic, str(origin.partition)), _Ordinals())
        super()._turn_to(origin)


class _Ordinals(dict[int, int]):
    """How many events each record has caused: in pages of bytes, and here what a byte cannot say."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, bytearray] = {}

    def get(self, offset: int, default: int = 0) -> int:  # type: ignore[override]
        """The number of an offset."""
        page = self._pages.get(offset // _PAGE)
        number = default if page is None else page[offset % _PAGE]
        return number if number < _BYTE else self[offset]

    def __setitem__(self, offset: int, number: int) -> None:
        page = self._pages.get(offset // _PAGE)
        if page is None:
            page = self._pages[offset // _PAGE] = bytearray(_PAGE)
        page[offset % _PAGE] = min(number, _BYTE)
        if number >= _BYTE:
            super().__setitem__(offset, number)


class _Dropped(list[Any]):
    """Takes everything, keeps nothing."""

    def append(self, _: object) -> None:
        """Nothing."""

    def extend(self, _: object) -> None:
        """Nothing."""


class _Watched(list["Record | None"]):
    """Says when something was added."""

    def __init__(self, told: Any) -> None:
        super().__init__()
        self._told = told

    def append(self, cause: "Record | None") -> None:
        """One more."""
        super().append(cause)
        self._told()
