"""`Table`: the latest value of each key, kept from a topic of updates."""

import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from djp_dagster.errors import CoPartitionError, InvalidValueError, MissingKeyError
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import DEFAULT_MAX_BATCH, DEFAULT_RETRY, DEFAULT_SNAPSHOTS, Consumer
from djp_dagster.processing.failures import RetryPolicy
from djp_dagster.processing.threshold import Threshold
from djp_dagster.state.file import Change, StateFile
from djp_dagster.state.snapshots import SnapshotPolicy
from djp_dagster.state.task_state import TaskState
from djp_dagster.streams.records import Record
from djp_dagster.streams.stream import StartPosition
from djp_dagster.streams.topics import Topic, key_of
from djp_dagster.units import parse_bytes

REBUILD = "rebuild"
"""The command that makes a table anew from its topic, and corrects what differs."""
_SEQUENCE_ATTRIBUTE = "sequence"


class Table(Consumer):
    """The latest value of each key of a topic: a consumer that keeps a table, for others to read.

    It is an asset like any consumer, kept up to date by a worker, a sensor's runs, or *Materialize*, and read from
    anywhere: by ``batch.table(...)`` in a handler that declares it, by ``stream.view(...)`` in an op, an asset, or any
    process. Readers see what was committed: they are behind the topic by as much as whoever keeps the table is, and
    `StateView.staleness_s` says by how much.

    Without a sequence the event appended last wins, whatever it says of itself. With one, an event that is older than
    what is there changes nothing, however late it comes; also after the key was deleted.

    Args:
        name: of its consumer group and asset.
        topic: the updates; partitioned by the same key.
        key: the field of ``data`` that is the key; the topic's unless given.
        value: the field of ``data`` that is the value, or several for an object of them; all of the data unless given.
            An event without data, or whose value is null, deletes the key.
        sequence: the field of ``data`` that orders the updates of a key: numbers, or strings, all of one kind; or
            ``"sequence"`` with no such field for the CloudEvents attribute of that name. Equal ones replace each other.
        max_batch, retry, snapshots, max_poison, start, asset_key: as of `consumer`.

    Raises:
        CoPartitionError: the topic is not partitioned by the key.
        InvalidSettingError: naming the argument, its value and what is allowed.

    Example:
        >>> import djp_dagster as djp
        >>> updates = djp.Topic("user_updates", partitions=4, key="user_id")
        >>> emails = djp.Table("user_emails", topic=updates, value="email", sequence="version")
        >>> new = updates.event(user_id=1, email="new@b.c", version=2)
        >>> old = updates.event(user_id=1, email="old@b.c", version=1)
        >>> djp.testing.run_consumer(emails, [new, old]).state
        {1: 'new@b.c'}
    """

    keyed_by_topic = True

    def __init__(
        self,
        name: str,
        *,
        topic: Topic,
        key: str | None = None,
        value: str | Sequence[str] | None = None,
        sequence: str | None = None,
        max_batch: Threshold = DEFAULT_MAX_BATCH,
        retry: RetryPolicy = DEFAULT_RETRY,
        snapshots: SnapshotPolicy | None = DEFAULT_SNAPSHOTS,
        max_poison: int = 1_000,
        start: StartPosition = "earliest",
        asset_key: str | Sequence[str] | None = None,
    ) -> None:
        key = topic.key if key is None else key
        if key is None or topic.key != key:
            raise CoPartitionError(
                f"table {name!r} is by {key!r}, but topic {topic.name!r} is partitioned by {topic.key!r}, so updates "
                "of one key may overtake each other; declare the topic with that key",
                topics=[topic.name],
                key=key,
            )
        self.key, self.value, self.sequence = key, value, sequence
        super().__init__(
            _keep,
            topics=[topic],
            emits=[],
            group=name,
            max_batch=max_batch,
            stateful=True,
            isolate="batch",
            on_poison="dead_letter",
            max_poison=max_poison,
            retry=retry,
            start=start,
            max_emit_bytes=parse_bytes("1MiB"),
            code_version=f"table/1/{key}/{value}/{sequence}",
            asset_key=asset_key,
            snapshots=snapshots,
        )
        self.__name__ = name
        self.__doc__ = f"The latest {_named(value)} of each {key}, from {topic.name}."

    def handle(self, batch: Batch, resources: Mapping[str, Any]) -> None:
        """Apply updates; or, if asked to, make the table anew and correct what differs."""
        if batch.command is not None and batch.command["kind"] == REBUILD:
            self._rebuild(batch)
            return
        for records in batch.chunks():
            self._apply(records, batch.state, batch)
        batch.count("updates", len(batch))

    def visible(self, value: Any) -> Any:
        """A reader sees the value without its sequence; nothing of deleted keys."""
        return value if self.sequence is None else value[1]

    def _apply(self, records: Sequence[Record], state: TaskState, batch: Batch) -> None:
        updates: list[tuple[Record, str | int, Any, Any]] = []
        for record in records:
            try:
                updates.append((record, self._key_of(record), self._value_of(record), self._sequence_of(record)))
            except (MissingKeyError, InvalidValueError) as error:
                batch.fail(record, error)
        if self.sequence is None:
            for _, key, value, _ in updates:
                if value is None:
                    state.delete(key)
                else:
                    state.set(key, value)
            return
        state.get_many({key for _, key, _, _ in updates})
        for record, key, value, sequence in updates:
            known = state.get(key)
            try:
                if known is None or sequence >= known[0]:
                    # A deleted key stays, as nothing: or an older update would bring it back.
                    state.set(key, [sequence, value])
            except TypeError:
                batch.fail(
                    record,
                    InvalidValueError(f"sequence {sequence!r} of key {key!r} does not compare with {known[0]!r}"),
                )

    def _key_of(self, record: Record) -> str | int:
        return key_of(record, self.key, record.topic)

    def _value_of(self, record: Record) -> Any:
        data: Any = record.data
        if self.value is None or data is None:
            return data
        if isinstance(self.value, str):
            return _field(data, self.value)
        return {name: _field(data, name) for name in self.value}

    def _sequence_of(self, record: Record) -> Any:
        if self.sequence is None:
            return None
        found = _field(record.data, self.sequence)
        if found is None and self.sequence == _SEQUENCE_ATTRIBUTE:
            found = (record.ext or {}).get(_SEQUENCE_ATTRIBUTE)
        if isinstance(found, bool) or not isinstance(found, int | float | str) or found != found:  # noqa: PLR0124
            raise InvalidValueError(
                f"event {record.id!r} has no sequence: data[{self.sequence!r}] must be a number or a string, not "
                f"{found!r}",
                event_id=record.id,
            )
        return found

    def _rebuild(self, batch: Batch) -> None:
        """Fold the whole topic into an empty table, then change of the live one only what differs."""
        if len(batch) < sum(part.start for part in batch.ranges):
            # It was all there when this was asked for: giving up for good would block the updates behind it.
            batch.log.error("table %s is kept as it is: retention has removed the beginning of its topic", self.group)
            return
        batch.max_poison = sys.maxsize  # what is no event is a dead letter since it was first handled
        with tempfile.TemporaryDirectory(prefix="djp-rebuild-") as folder:
            file = StateFile(Path(folder) / "table.db", "rebuild", self.group)
            try:
                for count, records in enumerate(batch.chunks()):
                    state = TaskState(file)
                    self._apply(records, state, batch)
                    file.apply(state.changes(), count, count + 1)
                batch.effects.failed.clear()  # so is what cannot be applied
                keys, differing = _correct(batch.state, TaskState(file))
            finally:
                file.close()
        batch.gauge("keys", keys, per_task=True)
        batch.count("corrected_keys", differing)


def _correct(live: TaskState, anew: TaskState) -> tuple[int, int]:
    """Make ``live`` hold what ``anew`` holds; how many keys that is, and how many differed.

    Both as bytes: what is to be corrected may be nothing that can be decoded.
    """
    keys = 0
    changes: list[Change] = []
    theirs = anew.range()
    other = next(theirs, None)
    for key, raw in live.range():
        while other is not None and other[0] < key:
            changes.append(other)
            other, keys = next(theirs, None), keys + 1
        if other is None or other[0] != key:
            changes.append((key, None))
            continue
        if other[1] != raw:
            changes.append(other)
        other, keys = next(theirs, None), keys + 1
    while other is not None:
        changes.append(other)
        other, keys = next(theirs, None), keys + 1
    for key, value in changes:
        live.change(key, value)
    return keys, len(changes)


def _keep(batch: Batch) -> None:
    """The latest value of each key."""


def _field(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _named(value: str | Iterable[str] | None) -> str:
    if value is None:
        return "data"
    return value if isinstance(value, str) else ", ".join(value)
