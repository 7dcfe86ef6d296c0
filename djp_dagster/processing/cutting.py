"""Where a batch ends: exact ranges from committed offsets, bounded in events and bytes."""

from collections.abc import Mapping, Sequence

from djp_dagster.processing.threshold import Threshold
from djp_dagster.streams.contracts import EventLog
from djp_dagster.streams.model import Deadline, Range
from djp_dagster.streams.records import MAX_BLOB_BYTES, TopicPartition


def cut_ranges(
    log: EventLog,
    positions: Mapping[TopicPartition, int],
    until: Mapping[TopicPartition, int],
    bound: Threshold,
) -> tuple[Range, ...]:
    """The next batch: from ``positions`` towards ``until``, within ``bound``, one record at least.

    Several partitions share the bound in proportion to what is pending in each, so they drain together.
    """
    ends = {at: until[at] for at, start in positions.items() if until.get(at, start) > start}
    if not ends:
        return ()
    ends = _bounded_by_events(positions, ends, bound.max_events)
    ends = _bounded_by_bytes(log, positions, ends, bound.max_bytes)
    return tuple(Range(at.topic, at.partition, positions[at], end) for at, end in ends.items() if end > positions[at])


def _bounded_by_events(
    positions: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], limit: int | None
) -> dict[TopicPartition, int]:
    pending = {at: end - positions[at] for at, end in ends.items()}
    total = sum(pending.values())
    if limit is None or total <= limit:
        return dict(ends)
    shares = zip(pending, divided(limit, list(pending.values())), strict=True)
    return {at: positions[at] + share for at, share in shares if share}


def divided(limit: int, pending: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``pending`` that add up to ``limit``."""
    total = sum(pending)
    shares = [limit * count // total for count in pending]
    most = sorted(range(len(pending)), key=lambda at: -(limit * pending[at] % total))
    for at in most[: limit - sum(shares)]:
        shares[at] += 1
    return shares


def _bounded_by_bytes(
    log: EventLog, positions: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], limit: int | None
) -> dict[TopicPartition, int]:
    if limit is None or not log.capabilities.exact_bytes:
        return dict(ends)
    if len(ends) == 1:
        ((at, end),) = ends.items()
        return {at: max(log.cut(at, positions[at], end, max_bytes=limit), positions[at] + 1)}
    backlogs = {at: log.backlog({at: positions[at]}) for at in ends}
    weights = {at: backlog.bytes or 1 for at, backlog in backlogs.items()}
    total = sum(weights.values())
    # An estimate is wrong by less than the record batch that the position lies in.
    if total + MAX_BLOB_BYTES * sum(backlog.estimated for backlog in backlogs.values()) <= limit:
        return dict(ends)
    cut = {at: log.cut(at, positions[at], end, max_bytes=limit * weights[at] // total) for at, end in ends.items()}
    oldest = min(ends, key=lambda at: backlogs[at].oldest_micros or 0)
    if cut[oldest] == positions[oldest]:
        # Its next record is above its share. Others would go on for ever without it, so it has this batch to itself.
        return {oldest: max(log.cut(oldest, positions[oldest], ends[oldest], max_bytes=limit), positions[oldest] + 1)}
    return cut


def cut_aligned(
    log: EventLog,
    positions: Mapping[TopicPartition, int],
    until: Mapping[TopicPartition, int],
    bound: Threshold,
    *,
    follows: bool = False,
) -> tuple[tuple[Range, ...], int]:
    """The next batch, which holds of all inputs what was appended before one moment; and the last time before that.

    So batches follow each other in the order of append times, whatever bounded each of them. Records of that moment
    itself come when nothing is left before it, one input after the other. With ``follows``, ``until`` is what somebody
    else has read.
    """
    ranges = cut_ranges(log, positions, until, bound)
    if not ranges:
        return (), 0
    moment = read_up_to(log, positions, ranges)
    if moment is None:
        newest = [log.append_time_of(part.at, part.end - 1) for part in ranges]
        return ranges, max(stamped for stamped in newest if stamped is not None)
    cut = [(part, min(part.end, log.offset_at(part.at, moment))) for part in ranges]
    before = tuple(Range(part.topic, part.partition, part.start, end) for part, end in cut if end > part.start)
    if before:
        return before, moment - 1
    at = min((at for at, offset in positions.items() if log.append_time_of(at, offset) == moment), default=None)
    if at is None:
        return (), 0  # retention has just removed it
    horizon = moment - 1
    if follows and until.get(at, positions[at]) <= positions[at]:
        # It was not there, of that very time or by a clock that has gone back, when the other read what comes now.
        moment, at = min((log.append_time_of(part.at, part.start) or 0, part.at) for part in ranges)
    # If that one must not be read yet, neither may others: it comes first.
    end = min(until.get(at, positions[at]), log.offset_at(at, moment + 1))
    return cut_ranges(log, {at: positions[at]}, {at: end}, bound), horizon


def read_up_to(log: EventLog, positions: Mapping[TopicPartition, int], ranges: Sequence[Range]) -> int | None:
    """The append time of the first record that is left unread after ``ranges``; None if none is."""
    ends = dict(positions) | {part.at: part.end for part in ranges}
    unread = [stamped for at, end in ends.items() if (stamped := log.append_time_of(at, end)) is not None]
    return min(unread, default=None)


def deadlines_within(
    log: EventLog,
    due: Sequence[Deadline],
    positions: Mapping[TopicPartition, int],
    ranges: Sequence[Range],
) -> tuple[Deadline, ...]:
    """The due deadlines this batch may fire: those before which nothing is left unread on their task's inputs."""
    if not due:
        return ()
    ends = dict(positions) | {part.at: part.end for part in ranges}
    first_unread: dict[int, int | None] = {}
    for at, end in ends.items():
        stamped = log.append_time_of(at, end)
        if stamped is not None:
            known = first_unread.get(at.partition)
            first_unread[at.partition] = stamped if known is None else min(known, stamped)
    return tuple(
        deadline
        for deadline in due
        if (unread := first_unread.get(deadline.task)) is None or unread > deadline.due_micros
    )


def nth_position(ranges: Sequence[Range], skip: frozenset[tuple[str, int, int]], index: int) -> tuple[str, int, int]:
    """The ``index``-th position of the ranges, not counting those in ``skip``."""
    for part, offsets in _kept(ranges, skip):
        if index < len(offsets):
            return (part.topic, part.partition, offsets[index])
        index -= len(offsets)
    raise IndexError(index)


def prefix(ranges: Sequence[Range], skip: frozenset[tuple[str, int, int]], length: int) -> tuple[Range, ...]:
    """The shortest beginning of the ranges with ``length`` positions not in ``skip``."""
    taken: list[Range] = []
    for part, offsets in _kept(ranges, skip):
        if length <= 0:
            break
        if length < len(offsets):
            taken.append(Range(part.topic, part.partition, part.start, offsets[length - 1] + 1))
            break
        taken.append(part)
        length -= len(offsets)
    return tuple(taken)


def _kept(ranges: Sequence[Range], skip: frozenset[tuple[str, int, int]]) -> list[tuple[Range, Sequence[int]]]:
    kept: list[tuple[Range, Sequence[int]]] = []
    for part in ranges:
        offsets: Sequence[int] = range(part.start, part.end)
        if any(topic == part.topic and partition == part.partition for topic, partition, _ in skip):
            offsets = [offset for offset in offsets if (part.topic, part.partition, offset) not in skip]
        kept.append((part, offsets))
    return kept
