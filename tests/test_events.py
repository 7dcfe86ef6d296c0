"""`Event`, its CloudEvents JSON, and `Record` with its record batches."""

import copy
import json
import os
import pickle
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from djp_dagster import Event, Topic
from djp_dagster.errors import EventTooLargeError, InvalidEventError, StreamCorruptError
from djp_dagster.streams.records import (
    MAX_BLOB_BYTES,
    EncodedBatch,
    Origin,
    Record,
    StoredBatch,
    Undecodable,
    decode_one,
    decode_records,
    encode_batches,
    encode_event,
    from_micros,
    raw_records,
    record_sizes,
    to_micros,
)

SDK = JSONFormat()
UTC = timezone.utc
NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)

text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
zones = st.one_of(
    st.just(UTC),
    st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    st.integers(-80_000, 80_000).map(lambda seconds: timezone(timedelta(seconds=seconds))),
)
times = st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31), timezones=zones)  # noqa: DTZ001
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
RESERVED = {"id", "source", "type", "time", "subject", "datacontenttype", "dataschema", "specversion", "data"}
extension_names = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(lambda name: name not in RESERVED)
extension_values = text | st.integers(-(2**31), 2**31 - 1) | st.booleans()
json_types = st.sampled_from([None, "application/json", "application/vnd.x+json", "text/json; charset=utf-8"])
events = st.builds(
    Event,
    id=text,
    source=text,
    type=text,
    time=st.none() | times,
    subject=st.none() | text,
    dataschema=st.none() | text,
    datacontenttype=json_types,
    data=json_values | st.binary(max_size=30),
    ext=st.none() | st.dictionaries(extension_names, extension_values, min_size=1, max_size=4),
)


def attributes_of(event: Event) -> dict[str, Any]:
    names = ("id", "source", "type", "time", "subject", "datacontenttype", "dataschema")
    given = {name: getattr(event, name) for name in names if getattr(event, name) is not None}
    return {"specversion": "1.0", **given, **(event.ext or {})}


class TestCloudEventsJson:
    """Structured mode, as the official SDK reads and writes it."""

    @given(events)
    def test_the_sdk_reads_what_we_write(self, event: Event) -> None:
        read = SDK.read(None, event.to_json())
        found = dict(read.get_attributes())
        if event.time is None:
            found.pop("time")  # the SDK makes one up
        assert found == attributes_of(event)
        assert {name: type(value) for name, value in found.items() if name != "time"} == {
            name: type(value) for name, value in attributes_of(event).items() if name != "time"
        }
        assert read.get_data() == event.data

    @given(events)
    def test_we_read_what_the_sdk_writes(self, event: Event) -> None:
        if event.time is not None:
            event = event.replace(
                time=event.time.astimezone(UTC)
            )  # the SDK writes offsets with seconds, which RFC 3339 has not
        attributes = {"time": NOON, **attributes_of(event)}
        read = Event.from_json(SDK.write(CloudEvent(attributes, event.data)))
        assert read == event.replace(time=attributes["time"])
        assert type(read.data) is type(event.data)

    @given(events)
    def test_there_and_back_is_the_same_event(self, event: Event) -> None:
        assert Event.from_json(event.to_json()) == event
        assert Event.from_json(event.to_json().decode()) == event
        assert Event.from_dict(event.to_dict()) == event

    @pytest.mark.parametrize(
        ("written", "micros"),
        [
            ("2024-01-01T12:00:00Z", 0),
            ("2024-01-01T14:30:00+02:30", 0),
            ("2024-01-01t12:00:00.5z", 500_000),
            ("2024-01-01T12:00:00.000001-00:00", 1),
        ],
    )
    def test_times_are_instants(self, written: str, micros: int) -> None:
        document = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "time": written}
        assert Event.from_dict(document).time == NOON + timedelta(microseconds=micros)

    def test_an_offset_with_seconds_keeps_the_instant(self) -> None:
        local = datetime(1880, 1, 1, tzinfo=timezone(timedelta(minutes=53, seconds=28)))
        written = Event(type="t", source="s", time=local).to_json()
        assert Event.from_json(written).time == local
        assert SDK.read(None, written).get_time() == local

    def test_text_of_another_media_type_stays_text(self) -> None:
        event = Event(type="t", source="s", id="1", datacontenttype="text/xml", data="<much/>")
        assert json.loads(event.to_json())["data"] == "<much/>"
        assert SDK.read(None, event.to_json()).get_data() == "<much/>"
        written = SDK.write(CloudEvent({"time": NOON, **attributes_of(event)}, event.data))
        assert Event.from_json(written) == event.replace(time=NOON)

    def test_bytes_travel_as_base64_whatever_the_media_type(self) -> None:
        event = Event(type="t", source="s", id="1", datacontenttype="image/png", data=b"\x89PNG\xff")
        document = json.loads(event.to_json())
        assert document["data_base64"] == "iVBOR/8="
        assert "data" not in document

    @pytest.mark.parametrize("member", [{}, {"data": None}, {"data_base64": None}, {"data": None, "data_base64": None}])
    def test_no_data(self, member: dict[str, Any]) -> None:
        document = {"specversion": "1.0", "id": "1", "source": "s", "type": "t", "subject": None, "ext1": None}
        event = Event.from_dict({**document, **member})
        assert (event.data, event.subject, event.ext) == (None, None, None)
        assert json.loads(event.to_json()) == {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}


