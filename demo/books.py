"""`Books`: how much has been published and handled; and, from the stream itself, whether all of it was, and once.

The books are opened while nothing runs and checked when everything is done. What they say is about the time between.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from definitions import (
    catalog,
    clicks,
    create_product,
    describe_media,
    fraud,
    fraud_alerts,
    order_files,
    orders,
    product_media,
    product_uploads,
    products,
    recommend,
    send_confirmations,
    send_receipts,
    submissions,
    suggestions,
    transcode_video,
    user_emails,
)
from demo.traffic import TOPICS
from djp_dagster import Claim, Consumer, EventStream, Record, Topic, TopicPartition
from djp_dagster.errors import PayloadError
from djp_dagster.joining.inspection import EventBuffer

CONSUMERS = (
    recommend,
    fraud,
    order_files,
    describe_media,
    *catalog.in_order(),
    user_emails,
    send_receipts,
    send_confirmations,
)
ABSURD_AMOUNT = 10_000


class Account(NamedTuple):
    """Where a consumer stands.

    Attributes:
        handled: records committed, without those that became dead letters.
        pending: records not yet committed.
        oldest_s: how long the oldest of them has been pending.
        dead_letters: records that failed, and have not been redriven.
        made: what came of them: events emitted, or outputs.
    """

    handled: int
    pending: int
    oldest_s: float
    dead_letters: int
    made: str


class Books:
    """The books of a stream; opening them makes the topics and groups of the shop, if they are not there.

    Args:
        stream: the stream.
    """

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        for topic in TOPICS:
            stream.create_topic(topic)
        for consumer in CONSUMERS:
            consumer.register(stream)
        self._ends_then = self._ends((*TOPICS, suggestions, fraud_alerts, product_media, products))
        self._positions_then = {consumer.group: stream.positions(consumer.group) for consumer in CONSUMERS}
        self._letters_then = max((letter.id for letter in self._letters(0)), default=0)
        self._outputs = self._last_output = self._outputs_then = 0
        self._count_outputs()
        self._outputs_then = self._last_output

    def published(self) -> int:
        """Events the traffic has published, ever."""
        return sum(self._ends(TOPICS).values())

    def accounts(self) -> dict[str, Account]:
        """Where each consumer stands, by group."""
        self._count_outputs()
        return {consumer.group: self._account(consumer) for consumer in CONSUMERS}

    def _account(self, consumer: Consumer) -> Account:
        stream, group = self._stream, consumer.group
        count = stream.coordinator.count_dead_letters
        failed = count(group, "pending") + count(group, "discarded")
        backlog = stream.pending(group)
        if consumer.emits:
            made = f"{sum(self._ends(consumer.emits).values()):,} {consumer.emits[0].name.replace('_', ' ')}"
        else:
            made = f"{self._outputs:,} files" if consumer is order_files else ""
        committed = sum(stream.positions(group).values())
        return Account(committed - failed, backlog.events, backlog.age_s, failed, made)

    def pending(self) -> dict[str, int]:
        """Events not yet handled, by group; groups that have handled all are not in it."""
        open_batches = self._stream.coordinator.intents
        found = {c.group: self._stream.pending(c.group).events or len(open_batches(c.group)) for c in CONSUMERS}
        return {group: events for group, events in found.items() if events}

    def check(self) -> list[str]:
        """What is wrong with the books; call it when nothing runs."""
        failed = Counter(
            (letter.group, letter.topic, letter.partition, letter.offset) for letter in self._letters_since()
        )
        problems = [f"{group} has not handled {events} events" for group, events in self.pending().items()]
        problems += [f"the dead letter {position} is there {n} times" for position, n in failed.items() if n > 1]
        problems += self._check_suggestions(failed) + self._check_alerts(failed)
        return problems + self._check_files() + self._check_media(failed) + self._check_products(failed)

    def _check_suggestions(self, failed: Mapping[tuple[str, str, int, int], int]) -> list[str]:
        """One suggestion for each click that did not fail, numbered without a gap per user."""
        made = list(self._since(suggestions))
        problems = _repeated("suggestion", made)
        last: dict[str, int] = {}
        for suggestion in made:
            user_id, views = suggestion.data["user_id"], suggestion.data["views"]
            if views != last.get(user_id, views - 1) + 1:
                problems.append(f"{user_id}'s suggestion {views} follows {last[user_id]}")
            last[user_id] = views
        wanted = {
            click.id for click in self._handled(recommend, clicks) if ("recommend", *click.position) not in failed
        }
        answered = {suggestion.data["click"] for suggestion in made} | self._ids_just_before(recommend)
        return problems + _difference("click without a suggestion", wanted - answered)

    def _check_alerts(self, failed: Mapping[tuple[str, str, int, int], int]) -> list[str]:
        """An alert for each absurd amount; a dead letter for each order without one."""
        made = list(self._since(fraud_alerts))
        placed = list(self._handled(fraud, orders))
        alerted = {alert.data["order"] for alert in made}
        absurd = {order.id for order in placed if (order.data.get("amount") or 0) > ABSURD_AMOUNT}
        malformed = {order.position for order in placed if order.data.get("amount") is None}
        missing = malformed - {position[1:] for position in failed if position[0] == "fraud"}
        return (
            _repeated("alert", made)
            + _difference("absurd order without an alert", absurd - alerted)
            + _difference("alert about nothing", alerted - {order.id for order in placed})
            + _difference("malformed order that is no dead letter", {str(position) for position in missing})
        )

    def _check_files(self) -> list[str]:
        """Every order with an amount in the files, and no record in two of them."""
        import pandas as pd

        written: Counter[tuple[int, int]] = Counter()
        ids = self._ids_just_before(order_files)
        sequence = self._outputs_then
        while outputs := self._stream.outputs("order_files", after=sequence):
            for output in outputs:
                with self._stream.payloads.open(output.payload) as file:
                    frame = pd.read_parquet(file, columns=["partition", "offset", "event_id"])
                written.update(zip(frame["partition"], frame["offset"], strict=True))
                ids.update(frame["event_id"])
            sequence = outputs[-1].sequence
        wanted = {order.id for order in self._handled(order_files, orders) if order.data.get("amount") is not None}
        problems = [f"order {position} is in {n} files" for position, n in written.items() if n > 1]
        return problems[:5] + _difference("order in no file", wanted - ids)

    def _check_media(self, failed: Mapping[tuple[str, str, int, int], int]) -> list[str]:
        """One description for each upload that did not fail, and the payload it speaks of."""
        made = list(self._since(product_media))
        wanted = {
            upload.id
            for upload in self._handled(describe_media, product_uploads)
            if ("describe_media", *upload.position) not in failed
        }
        described = {medium.data["upload"] for medium in made}
        lost = set()
        for token in {medium.data["claim"]["uri"]: medium.data["claim"] for medium in made}.values():
            try:
                self._stream.payloads.verify(Claim.from_dict(token))
            except PayloadError:
                lost.add(token["uri"])
        return (
            _repeated("description", made)
            + _difference("upload without a description", wanted - described)
            + _difference("payload that is lost or damaged", lost)
        )

    def _check_products(self, failed: Mapping[tuple[str, str, int, int], int]) -> list[str]:
        """Each submission is a product, once; or its video failed, so that its other parts wait or are dead letters."""
        made = list(self._since(products))
        counts = Counter(product.data["product_id"] for product in made)
        unplayable: set[str] = set()
        wanted: set[str] = set()
        for submitted in self._handled(transcode_video, submissions):
            bad = ("transcode_video", *submitted.position) in failed
            (unplayable if bad else wanted).add(submitted.data["product_id"])
        with (
            tempfile.TemporaryDirectory() as folder,
            EventBuffer(self._stream, create_product.group, folder=Path(folder)) as buffer,
        ):
            known = {one.key: one.status for one in buffer}
        expired = {product for product, status in known.items() if status in ("expired", "failed")}
        return (
            _repeated("product", made)
            + [f"product {product} was created {n} times" for product, n in counts.items() if n > 1][:5]
            + _difference("submission without a product", wanted - set(counts) - expired)
            + _difference("product whose video nobody can play", unplayable & set(counts))
            + _difference("submission that the buffer knows nothing of", unplayable - set(map(str, known)))
        )

    def _handled(self, consumer: Consumer, topic: Topic) -> Iterator[Record]:
        """What the consumer has committed since the books were opened."""
        now = self._stream.positions(consumer.group)
        for at, start in self._positions_then[consumer.group].items():
            if at.topic == topic.name:
                yield from self._stream.records(topic, at.partition, start, now[at])

    def _ids_just_before(self, consumer: Consumer) -> set[str]:
        """Ids of the last events handled before: a duplicate of one may be the first after."""
        ids: set[str] = set()
        for at, start in self._positions_then[consumer.group].items():
            if start > self._stream.log.spans([at.topic])[at].begin:
                ids.update(record.id for record in self._stream.records(at.topic, at.partition, start - 1, start))
        return ids

    def _since(self, topic: Topic) -> Iterator[Record]:
        for partition in range(topic.partitions):
            start = self._ends_then[TopicPartition(topic.name, partition)]
            yield from self._stream.records(topic, partition, start)

    def _ends(self, topics: tuple[Topic, ...]) -> dict[TopicPartition, int]:
        spans = self._stream.log.spans([topic.name for topic in topics])
        return {at: span.end for at, span in spans.items()}

    def _letters_since(self) -> Iterator["_Letter"]:
        return self._letters(self._letters_then)

    def _letters(self, after: int) -> Iterator["_Letter"]:
        while letters := self._stream.dead_letters(status=None, after=after):
            for letter in letters:
                yield _Letter(letter.id, letter.group, letter.topic, letter.partition, letter.offset)
            after = letters[-1].id

    def _count_outputs(self) -> None:
        while outputs := self._stream.outputs("order_files", after=self._last_output):
            self._outputs += len(outputs)
            self._last_output = outputs[-1].sequence


class _Letter(NamedTuple):
    id: int
    group: str
    topic: str
    partition: int
    offset: int


def _repeated(what: str, records: list[Record]) -> list[str]:
    """Ids of emitted events follow from what caused them: an id that is there twice was committed twice."""
    ids = Counter(record.id for record in records)
    return [f"{what} {event_id} was committed {n} times" for event_id, n in ids.items() if n > 1][:5]


def _difference(what: str, found: set[str]) -> list[str]:
    return [f"{len(found)} times: {what}, e.g. {min(found)}"] if found else []
