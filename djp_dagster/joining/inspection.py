"""What waits in an event buffer: listed and shown from a replica, expired by whoever holds it. Needs no declaration."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import msgspec

from djp_dagster.errors import InvalidSettingError
from djp_dagster.joining.entries import NEVER, Entry, Status, decode_entry
from djp_dagster.joining.rules import EXPIRE
from djp_dagster.partitioning import partition_of
from djp_dagster.processing.commands import request_command
from djp_dagster.state.view import StateView
from djp_dagster.streams.model import GroupInfo
from djp_dagster.streams.records import Origin, Record, TopicPartition
from djp_dagster.streams.stream import EventStream

if TYPE_CHECKING:
    from djp_dagster.processing.consumer import Consumer

_KEYS_PER_COMMAND = 10_000


class BufferedKey(msgspec.Struct, frozen=True):
    """One key of an event buffer.

    Attributes:
        status: ``pending``; or ``completed``, ``expired``, ``failed``.
        parts: how many events of each part wait.
        due_micros: when it expires, by the join's clock; None for never, or if it is done.
        since_micros: when it was done; None if it is pending.
        bytes: of the events that wait.
    """

    key: str | int
    status: str
    parts: dict[str, int]
    due_micros: int | None
    since_micros: int | None
    bytes: int


class EventBuffer:
    """The event buffer of a join's group, as it is now. Close it after use.

    Args:
        stream: where it is.
        group: of the join.
        folder: where the replica of its state lies.

    Raises:
        UnknownGroupError: nothing has run yet.
        InvalidSettingError: the group keeps no event buffer.
    """

    def __init__(self, stream: EventStream, group: str, *, folder: Path | None = None) -> None:
        self._stream = stream
        if not stream.coordinator.group(group).stateful:
            raise InvalidSettingError(
                f"group {group!r} keeps no state, so it is no join; see: djp groups", setting="group", value=group
            )
        self._view = StateView(stream, cast("Consumer", _Undeclared(stream, group)), folder=folder)

    def __enter__(self) -> "EventBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the replica."""
        self._view.close()

    @property
    def as_of(self) -> Mapping[TopicPartition, int]:
        """The committed offsets it is of."""
        return self._view.as_of

    def __iter__(self) -> Iterator[BufferedKey]:
        """All keys, those that are done as well."""
        for key, value in self._view.items():
            if isinstance(key, str | int):
                yield _buffered(key, _decoded(value))

    def records(self, key: str | int) -> dict[str, list[Record]]:
        """The events of ``key`` that wait, by part; empty if none do."""
        value = self._view.get(key)
        entry = None if value is None else _decoded(value)
        if not isinstance(entry, Entry):
            return {}
        origin = Origin("", 0, 0, "", self._stream.claimed)
        return {name: [part.record(origin) for part in found] for name, found in entry.parts.items()}

    def find(self, key: str | int) -> BufferedKey | None:
        """What there is of ``key``."""
        value = self._view.get(key)
        return None if value is None else _buffered(key, _decoded(value))


def request_expiry(stream: EventStream, group: str, keys: Iterable[str | int]) -> list[int]:
    """Ask whoever holds the buffer to expire ``keys`` now; the numbers of the requests.

    What becomes of their parts is what the join does at a deadline.
    """
    tasks = stream.coordinator.group(group).tasks
    by_task: dict[int, list[str | int]] = {}
    for key in keys:
        by_task.setdefault(partition_of(key, tasks), []).append(key)
    commands = [
        {"kind": EXPIRE, "task": task, "keys": found[start : start + _KEYS_PER_COMMAND]}
        for task, found in sorted(by_task.items())
        for start in range(0, len(found), _KEYS_PER_COMMAND)
    ]
    return request_command(stream, group, commands)


class _Undeclared:
    """A group whose declaration is not at hand, for a view of what it keeps."""

    stateful = keyed_by_topic = True

    def __init__(self, stream: EventStream, group: str) -> None:
        self._info, self.group = stream.coordinator.group(group), group

    def register(self, stream: EventStream) -> GroupInfo:
        """It is there."""
        return self._info

    def visible(self, value: Any) -> Any:
        """All of it."""
        return value


def _decoded(value: Any) -> Entry | tuple[str, int]:
    try:
        found = decode_entry(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _no_join() from error
    if isinstance(found, tuple) and found[0] not in get_args(Status):
        raise _no_join()
    return found


def _no_join() -> InvalidSettingError:
    return InvalidSettingError(
        "this group keeps something else than an event buffer: it is no join", setting="group", value=None
    )


def _buffered(key: str | int, entry: Entry | tuple[str, int]) -> BufferedKey:
    if isinstance(entry, tuple):
        return BufferedKey(key, entry[0], {}, None, entry[1], 0)
    parts = {name: len(found) for name, found in entry.parts.items()}
    return BufferedKey(key, "pending", parts, None if entry.due == NEVER else entry.due, None, entry.size)