VALID = {"specversion": "1.0", "id": "1", "source": "s", "type": "t"}


class TestRefused:
    """What is no event, by the attribute at fault."""

    @pytest.mark.parametrize(
        ("attribute", "value"),
        [
            *((name, value) for name in ("id", "source", "type") for value in ("", 7, b"x", None)),
            *((name, value) for name in ("subject", "datacontenttype", "dataschema") for value in ("", 7)),
            ("time", "2024-01-01T00:00:00Z"),
            ("time", datetime(2024, 1, 1)),  # noqa: DTZ001
            ("time", 0),
            ("ext", ["a"]),
        ],
    )
    def test_in_an_attribute(self, attribute: str, value: Any) -> None:
        given_attributes: dict[str, Any] = {"type": "t", "source": "s", "id": "1", attribute: value}
        with pytest.raises(InvalidEventError, match=attribute) as caught:
            Event(**given_attributes)
        assert caught.value.facts["attribute"] == attribute

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("Upper", "x"),
            ("with_line", "x"),
            ("", "x"),
            ("a" * 21, "x"),
            ("ümlaut", "x"),
            ("id", "x"),
            ("data", "x"),
            ("specversion", "1.0"),
            ("big", 2**31),
            ("small", -(2**31) - 1),
            ("number", 1.5),
            ("list", []),
            ("bytes", b"x"),
            ("nothing", None),
        ],
    )
    def test_in_an_extension(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidEventError) as caught:
            Event(type="t", source="s", ext={name: value})
        assert caught.value.facts["attribute"] == name

    @pytest.mark.parametrize(
        ("change", "attribute"),
        [
            ({"specversion": "0.3"}, "specversion"),
            ({"specversion": 1.0}, "specversion"),
            ({"id": ""}, "id"),
            ({"source": 7}, "source"),
            ({"type": []}, "type"),
            ({"time": "yesterday"}, "time"),
            ({"time": "2024-01-01T00:00:00"}, "time"),
            ({"time": 12}, "time"),
            ({"subject": ""}, "subject"),
            ({"data_base64": "no base64!"}, "data_base64"),
            ({"data_base64": "ümlaut"}, "data_base64"),
            ({"data_base64": 7}, "data_base64"),
            ({"data_base64": "AA==", "data": 1}, "data_base64"),
            ({"myExt": "x"}, "myExt"),
            ({"ext": {"a": 1}}, "ext"),
        ],
    )
    def test_in_a_document(self, change: dict[str, Any], attribute: str) -> None:
        with pytest.raises(InvalidEventError, match=attribute) as caught:
            Event.from_json(json.dumps({**VALID, **change}))
        assert caught.value.facts["attribute"] == attribute

    @pytest.mark.parametrize("missing", ["specversion", "id", "source", "type"])
    def test_a_missing_attribute(self, missing: str) -> None:
        with pytest.raises(InvalidEventError, match=missing) as caught:
            Event.from_dict({name: value for name, value in VALID.items() if name != missing})
        assert caught.value.facts["attribute"] == missing

    @pytest.mark.parametrize(
        "document",
        ["", "{", "[]", "7", "null", b"\xff\xfe", b'{"id":"\xff"}', '"\ud800"', "[" * 100_000, '{"a":' * 100_000],
        ids=lambda document: repr(document)[:20],
    )
    def test_what_is_no_json_object(self, document: str | bytes) -> None:
        with pytest.raises(InvalidEventError) as caught:
            Event.from_json(document)
        assert caught.value.facts["attribute"] is None

    @given(st.binary(max_size=60) | st.text(max_size=60) | json_values.map(json.dumps))
    def test_nothing_read_raises_anything_else(self, document: str | bytes) -> None:
        with pytest.raises(InvalidEventError):
            Event.from_json(document)

    @pytest.mark.parametrize(
        "data",
        [object(), {"a": {1, object()}}, "\ud800", {(1, 2): 3}],
        ids=["object", "within a set", "surrogate", "key"],
    )
    def test_data_that_is_no_json(self, data: Any) -> None:
        with pytest.raises(InvalidEventError) as caught:
            Event(type="t", source="s", data=data).to_json()
        assert caught.value.facts["attribute"] == "data"

    @pytest.mark.parametrize("data", [object(), 2**64, "\ud800"], ids=["object", "large", "surrogate"])
    def test_data_that_cannot_be_published(self, data: Any) -> None:
        good = Event(type="t", source="s")
        with pytest.raises(InvalidEventError, match="'bad'") as caught:
            list(encode_batches("t", 0, [good, Event(type="t", source="s", id="bad", data=data)], max_event_bytes=9999))
        assert caught.value.facts["attribute"] == "data"

    def test_a_copy_with_other_attributes_is_validated(self) -> None:
        event = Event(type="t", source="s", id="1")
        assert event.replace(subject="x") == Event(type="t", source="s", id="1", subject="x")
        with pytest.raises(InvalidEventError, match="subject"):
            event.replace(subject="")


