"""`Period`: what has been published, handled, emitted and given up between two moments, for the checks of a pattern."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from demo.patterns import CONSUMERS
from djp_dagster import Consumer, EventStream, Record, Topic, TopicPartition
from djp_dagster.streams.model import DeadLetter

_EXAMPLES = 5


class Notes(NamedTuple):
    """Where everything stood at a moment.

    Attributes:
        ends: of all topics.
        positions: the committed offsets of each group.
        last_letter, last_output: the highest numbers of dead letters, and of the outputs of each group.
    """

    ends: dict[TopicPartition, int]
    positions: dict[str, dict[TopicPartition, int]]
    last_letter: int
    last_output: dict[str, int]


def note_down(stream: EventStream) -> Notes:
    """Where everything stands now."""
    last = {consumer.group: stream.coordinator.last_output(consumer.group) for consumer in CONSUMERS}
    return Notes(
        {at: span.end for at, span in stream.log.spans([topic.name for topic in stream.topics()]).items()},
        {consumer.group: stream.positions(consumer.group) for consumer in CONSUMERS},
        max((letter.id for letter in _letters(stream, 0)), default=0),
        {group: output.sequence if output is not None else 0 for group, output in last.items()},
    )


class Period:
    """From some moment until this is made; nothing may run while it is looked at.

    Args:
        stream: the stream.
        mails: the folder of the outbox.
        began: where everything stood at first.
    """

    def __init__(self, stream: EventStream, mails: Path, began: Notes) -> None:
        self.stream, self.mails, self.began = stream, mails, began
        self.positions = {consumer.group: stream.positions(consumer.group) for consumer in CONSUMERS}
        self._failed = Counter(
            (letter.group, letter.topic, letter.partition, letter.offset)
            for letter in _letters(stream, began.last_letter)
        )

    def handled(self, consumer: Consumer, topic: Topic) -> Iterator[Record]:
        """What the consumer has committed of the topic, dead letters among it; without what retention has removed."""
        began, now = self.began.positions[consumer.group], self.positions[consumer.group]
        for at, span in self.stream.log.spans([topic.name]).items():
            yield from self.stream.records(topic, at.partition, max(began[at], span.begin), now[at])

    def sound(self, consumer: Consumer, topic: Topic) -> Iterator[Record]:
        """The same without what became dead letters."""
        return (record for record in self.handled(consumer, topic) if not self.has_failed(consumer, record))

    def has_failed(self, consumer: Consumer, record: Record) -> bool:
        """Whether the record became a dead letter of the consumer."""
        return (consumer.group, *record.position) in self._failed

    def made(self, topic: Topic) -> list[Record]:
        """What was appended to the topic."""
        spans = self.stream.log.spans([topic.name])
        return [
            record
            for at, span in spans.items()
            for record in self.stream.records(topic, at.partition, max(self.began.ends.get(at, 0), span.begin))
        ]

    def ids_just_before(self, consumer: Consumer) -> set[str]:
        """Ids of the last events handled before: a duplicate of one may be the first after."""
        ids: set[str] = set()
        for at, start in self.began.positions[consumer.group].items():
            if start > self.stream.log.spans([at.topic])[at].begin:
                ids.update(record.id for record in self.stream.records(at.topic, at.partition, start - 1, start))
        return ids

    def check_dead_letters(self) -> list[str]:
        """A dead letter for a record, once, and only for one that its group has got past."""
        ends = {(group, *at): end for group, found in self.positions.items() for at, end in found.items()}
        problems = [
            f"the dead letter {position} is there {count} times"
            for position, count in self._failed.items()
            if count > 1
        ]
        early = [position for position in self._failed if position[3] >= ends.get(position[:3], 0)]
        return problems + [f"the dead letter {position} is of a record that is yet to be handled" for position in early]

    def check_positions(self, consumer: Consumer) -> list[str]:
        """What lies behind the committed offset is handled, what lies before it is pending: nothing is neither."""
        group, problems, before = consumer.group, [], 0
        for at, offset in self.positions[group].items():
            span = self.stream.log.spans([at.topic])[at]
            before += span.end - max(offset, span.begin)
            if offset < self.began.positions[group][at]:
                problems.append(f"{group} has gone back to {offset} in {at.topic} partition {at.partition}")
            if offset < span.begin:
                lost = span.begin - offset
                problems.append(f"{group} has lost {lost} events of {at.topic} partition {at.partition} to retention")
        pending = self.stream.pending(group).events
        if pending != before:
            problems.append(f"{group} says that {pending} events are pending, and {before} are")
        return problems


def repeated(what: str, records: Iterable[Record]) -> list[str]:
    """Ids of emitted events follow from what caused them: an id that is there twice was committed twice."""
    ids = Counter(record.id for record in records)
    return [f"{what} {event_id} was committed {n} times" for event_id, n in ids.items() if n > 1][:_EXAMPLES]


def difference(what: str, found: set[str]) -> list[str]:
    """What should not be, if there is any, with an example."""
    return [f"{len(found)} times: {what}, e.g. {min(found)}"] if found else []


def _letters(stream: EventStream, after: int) -> Iterator[DeadLetter]:
    while letters := stream.dead_letters(status=None, after=after):
        yield from letters
        after = letters[-1].id
