"""PostgreSQL gone in the middle of a COMMIT, and for a while: nothing lost, nothing twice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster.errors import AmbiguousPublishError, FencedError, StreamUnavailableError
from djp_dagster.processing.batch import Batch
from djp_dagster.processing.consumer import Consumer, consumer
from djp_dagster.processing.crash_points import CrashPoint, set_hook
from djp_dagster.processing.failures import RetryPolicy
from djp_dagster.processing.run import RunReport, run_pending
from djp_dagster.processing.threshold import Threshold
from djp_dagster.streams.publishing import Producer
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic
from tests.faults.kit import eventually, ids, numbered, opened, sources, working
from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import Cut, TcpProxy, When

NUMBERS = Topic("numbers", partitions=3, key="key")
DOUBLED = Topic("doubled", partitions=2, key="n")
COMMIT = b"COMMIT\0"  # as sent; without the NUL it is found in BEGIN ISOLATION LEVEL READ COMMITTED
WHENS: tuple[When, When] = ("before", "after")


@pytest.fixture
def proxy(postgres_server: PostgresServer, postgres_url: str) -> Iterator[TcpProxy]:
    with TcpProxy(postgres_server.port) as proxy:
        yield proxy


@pytest.fixture
def direct(postgres_url: str, tmp_path: Path) -> Iterator[EventStream]:
    """The stream without the proxy: to look at what is there."""
    with opened(postgres_url, tmp_path) as stream:
        stream.create_topic(NUMBERS)
        stream.create_topic(DOUBLED)
        yield stream


@pytest.fixture
def proxied_url(postgres_server: PostgresServer, proxy: TcpProxy, postgres_url: str) -> str:
    return postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/")


@pytest.fixture
def proxied(direct: EventStream, proxied_url: str, tmp_path: Path) -> Iterator[EventStream]:
    with opened(proxied_url, tmp_path) as stream:
        yield stream


def doubler(handled: list[int], **settings: object) -> Consumer:
    """Every effect a batch can have: an emit per record, state, an output, a dead letter, a deadline."""

    @consumer(topic=NUMBERS, emits=[DOUBLED], group="doubler", stateful=True, **settings)  # type: ignore[arg-type]
    def double(batch: Batch) -> dict[str, int]:
        handled.append(len(batch))
        count = 0
        for record in batch:
            number = record.data["n"]
            if number % 50 == 13:
                batch.fail(record, "unlucky")
                continue
            batch.emit(DOUBLED.event(n=number))
            batch.state.set(number, batch.state.get(number, 0) + 1)
            count += 1
        return {"count": count}

    return double


def check_effects(stream: EventStream, worked: Consumer, numbers: range, folder: Path) -> None:
    """From outside: every effect of every number, once."""
    unlucky = [number for number in numbers if number % 50 == 13]
    fine = [number for number in numbers if number % 50 != 13]
    assert sorted(sources(stream, "doubled")) == fine
    assert len(set(ids(stream, "doubled"))) == len(fine)
    assert stream.pending("doubler").events == 0
    letters = stream.dead_letters("doubler")
    assert len(letters) == len(unlucky)
    assert len({(letter.partition, letter.offset) for letter in letters}) == len(unlucky)
    outputs = stream.outputs("doubler")
    assert len({output.batch_id for output in outputs}) == len(outputs)
    changes = sum(span.end for span in stream.log.spans(["__changelog.doubler"]).values())
    assert changes == len(fine)  # each number was set once, to 1, since no state was read twice
    for task in stream.coordinator.tasks("doubler"):
        assert stream.coordinator.acquire("doubler", [task.task], "looking", 60).intents == ()


class CutAtCommit:
    """Arms the proxy when the protocol comes to the point just before the commit for the ``hit``-th time."""

    def __init__(self, proxy: TcpProxy, when: When, hit: int) -> None:
        self._proxy, self._when, self._hit = proxy, when, hit
        self.cut: Cut | None = None

    def __call__(self, reached: CrashPoint) -> None:
        if reached != "5.stored":
            return
        self._hit -= 1
        if self._hit == 0:
            self.cut = self._proxy.cut_on(COMMIT, self._when)


@pytest.fixture
def no_hook() -> Iterator[None]:
    yield
    set_hook(None)


@pytest.mark.usefixtures("no_hook")
@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("when", WHENS)
def test_an_ambiguous_commit_is_settled(
    direct: EventStream, proxied: EventStream, proxy: TcpProxy, tmp_path: Path, when: When, hit: int
) -> None:
    direct.publish(NUMBERS, numbered(range(300)))
    handled: list[int] = []
    double = doubler(handled)
    # No heartbeat within the test, so that the COMMIT cut is the batch's.
    set_hook(armed := CutAtCommit(proxy, when, hit))
    report = run_pending(proxied, double, state_folder=tmp_path / "state", lease=600)
    assert armed.cut is not None
    assert armed.cut.done.wait(10)
    assert len(report.batches) == 3
    assert report.events == sum(handled) == 300  # settled or sent again, not handled again
    check_effects(direct, double, range(300), tmp_path)


@pytest.mark.usefixtures("no_hook")
@pytest.mark.parametrize("when", WHENS)
def test_an_ambiguous_commit_of_a_holder_that_is_replaced_meanwhile(
    direct: EventStream, proxied: EventStream, proxy: TcpProxy, tmp_path: Path, when: When
) -> None:
    """The connection breaks at COMMIT and stays away; somebody else finishes; the first holder changes nothing."""
    direct.publish(NUMBERS, numbered(range(60)))
    handled: list[int] = []
    double = doubler(handled)
    armed = CutAtCommit(proxy, when, 1)
    ended: list[BaseException | object] = []

    def run_through_the_proxy() -> None:
        try:
            ended.append(run_pending(proxied, double, state_folder=tmp_path / "first", lease=0.5, wait=0))
        except Exception as error:
            ended.append(error)

    set_hook(armed)
    first = threading.Thread(target=run_through_the_proxy)
    first.start()
    eventually(lambda: armed.cut is not None and armed.cut.done.is_set())
    proxy.pause()
    set_hook(None)
    run_pending(direct, double, state_folder=tmp_path / "second", wait=60)
    check_effects(direct, double, range(60), tmp_path)
    proxy.resume()
    first.join(60)
    assert not first.is_alive()
    assert [type(one) for one in ended] in ([FencedError], [RunReport]), ended
    check_effects(direct, double, range(60), tmp_path)


@pytest.mark.parametrize("when", WHENS)
def test_an_unnamed_publish_says_that_it_is_ambiguous(
    direct: EventStream, proxied: EventStream, proxy: TcpProxy, when: When
) -> None:
    proxied.publish(NUMBERS, numbered([0]))
    cut = proxy.cut_on(COMMIT, when)
    with pytest.raises(AmbiguousPublishError, match="once or not at all") as caught:
        proxied.publish(NUMBERS, numbered(range(1, 21)))
    assert cut.done.wait(10)
    assert "stream.producer" in str(caught.value)
    expected = range(21) if when == "after" else range(1)
    eventually(lambda: sorted(sources(direct, "numbers")) == list(expected))
    proxied.publish(NUMBERS, numbered([99]))  # the stream goes on by itself
    assert sorted(sources(direct, "numbers")) == [*expected, 99]


def test_a_publish_cut_before_its_commit_is_not_ambiguous(
    direct: EventStream, proxied: EventStream, proxy: TcpProxy
) -> None:
    proxied.publish(NUMBERS, numbered([0]))
    proxy.cut_on(b"INSERT INTO djp_record_batches", "before")
    with pytest.raises(StreamUnavailableError, match="away"):
        proxied.publish(NUMBERS, numbered([1]))
    assert sources(direct, "numbers") == [0]


@pytest.mark.parametrize("when", WHENS)
def test_a_named_publish_is_appended_once(
    direct: EventStream, proxied: EventStream, proxy: TcpProxy, when: When
) -> None:
    producer = proxied.producer("p")
    for sequence in range(1, 6):
        cut = proxy.cut_on(COMMIT, when)
        producer.publish("numbers", numbered([2 * sequence, 2 * sequence + 1]), sequence=sequence)
        assert cut.done.wait(10)
    assert sorted(sources(direct, "numbers")) == list(range(2, 12))
    assert proxied.producer("p").last_sequence == 5


SOAK = [pytest.mark.soak, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("how", "away_s"),
    [
        ("kill", 5),
        pytest.param("stop", 5, marks=SOAK),
        *(pytest.param(how, 70, marks=SOAK) for how in ("stop", "kill")),
    ],
)
def test_a_database_away_for_a_while_costs_nothing(
    postgres_server: PostgresServer, postgres_url: str, tmp_path: Path, seed: random.Random, how: str, away_s: float
) -> None:
    handled: list[int] = []
    patient = RetryPolicy(first=0.05)
    double = doubler(handled, max_batch=Threshold(events=40), retry=patient, max_poison=100)
    published = threading.Event()
    enough = threading.Event()
    last: list[int] = []
    raised: list[BaseException] = []

    def publish() -> None:
        try:
            with opened(postgres_url, tmp_path) as stream:
                producer = Producer(stream.log, "p", retry_for_s=300.0)
                number = 0
                while not enough.is_set():
                    count = seed.randint(1, 30)
                    producer.publish("numbers", numbered(range(number, number + count)))
                    number += count
                    last[:] = [number]
                    published.set()
                    enough.wait(0.01)
        except BaseException as error:
            raised.append(error)

    with opened(postgres_url, tmp_path) as stream:
        stream.create_topic(NUMBERS)
        double.register(stream)
    publisher = threading.Thread(target=publish)
    with working(lambda: opened(postgres_url, tmp_path), double, folder=tmp_path / "state"):
        publisher.start()
        assert published.wait(30)
        eventually(lambda: sum(handled) > 100)
        getattr(postgres_server, how)()
        away_until = time.monotonic() + away_s
        while time.monotonic() < away_until:  # the outage itself is the fault under test
            assert publisher.is_alive()
            time.sleep(0.1)
        postgres_server.start()
        before = last[0]
        eventually(lambda: last[0] > before + 100)
        enough.set()
        publisher.join(60)
        assert not publisher.is_alive()
        assert not raised
        with opened(postgres_url, tmp_path) as stream:
            eventually(lambda: stream.pending("doubler").events == 0)
    with opened(postgres_url, tmp_path) as stream:
        assert sorted(sources(stream, "numbers")) == list(range(last[0]))
        check_effects(stream, double, range(last[0]), tmp_path)