class TestValue:
    """An event is a value."""

    def test_it_is_immutable(self) -> None:
        event = Event(type="t", source="s")
        for name in ("id", "data", "ext"):
            with pytest.raises(AttributeError):
                setattr(event, name, "x")

    @given(events)
    @settings(max_examples=30)
    def test_it_survives_copying_and_pickling(self, event: Event) -> None:
        assert copy.copy(event) == copy.deepcopy(event) == pickle.loads(pickle.dumps(event)) == event

    def test_a_record_survives_pickling(self) -> None:
        record = decode_one(encode_event(Event(type="t", source="s", id="1", data=7)), 3, Origin("a", 1, 2, "scope"))
        assert isinstance(record, Record)
        again = pickle.loads(pickle.dumps(record))
        assert (again.event(), again.position, again.origin) == (record.event(), record.position, record.origin)

    def test_ids_are_unique(self) -> None:
        ids = {Event(type="t", source="s").id for _ in range(10_000)}
        assert len(ids) == 10_000

    def test_ids_are_unique_across_a_fork(self) -> None:
        Event(type="t", source="s")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, "\n".join(Event(type="t", source="s").id for _ in range(100)).encode())
            os._exit(0)
        mine = {Event(type="t", source="s").id for _ in range(100)}
        os.close(write)
        with os.fdopen(read) as pipe:
            theirs = set(pipe.read().split("\n"))
        assert os.waitpid(child, 0)[1] == 0
        assert len(theirs) == 100
        assert not mine & theirs

    def test_event_time(self) -> None:
        assert Event(type="t", source="s", time=NOON).event_time == NOON
        assert Event(type="t", source="s").event_time is None


