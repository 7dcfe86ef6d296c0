"""``djp tail``."""

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Event, EventStream, Topic, consumer, open_stream
from djp_dagster.testing import Clock
from tests.cli.conftest import Djp, document, documents
from tests.processing.kit import NO_EVENT, append_raw, raw

WORDS = Topic("words", partitions=3, key="word")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(place: Path, clock: Clock) -> EventStream:
    """A stream whose records are an hour apart: ``n`` counts them in order of append."""
    with open_stream(place, clock=clock) as stream:
        stream.create_topic(WORDS)
        for n in range(30):
            stream.publish(WORDS, [WORDS.event(word=f"w{n * 7 % 11}", n=n)])
            clock.advance(3600)
        return stream


def told(djp: Djp, *args: object) -> list[int]:
    """Which records a command prints."""
    return [one["data"]["n"] for one in documents(djp("tail", "words", "--json", *args))]


def test_the_last_records_of_all_partitions_by_append_time(djp: Djp, timed: EventStream) -> None:
    assert told(djp) == list(range(20, 30))
    assert told(djp, "-n", 3) == [27, 28, 29]
    assert told(djp, "-n", 0) == []
    assert told(djp, "-n", 1000) == list(range(30))


def test_one_partition(djp: Djp, timed: EventStream) -> None:
    held = [[r.data["n"] for r in timed.records("words", partition)] for partition in range(3)]
    for partition in range(3):
        assert told(djp, "-p", partition, "-n", 100) == held[partition]
        assert told(djp, "-p", partition, "-n", 2) == held[partition][-2:]
        assert told(djp, "-p", partition, "--from", 1) == held[partition][1:]
        assert told(djp, "-p", partition, "--from", len(held[partition])) == []


def test_from_some_place_on(djp: Djp, timed: EventStream) -> None:
    assert told(djp, "--from", "earliest") == list(range(30))
    assert told(djp, "--from", "latest") == []
    assert told(djp, "--from", "earliest", "-n", 4) == [0, 1, 2, 3]
    time = documents(djp("tail", "words", "--json", "-n", 5))[0]["append_time"]
    assert told(djp, "--from", time) == list(range(25, 30))
    assert told(djp, "--from", time, "-n", 2) == [25, 26]
    assert told(djp, "--from", "1min") == []
    shown = djp("tail", "words", "-n", 5).stdout.split()[0]
    assert told(djp, "--from", shown) == list(range(25, 30)), "a time shown can be given back"


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--from", "3"), 2, "add --partition"),
        (("--from", "999", "-p", "0"), 1, "not 999"),
        (("--from", "soon"), 1, "is no time"),
        (("-p", "3"), 1, "has partitions 0 to 2, not 3"),
        (("-n", "-1"), 2, "-n"),
    ],
)
def test_what_makes_no_sense_is_refused(
    djp: Djp, timed: EventStream, args: tuple[str, ...], code: int, said: str
) -> None:
    assert said in djp("tail", "words", *args, code=code).stderr


