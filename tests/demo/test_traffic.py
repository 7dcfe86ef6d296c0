"""The traffic follows from its settings and nothing else, has the shares it is asked for, and is published once."""

import doctest
import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import djp_dagster as djp
from definitions import clicks, product_uploads, submissions
from demo import traffic as traffic_module
from demo.traffic import SMALL, TOPICS, Publisher, Settings, Traffic, as_options, main, run
from tests.crash.conftest import wait_for

CHUNKS = range(1, 401)


def contents(traffic: Traffic, chunks: range = CHUNKS) -> list[tuple[str, str, object]]:
    return [
        (topic.name, event.id, event.data)
        for number in chunks
        for topic, events in traffic.chunk(number).items()
        if topic in SMALL
        for event in events
    ]


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(traffic_module).failed == 0


def test_the_same_settings_make_the_same_events(seed: random.Random) -> None:
    settings = Settings(rate=seed.choice([8, 100, 333]), seed=seed.randrange(1000), duplicates=0.1, poison=0.1)
    made = contents(Traffic(settings))
    assert made == contents(Traffic(settings))
    number = seed.choice(CHUNKS)
    assert Traffic(settings).chunk(number) == Traffic(settings).chunk(number)
    assert made != contents(Traffic(settings._replace(seed=settings.seed + 1)))


def test_the_events_of_a_seed_stay_what_they_are() -> None:
    topic, event_id, data = contents(Traffic(Settings(rate=8, seed=7)), range(1, 2))[0]
    assert (topic, event_id, data) == ("clicks", "7-1-0", {"user_id": "user-149", "product_id": "p29"})


def test_chunks_are_as_large_as_the_rate_asks_for() -> None:
    for rate in (0.5, 3, 40, 250, 4_000):
        settings = Settings(rate=rate, duplicates=0.2)
        assert settings.chunk_events / settings.chunk_seconds == pytest.approx(rate)
        chunks = [Traffic(settings).chunk(number) for number in range(1, 20)]
        sizes = {sum(len(events) for topic, events in chunk.items() if topic in SMALL) for chunk in chunks}
        assert sizes == {settings.chunk_events}


def test_shares_are_as_asked_for() -> None:
    settings = Settings(rate=200, duplicates=0.05, poison=0.03)
    made = contents(Traffic(settings))
    total = len(made)
    ids = Counter((topic, event_id) for topic, event_id, _ in made)
    assert set(ids.values()) == {1, 2}
    assert sum(n == 2 for n in ids.values()) / len(ids) == pytest.approx(0.05, rel=0.2)
    malformed = [data for _, _, data in made if is_malformed(data)]
    assert len(malformed) / total == pytest.approx(0.03, rel=0.2)
    by_topic = Counter(topic for topic, _, _ in made)
    assert by_topic["clicks"] > by_topic["orders"] > by_topic["user_updates"] > 0


def is_malformed(data: object) -> bool:
    assert isinstance(data, dict)
    return "page" in data or data.get("amount", 0) is None or data.get("email", "") is None


def test_without_duplicates_and_poison_there_are_none() -> None:
    made = contents(Traffic(Settings(duplicates=0, poison=0)))
    assert len({(topic, event_id) for topic, event_id, _ in made}) == len(made)
    assert not any(is_malformed(data) for _, _, data in made)


def test_skew_makes_few_users_do_much() -> None:
    def share_of_the_busiest(skew: float) -> float:
        made = contents(Traffic(Settings(skew=skew, users=100)))
        users = Counter(data["user_id"] for _, _, data in made if isinstance(data, dict))
        return users.most_common(1)[0][1] / len(made)

    assert share_of_the_busiest(0) < 0.05 < 0.12 < share_of_the_busiest(1.0) < share_of_the_busiest(1.5)


def events_in(stream: djp.EventStream) -> list[tuple[str, str, object]]:
    return sorted(
        (topic.name, record.id, str(record.data))
        for topic in SMALL
        for partition in range(topic.partitions)
        for record in stream.records(topic, partition)
    )


def test_a_publisher_that_comes_back_goes_on_where_it_stopped(tmp_path: Path, seed: random.Random) -> None:
    traffic = Traffic(Settings(rate=40, seed=seed.randrange(1000)))
    with djp.open_stream(tmp_path / "stream.db") as stream:
        left = 30
        while left:
            publisher = Publisher(stream, traffic)
            for _ in range(min(seed.randint(1, 9), left)):
                publisher.publish_next()
                left -= 1
        wanted = sorted((topic, event_id, str(data)) for topic, event_id, data in contents(traffic, range(1, 31)))
        assert events_in(stream) == wanted


def test_a_crash_between_two_topics_is_made_good(tmp_path: Path) -> None:
    traffic = Traffic(Settings(rate=200))
    with djp.open_stream(tmp_path / "stream.db") as stream:
        Publisher(stream, traffic).publish_next()
        stream.producer("traffic-clicks").publish("clicks", traffic.chunk(2)[clicks], sequence=2)
        Publisher(stream, traffic)
        wanted = sorted((topic, event_id, str(data)) for topic, event_id, data in contents(traffic, range(1, 3)))
        assert events_in(stream) == wanted


def test_it_runs_at_the_rate_until_it_is_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    published: list[int] = []
    with djp.open_stream(tmp_path / "stream.db") as stream:
        for topic in TOPICS:
            stream.create_topic(topic)
        began = time.monotonic()
        thread = threading.Thread(target=lambda: published.append(run(stream, Settings(rate=100), stop)))
        thread.start()
        try:
            wait_for(lambda: len(events_in(stream)) >= 200, "two seconds of traffic")
        finally:
            took_s = time.monotonic() - began
            stop.set()
            thread.join(30)
        others = sum(span.end for span in stream.log.spans([product_uploads.name, submissions.name]).values())
        assert published == [len(events_in(stream)) + others]
        assert took_s > 1.0  # it does not publish as fast as it can


def test_settings_survive_the_command_line() -> None:
    wanted = Settings(rate=12.5, skew=0, duplicates=0.5, poison=1, seed=-3, users=1, products=2)
    options = as_options(wanted)
    assert options[0] == "--rate=12.5"
    parsed = main.make_context("traffic", options).params
    assert Settings(**{name: parsed[name] for name in Settings._fields}) == wanted


@pytest.mark.parametrize("option", ["--rate=0", "--skew=-1", "--poison=1.5", "--duplicates=-0.1", "--users=0"])
def test_settings_that_make_no_sense_are_refused(option: str) -> None:
    result = CliRunner().invoke(main, [option])
    assert result.exit_code == 2
    assert option.partition("=")[0] in result.output


def test_malformed_events_can_be_published(tmp_path: Path) -> None:
    with djp.open_stream(tmp_path / "stream.db") as stream:
        publisher = Publisher(stream, Traffic(Settings(rate=400, poison=1)))
        assert publisher.publish_next() == 100
        assert {topic.name for topic in TOPICS} == {info.name for info in stream.topics()}


def test_uploads_come_now_and_then_and_are_heavy(seed: random.Random) -> None:
    traffic = Traffic(Settings(rate=8, seed=seed.randrange(1000)))
    uploads = [upload for number in range(1, 61) for upload in traffic.chunk(number)[product_uploads]]
    assert len(uploads) == 5
    assert all(len(upload.data) > 100_000 and upload.subject == upload.ext["partitionkey"] for upload in uploads)
    assert uploads == [upload for number in range(1, 61) for upload in traffic.chunk(number)[product_uploads]]
