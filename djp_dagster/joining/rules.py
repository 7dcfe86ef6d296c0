"""`JoinRules`: what a join waits for, and what becomes of what comes twice, too late, or not at all."""

from typing import Literal

import msgspec

from djp_dagster.joining.parts import PartSpec

Duplicates = Literal["first", "last", "all"]
OnDeadline = Literal["dead_letter", "partial"]
EXPIRE = "expire"
"""The command that expires keys before their time."""


class JoinRules(msgspec.Struct, frozen=True):
    """How a join behaves.

    Attributes:
        by_event_time: deadlines are measured in event time, from the earliest part; else in append time, from the
            first.
        late, late_topic: what becomes of a part that comes too late; ``"with_key"``: what became of its key.
        remember_micros: how long marks are kept; None for ever.
    """

    key: str
    parts: tuple[PartSpec, ...]
    deadline_micros: int | None
    by_event_time: bool
    idle_micros: int
    on_deadline: OnDeadline
    duplicates: Duplicates
    late: Literal["with_key", "drop", "dead_letter", "topic"]
    late_topic: str | None
    remember_micros: int | None
    max_buffer_bytes: int
