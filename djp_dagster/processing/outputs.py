"""`BatchOutputs`: what a consumer's batches returned, as others read it; resolved from the stream when asked.

A named reader is given every output at least once, in commit order. What it was given is a *proposal* until whoever
asked for it is known to have succeeded: the next `since` of the same name finds out, and goes on behind it, or gives
the same again. So a crash anywhere repeats outputs, and skips none.
"""

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import msgspec

from djp_dagster.claim_check.serializers import load_value
from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.errors import UnknownGroupError
from djp_dagster.streams.model import Output, ReaderPosition
from djp_dagster.streams.stream import EventStream

T = TypeVar("T")
_PAGE = 1000


class BatchOutput(Output, Generic[T], frozen=True):
    """What one batch returned: where it lies, and how to get it.

    Attributes:
        sequence: grows with every commit of an output, over all groups.
        bytes: size as stored.
    """

    store: PayloadStore
    as_arrow: bool = False

    @property
    def bytes(self) -> int:
        """Size as stored."""
        return self.payload.bytes

    @property
    def committed_at(self) -> datetime:
        """When its batch was committed, by the stream's clock."""
        return datetime.fromtimestamp(self.committed_micros / 1e6, timezone.utc)

    def load(self) -> T:
        """The value: a DataFrame (or Arrow table), text, bytes, or JSON values.

        Raises:
            PayloadMissingError, PayloadCorruptError: naming the payload.
        """
        value: T = load_value(self.store, self.payload, as_arrow=self.as_arrow)
        return value


if TYPE_CHECKING:

    class _Subscriptable(Generic[T]):
        """For type checkers: what an output loads as."""

else:

    class _Subscriptable:
        """At run time a subscript is a class of its own, because Dagster wants the annotation of an input to be one."""

        item_type: type | None = None
        _made: ClassVar[dict] = {}

        def __class_getitem__(cls, item):
            if isinstance(item, TypeVar):
                return cls
            made = _Subscriptable._made.get((cls, item))
            if made is None:
                name = f"{cls.__name__}[{getattr(item, '__qualname__', item)}]"
                made = _Subscriptable._made[cls, item] = type(name, (cls,), {"item_type": item, "__doc__": cls.__doc__})
            return made


class BatchOutputs(_Subscriptable[T]):
    """The committed outputs of a group, in commit order.

    A Dagster asset gets them by an input annotated ``BatchOutputs``, or ``BatchOutputs[pd.DataFrame]`` and
    ``BatchOutputs[pa.Table]``, which decide how tables are loaded.

    Args:
        stream: where they are.
        group: whose they are.
        as_arrow: load tables as Arrow tables, not as DataFrames.
        proposer: who asks, e.g. a run and its step; what it is given counts once it has succeeded.
        has_succeeded: whether a proposer has; without it, only `advance` moves a reader.

    Example:
        >>> from djp_dagster import Topic, consumer, run_pending, testing
        >>> orders = Topic("orders")
        >>> @consumer(topic=orders)
        ... def totals(batch):
        ...     return sum(record.data["amount"] for record in batch)
        >>> with testing.memory_stream() as stream:
        ...     _ = totals.register(stream)
        ...     _ = stream.publish(orders, [orders.event(amount=2), orders.event(amount=3)])
        ...     _ = run_pending(stream, totals)
        ...     BatchOutputs(stream, "totals").latest().load()
        5
    """

    def __init__(
        self,
        stream: EventStream,
        group: str,
        *,
        as_arrow: bool = False,
        proposer: str | None = None,
        has_succeeded: Callable[[str], bool] | None = None,
    ) -> None:
        self._stream, self.group, self._as_arrow = stream, group, as_arrow
        self._proposer, self._has_succeeded = proposer, has_succeeded

    def __iter__(self) -> Iterator[BatchOutput[T]]:
        """Every output, oldest first, read page by page; none if the group does not exist yet."""
        return self._after(0)

    def latest(self) -> BatchOutput[T] | None:
        """The output committed last; None if there is none."""
        try:
            output = self._stream.coordinator.last_output(self.group)
        except UnknownGroupError:
            return None
        return None if output is None else self._wrap(output)

    def since(self, reader: str) -> list[BatchOutput[T]]:
        """What the named reader has not done with yet, oldest first; every output at least once.

        In a Dagster step the reader moves on once the step has succeeded. Elsewhere, call `advance`.

        Args:
            reader: a name, kept in the stream.
        """
        coordinator = self._stream.coordinator
        try:
            position = coordinator.reader(self.group, reader)
        except UnknownGroupError:
            return []
        done = self._settled(position)
        outputs = list(self._after(done))
        if self._proposer is None:
            return outputs  # only a look: what a step was given stays its own
        proposed = outputs[-1].sequence if outputs else None
        wanted = ReaderPosition(done, proposed, self._proposer if outputs else None)
        if wanted != position:
            coordinator.move_reader(self.group, reader, wanted)
        return outputs

    def advance(self, reader: str, output: BatchOutput[T]) -> None:
        """Say that the named reader is done with everything up to ``output``."""
        self._stream.coordinator.move_reader(self.group, reader, ReaderPosition(output.sequence))

    def _settled(self, position: ReaderPosition) -> int:
        if position.proposed is None or position.proposer is None or position.proposer == self._proposer:
            return position.sequence
        succeeded = self._has_succeeded is not None and self._has_succeeded(position.proposer)
        return position.proposed if succeeded else position.sequence

    def _after(self, sequence: int) -> Iterator[BatchOutput[T]]:
        try:
            while page := self._stream.outputs(self.group, after=sequence, limit=_PAGE):
                yield from map(self._wrap, page)
                sequence = page[-1].sequence
        except UnknownGroupError:
            return

    def _wrap(self, output: Output) -> BatchOutput[T]:
        return BatchOutput(**msgspec.structs.asdict(output), store=self._stream.payloads, as_arrow=self._as_arrow)
