"""`BatchReport`: what a committed batch did."""

from collections.abc import Mapping

import msgspec

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.streams.model import Range


class BatchReport(msgspec.Struct, frozen=True):
    """What a committed batch did, for logs, metadata and metrics.

    Attributes:
        bytes: encoded size of the records the handler read.
        counts: what the handler counted, by name; to be added up.
        gauges: what it measured, by name; of the names in ``per_task``, its task alone.
        seconds: from the start of its last attempt to its commit.
        handler_seconds, commit_seconds: the parts of that.
    """

    batch_id: str
    group: str
    kind: str
    reason: str
    attempt: int
    ranges: tuple[Range, ...]
    events: int
    bytes: int
    emitted: int
    dead_letters: int
    state_changes: int
    deadlines: int
    output: PayloadRef | None
    seconds: float
    handler_seconds: float
    commit_seconds: float
    counts: Mapping[str, int] = {}
    gauges: Mapping[str, float] = {}
    per_task: frozenset[str] = frozenset()
