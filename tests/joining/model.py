"""What a join does with what was appended, said again: one loop over all records in their order, no batches, no state.

Times are microseconds. Nothing of `djp_dagster` is used.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

Key = str | int


class Seen(NamedTuple):
    """A record, as it lies in the stream; each part has a topic of its own."""

    stamp: int
    topic: str
    partition: int
    offset: int
    key: Key
    id: str
    time: int


@dataclass(frozen=True)
class Rules:
    """The settings of a join; ``fails`` says for which keys its handler raises."""

    parts: tuple[str, ...]
    deadline: int | None = None
    by_event_time: bool = False
    idle: int = 60_000_000
    partial: bool = False
    optional: frozenset[str] = frozenset()
    counts: dict[str, int] = field(default_factory=dict)
    duplicates: str = "first"
    late: str | None = None
    remember: float = inf
    fails: Callable[[Key], bool] = lambda key: False


@dataclass
class Outcome:
    """What is to be seen afterwards; what is emitted, in order, by partition."""

    emitted: dict[int, list[Any]]
    late: dict[int, list[str]]
    letters: "Counter[tuple[str, int, int, str]]" = field(default_factory=Counter)
    status: dict[Key, str] = field(default_factory=dict)


class _Task:
    def __init__(self, rules: Rules, outcome: Outcome, partition: int) -> None:
        self.rules, self.outcome, self.partition = rules, outcome, partition
        self.open: dict[Key, tuple[float, dict[str, list[Seen]]]] = {}
        self.done: dict[Key, tuple[str, float]] = {}
        self.inputs: dict[str, tuple[float, int]] = {}

    def watermark(self, now: int) -> float:
        active = [high for high, last in self.inputs.values() if now - last <= self.rules.idle]
        if active or not self.inputs:
            return min(active, default=-inf)
        return max(high for high, _ in self.inputs.values()) + now - max(last for _, last in self.inputs.values())

    def expire(self, now: int, *, by: int = 0) -> None:
        """What is due before ``now + by`` has come to its end."""
        for key in sorted(self.open, key=lambda key: (self.open[key][0], type(key) is str, key)):
            due = self.open[key][0]
            if not self.rules.by_event_time and due < now + by:
                self.end(key, due)
            elif self.rules.by_event_time and due < self.watermark(now):
                since = max((last for _, last in self.inputs.values()), default=now)
                moments = range(since, now + 1)
                self.end(key, since + bisect_left(moments, True, key=lambda moment: due < self.watermark(moment)))

    def is_there(self, key: Key, part: str) -> bool:
        return len(self.open[key][1].get(part, ())) >= self.rules.counts.get(part, 1)

    def end(self, key: Key, since: float) -> None:
        missing = [part for part in self.rules.parts if not self.is_there(key, part)]
        if set(missing) <= self.rules.optional or self.rules.partial:
            self.complete(key, since, missing)
        else:
            self.give_up(key, "expired", since, "JoinIncompleteError")

    def complete(self, key: Key, since: float, missing: list[str]) -> None:
        if self.rules.fails(key):
            self.give_up(key, "failed", since, "ValueError")
            return
        found = self.open.pop(key)[1]
        parts = {part: [record.id for record in found[part]] for part in self.rules.parts if part in found}
        self.outcome.emitted[self.partition].append([key, parts, missing])
        self.done[key] = ("completed", since)

    def give_up(self, key: Key, status: str, since: float, error: str) -> None:
        for records in self.open.pop(key)[1].values():
            self.outcome.letters.update((*record[1:4], error) for record in records)
        self.done[key] = (status, since)

    def is_late(self, record: Seen, *, given_up: bool) -> None:
        if self.rules.late == "dead_letter" or (self.rules.late is None and given_up):
            self.outcome.letters.update([(*record[1:4], "LatePartError")])
        elif self.rules.late == "topic":
            self.outcome.late[self.partition].append(record.id)

    def take(self, record: Seen) -> None:
        key, rules = record.key, self.rules
        if key in self.done and record.stamp <= self.done[key][1] + rules.remember:
            self.is_late(record, given_up=self.done[key][0] != "completed")
            return
        at = record.time if rules.by_event_time else record.stamp
        due, parts = self.open.get(key, (inf, {}))
        if at > due:
            self.is_late(record, given_up=not rules.partial)
            return
        due = min(due, inf if rules.deadline is None else at + rules.deadline)
        for part, found in list(parts.items()):
            for late in [one for one in found if rules.by_event_time and one.time > due]:
                found.remove(late)
                self.is_late(late, given_up=not rules.partial)
            if not found:
                del parts[part]
        self.open[key] = (due, parts)
        self.keep(record, parts.setdefault(record.topic, []))
        if all(self.is_there(key, part) for part in rules.parts):
            self.complete(key, record.stamp, [])

    def keep(self, record: Seen, found: list[Seen]) -> None:
        if any(one.id == record.id for one in found):
            return
        if len(found) < self.rules.counts.get(record.topic, 1) or self.rules.duplicates == "all":
            found.append(record)
        elif self.rules.duplicates == "last":
            found[:] = [*found[1:], record]


def simulate(rules: Rules, records: Sequence[Seen], partitions: int, now: int) -> Outcome:
    """What has become of all records by ``now``."""
    outcome = Outcome({number: [] for number in range(partitions)}, {number: [] for number in range(partitions)})
    for partition in range(partitions):
        task = _Task(rules, outcome, partition)
        for record in sorted(one for one in records if one.partition == partition):
            task.expire(record.stamp)
            task.take(record)
            task.inputs = task.inputs or dict.fromkeys(rules.parts, (-inf, record.stamp))
            task.inputs[record.topic] = (max(task.inputs[record.topic][0], record.time), record.stamp)
            if rules.by_event_time:
                task.expire(record.stamp)
        task.expire(now, by=1)
        outcome.status |= dict.fromkeys(task.open, "pending")
        outcome.status |= {
            key: status
            for key, (status, since) in task.done.items()
            if key not in task.open and now <= since + rules.remember
        }
    return outcome
