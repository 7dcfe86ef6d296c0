"""``djp publish``: what is in the stream afterwards, exactly, whatever the input."""

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from djp_dagster import Event, EventStream, Topic, open_stream
from djp_dagster.cli.reading import BadInputError, Source
from tests.cli.conftest import Djp, document, documents

ORDERS = Topic("orders", partitions=3, key="user")


def lines(*values: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def orders(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"user": f"u{n % 7}", "n": n} for n in range(start, start + count)]


def data_of(stream: EventStream, topic: Topic = ORDERS) -> list[Any]:
    """The data of all records, in the order of ``n`` where they have one."""
    found = [record.data for partition in range(topic.partitions) for record in stream.records(topic, partition)]
    return (
        sorted(found, key=lambda data: data["n"]) if all(type(one) is dict and "n" in one for one in found) else found
    )


@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_each_line_is_the_data_of_an_event(djp: Djp, stream: EventStream, tmp_path: Path, batch: int) -> None:
    stream.create_topic(ORDERS)
    file = tmp_path / "orders.jsonl"
    file.write_bytes(lines(*orders(25)).replace(b"\n", b"\r\n\n", 3) + b"  \n" + lines({"user": "last", "n": 99})[:-1])
    result = djp("publish", "orders", file, "--batch", batch)
    assert re.fullmatch(r"published 26 events to orders in [\d.]+ s \([\d,]+ events/s\)\n", result.stdout)
    assert result.stderr == ""
    assert data_of(stream) == [*orders(25), {"user": "last", "n": 99}]
    record = next(stream.records("orders", 0))
    assert (record.type, record.source) == ("orders", "/topics/orders")


