"""What differs between two versions of a consumer's state."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from djp_dagster.processing.consumer import Consumer
from djp_dagster.state.keys import StateKey, encode_key
from djp_dagster.state.view import StateView
from djp_dagster.streams.model import GroupInfo
from djp_dagster.streams.records import encode_value
from djp_dagster.streams.stream import EventStream
from djp_dagster.versions.promotion import Role

_EXAMPLES = 20


class Comparison(msgspec.Struct, frozen=True):
    """The live version against a follower.

    Attributes:
        keys, other_keys: how many there are in each.
        only_here, only_there: keys that are in one of them only.
        differing: keys whose values differ.
        examples: some of all three: key, value here, value there; None is nothing.
        behind: how many records the follower lacked when they were compared.
    """

    keys: int
    other_keys: int
    only_here: int
    only_there: int
    differing: int
    examples: tuple[tuple[Any, Any, Any], ...]
    behind: int

    @property
    def equal(self) -> bool:
        """Whether they hold the same."""
        return not (self.only_here or self.only_there or self.differing)


def compare(
    stream: EventStream, consumer: Consumer | str, *, role: Role = "next", folder: Path | None = None
) -> Comparison:
    """Compare the live state with the follower's, key by key, in bounded memory.

    Under traffic they are compared as of moments that lie close together: what is behind may differ for that alone.

    Args:
        stream: where they are.
        consumer: whose state; a group, if there is no consumer at hand: then values are compared as they are stored.
        role: with which other version.
        folder: where replicas lie.

    Raises:
        UnknownGroupError: there is no such version.
    """
    group = consumer if isinstance(consumer, str) else consumer.group
    stream.coordinator.group(f"{group}.{role}")
    one = cast("Consumer", _AsStored(group)) if isinstance(consumer, str) else consumer
    with (
        StateView(stream, one, folder=folder) as here,
        StateView(stream, one.following(role), folder=folder) as there,
        here.pinned(),
        there.pinned(),
    ):
        behind = max(sum(here.as_of.values()) - sum(there.as_of.values()), 0)
        return _compare(_in_order(here), _in_order(there), behind)


class _AsStored:
    """In place of a consumer whose code is not at hand."""

    stateful = True
    keyed_by_topic = False

    def __init__(self, group: str) -> None:
        self.group = group

    def register(self, stream: EventStream) -> GroupInfo:
        return stream.coordinator.group(self.group)

    def following(self, suffix: str) -> "_AsStored":
        return _AsStored(f"{self.group}.{suffix}")

    def visible(self, value: Any) -> Any:
        return value


class _Item(NamedTuple):
    place: tuple[int, bytes]
    key: StateKey
    value: Any


def _in_order(view: StateView) -> Iterator[_Item]:
    """Both views go through the same tasks, and in each through keys in order."""
    for task in range(view.tasks):
        for key, value in view.items_of(task):
            yield _Item((task, encode_key(key)), key, value)


def _compare(here: Iterator[_Item], there: Iterator[_Item], behind: int) -> Comparison:
    counts = {"keys": 0, "other_keys": 0, "only_here": 0, "only_there": 0, "differing": 0}
    examples: list[tuple[Any, Any, Any]] = []

    def note(kind: str, key: Any, mine: Any, other: Any) -> None:
        counts[kind] += 1
        if len(examples) < _EXAMPLES:
            examples.append((key, mine, other))

    one, two = next(here, None), next(there, None)
    while one is not None or two is not None:
        if one is not None and (two is None or one.place < two.place):
            counts["keys"] += 1
            note("only_here", one.key, one.value, None)
            one = next(here, None)
        elif two is not None and (one is None or two.place < one.place):
            counts["other_keys"] += 1
            note("only_there", two.key, None, two.value)
            two = next(there, None)
        elif one is not None and two is not None:
            counts["keys"] += 1
            counts["other_keys"] += 1
            if one.value != two.value and encode_value(one.value) != encode_value(two.value):  # NaN is not itself
                note("differing", one.key, one.value, two.value)
            one, two = next(here, None), next(there, None)
    return Comparison(**counts, examples=tuple(examples), behind=behind)
