"""`Threshold`: when what has piled up is enough, and how much of it makes a batch."""

import msgspec

from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.model import Backlog
from djp_dagster.units import Duration, Size, is_count, parse_bytes, parse_seconds


class Threshold(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, events, age or idle time, whichever is reached first.

    As a trigger it says when a batch is cut; as a bound, ``bytes`` and ``events`` say how much a batch holds at most
    (one record at least). Age counts from when the oldest pending record was appended, by the stream's clock, so it
    survives restarts; idle from when the newest was.

    Args:
        bytes: encoded size, a number or ``"100MB"``, ``"64MiB"``.
        events: a count.
        age, idle: seconds, or ``"12h"``, ``"90s"``.

    Raises:
        InvalidSettingError: naming the setting that is not positive, or none is given.

    Example:
        >>> Threshold(bytes="100MB", age="12h")
        Threshold(bytes='100MB', events=None, age='12h', idle=None)
    """

    bytes: Size | None = None
    events: int | None = None
    age: Duration | None = None
    idle: Duration | None = None

    def __post_init__(self) -> None:
        limits = {"bytes": self.max_bytes, "events": self.max_events, "age": self.age_s, "idle": self.idle_s}
        if all(limit is None for limit in limits.values()):
            raise InvalidSettingError(
                "Threshold() needs at least one of bytes, events, age, idle", setting="threshold", value=None
            )
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise InvalidSettingError(f"Threshold({name}={limit!r}) must be above 0", setting=name, value=limit)

    @property
    def max_bytes(self) -> int | None:
        """``bytes`` as a number."""
        return None if self.bytes is None else parse_bytes(self.bytes)

    @property
    def max_events(self) -> int | None:
        """``events``, checked to be a whole number."""
        if self.events is not None and not is_count(self.events):
            raise InvalidSettingError(
                f"Threshold(events={self.events!r}) must be a whole number", setting="events", value=self.events
            )
        return self.events

    @property
    def age_s(self) -> float | None:
        """``age`` in seconds."""
        return None if self.age is None else parse_seconds(self.age, name="age")

    @property
    def idle_s(self) -> float | None:
        """``idle`` in seconds."""
        return None if self.idle is None else parse_seconds(self.idle, name="idle")

    def reached(self, backlog: Backlog) -> str | None:
        """Which limit the backlog has reached: ``bytes``, ``events``, ``age`` or ``idle``; None if none."""
        if backlog.events == 0:
            return None
        if self.max_bytes is not None and backlog.bytes is not None and backlog.bytes >= self.max_bytes:
            return "bytes"
        if self.max_events is not None and backlog.events >= self.max_events:
            return "events"
        if self.age_s is not None and backlog.age_s >= self.age_s:
            return "age"
        if self.idle_s is not None and backlog.idle_s >= self.idle_s:
            return "idle"
        return None
