"""`Joined`: what the handler of a join gets: the parts of one key."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import EventTooLargeError, InvalidSettingError
from djp_dagster.events import Event
from djp_dagster.processing.batch import Failed
from djp_dagster.streams.records import Record, encode_event
from djp_dagster.streams.topics import Topic, key_of

if TYPE_CHECKING:
    import logging

    from djp_dagster.processing.batch import Batch

_fields_of = msgspec.structs.astuple


def emit(batch: "Batch", event: Event, topic: str | None, cause: Record) -> None:
    """Emit an event that its topic takes: what it does not take is the fault of one key, and not of the batch.

    Raises:
        MissingKeyError, InvalidEventError, EventTooLargeError: the topic does not take it.
    """
    target = batch.effects.emits_to(event, topic).topic
    if target.key is not None:
        key_of(event, target.key, target.name)
    size = len(encode_event(_fields_of(event)[: len(Event.__struct_fields__)]))
    if size > target.max_event_bytes and target.offload_above is None:
        raise EventTooLargeError(
            f"event {event.id!r} has {size} bytes, topic {target.name!r} takes {target.max_event_bytes}; raise the "
            "topic's max_event_bytes, or declare it with offload_above='64KiB'",
            topic=target.name,
            bytes=size,
            limit=target.max_event_bytes,
        )
    batch.emit(event, topic=target.name, source=cause)


class Joined(Mapping[str, Any]):
    """The parts of one key, by name: each a `Record`, or a list of them where the join keeps all of a part.

    Attributes:
        key: what they have in common.
        missing: the names of parts that were not there when the deadline passed; empty if all are.
        log: a logger, usable everywhere.

    Example:
        >>> import djp_dagster as djp
        >>> orders, payments = djp.Topic("orders", key="order"), djp.Topic("payments", key="order")
        >>> @djp.join(inputs={"placed": orders, "paid": payments}, key="order")
        ... def ship(parts):
        ...     return parts["placed"].data["item"] if parts["paid"].data["amount"] > 0 else parts.fail("not paid")
        >>> run = djp.testing.run_consumer(ship, {orders: [orders.event(order=1, item="pen")], payments: []})
        >>> run.batches[0].gauges["pending_keys"]
        1
    """

    def __init__(self, batch: "Batch", key: str | int, parts: Mapping[str, Any], missing: tuple[str, ...]) -> None:
        self._batch, self._parts = batch, parts
        self.key, self.missing = key, missing
        self.log: logging.Logger = batch.log
        self.failure: BaseException | None = None
        self._last: Record | None = None

    def __getitem__(self, name: str) -> Any:
        """The part; raises `KeyError` if it is missing: use ``get`` for those that may be."""
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the parts that are there."""
        return iter(self._parts)

    def __len__(self) -> int:
        """How many parts are there."""
        return len(self._parts)

    def __repr__(self) -> str:
        return f"Joined(key={self.key!r}, parts={sorted(self._parts)}, missing={list(self.missing)})"

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return not self.missing

    @property
    def records(self) -> list[Record]:
        """All records, in the order in which they were appended."""
        found = [one for part in self._parts.values() for one in (part if isinstance(part, list) else [part])]
        return sorted(found, key=lambda record: (record.origin.append_micros, record.topic, record.offset))

    @property
    def first_time(self) -> datetime:
        """When the first of them was appended."""
        return self.records[0].append_time

    def emit(self, event: Event, *, topic: "str | Topic | None" = None) -> None:
        """Publish ``event`` with the commit, once; its cause is the part that came last. See `Batch.emit`.

        Raises:
            MissingKeyError, InvalidEventError, EventTooLargeError: the topic does not take it.
        """
        if self._last is None:
            self._last = self.records[-1]
        emit(self._batch, event, topic.name if isinstance(topic, Topic) else topic, self._last)

    def fail(self, error: BaseException | str) -> None:
        """Send all the parts to the dead letters; nothing the handler does for this key has any effect."""
        self.failure = error if isinstance(error, BaseException) else Failed(error)

    def table(self, consumer: Any) -> Any:
        """See `Batch.table`."""
        return self._batch.table(consumer)

    @property
    def state(self) -> None:
        """The state of a join is its buffer.

        Raises:
            InvalidSettingError: always.
        """
        raise InvalidSettingError(
            "a join keeps its parts in its state, and nothing else; have another consumer read what it emits",
            setting="state",
            value=None,
        )