def test_from_standard_input_as_json(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(ORDERS)
    facts = document(djp("publish", "orders", "--json", given=b"\xef\xbb\xbf" + lines(*orders(10))))
    assert (facts["topic"], facts["events"], facts["up_to_line"]) == ("orders", 10, 10)
    assert facts["events_per_second"] > 0
    assert data_of(stream) == orders(10)


@pytest.mark.parametrize("empty", [b"", b"\n \n\n", b"\xef\xbb\xbf"])
def test_nothing_is_no_error(djp: Djp, stream: EventStream, empty: bytes) -> None:
    stream.create_topic(ORDERS)
    assert document(djp("publish", "orders", "--json", given=empty))["events"] == 0
    assert document(djp("publish", "orders", "--json", "--producer", "p", given=empty))["events"] == 0


def test_a_topic_is_made_only_on_request_and_alike(djp: Djp, stream: EventStream) -> None:
    assert "topic 'orders' does not exist" in djp("publish", "orders", code=1, given="{}\n").stderr
    assert "add --create" in djp("publish", "orders", "--partitions", 2, code=2, given="{}\n").stderr
    made = ("publish", "orders", "--create", "--partitions", 3, "--key", "user")
    djp(*made, given=lines(*orders(3)))
    djp(*made, given=lines(*orders(3, start=3)))
    assert data_of(stream) == orders(6)
    assert "was created with partitions=3" in djp("publish", "orders", "--create", code=1, given="{}\n").stderr
    assert "must be 1 to 4096" in djp("publish", "more", "--create", "--partitions", 0, code=1, given="{}\n").stderr


BAD_LINES = [
    (b'{"user": "u1", "n": ', "not a JSON value"),
    (b"\xff\xfe", "not a JSON value"),
    (b"[" * 20_000, "not a JSON value"),
    (b'{"n": 1}', "user"),
    (b'{"user": 1.5, "n": 1}', "user"),
    (b'{"user": "u", "n": %d}' % 2**70, "cannot be encoded"),
    (b'{"user": "u", "pad": "%s"}' % (b"x" * 2000), "takes 1000"),
    (b'"' + b"x" * 100_000 + b'"', "longer than"),
]


@pytest.mark.parametrize(
    ("batch", "producer"), [(1, ()), (4, ("--producer", "p")), (1000, ())], ids=["1", "4 named", "1000"]
)
@pytest.mark.parametrize(("bad", "said"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_all_before_it_is_there(
    djp: Djp, stream: EventStream, tmp_path: Path, bad: bytes, said: str, batch: int, producer: tuple[str, ...]
) -> None:
    stream.create_topic(Topic("orders", partitions=3, key="user", max_event_bytes=1000))
    file = tmp_path / "some.jsonl"
    file.write_bytes(lines(*orders(10)) + bad + b"\n" + lines(*orders(10, start=10)))
    command = ("publish", "orders", file, "--batch", batch, *producer)
    error = djp(*command, code=1).stderr
    assert error.startswith("Error: published 10 events up to line 10; ")
    assert f"{file} line 11: " in error
    assert said in error
    assert error.count("\n") == 1
    assert data_of(stream) == orders(10)
    assert "--skip-lines 11" in error
    djp(*command, "--skip-lines", 11)
    assert data_of(stream) == orders(20)


def test_a_bad_first_line_leaves_nothing(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(ORDERS)
    error = djp("publish", "orders", code=1, given=b"nonsense\n" + lines(*orders(3))).stderr
    assert "published 0 events; standard input line 1: not a JSON value" in error
    error = djp("publish", "orders", "--producer", "p", code=1, given=lines({"n": 1})).stderr
    assert error.startswith("Error: published 0 events; standard input line 1: ")
    assert data_of(stream) == []


def test_an_outage_is_told_with_what_was_published(
    djp: Djp, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    from djp_dagster.errors import AmbiguousPublishError, StreamUnavailableError
    from djp_dagster.streams.sql.log import SqlEventLog

    stream.create_topic(ORDERS)
    append = SqlEventLog.append
    left = iter([None, None, StreamUnavailableError("it is away"), None, AmbiguousPublishError("who knows")])

    def failing(self: SqlEventLog, *args: Any) -> Any:
        error = next(left)
        if error is not None:
            raise error
        return append(self, *args)

    monkeypatch.setattr(SqlEventLog, "append", failing)
    error = djp("publish", "orders", "--batch", 3, code=1, given=lines(*orders(9))).stderr
    assert error == "Error: published 6 events up to line 6; it is away. Continue with --skip-lines 6.\n"
    error = djp("publish", "orders", "--batch", 3, "--skip-lines", 6, code=1, given=lines(*orders(12))).stderr
    assert "published 3 events up to line 9; lines 10 to 12 are in the stream all or none; who knows" in error
    assert data_of(stream) == orders(9)


def test_a_named_producer_appends_each_line_once(djp: Djp, stream: EventStream, tmp_path: Path) -> None:
    stream.create_topic(ORDERS)
    file = tmp_path / "growing.jsonl"
    command = ("publish", "orders", file, "--producer", "import")
    file.write_bytes(lines(*orders(10)))
    djp(*command, "--batch", 3)
    again = djp(*command)
    assert again.stdout.startswith("published 0 events")
    assert "had published the first 10 lines before" in again.stderr
    file.write_bytes(lines(*orders(25)))
    assert document(djp(*command, "--json"))["already_published_lines"] == 10
    assert data_of(stream) == orders(25)
    ids = [record.id for partition in range(3) for record in stream.records("orders", partition)]
    assert sorted(int(one.rpartition(":")[2]) for one in ids) == list(range(1, 26))
    file.write_bytes(lines(*orders(20)))
    assert "was cut; give another --producer name" in djp(*command, code=1).stderr
    assert data_of(stream) == orders(25)


def test_nobody_publishes_to_the_librarys_own_topics(djp: Djp, stream: EventStream) -> None:
    assert "library's own" in djp("publish", "__changelog.g", "--create", code=1, given="1\n").stderr
    assert stream.topics(internal=True) == []


def test_a_producer_takes_no_other_input_or_topic_for_the_same(djp: Djp, stream: EventStream) -> None:
    for name in ("orders", "others"):
        stream.create_topic(Topic(name, partitions=3, key="user"))
        djp("publish", name, "--producer", "daily", given=lines(*orders(5)))
        djp("publish", name, "--producer", "daily", given=lines(*orders(5, start=5)))
        assert data_of(stream, Topic(name, partitions=3, key="user")) == orders(10)


@pytest.mark.parametrize("wrong", ["no/name", "x" * 300])
def test_a_producer_has_a_name(djp: Djp, stream: EventStream, wrong: str) -> None:
    stream.create_topic(ORDERS)
    error = djp("publish", "orders", "--producer", wrong, code=1, given=lines(*orders(1))).stderr
    assert "producer name" in error


EVENTS = [
    Event(type="a", source="/s", id=f"{n}", data={"user": "u", "n": n}, subject="s", ext={"partitionkey": f"k{n}"})
    for n in range(20)
]


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_cloudevents_keep_their_attributes(djp: Djp, stream: EventStream, array: bool) -> None:
    stream.create_topic(ORDERS)
    texts = [event.to_json() for event in EVENTS]
    given = b" \n [" + b" ,\n".join(texts) + b"] \n" if array else b"\n".join(texts)
    facts = document(djp("publish", "orders", "--format", "cloudevents", "--json", "--batch", 7, given=given))
    assert facts["events"] == 20
    found = {r.id: r.event() for partition in range(3) for r in stream.records("orders", partition)}
    assert found == {event.id: event for event in EVENTS}


def test_a_bad_element_of_an_array_is_named(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(ORDERS)
    texts = [event.to_json() for event in EVENTS]
    texts[12] = b'{"specversion": "1.0", "type": "a", "id": "1"}'
    command = ("publish", "orders", "--format", "cloudevents", "--batch", 5)
    error = djp(*command, code=1, given=b"[" + b",".join(texts) + b"]").stderr
    assert "published 12 events up to element 12; standard input element 13: event attribute 'source'" in error
    djp(*command, "--skip-lines", 13, given=b"[" + b",".join(texts) + b"]")
    assert [data["n"] for data in data_of(stream)] == [n for n in range(20) if n != 12]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'[{"a": 1}', "its ']' is missing"),
        (b"[ ] 3", "after the end of the array"),
        (b"[1]", "a JSON object, not int"),
        (b"[,]", "not a JSON object"),
        (b"[{}}]", "'specversion'"),
        (b"5", "a JSON object, not int"),
        (b'{"specversion": "0.3"}', "must be '1.0'"),
    ],
)
def test_what_is_no_cloudevent_is_said(djp: Djp, stream: EventStream, text: bytes, said: str) -> None:
    stream.create_topic(ORDERS)
    assert said in djp("publish", "orders", "--format", "cloudevents", code=1, given=text).stderr


def test_what_tail_printed_is_taken_back(djp: Djp, stream: EventStream) -> None:
    for name in ("first", "second"):
        stream.create_topic(Topic(name))
    event = Event(type="t", source="/s", id="1", data=b"\x00\xff", ext={"topic": "mine", "partition": 7, "other": True})
    stream.publish("first", [event])
    printed = djp("tail", "first", "--json").stdout
    assert json.loads(printed)["topic"] == "first"
    djp("publish", "second", "--format", "cloudevents", given=printed)
    assert next(stream.records("second", 0)).event() == event


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(JSON, max_size=30), batch=st.integers(1, 10))
def test_any_json_lines_come_back_from_tail(
    djp: Djp, tmp_path_factory: pytest.TempPathFactory, values: list[Any], batch: int
) -> None:
    place = tmp_path_factory.mktemp("any") / "stream.db"
    text = b"".join(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for value in values)
    djp("publish", "any", "--create", "--batch", batch, given=text, stream=place)
    found = documents(djp("tail", "any", "--from", "earliest", "--json", stream=place))
    assert [one.get("data") for one in found] == [json.loads(line) for line in text.splitlines()]
    assert [one["offset"] for one in found] == list(range(len(values)))


class Drip(io.RawIOBase):
    """An input that comes in pieces of random size."""

    def __init__(self, text: bytes, seed: random.Random, largest: int) -> None:
        self._text, self._seed, self._largest = text, seed, largest

    def read1(self, _: int) -> bytes:
        size = self._seed.randint(1, self._largest)
        piece, self._text = self._text[:size], self._text[size:]
        return piece


@pytest.mark.parametrize("largest", [1, 3, 1000])
def test_pieces_of_any_size_make_the_same_items(seed: random.Random, largest: int) -> None:
    letters = '"\\[]{},: \n\u00e9x'
    values = [{"".join(seed.choices(letters, k=3)): "".join(seed.choices(letters, k=9))} for _ in range(200)]
    texts = [json.dumps(value).encode() for value in values]
    for text, arrays in ((b"\n".join(texts), False), (b"[" + b" , ".join(texts) + b"]\n", True)):
        source = Source(Drip(text, seed, largest), max_item_bytes=1000, arrays=arrays)  # type: ignore[arg-type]
        items = [item for item in source if item is not None]
        assert [json.loads(item.text) for item in items] == values
        assert [item.number for item in items] == list(range(1, 201))
        assert source.bytes_read == len(text)


@pytest.mark.parametrize("text", [b"x" * 50_000_000, b"[" + b'"' * 1 + b"x" * 50_000_000])
def test_memory_is_bounded_by_the_longest_item_allowed(text: bytes) -> None:
    import tracemalloc

    source = Source(io.BytesIO(text), max_item_bytes=100_000, arrays=True)
    tracemalloc.start()
    try:
        with pytest.raises(BadInputError, match="longer than 100,000"):
            list(source)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_the_stream_is_readable_by_others_while_it_grows(djp: Djp, place: Path) -> None:
    djp("publish", "t", "--create", given=lines(1, 2, 3))
    with open_stream(place) as other:
        assert [record.data for record in other.records("t", 0)] == [1, 2, 3]