def test_json_is_the_cloudevent_and_where_it_lies(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(WORDS)
    event = Event(type="t", source="/s", id="1", data={"word": "a"}, subject="x", ext={"partitionkey": "b"})
    ((_, partition, offset, _),) = [
        (a.topic, a.partition, a.base_offset, a.count) for a in stream.publish(WORDS, [event])
    ]
    found = document(djp("tail", "words", "--json"))
    record = next(stream.records("words", partition))
    assert {name: found.pop(name) for name in ("topic", "partition", "offset", "append_time")} == {
        "topic": "words",
        "partition": partition,
        "offset": offset,
        "append_time": record.append_time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
    }
    assert Event.from_dict(found) == event


def test_a_line_shows_time_place_key_and_data(djp: Djp, timed: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    record = list(timed.records("words", 0))[-1]
    line = djp("tail", "words", "-p", 0, "-n", 1).stdout
    time = record.append_time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    assert line.split(maxsplit=4) == [
        time,
        "0",
        str(record.offset),
        record.data["word"],
        f'{{"word":"{record.data["word"]}","n":{record.data["n"]}}}\n',
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_line_fits_the_terminal(djp: Djp, stream: EventStream, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    stream.create_topic(WORDS)
    stream.publish(WORDS, [WORDS.event(word="w", text="日本語\x1b[31m\u202e" * 50), WORDS.event(word="\x1b]0;x\x07")])
    assert max(map(len, djp("tail", "words").stdout.splitlines())) > 200, "in a pipe nothing is cut"
    monkeypatch.setenv("COLUMNS", str(width))
    out = djp("tail", "words").stdout
    assert max(map(cell_len, out.splitlines())) <= width
    assert "…" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_what_is_no_event_is_shown_in_its_place(djp: Djp, stream: EventStream) -> None:
    topic = Topic("raw")
    stream.create_topic(topic)
    good = [raw(Event(type="t", source="/s", data=n)) for n in range(3)]
    append_raw(stream, topic, [good[0], NO_EVENT, good[1], good[2]])
    found = documents(djp("tail", "raw", "--json"))
    assert [one["offset"] for one in found] == [0, 1, 2, 3]
    assert [one.get("data") for one in found] == [0, None, 1, 2]
    assert found[1]["raw_base64"] == "AQ=="
    assert found[1]["error"]
    assert "no event, 1 bytes" in djp("tail", "raw").stdout.splitlines()[1]


def test_bytes_and_nothing_as_data(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(Topic("t"))
    stream.publish("t", [Event(type="t", source="/s", data=b"1234"), Event(type="t", source="/s")])
    lines = djp("tail", "t").stdout.splitlines()
    assert lines[0].endswith("-  (4 bytes)")
    assert lines[1].endswith("-  null")
    assert documents(djp("tail", "t", "--json"))[0]["data_base64"] == "MTIzNA=="


def test_a_changelog_is_no_topic_of_events(djp: Djp, stream: EventStream) -> None:
    @consumer(topic=Topic("t"), stateful=True)
    def count(batch: Any) -> None:
        batch.state.set("k", 1)

    from djp_dagster import run_pending

    stream.create_topic(Topic("t"))
    stream.publish("t", [Event(type="t", source="/s")])
    run_pending(stream, count)
    assert "is a changelog" in djp("tail", "__changelog.count", code=1).stderr


def test_what_retention_removed_is_not_asked_for(djp: Djp, stream: EventStream) -> None:
    topic = Topic("short", retention="1us")
    stream.create_topic(topic)
    for n in range(5):
        stream.publish(topic, [topic.event(n=n)])
    stream.log.trim(stream.log.now_micros() + 10**9)
    assert documents(djp("tail", "short", "--from", "earliest", "--json")) == []
    stream.publish(topic, [topic.event(n=5)])
    assert [one["offset"] for one in documents(djp("tail", "short", "--json"))] == [5]
    assert [one["offset"] for one in documents(djp("tail", "short", "--from", "1h", "--json"))] == [5]
    assert "holds offsets 5 to 5, not 0" in djp("tail", "short", "--from", 0, code=1).stderr


def test_partitions_of_any_batches_merge(djp: Djp, place: Path, clock: Clock, seed: random.Random) -> None:
    with open_stream(place, clock=clock) as stream:
        stream.create_topic(WORDS)
        for n in range(60):
            stream.publish(WORDS, [WORDS.event(word=f"w{seed.randrange(9)}", n=n) for _ in range(seed.randint(1, 5))])
            clock.advance(timedelta(milliseconds=seed.choice([0, 1])).total_seconds())
    everything = documents(djp("tail", "words", "--from", "earliest", "--json"))
    assert everything == sorted(everything, key=lambda one: (one["append_time"], one["partition"], one["offset"]))
    for number in (1, 2, 17, 50):
        assert documents(djp("tail", "words", "-n", number, "--json")) == everything[-number:]