def stored(encoded: EncodedBatch, base_offset: int = 0) -> StoredBatch:
    return StoredBatch(encoded.topic, encoded.partition, base_offset, encoded.count, 77, encoded.codec, encoded.blob)


def only(encoded: Iterator[EncodedBatch]) -> EncodedBatch:
    (one,) = encoded
    return one


class TestRecordBatches:
    """Events in the stream's own encoding."""

    @given(st.lists(events, min_size=1, max_size=6), st.integers(0, 10), st.data())
    @settings(max_examples=50)
    def test_there_and_back(self, given_events: list[Event], base: int, data: st.DataObject) -> None:
        encoded = only(encode_batches("t", 3, given_events, max_event_bytes=1 << 20))
        assert encoded.count == len(given_events)
        start = data.draw(st.integers(0, base + len(given_events)))
        end = data.draw(st.integers(start, base + len(given_events) + 2))
        records, bad = decode_records(stored(encoded, base), start, end, scope="scope")
        assert bad == []
        first = max(start, base)
        assert [record.event() for record in records] == given_events[first - base : max(end - base, 0)]
        assert [record.offset for record in records] == list(range(first, first + len(records)))
        assert all(record.topic == "t" and record.partition == 3 for record in records)
        times_given = [to_micros(event.time) for event in given_events if event.time is not None]
        assert encoded.min_event_micros == min(times_given, default=None)
        assert encoded.max_event_micros == max(times_given, default=None)

    @given(st.lists(events, min_size=1, max_size=4))
    @settings(max_examples=20)
    def test_tuples_of_attributes_encode_alike(self, given_events: list[Event]) -> None:
        import msgspec

        rows = [msgspec.structs.astuple(event) for event in given_events]
        assert list(encode_batches("t", 0, rows, max_event_bytes=1 << 20)) == list(
            encode_batches("t", 0, given_events, max_event_bytes=1 << 20)
        )

    @given(times)
    def test_micros_are_exact(self, moment: datetime) -> None:
        assert from_micros(to_micros(moment)) == moment

    def test_no_events_are_no_batch(self) -> None:
        assert list(encode_batches("t", 0, [], max_event_bytes=10)) == []

    def test_large_batches_are_split_and_keep_their_order(self) -> None:
        large = [Event(type="t", source="s", data="x" * 100_000, id=str(n)) for n in range(50)]
        encoded = list(encode_batches("t", 0, large, max_event_bytes=1 << 20))
        assert len(encoded) > 4
        assert all(len(batch.blob) <= MAX_BLOB_BYTES for batch in encoded)
        ids = [record.id for batch in encoded for record in decode_records(stored(batch), 0, batch.count)[0]]
        assert ids == [event.id for event in large]

    def test_an_event_above_the_blob_size_has_a_batch_of_its_own(self) -> None:
        large = Event(type="t", source="s", data="x" * (MAX_BLOB_BYTES + 10), id="large")
        small = [Event(type="t", source="s", id=str(n)) for n in range(3)]
        encoded = list(encode_batches("t", 0, [*small, large, *small], max_event_bytes=10 * MAX_BLOB_BYTES))
        assert sum(batch.count for batch in encoded) == 7
        assert [batch.count for batch in encoded if len(batch.blob) > MAX_BLOB_BYTES] == [1]

    @pytest.mark.parametrize("others", [0, 1, 20])
    def test_the_limit_is_exact(self, others: int) -> None:
        small = [Event(type="t", source="s", id=str(n)) for n in range(others)]
        event = Event(type="t", source="s", id="tight", data="x" * 300)
        size = len(encode_event(event))
        encoded = list(encode_batches("t", 0, [*small, event], max_event_bytes=size))
        assert sum(batch.count for batch in encoded) == others + 1
        with pytest.raises(EventTooLargeError, match="'tight'") as caught:
            list(encode_batches("t", 0, [*small, event], max_event_bytes=size - 1))
        assert caught.value.facts == {"topic": "t", "event_id": "tight", "bytes": size, "limit": size - 1}

    def test_sizes_and_raw_records(self) -> None:
        given_events = [Event(type="t", source="s", data="x" * n) for n in range(5)]
        batch = stored(only(encode_batches("t", 0, given_events, max_event_bytes=1 << 20)))
        assert record_sizes(batch) == [len(encode_event(event)) for event in given_events]
        assert raw_records(batch) == [encode_event(event) for event in given_events]

    @pytest.mark.parametrize(
        "bad",
        [
            b"\x01",
            b"\x90",
            b"\xc0",
            b"\x93\xa1a\xa1b\x01",
            b"\x93\xa1\xff\xa1s\xa1t",
            b"\x94\xa1i\xa1s\xa1t\xa1\xff",
            b"\x94\xa1i\xa1s\xa1t\x81\xa1\xff\x01",
            b"\x94\xa1i\xa1s\xa1t\x81\x80\x01",
            b"\x95\xa1i\xa1s\xa1t\x01\xa3now",
        ],
        ids=lambda raw: raw.hex(),
    )
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_record_that_does_not_decode_is_isolated(self, bad: bytes, place: int) -> None:
        raws = [encode_event(Event(type="t", source="s", id=str(n))) for n in range(2)]
        raws.insert(place, bad)
        batch = StoredBatch("t", 1, 10, 3, 77, 1, b"\x93" + b"".join(raws))
        records, undecodable = decode_records(batch, 10, 13, scope="x")
        assert [record.id for record in records] == ["0", "1"]
        (found,) = undecodable
        assert isinstance(found, Undecodable)
        assert (found.position, found.raw, bool(found.error)) == (("t", 1, 10 + place), bad, True)
        assert 10 + place not in [record.offset for record in records]

    @pytest.mark.parametrize("blob", [b"", b"\x93\x01", b"\x01", b"\x92\x90\x90"], ids=lambda blob: blob.hex())
    def test_a_damaged_batch_is_named(self, blob: bytes) -> None:
        with pytest.raises(StreamCorruptError) as caught:
            decode_records(StoredBatch("t", 1, 10, 3, 77, 1, blob), 10, 13)
        assert caught.value.facts == {"topic": "t", "partition": 1, "offset": 10}

    def test_a_batch_of_another_count_is_damaged(self) -> None:
        encoded = only(encode_batches("t", 0, [Event(type="t", source="s")] * 2, max_event_bytes=1 << 20))
        with pytest.raises(StreamCorruptError, match="2 records, not 3"):
            decode_records(StoredBatch("t", 0, 0, 3, 77, 1, encoded.blob), 0, 3)


class TestRecord:
    """What a reader gets."""

    def record(self, event: Event) -> Record:
        found = decode_one(encode_event(event), 5, Origin("clicks", 2, to_micros(NOON), "abc/group"))
        assert isinstance(found, Record)
        return found

    def test_where_it_lies(self) -> None:
        record = self.record(Event(type="t", source="s"))
        assert (record.topic, record.partition, record.offset) == ("clicks", 2, 5)
        assert record.position == ("clicks", 2, 5)
        assert record.append_time == record.event_time == NOON
        assert record.idempotency_key == "abc/group/clicks/2/5"

    def test_it_is_an_event(self) -> None:
        event = Topic("clicks").event(n=1).replace(time=NOON - timedelta(days=1), ext={"partitionkey": "k"})
        record = self.record(event)
        assert isinstance(record, Event)
        assert record.event_time == event.time
        assert type(record.event()) is Event
        assert record.event() == event
        assert Event.from_json(record.to_json()) == event
