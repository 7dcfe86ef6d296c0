"""How an entry fills: which parts are kept, which come twice, and when all are there."""

from collections.abc import Sequence
from typing import Any

from djp_dagster.errors import InvalidEventError
from djp_dagster.joining.entries import Entry, Part
from djp_dagster.joining.parts import PartSpec
from djp_dagster.joining.rules import Duplicates
from djp_dagster.streams.records import Origin, Record


class Filling:
    """What a join's parts mean for one entry.

    Args:
        specs: its parts.
        duplicates: what to keep of a part that is there already.
    """

    def __init__(self, specs: Sequence[PartSpec], duplicates: Duplicates) -> None:
        self._specs, self._duplicates = specs, duplicates
        self._required = [spec for spec in specs if not spec.optional]
        self._names = frozenset(spec.name for spec in specs)
        self._counts = any(spec.count is not None for spec in specs)

    def add(self, entry: Entry, spec: PartSpec, part: Part, record: Record) -> bool:
        """Keep the part, unless the rules say otherwise; False if it is there already."""
        found = entry.parts.get(spec.name)
        if found is None:
            entry.parts[spec.name] = [part]
            return True
        if any(known.is_same(record, record.origin) for known in found):
            return False
        if self._duplicates == "all" or (
            spec.count is not None and len(found) < needed(found[0].record(record.origin), spec)
        ):
            found.append(part)
            return True
        if self._duplicates == "last":
            found[:] = [*found[1:], part]
        return False

    def is_complete(self, entry: Entry, origin: Origin) -> bool:
        """Whether all parts are there."""
        if not self._names <= entry.parts.keys():
            return False
        return not self._counts or all(_is_there(entry, spec, origin) for spec in self._specs)

    def has_required(self, entry: Entry, origin: Origin) -> bool:
        """Whether all parts are there but optional ones."""
        return all(_is_there(entry, spec, origin) for spec in self._required)

    def missing(self, entry: Entry, origin: Origin) -> tuple[str, ...]:
        """The names of the parts that are not."""
        return tuple(spec.name for spec in self._specs if not _is_there(entry, spec, origin))

    def named(self, entry: Entry, origin: Origin) -> dict[str, Any]:
        """The records of the parts that are there: each one, or a list where there may be several."""
        named: dict[str, Any] = {}
        for spec in self._specs:
            found = [part.record(origin) for part in entry.parts.get(spec.name, ())]
            if found:
                many = spec.count is not None or self._duplicates == "all"
                named[spec.name] = found if many else found[0]
        return named


def _is_there(entry: Entry, spec: PartSpec, origin: Origin) -> bool:
    found = entry.parts.get(spec.name)
    if not found:
        return False
    return spec.count is None or len(found) >= needed(found[0].record(origin), spec)


def is_there(records: Sequence[Record], spec: PartSpec) -> bool:
    """Whether these records make the part whole."""
    return bool(records) and len(records) >= needed(records[0], spec)


def needed(record: Record, spec: PartSpec) -> int:
    """How many events the part takes.

    Raises:
        InvalidEventError: its data does not say.
    """
    if not isinstance(spec.count, str):
        return 1 if spec.count is None else spec.count
    value: Any = record.data
    for name in spec.count.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InvalidEventError(
        f"event {record.id!r}: data[{spec.count!r}] must say how many events the part {spec.name!r} takes, a number "
        f"above 0, not {value!r}",
        attribute="data",
    )
