"""`Figures`: what the stream and the outbox say of the shop at this moment, by consumer and by pattern."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from definitions import (
    catalog,
    clicks,
    fraud_alerts,
    order_files,
    orders,
    product_uploads,
    products,
    suggestions,
)
from demo import outbox, patterns
from demo.traffic import TOPICS
from djp_dagster import Consumer, EventStream, Topic, TopicPartition


class Account(NamedTuple):
    """Where a consumer, or several, stand.

    Attributes:
        handled: records committed, without those that became dead letters.
        pending: records not yet committed: the lag in events.
        oldest_s: how long the oldest of them has been pending: the lag in time.
        dead_letters: records that failed, and have not been redriven.
    """

    handled: int = 0
    pending: int = 0
    oldest_s: float = 0.0
    dead_letters: int = 0

    def plus(self, other: "Account") -> "Account":
        """Both together."""
        return Account(
            self.handled + other.handled,
            self.pending + other.pending,
            max(self.oldest_s, other.oldest_s),
            self.dead_letters + other.dead_letters,
        )

    @property
    def done(self) -> int:
        """Records committed, however they ended."""
        return self.handled + self.dead_letters


class Figures:
    """The figures, asked for again and again; what cannot change is read once.

    Args:
        stream: with the topics and groups of the shop.
        mails: the folder of the outbox.
    """

    def __init__(self, stream: EventStream, mails: Path) -> None:
        self._stream, self._mails = stream, mails
        self._mailed: dict[str, int] = {}
        self._files = self._last_output = 0
        self._claims = self._claimed_bytes = 0
        self._uploads_read: dict[TopicPartition, int] = {}

    def published(self) -> int:
        """Events the traffic has published, ever."""
        return self._count(*TOPICS)

    def accounts(self) -> dict[str, Account]:
        """Where each consumer stands, by group."""
        return {consumer.group: self._account(consumer) for consumer in patterns.CONSUMERS}

    def by_pattern(self) -> dict[str, Account | None]:
        """Where each pattern stands; None for those that consume nothing."""
        accounts = self.accounts()
        found: dict[str, Account | None] = {}
        for pattern in patterns.PATTERNS:
            together = Account()
            for consumer in pattern.consumers:
                together = together.plus(accounts[consumer.group])
            found[pattern.name] = together if pattern.consumers else None
        return found

    def made(self) -> dict[str, dict[str, int]]:
        """What has come of it, by pattern: the name of a thing, and how many there are."""
        self._read_outputs()
        self._read_uploads()
        mails = self._count_mails()
        branches = [topic for consumer in catalog.in_order() for topic in consumer.emits if topic is not products]
        return {
            patterns.STREAMING: {"suggestions": self._count(suggestions), "fraud alerts": self._count(fraud_alerts)},
            patterns.BATCHING: {"batches, each a file": self._files},
            patterns.KAPPA: {"clicks to replay": self._kept(clicks)},
            patterns.DAG: {"parts of products": self._count(*branches)},
            patterns.EVENT_BUFFERING: {"products completed": self._count(products)},
            patterns.STATELESS_WORKER: {"confirmations": mails[outbox.CONFIRMATION]},
            patterns.CLAIM_CHECK: {"claims": self._claims, "megabytes": round(self._claimed_bytes / 1e6)},
            patterns.STATEFUL_WORKER: {"receipts": mails[outbox.RECEIPT]},
            patterns.MAP_REDUCE: {"orders to add up": self._kept(orders)},
        }

    def _account(self, consumer: Consumer) -> Account:
        stream, group = self._stream, consumer.group
        count = stream.coordinator.count_dead_letters
        failed = count(group, "pending") + count(group, "discarded")
        backlog = stream.pending(group)
        return Account(sum(stream.positions(group).values()) - failed, backlog.events, backlog.age_s, failed)

    def _count(self, *topics: Topic) -> int:
        """Events appended to the topics, ever."""
        return sum(span.end for span in self._stream.log.spans([topic.name for topic in topics]).values())

    def _kept(self, topic: Topic) -> int:
        """Events of the topic that retention has left."""
        return sum(span.end - span.begin for span in self._stream.log.spans([topic.name]).values())

    def _count_mails(self) -> Counter[str]:
        """Mails delivered, by kind; those of files that have been rotated away since they were first seen, too."""
        for file in outbox.files(self._mails):
            if file.name not in self._mailed:
                self._mailed[file.name] = len(outbox.mails_of(file))
        counts: Counter[str] = Counter()
        for name, mails in self._mailed.items():
            counts[outbox.kind_of(name)] += mails
        return counts

    def _read_outputs(self) -> None:
        while outputs := self._stream.outputs(order_files.group, after=self._last_output):
            self._files += len(outputs)
            self._last_output = outputs[-1].sequence

    def _read_uploads(self) -> None:
        for at, span in self._stream.log.spans([product_uploads.name]).items():
            start = max(span.begin, self._uploads_read.get(at, 0))
            for upload in self._stream.records(at.topic, at.partition, start, span.end):
                if upload.claim is not None:
                    self._claims += 1
                    self._claimed_bytes += upload.claim.size or 0
            self._uploads_read[at] = span.end
