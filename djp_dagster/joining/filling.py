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

    def add(self, entry: Entry, spec: PartSpec, part: Part, record: Record) -> bool:
        """Keep the part, unless the rules say otherwise; False if it comes twice.

        Raises:
            InvalidEventError: it must say how many events the part takes, and does not.
        """
        if isinstance(spec.count, str):
            _needed(record, spec)
        found = entry.parts.get(spec.name)
        if found is None:
            entry.parts[spec.name] = [part]
            return True
        if any(known.identity == (record.source, record.id) for known in found):
            return False
        if spec.count is not None or self._duplicates == "all":
            found.append(part)
            return True
        if self._duplicates == "last":
            found[:] = [part]
        return False

    def is_complete(self, entry: Entry, origin: Origin, *, required_only: bool = False) -> bool:
        """Whether all parts are there."""
        specs = self._required if required_only else self._specs
        return all(_is_there(entry, spec, origin) for spec in specs)

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
    if spec.count is None:
        return True
    return len(found) >= _needed(found[0].record(origin), spec)


def _needed(record: Record, spec: PartSpec) -> int:
    """How many events the part takes.

    Raises:
        InvalidEventError: its data does not say.
    """
    if isinstance(spec.count, int):
        return spec.count
    value: Any = record.data
    for name in str(spec.count).split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise InvalidEventError(
        f"event {record.id!r}: data[{spec.count!r}] must say how many events the part {spec.name!r} takes, a number "
        f"above 0, not {value!r}",
        attribute="data",
    )
