"""Seeded traffic for the shop: clicks, orders, updates, uploads and submissions, some of them twice, some malformed.

The events come in chunks, and chunk *k* follows from the settings and *k* alone. Each topic has a named producer that
publishes chunk *k* under the sequence *k*: whoever starts again, after any crash, goes on with the first chunk that is
not in the stream, and none is published twice.
"""

import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import click

import djp_dagster as djp
from definitions import clicks, orders, product_uploads, submissions, user_updates
from demo.catalog import submission
from demo.media import IMAGES, VIDEOS, medium
from djp_dagster import Event, EventStream, Topic
from djp_dagster.processing.stopping import SignalledEvent

SMALL = (clicks, orders, user_updates)
TOPICS = (*SMALL, product_uploads, submissions)
_CHUNKS_PER_SECOND = 4
_SHARES = (0.70, 0.22, 0.08)
_CHUNKS_PER_UPLOAD = 12  # megabytes each: one in about three seconds
_CHUNKS_PER_SUBMISSION = 2
_BOT_SHARE = 0.02
_ABSURD_SHARE = 0.002
_PROVIDERS = ("example.com", "example.org", "example.net")
_SAY_EVERY_S = 10.0
_POSITIVE = click.FloatRange(min=0, min_open=True)
_NOT_NEGATIVE = click.FloatRange(min=0)
_SHARE = click.FloatRange(min=0, max=1)
_COUNT = click.IntRange(min=1)


class Settings(NamedTuple):
    """What the traffic looks like.

    Attributes:
        rate: events per second in all topics together, duplicates among them; not uploads (one in three seconds) and
            submissions (two a second).
        skew: exponent of the Zipf law by which users and products are chosen; 0 makes all alike.
        duplicates: share of events that are published twice, with the same id.
        poison: share of events that are malformed: a click without product, an order without amount; an update without
            its value, which deletes the address. Of the uploads, ten times that share is no image or video at all; of
            the submissions, as many have a video that nobody can play.
        seed: another seed, other events.
        users, products: how many there are.
    """

    rate: float = 200.0
    skew: float = 0.7
    duplicates: float = 0.01
    poison: float = 0.005
    seed: int = 1
    users: int = 5_000
    products: int = 200

    @property
    def chunk_events(self) -> int:
        """Events in a chunk, but for uploads: about a quarter of a second's."""
        return max(1, round(self.rate / _CHUNKS_PER_SECOND))

    @property
    def chunk_seconds(self) -> float:
        """The time between two chunks."""
        return self.chunk_events / self.rate


