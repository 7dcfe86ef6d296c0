"""`Books`: from the stream and the outbox alone, whether all that was published was handled, and once.

The books are opened while nothing runs and checked when everything is done. What they say is about the time between:
everything published is handled, pending or a dead letter, and no committed effect is there twice. What the consumers of
a pattern should have left behind is checked in the module of its name. Kappa and MapReduce consume nothing: what they
make can be made again from the stream.
"""

from pathlib import Path

from demo.books import (
    batching,
    claim_check,
    dag,
    event_buffering,
    stateful_worker,
    stateless_worker,
    streaming,
)
from demo.books.period import Period, note_down
from demo.patterns import CONSUMERS
from demo.traffic import TOPICS
from djp_dagster import EventStream

_CHECKS = (
    streaming.check,
    batching.check,
    dag.check,
    event_buffering.check,
    stateless_worker.check,
    claim_check.check,
    stateful_worker.check,
)


class Books:
    """The books of a stream; opening them makes the topics and groups of the shop, if they are not there.

    Args:
        stream: the stream.
        mails: the folder of the outbox.
    """

    def __init__(self, stream: EventStream, mails: Path) -> None:
        self._stream, self._mails = stream, mails
        for topic in TOPICS:
            stream.create_topic(topic)
        for consumer in CONSUMERS:
            consumer.register(stream)
        self._opened = note_down(stream)

    def published(self) -> int:
        """Events the traffic has published, ever."""
        return sum(span.end for span in self._stream.log.spans([topic.name for topic in TOPICS]).values())

    def pending(self) -> dict[str, int]:
        """Events not yet handled, by group; groups that have handled all are not in it."""
        open_batches = self._stream.coordinator.intents
        found = {c.group: self._stream.pending(c.group).events or len(open_batches(c.group)) for c in CONSUMERS}
        return {group: events for group, events in found.items() if events}

    def check(self) -> list[str]:
        """What is wrong with the books; call it when nothing runs."""
        period = Period(self._stream, self._mails, self._opened)
        problems = [f"{group} has not handled {events} events" for group, events in self.pending().items()]
        problems += period.check_dead_letters()
        for consumer in CONSUMERS:
            problems += period.check_positions(consumer)
        for check in _CHECKS:
            problems += check(period)
        return problems
