"""What a join waits for: named parts, each from a topic, or from the events of one type in it."""

from collections.abc import Mapping, Sequence

import msgspec

from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.topics import Topic
from djp_dagster.units import is_count

Input = Topic | tuple[Topic, str]
"""A topic; or a topic and the type of the events in it that are meant."""


class PartSpec(msgspec.Struct, frozen=True):
    """One of the parts.

    Attributes:
        kind: the type of its events; None for any.
        optional: the key does not fail for want of it.
        count: how many different events it takes; or the path in their data that says it; None for one.
    """

    name: str
    topic: Topic
    kind: str | None = None
    optional: bool = False
    count: int | str | None = None


def part_specs(
    inputs: Mapping[str, Input], optional: Sequence[str], counts: Mapping[str, int | str]
) -> tuple[PartSpec, ...]:
    """The parts of a join, checked.

    Raises:
        InvalidSettingError: naming the argument, its value and what is allowed.
    """
    if not isinstance(inputs, Mapping) or not inputs:  # type: ignore[redundant-expr]
        raise _invalid("inputs", inputs, 'name the parts: inputs={"metadata": metadata, "video": video}')
    for setting, named in (("optional", optional), ("count", counts)):
        unknown = sorted(set(named) - set(inputs))
        if isinstance(named, str) or unknown:
            raise _invalid(setting, named, f"use names of inputs: {sorted(inputs)}")
    if set(optional) == set(inputs):
        raise _invalid("optional", optional, "at least one part must be required")
    specs = []
    for name, given in inputs.items():
        topic, kind = _topic_and_kind(name, given)
        count = counts.get(name)
        if count is not None and not _is_number(count):
            raise _invalid("count", {name: count}, "give a number above 0, or the path in the data that holds it")
        specs.append(PartSpec(name, topic, kind, name in optional, count))
    _require_distinct(specs)
    return tuple(specs)


def _topic_and_kind(name: str, given: object) -> tuple[Topic, str | None]:
    topic, kind = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(topic, Topic) or not isinstance(kind, str | None):
        raise _invalid("inputs", {name: given}, "give a Topic, or (Topic, event type)")
    return topic, kind


def _is_number(count: int | str) -> bool:
    return bool(count) if isinstance(count, str) else is_count(count) and count > 0


def _require_distinct(specs: Sequence[PartSpec]) -> None:
    kinds: dict[str, list[str | None]] = {}
    topics: dict[str, Topic] = {}
    for spec in specs:
        if topics.setdefault(spec.topic.name, spec.topic) != spec.topic:
            raise _invalid("inputs", spec.topic, f"topic {spec.topic.name!r} is declared twice and differently")
        kinds.setdefault(spec.topic.name, []).append(spec.kind)
    for topic, found in kinds.items():
        if len(found) > 1 and (None in found or len(set(found)) < len(found)):
            raise _invalid(
                "inputs", topic, f"topic {topic!r} has several parts; tell them apart: (topic, 'event type') for each"
            )


def _invalid(setting: str, value: object, remedy: str) -> InvalidSettingError:
    return InvalidSettingError(f"@join({setting}={value!r}): {remedy}", setting=setting, value=value)