class Traffic:
    """The events of given settings.

    Example:
        >>> traffic = Traffic(Settings(rate=40, seed=7))
        >>> [len(events) for events in traffic.chunk(1).values()]
        [7, 1, 2, 0, 0]
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._users = _zipf(settings.users, settings.skew)
        self._products = _zipf(settings.products, settings.skew)

    def chunk(self, number: int) -> dict[Topic, list[Event]]:
        """The events of a chunk by topic, in the order they are published in."""
        settings = self.settings
        # A source of chance for each chunk: it can be made without making those before it.
        chance = random.Random(f"{settings.seed}/{number}")  # noqa: S311
        bot = self._user(chance) if chance.random() < _BOT_SHARE else None
        made: dict[Topic, list[Event]] = {topic: [] for topic in TOPICS}
        count = 0
        while count < settings.chunk_events:
            topic = orders if bot is not None else chance.choices(SMALL, _SHARES)[0]
            data = self._data(chance, topic, bot, version=number * settings.chunk_events + count)
            event = Event(
                type=topic.name, source=f"/topics/{topic.name}", id=f"{settings.seed}-{number}-{count}", data=data
            )
            twice = count + 1 < settings.chunk_events and chance.random() < settings.duplicates
            made[topic].extend([event, event] if twice else [event])
            count += 1 + twice
        if number % _CHUNKS_PER_UPLOAD == 0:
            made[product_uploads].append(self._upload(chance, number))
        if number % _CHUNKS_PER_SUBMISSION == 0:
            bad = chance.random() < 10 * settings.poison
            made[submissions].append(
                Event(
                    type=submissions.name,
                    source=f"/topics/{submissions.name}",
                    id=f"{settings.seed}-{number}-submission",
                    data=submission(chance, f"s{number}", playable=not bad),
                )
            )
        return made

    def _upload(self, chance: random.Random, number: int) -> Event:
        """An image or a video of a product: heavy data, which the topic sends to the payload store."""
        media_type, content = medium(chance.randrange(IMAGES + VIDEOS), self.settings.seed)
        if chance.random() < 10 * self.settings.poison:
            content = b"no image, but the seller's tax return\n" * 4_000
        product_id = f"p{self._pick(chance, self._products)}"
        return Event(
            type=product_uploads.name,
            source=f"/topics/{product_uploads.name}",
            id=f"{self.settings.seed}-{number}-upload",
            data=content,
            datacontenttype=media_type,
            subject=product_id,
            ext={"partitionkey": product_id},
        )

    def _user(self, chance: random.Random) -> str:
        return f"user-{self._pick(chance, self._users)}"

    @staticmethod
    def _pick(chance: random.Random, cumulative: list[float]) -> int:
        return chance.choices(range(len(cumulative)), cum_weights=cumulative)[0]

    def _data(self, chance: random.Random, topic: Topic, bot: str | None, version: int) -> dict[str, object]:
        user_id, product = bot or self._user(chance), self._pick(chance, self._products)
        malformed = chance.random() < self.settings.poison
        if topic is clicks:
            return {"user_id": user_id, "page": "/"} if malformed else {"user_id": user_id, "product_id": f"p{product}"}
        if topic is user_updates:
            provider = _PROVIDERS[product % len(_PROVIDERS)]
            return {"user_id": user_id, "email": None if malformed else f"{user_id}@{provider}", "version": version}
        quantity = 10_000 if chance.random() < _ABSURD_SHARE else chance.randint(1, 3)
        amount = round((5 + product % 95) * quantity * 1.01, 2)
        return {
            "user_id": user_id,
            "product_id": f"p{product}",
            "quantity": quantity,
            "amount": None if malformed else amount,
        }


def _zipf(count: int, exponent: float) -> list[float]:
    """Cumulative weights of ranks 1 to ``count``."""
    return list(accumulate(1 / rank**exponent for rank in range(1, count + 1)))


class Publisher:
    """Publishes the traffic chunk by chunk, going on where the last one stopped."""

    def __init__(self, stream: EventStream, traffic: Traffic) -> None:
        for topic in TOPICS:
            stream.create_topic(topic)
        self._traffic = traffic
        self._producers = {topic: stream.producer(f"traffic-{topic.name}", patience="5s") for topic in TOPICS}
        sequences = [producer.last_sequence for producer in self._producers.values()]
        self._next = min(sequences) + 1
        while self._next <= max(sequences):
            self.publish_next()  # what a crash between two topics left out

    def publish_next(self) -> int:
        """Publish the next chunk, each topic's part once; how many events that added. May be repeated if it raises."""
        events = self._traffic.chunk(self._next)
        added = 0
        for topic, producer in self._producers.items():
            if producer.last_sequence < self._next:
                added += sum(part.count for part in producer.publish(topic.name, events[topic], sequence=self._next))
        self._next += 1
        return added


def run(stream: EventStream, settings: Settings, stop: threading.Event) -> int:
    """Publish at the wanted rate until ``stop`` is set; how many events. An outage of the stream is waited for."""
    publisher = Publisher(stream, Traffic(settings))
    published = 0
    due = said_at = time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        try:
            published += publisher.publish_next()
        except djp.TransientError as error:
            click.echo(f"waiting for the stream: {error}", err=True)
            due = time.monotonic() + 1.0
            continue
        now = time.monotonic()
        due = max(due + settings.chunk_seconds, now - 1.0)  # after a delay it catches up, but by no more than a second
        if now - said_at >= _SAY_EVERY_S:
            click.echo(f"published {published:,} events")
            said_at = now
    return published


_DEFAULTS = Settings()
SETTINGS_OPTIONS = (
    click.option("--rate", type=_POSITIVE, default=_DEFAULTS.rate, show_default=True, help="Events per second."),
    click.option("--skew", type=_NOT_NEGATIVE, default=_DEFAULTS.skew, show_default=True, help="Zipf exponent."),
    click.option(
        "--duplicates", type=_SHARE, default=_DEFAULTS.duplicates, show_default=True, help="Share sent twice."
    ),
    click.option("--poison", type=_SHARE, default=_DEFAULTS.poison, show_default=True, help="Share malformed."),
    click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True, help="Another seed, other events."),
    click.option("--users", type=_COUNT, default=_DEFAULTS.users, show_default=True, help="How many users."),
    click.option("--products", type=_COUNT, default=_DEFAULTS.products, show_default=True, help="How many products."),
)


def as_options(settings: Settings) -> list[str]:
    """The settings as options of this command."""
    return [f"--{name}={value}" for name, value in settings._asdict().items()]


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the traffic's settings as options."""
    for option in reversed(SETTINGS_OPTIONS):
        command = option(command)
    return command


@click.command(help="Publish seeded traffic for the shop until stopped.")
@settings_options
@click.option("--stream", "target", help="File or URL of the stream; that of SqlEventStream() unless given.")
def main(target: str | None, **given: Any) -> None:
    """Run until SIGINT or SIGTERM."""
    stop = SignalledEvent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    settings = Settings(**given)
    with djp.open_stream(target) if target else djp.SqlEventStream().open() as stream:
        click.echo(f"publishing to {stream.label}: {settings}")
        click.echo(f"published {run(stream, settings, stop):,} events")


if __name__ == "__main__":
    main()
