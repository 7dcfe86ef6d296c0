"""Heavy data of events in the payload store: what comes back is what was published, and comes only when asked for."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from djp_dagster import Batch, Event, EventStream, Topic, consumer, open_payload_store, open_stream, run_pending
from djp_dagster.errors import (
    EventTooLargeError,
    InvalidClaimError,
    InvalidEventError,
    InvalidSettingError,
    MissingKeyError,
    PayloadCorruptError,
    PayloadForbiddenError,
    PayloadMissingError,
    PayloadStoreUnavailableError,
    PayloadTooLargeError,
)
from djp_dagster.streams.records import Record
from djp_dagster.testing import memory_stream
from tests.claim_check.kit import MIB, Memory
from tests.servers.seaweedfs import SeaweedServer
from tests.streams.conftest import Backend
from tests.streams.heavy import (
    KINDS,
    MEDIA_TYPES,
    both,
    content_of,
    counted_store,
    grow_old,
    payload_files,
    records_of,
    same,
    seen,
    values,
)

INLINE, HEAVY = Topic("inline"), Topic("heavy", offload_above=0)
THOUSAND = Topic("thousand", offload_above=1000)


def event_of(data: Any, **attributes: Any) -> Event:
    return Event(**{"type": "t", "source": "/s", "data": data, **attributes})


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., tuple[EventStream, Counter[str]]]]:
    """Opens streams on SQLite whose payloads are in a folder that counts."""
    with ExitStack() as stack:

        def make(**settings: Any) -> tuple[EventStream, Counter[str]]:
            store, counts = counted_store(tmp_path / "payloads", **settings)
            return stack.enter_context(open_stream(tmp_path / "stream.db", payloads=store)), counts

        yield make


@pytest.fixture
def counted(opened: Callable[..., tuple[EventStream, Counter[str]]]) -> tuple[EventStream, Counter[str]]:
    """A stream, and how often its payload store was asked for what."""
    return opened()


def published(stream: EventStream, topic: Topic, *events: Event) -> list[Record]:
    stream.create_topic(topic)
    before = {record.position for record in records_of(stream, topic)}
    stream.publish(topic, events)
    return [record for record in records_of(stream, topic) if record.position not in before]


@pytest.fixture(scope="module")
def shared() -> Iterator[EventStream]:
    """One stream in memory for tests that only look at what they have just published."""
    with memory_stream() as stream:
        for topic in (INLINE, HEAVY, THOUSAND):
            stream.create_topic(topic)
        yield stream


class TestKinds:
    """Every value comes back as it does without a payload store."""

    @pytest.fixture
    def stream(self, shared: EventStream) -> EventStream:
        return shared

    @pytest.mark.parametrize("name", KINDS)
    def test_all_kinds(self, stream: EventStream, name: str) -> None:
        events = [
            event_of(KINDS[name], datacontenttype=media_type, subject="s", ext={"other": 7, "traceparent": "x"})
            for media_type in MEDIA_TYPES
        ]
        for expected, record in both(stream, INLINE, HEAVY, events):
            assert same(record.data, expected.data), record.datacontenttype
            assert seen(record) == seen(expected)
            assert (record.claim is None) == (name in {"None", "no bytes"})  # no larger than 0 bytes
            assert expected.claim is None
            assert content_or_error(record) == content_or_error(expected), record.datacontenttype

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(values, st.sampled_from(MEDIA_TYPES)), min_size=1, max_size=6))
    def test_any_values(self, stream: EventStream, drawn: list[tuple[Any, str | None]]) -> None:
        events = [event_of(value, datacontenttype=media_type) for value, media_type in drawn]
        for expected, record in both(stream, INLINE, HEAVY, events):
            assert same(record.data, expected.data)
            assert seen(record) == seen(expected)
            assert content_or_error(record) == content_or_error(expected)

    @pytest.mark.parametrize("more", [-1, 0, 1])
    @pytest.mark.parametrize(
        "make",
        [
            lambda size: b"x" * size,
            lambda size: "x" * (size - 3),  # MessagePack: three bytes before a text of that length
            lambda size: {"a": "x" * (size - 6)},
            lambda size: ["é" * ((size - 4) // 2) + "x" * (size % 2)],
        ],
        ids=["bytes", "text", "dict", "list"],
    )
    def test_the_boundary(self, stream: EventStream, make: Callable[[int], Any], more: int) -> None:
        data = make(1000 + more)
        encoded = data if isinstance(data, bytes) else msgspec.msgpack.encode(data)
        assert len(encoded) == 1000 + more
        ((expected, record),) = both(stream, INLINE, THOUSAND, [event_of(data)])
        assert (record.claim is not None) == (more > 0)
        assert same(record.data, expected.data)

    def test_among_others_in_order(self, stream: EventStream) -> None:
        events = [event_of({"n": n, "x": "x" * (n % 7 * 300)}) for n in range(200)]
        pairs = both(stream, INLINE, THOUSAND, events)
        assert [record.data["n"] for _, record in pairs] == list(range(200))
        assert all(seen(record) == seen(expected) and record.data == expected.data for expected, record in pairs)
        assert sum(record.claim is not None for _, record in pairs) == sum(n % 7 >= 4 for n in range(200))

    def test_what_cannot_be_encoded_is_refused_alike(self, stream: EventStream) -> None:
        stored = len(list(stream.payloads.objects.list("sha256/")))
        for bad in (object(), 2**64, "\ud800", {"a": ["x" * 2000, object()]}, [2**64, "x" * 2000]):
            messages = []
            for topic in (INLINE, HEAVY, THOUSAND):
                with pytest.raises(InvalidEventError) as caught:
                    stream.publish(topic, [event_of("x" * 2000, id="good"), event_of(bad, id="bad")])
                messages.append(str(caught.value))
            assert "'bad'" in messages[0]
            assert len(set(messages)) == 1
        assert len(list(stream.payloads.objects.list("sha256/"))) == stored

    def test_an_event_without_data_stays_without(self, stream: EventStream) -> None:
        (record,) = published(stream, HEAVY, event_of(None))
        assert record.ext is None
        assert record.data is None

    def test_is_what_another_tool_reads_of_it(self, stream: EventStream) -> None:
        """The payload is what the media type says."""
        for data, declared, media_type, content in (
            ({"a": 1}, None, "application/json", b'{"a":1}'),
            ({"a": 1}, "application/vnd.api+json", "application/vnd.api+json", b'{"a":1}'),
            ({"a": 1}, "text/csv", "application/json", b'{"a":1}'),
            ("a,b", "text/csv", "text/csv", b"a,b"),
            ("a,b", None, "text/plain; charset=utf-8", b"a,b"),
            ("a,b", "application/json", "application/json", b'"a,b"'),
            (b"\x89PNG", "image/png", "image/png", b"\x89PNG"),
            (b"\x89PNG", None, "application/octet-stream", b"\x89PNG"),
            (b"\x89PNG", "no media type", "application/octet-stream", b"\x89PNG"),
            ({"a": b"\1"}, "application/json", "application/vnd.msgpack", b"\x81\xa1a\xc4\x01\x01"),
        ):
            (record,) = published(stream, HEAVY, event_of(data, datacontenttype=declared))
            claim = record.claim
            assert claim is not None
            assert claim.media_type == media_type
            assert stream.payloads.read(claim) == content

    def test_through_the_official_sdk(self, stream: EventStream) -> None:
        sdk = JSONFormat()
        (record,) = published(stream, HEAVY, event_of({"a": 1}, datacontenttype="application/json"))
        theirs = sdk.read(CloudEvent, record.to_json())
        assert theirs.get_extension("dataref") == record.claim.uri  # type: ignore[union-attr]
        (again,) = published(stream, HEAVY, Event.from_json(sdk.write(theirs)))
        assert again.data == {"a": 1}

    def test_an_event_that_offloading_makes_small_enough(self, stream: EventStream) -> None:
        tight = Topic("tight", offload_above=10_000, max_event_bytes=3000)
        (record,) = published(stream, tight, event_of("x" * 3000))
        assert record.claim is not None
        assert record.data == "x" * 3000
        with pytest.raises(EventTooLargeError):
            stream.publish(tight, [event_of("x" * 500, subject="s" * 3000)])


def content_or_error(record: Record) -> bytes | str:
    try:
        return content_of(record)
    except TypeError as error:  # keys that JSON has not
        return str(error)


class TestKeys:
    """The key that data holds decides what it decides without a payload store, and is not loaded for it."""

    @pytest.fixture(params=["user", "user.name"])
    def path(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_the_same_partitions_and_the_same_keys(
        self, backend: Backend, stream: EventStream, tmp_path: Path, path: str
    ) -> None:
        inline = Topic("inline", partitions=5, key=path)
        heavy = Topic("heavy", partitions=5, key=path, offload_above=500)
        ids: list[str | int] = ["a", "b", "ü😀", "", "1", 1, -(2**60), 2**63, "x" * 700]
        for topic in (inline, heavy):
            stream.create_topic(topic)
            events = [
                Event(
                    id=f"{size}-{position}",
                    type="t",
                    source="/s",
                    data={"user": user if path == "user" else {"name": user}, "x": "x" * size},
                    ext={"partitionkey": "explicit"} if position == 3 else None,
                )
                for size in (0, 2000)
                for position, user in enumerate(ids)
            ]
            stream.publish(topic, events)
        expected = {(record.id, record.partition, inline.key_of(record)) for record in records_of(stream, inline)}
        records = records_of(stream, heavy)
        for path_ in payload_files(tmp_path / "payloads"):
            path_.unlink()
        assert {(record.id, record.partition, heavy.key_of(record)) for record in records} == expected
        assert sum(record.claim is not None for record in records) == len(ids) + 1

    def test_no_key_is_refused_alike(self, stream: EventStream, tmp_path: Path) -> None:
        heavy = stream.create_topic(Topic("heavy", partitions=2, key="user", offload_above=0))
        for data in ({"x": 1}, {"user": None}, {"user": 1.5}, {"user": True}, b"bytes", "text", None):
            with pytest.raises(MissingKeyError):
                stream.publish(heavy.name, [event_of(data)])
        assert payload_files(tmp_path) == []

    def test_records_published_again(self, counted: tuple[EventStream, Counter[str]]) -> None:
        """To a topic of the same key, of none, and of another: by the record, and by its bare event."""
        stream, counts = counted
        first = Topic("first", partitions=4, key="user", offload_above=100)
        alike = Topic("alike", partitions=4, key="user", offload_above=100)
        keyless = Topic("keyless", partitions=4)
        other = Topic("other", partitions=4, key="town")
        events = [first.event(user=f"u{n}", town=f"t{n % 7}", x="x" * 500) for n in range(20)]
        records = published(stream, first, *events)
        for topic in (alike, keyless):
            copies = published(stream, topic, *records)
            assert counts["read"] == 0
            assert {copy_.id: copy_.claim for copy_ in copies} == {record.id: record.claim for record in records}
            assert {(c.id, c.partition) for c in copies} == {(e.id, topic.partition_of(e)) for e in events}
        copies = published(stream, other, *records)
        assert {(c.id, c.partition) for c in copies} == {(e.id, other.partition_of(e)) for e in events}
        assert {other.key_of(record) for record in copies} == {f"t{n}" for n in range(7)}
        assert [c.data for c in sorted(copies, key=lambda c: int(c.data["user"][1:]))] == [e.data for e in events]
        assert counts["written"] == 20

    def test_new_data_has_its_own_key(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        topic = Topic("t", partitions=16, key="user", offload_above=100)
        (record,) = published(stream, topic, topic.event(user="a", x="x" * 500))
        for n in range(8):
            changed = record.replace(data={"user": f"b{n}"}, id=f"changed-{n}")
            bare = record.event().replace(data={"user": f"b{n}"}, id=f"bare-{n}")
            for found in published(stream, topic, changed, bare):
                assert found.data == {"user": f"b{n}"}
                assert topic.key_of(found) == f"b{n}"
                assert found.partition == topic.partition_of(topic.event(user=f"b{n}"))

    @pytest.mark.parametrize("key", ["", "x", "1.5", "null", "{}", 7, "[" * 5000])
    def test_a_hostile_key_is_refused_by_name(self, stream: EventStream, key: Any) -> None:
        topic = Topic("t", partitions=2, key="user")
        stream.create_topic(topic)
        hostile = event_of(None, ext={"dataref": "s3://b/k", "datarefkeypath": "user", "datarefkey": key})
        if key == 7:
            assert topic.key_of(hostile) == 7
            return
        with pytest.raises(InvalidEventError, match="datarefkey"):
            stream.publish(topic, [hostile])


class TestBackends:
    """SQLite, PostgreSQL and memory alike."""

    def test_publishing(self, stream: EventStream) -> None:
        events = [event_of({"n": n, "x": "x" * size}) for n, size in enumerate([10, 5000, 0, 300_000, 1000])]
        records = published(stream, THOUSAND, *events)
        assert [record.data for record in records] == [event.data for event in events]
        assert [record.claim is not None for record in records] == [False, True, False, True, True]
        pending = stream.log.spans(["thousand"])
        assert sum(span.end - span.begin for span in pending.values()) == 5

    def test_declared_otherwise_later(self, backend: Backend, stream: EventStream) -> None:
        data = {"x": "x" * 2000}
        claims = []
        for above in (None, 1000, 5000, "1kB", None, 0):
            declared = stream.create_topic(Topic("t", offload_above=above))
            assert declared.offload_above == (1000 if above == "1kB" else above)
            stream.publish("t", [event_of(data)])
            # Whoever opens the stream later goes by it, declaring nothing.
            backend.open().publish("t", [event_of(data)])
            claims += [record.claim is not None for record in stream.records("t", 0)][-2:]
        assert claims == [False, False, True, True, False, False, True, True, False, False, True, True]
        assert [record.data for record in stream.records("t", 0)] == [data] * 12

    def test_a_named_producer_that_repeats_itself(self, stream: EventStream) -> None:
        stream.create_topic(THOUSAND)
        heavy, light = event_of("x" * 3000), event_of("small")
        producer = stream.producer("p")
        assert len(producer.publish("thousand", [heavy, light], sequence=1)) == 1
        assert producer.publish("thousand", [heavy, light], sequence=1) == []
        again = stream.producer("p")
        assert again.publish("thousand", [heavy, light], sequence=1) == []
        again.publish("thousand", [heavy], sequence=2)
        assert [record.data for record in stream.records("thousand", 0)] == ["x" * 3000, "small", "x" * 3000]
        assert len(list(stream.payloads.objects.list("sha256/"))) == 1

    def test_collection_finds_what_records_name(self, backend: Backend, stream: EventStream, tmp_path: Path) -> None:
        inner = stream.payloads.put(b"inner" * 500).claim
        other = stream.payloads.put(b"other" * 500).claim
        small, heavy, again = published(
            stream,
            THOUSAND,
            event_of({"image": inner.to_dict()}),
            # Inside what is offloaded itself, compressed, and as MessagePack.
            event_of({"images": [other.to_dict()], "text": "x" * 30_000}),
            event_of({"images": [other.to_dict()], "bytes": b"x" * 30_000}),
        )
        assert small.claim is None
        assert heavy.claim is not None
        assert heavy.claim.encoding == "zstd"
        orphan = stream.payloads.put(b"orphan" * 500)
        if backend.name == "memory":
            return  # its payloads are nobody's business
        grow_old(tmp_path / "payloads")
        for _ in range(2):
            report = stream.collect_payloads(grace="10min", dry_run=False)
            assert [found.key for found in report.garbage] == [orphan.ref.key]
            assert report.in_use == 4
        assert again.data["images"][0]["uri"] == other.uri

    def test_what_heavy_data_names(self, stream: EventStream) -> None:
        """However it says so; and what only looks like it, names nothing."""
        key, output = f"sha256/ab/{'c' * 62}", "attempts/group/b1/1/output.json"
        for data, kept in (
            ({"a": f"file:///x/{key}.zst", "b": key}, f"{key}.zst"),
            (f'"s3:\\/\\/b\\/{key}"'.replace("/", "\\/"), key),
            (key.encode() + b"\0", key),
            ({"ref": output}, output),
            ("attempts", None),
            ("sha256", None),
            (b"sha256/attempts", None),
            (b"sha256/ab/cd", None),
        ):
            (record,) = published(stream, HEAVY, event_of(data))
            assert record.data == data
            assert (record.ext or {}).get("datarefkeeps") == kept

    def test_a_claim_beyond_number_of_names(self, stream: EventStream) -> None:
        """The names of what heavy data names must fit into the event."""
        keys = [f"sha256/{n:02x}/{n:062x}" for n in range(200)]
        (record,) = published(stream, THOUSAND, event_of({"keys": keys}))
        assert record.ext is not None
        assert str(record.ext["datarefkeeps"]).split(" ") == keys
        tight = Topic("tight", offload_above=1000, max_event_bytes=10_000)
        stream.create_topic(tight)
        with pytest.raises(EventTooLargeError):
            stream.publish(tight, [event_of({"keys": keys})])

    def test_a_topic_made_anew(self, stream: EventStream) -> None:
        """The same position holds something else then."""
        for data in ("x" * 2000, "y" * 2000):
            stream.create_topic(THOUSAND)
            stream.publish(THOUSAND, [event_of(data)])
            assert [record.data for record in stream.records("thousand", 0)] == [data]
            stream.delete_topic(THOUSAND)


class TestLazily:
    """Nothing is loaded that was not asked for, and nothing twice."""

    def test_looking_at_a_record_loads_nothing(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, counts = counted
        topic = Topic("t", partitions=2, key="user", offload_above=100)
        (record,) = published(stream, topic, topic.event(user="u", x="x" * 2000))
        claim = record.claim
        assert claim is not None
        for look in (
            lambda: record.claim,
            record.event,
            record.to_dict,
            lambda: json.loads(record.to_json()),
            lambda: record.replace(subject="s"),
            lambda: record.replace(data={"user": "v"}),
            lambda: repr(record),
            lambda: topic.key_of(record),
            lambda: (record.id, record.position, record.idempotency_key, record.event_time, record.ext),
            lambda: copy.copy(record),
            lambda: copy.deepcopy(record),
            lambda: pickle.dumps(record),
            lambda: msgspec.structs.astuple(record)[:9],
            lambda: hash(record),
            lambda: record == record,
        ):
            look()
        assert counts["read"] == 0
        assert record.to_dict()["dataref"] == claim.uri
        assert "data" not in record.to_dict()
        assert record.event().ext == record.ext
        assert record.event().data is None
        assert Event.from_json(record.to_json()) == record.event()
        assert record.data["user"] == "u"
        assert counts["read"] == 1

    def test_replace(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        (record,) = published(stream, HEAVY, event_of("x" * 50, ext={"other": 7}))
        kept = [
            record.replace(subject="s"),
            record.replace(ext={"mine": 1}),
            record.replace(ext={**record.ext, "mine": 1}),  # type: ignore[dict-item]
            record.replace(ext=None),
        ]
        for event in kept:
            (found,) = published(stream, HEAVY, event)
            assert found.data == "x" * 50
        assert [(event.ext or {}).get("other") for event in kept] == [7, None, 7, None]
        assert [(event.ext or {}).get("mine") for event in kept] == [None, 1, 1, None]
        for event in (
            record.replace(data="new"),
            record.replace(data="new", ext={"other": 7}),
            record.replace(data="new", ext=record.ext),
        ):
            assert event.ext == {"other": 7}
            assert event.data == "new"
        assert record.replace(data=None).ext == {"other": 7}
        claim = stream.payloads.put(b"another").claim
        (found,) = published(stream, HEAVY, record.replace(ext=claim.to_attributes(), datacontenttype=None))
        assert found.data == b"another"

    def test_data_twice_is_loaded_once(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, counts = counted
        records = published(stream, HEAVY, *[event_of({"n": n}) for n in range(50)])
        for _ in range(3):
            assert [record.data["n"] for record in records] == list(range(50))
        assert all(record.data is record.data for record in records)
        for _ in range(3):
            assert [record.data["n"] for record in records_of(stream, HEAVY)] == list(range(50))
        assert counts["read"] == 50

    def test_what_is_done_to_data_stays_with_its_record(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        for topic in (INLINE, HEAVY):
            stream.create_topic(topic)
            stream.publish(topic, [event_of({"list": [1]}, id="a"), event_of({"list": [1]}, id="b")])
            first, other = records_of(stream, topic)
            first.data["list"].append(2)
            assert first.data == {"list": [1, 2]}
            assert other.data == {"list": [1]}
            assert [record.data for record in records_of(stream, topic)] == [{"list": [1]}] * 2

    def test_memory_is_bounded(self, counted: tuple[EventStream, Counter[str]]) -> None:
        """140 MiB of payloads, read twice through records that are all kept."""
        stream, counts = counted
        stream.create_topic(HEAVY)
        for n in range(14):
            stream.publish(HEAVY, [event_of(bytes([n]) * (10 << 20))])
        records = records_of(stream, HEAVY)
        gc.collect()
        memory = Memory()
        with memory.peak("all of it"):
            for _ in range(2):
                for n, record in enumerate(records):
                    data = record.data
                    assert data[0] == n
                    assert len(data) == 10 << 20
                    del data
        assert memory.risen["all of it"] < 115 * MIB
        assert counts["read"] == 28

    def test_many_small_ones_are_forgotten_too(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        records = published(stream, HEAVY, *[event_of(n) for n in range(100)])
        claimed = stream.claimed
        claimed._content_bytes = claimed._value_bytes = 0
        for record in records:
            assert isinstance(record.data, int)
        assert claimed._content_bytes >= 100 * 1024
        assert claimed._value_bytes >= 100 * 1024

    def test_open_data_streams(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        size = 100 << 20
        with stream.payloads.writer() as writing:
            for n in range(100):
                writing.file.write(bytes([n]) * MIB)
        topic = Topic("uploads")
        (record,) = published(stream, topic, topic.claim_event(writing.stored.claim))
        memory, total = Memory(), 0
        with memory.peak("streaming"), record.open_data() as file:
            while piece := file.read(MIB):
                assert piece[0] == total // MIB
                total += len(piece)
        assert total == size
        assert memory.risen["streaming"] < 16 * MIB

    def test_threads_get_the_same(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        published(stream, HEAVY, *[event_of({"n": n, "x": "x" * 200_000}) for n in range(60)])
        records = records_of(stream, HEAVY)
        wrong: list[object] = []

        def read() -> None:
            for _ in range(3):
                wrong.extend(n for n, record in enumerate(records) if record.data["n"] != n)

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert stream.claimed._content_bytes <= 64 << 20
        assert stream.claimed._value_bytes <= 17 << 20

    def test_sent_to_another_process(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        inline = published(stream, INLINE, event_of({"a": 1}))[0]
        loaded, unloaded = published(stream, HEAVY, event_of({"a": 1}), event_of({"a": 2}))
        assert loaded.data == {"a": 1}
        assert pickle.loads(pickle.dumps(inline)).data == {"a": 1}
        assert pickle.loads(pickle.dumps(loaded)).data == {"a": 1}
        there = pickle.loads(pickle.dumps(unloaded))
        assert there.claim == unloaded.claim
        assert there.position == unloaded.position
        with pytest.raises(InvalidSettingError, match="ask for its data before"):
            _ = there.data
        assert copy.deepcopy(unloaded).data == {"a": 2}


class TestClaimsAsData:
    """Payloads that were stored by somebody else than `publish`."""

    def test_claim_event(self, counted: tuple[EventStream, Counter[str]], tmp_path: Path) -> None:
        stream, counts = counted
        file = tmp_path / "video.mp4"
        file.write_bytes(b"\0\0\0\x18ftyp" * 1000)
        uploads = Topic("uploads", partitions=3, key="product", offload_above=100)
        with file.open("rb") as content:
            claim = stream.payloads.put(content, media_type="video/mp4").claim
        events = [
            uploads.claim_event(claim, key="p1", subject="video"),
            uploads.claim_event(claim, key=7, ext={"other": 1}),
        ]
        records = published(stream, uploads, *events)
        assert {uploads.key_of(record) for record in records} == {"p1", 7}
        for record in records:
            assert record.claim == claim
            assert record.datacontenttype == "video/mp4"
            assert record.data == file.read_bytes()
            assert content_of(record) == file.read_bytes()
        assert counts["written"] == 1
        with pytest.raises(MissingKeyError):
            stream.publish(uploads, [uploads.claim_event(claim)])

    @pytest.mark.parametrize(
        ("content", "media_type", "data"),
        [
            (b'{"a": 1}', "application/json", {"a": 1}),
            (b'{"a": 1}', "application/vnd.api+json; v=2", {"a": 1}),
            (b"text", "text/plain", b"text"),
            (b"\xc1", "application/vnd.msgpack", b"\xc1"),
        ],
    )
    def test_data_by_its_media_type(
        self, counted: tuple[EventStream, Counter[str]], content: bytes, media_type: str, data: Any
    ) -> None:
        stream, _ = counted
        topic = Topic("t")
        claim = stream.payloads.put(content, media_type=media_type).claim
        (record,) = published(stream, topic, topic.claim_event(claim))
        assert record.data == data
        assert content_of(record) == content

    def test_data_beside_a_claim_is_the_data(self, counted: tuple[EventStream, Counter[str]]) -> None:
        """CloudEvents allows both; the one at hand is taken."""
        stream, counts = counted
        claim = stream.payloads.put(b"{}").claim
        small, heavy = published(
            stream,
            THOUSAND,
            event_of({"here": 1}, ext=claim.to_attributes()),
            event_of({"here": "x" * 2000}, ext={**claim.to_attributes(), "other": 7}),
        )
        assert small.claim is None
        assert small.data == {"here": 1}
        assert small.ext == claim.to_attributes()
        assert heavy.data == {"here": "x" * 2000}
        assert heavy.claim != claim
        assert counts["read"] == 1

    def test_passed_on_where_everything_is_offloaded(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, counts = counted
        all_of_it = Topic("all", offload_above=0)
        (record,) = published(stream, HEAVY, event_of("x" * 50))
        (passed_on,) = published(stream, all_of_it, record)
        assert passed_on.claim == record.claim
        assert passed_on.data == "x" * 50
        assert counts["written"] == 1


class TestWithoutAStore:
    def test_small_events_pass_and_heavy_ones_are_refused(self, tmp_path: Path, stream: EventStream) -> None:
        without = EventStream(stream.log, stream.coordinator, label="bare")
        (record,) = published(without, THOUSAND, event_of("small"))
        assert record.data == "small"
        with pytest.raises(InvalidSettingError, match="payloads=open_payload_store"):
            without.publish(THOUSAND, [event_of("small"), event_of("x" * 2000)])
        assert len(records_of(without, THOUSAND)) == 1
        stream.publish(THOUSAND, [event_of("x" * 2000)])
        heavy = records_of(without, THOUSAND)[-1]
        assert heavy.claim is not None
        for ask in (lambda: heavy.data, heavy.open_data, lambda: without.claimed.payloads):
            with pytest.raises(
                InvalidSettingError, match=r"stream bare was opened without one; open it with payloads="
            ):
                ask()

    def test_a_store_somewhere_else_does_not_follow(self, tmp_path: Path, stream: EventStream) -> None:
        stream.create_topic(THOUSAND)
        stream.publish(THOUSAND, [event_of("x" * 2000)])
        elsewhere = EventStream(
            stream.log, stream.coordinator, label="x", payloads=open_payload_store(tmp_path / "elsewhere")
        )
        with pytest.raises(PayloadForbiddenError):
            _ = records_of(elsewhere, THOUSAND)[0].data


class TestPayloadsThatAreNot:
    """Missing, damaged, hostile: an error of that record, which names it."""

    def test_missing_and_damaged(self, counted: tuple[EventStream, Counter[str]], tmp_path: Path) -> None:
        stream, _ = counted
        missing, damaged, cut, good = published(stream, THOUSAND, *[event_of(bytes([n]) * 2000) for n in range(4)])
        paths = {path.read_bytes()[0]: path for path in payload_files(tmp_path)}
        paths[0].unlink()
        paths[1].write_bytes(b"\xff" * 2000)
        paths[2].write_bytes(b"\x02" * 1999)
        for record, kind in (
            (missing, PayloadMissingError),
            (damaged, PayloadCorruptError),
            (cut, PayloadCorruptError),
        ):
            for _ in range(2):
                with pytest.raises(kind):
                    _ = record.data
        assert good.data == b"\x03" * 2000

    @pytest.mark.parametrize(
        ("ext", "kind"),
        [
            ({"dataref": "s3://other/sha256/ab/cd"}, PayloadForbiddenError),
            ({"dataref": "http://127.0.0.1:1/x"}, PayloadForbiddenError),
            ({"dataref": "file:///etc/passwd"}, PayloadForbiddenError),
            ({"dataref": "/etc/passwd"}, PayloadForbiddenError),
            ({"dataref": "STORE/../../../../../../../../etc/passwd"}, PayloadForbiddenError),
            ({"dataref": "STORE/sha256/../../x"}, PayloadForbiddenError),
            ({"dataref": "STORE"}, PayloadForbiddenError),
            ({"dataref": "STORE/sha256/ab/nothing"}, PayloadMissingError),
            ({"dataref": "STORE/rooms/stream", "datarefsize": "5"}, PayloadCorruptError),
            ({"dataref": "STORE/rooms/stream", "datarefencoding": "lzma"}, PayloadForbiddenError),
            ({"dataref": "STORE/rooms/stream", "datarefexpires": "1"}, Exception),
            ({"dataref": "STORE/rooms/stream", "datarefkind": "pickle"}, InvalidClaimError),
            ({"dataref": "STORE/rooms/stream", "datarefkind": "os.system"}, InvalidClaimError),
            ({"dataref": "STORE/rooms/stream", "datarefkind": "json"}, InvalidClaimError),
            ({"dataref": "STORE/rooms/stream", "datarefkind": "msgpack"}, InvalidClaimError),
            ({"dataref": "STORE/rooms/stream", "datarefkind": 7}, InvalidClaimError),
            ({"dataref": ""}, InvalidClaimError),
            ({"dataref": True}, InvalidClaimError),
            ({"dataref": "s3://b/ü"}, InvalidClaimError),
            ({"dataref": "x" * 5000}, InvalidClaimError),
            ({"dataref": "STORE/x", "datarefsha256": "x"}, InvalidClaimError),
        ],
        ids=lambda value: ", ".join(map(str, value.values()))[:60] if isinstance(value, dict) else "",
    )
    def test_hostile_claims(self, counted: tuple[EventStream, Counter[str]], ext: Any, kind: type[Exception]) -> None:
        stream, _ = counted
        first, _ = published(stream, THOUSAND, event_of("x" * 2000), event_of("y"))
        assert first.claim is not None
        ext = {k: v.replace("STORE", stream.payloads.uri) if isinstance(v, str) else v for k, v in ext.items()}
        hostile, good = published(stream, THOUSAND, event_of(None, ext=ext), event_of("good" * 500))
        with pytest.raises(kind):
            _ = hostile.data
        assert hostile.ext == ext
        assert hostile.to_dict()["dataref"] == ext["dataref"]
        assert good.data == "good" * 500

    def test_a_payload_that_is_no_json(self, counted: tuple[EventStream, Counter[str]]) -> None:
        stream, _ = counted
        topic = Topic("t")
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b"{" * 10, b"1 2"):
            claim = stream.payloads.put(content, media_type="application/json").claim
            (record,) = published(stream, topic, topic.claim_event(claim))
            with pytest.raises(InvalidClaimError, match="is no json"):
                _ = record.data
            assert content_of(record) == content

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(content=st.binary(max_size=60), kind=st.sampled_from(["json", "string", "msgpack", "text", "bytes"]))
    def test_any_bytes_as_any_kind(self, counted: tuple[EventStream, Counter[str]], content: bytes, kind: str) -> None:
        stream, _ = counted
        claim = stream.payloads.put(content).claim
        event = event_of(None, ext={**claim.to_attributes(), "datarefkind": kind})
        (record,) = published(stream, Topic("t"), event)[-1:]
        caught: list[InvalidClaimError] = []
        try:
            _ = record.data
        except InvalidClaimError as error:
            caught.append(error)
        assert not (caught and kind == "bytes")
        assert all(error.facts["part"] == "kind" for error in caught)

    def test_too_large_to_be_read_at_once(self, opened: Callable[..., tuple[EventStream, Counter[str]]]) -> None:
        stream, _ = opened(max_read_bytes=3000)
        small, large = published(stream, THOUSAND, event_of(b"x" * 2000), event_of(b"x" * 4000))
        assert small.data == b"x" * 2000
        with pytest.raises(PayloadTooLargeError, match="open it as a stream"):
            _ = large.data
        assert content_of(large) == b"x" * 4000

    def test_a_store_that_is_away(self, s3_server: SeaweedServer, s3_bucket: str, tmp_path: Path) -> None:
        store = open_payload_store(
            f"s3://{s3_bucket}/pre",
            endpoint_url=s3_server.endpoint_url,
            region="us-east-1",
            access_key_id=s3_server.access_key,
            secret_access_key=s3_server.secret_key,
            addressing="path",
            max_attempts=2,
        )
        with open_stream(tmp_path / "stream.db", payloads=store) as stream:
            (before,) = published(stream, THOUSAND, event_of("x" * 2000))
            s3_server.kill()
            with pytest.raises(PayloadStoreUnavailableError):
                _ = before.data
            with pytest.raises(PayloadStoreUnavailableError):
                stream.publish(THOUSAND, [event_of("small"), event_of("y" * 2000)])
            with pytest.raises(PayloadStoreUnavailableError):
                stream.producer("p").publish("thousand", [event_of("y" * 2000)], sequence=1)
            stream.publish(THOUSAND, [event_of("small")])
            s3_server.start()
            assert before.data == "x" * 2000
            stream.producer("p").publish("thousand", [event_of("y" * 2000)], sequence=1)
            assert [record.data for record in records_of(stream, THOUSAND)] == ["x" * 2000, "small", "y" * 2000]

    def test_a_folder_that_is_away(self, counted: tuple[EventStream, Counter[str]], tmp_path: Path) -> None:
        """Unmounted, say: whoever comes later finds everything."""
        stream, _ = counted
        (record,) = published(stream, THOUSAND, event_of("x" * 2000))
        (tmp_path / "payloads").rename(tmp_path / "away")
        with pytest.raises(PayloadStoreUnavailableError):
            _ = record.data
        (tmp_path / "away").rename(tmp_path / "payloads")
        assert record.data == "x" * 2000


def test_replay_is_reading_again(stream: EventStream) -> None:
    events = [event_of({"n": n, "x": "x" * (n % 3 * 800)}) for n in range(30)]
    published(stream, THOUSAND, *events)
    for start, end in ((None, None), (0, 10), (7, 23), (29, None), (30, None)):
        found = list(stream.records(THOUSAND, 0, start, end))
        assert [record.data for record in found] == [event.data for event in events[slice(start, end)]]


class TestCommandLine:
    """`djp` shows claims as they are: it has nothing to load them with, and need not."""

    @pytest.fixture
    def djp(self, tmp_path: Path) -> Callable[..., str]:
        from click.testing import CliRunner

        from djp_dagster.cli import main

        def run(*words: str) -> str:
            result = CliRunner().invoke(main, ["--stream", str(tmp_path / "stream.db"), *words])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code == 0, result.output
            return result.output

        return run

    def test_tail(self, counted: tuple[EventStream, Counter[str]], tmp_path: Path, djp: Callable[..., str]) -> None:
        stream, _ = counted
        topic = Topic("t", partitions=2, key="user", offload_above=100)
        published(stream, topic, topic.event(user="u1", x="x" * 2000), topic.event(user="u2"))
        (tmp_path / "payloads").rename(tmp_path / "away")
        lines = djp("tail", "t").splitlines()
        assert len(lines) == 2
        (heavy,) = [line for line in lines if "u1" in line]
        assert "file:///" in heavy
        documents = [json.loads(line) for line in djp("tail", "t", "--json").splitlines()]
        assert sorted("dataref" in document for document in documents) == [False, True]

    def test_tail_of_a_hostile_claim(self, counted: tuple[EventStream, Counter[str]], djp: Callable[..., str]) -> None:
        stream, _ = counted
        published(stream, THOUSAND, event_of(None, ext={"dataref": "\x1b]0;x\x07"}), event_of("good"))
        lines = djp("tail", "thousand").splitlines()
        assert len(lines) == 2
        assert "\x1b" not in lines[0]
        assert "good" in lines[1]

    def test_dead_letters(
        self, counted: tuple[EventStream, Counter[str]], tmp_path: Path, djp: Callable[..., str]
    ) -> None:
        stream, counts = counted
        (record,) = published(stream, THOUSAND, event_of({"text": "x" * 2000}))

        @consumer(topic=THOUSAND, group="failing")
        def handle(batch: Batch) -> None:
            for found in batch:
                raise ValueError(found.id)

        run_pending(stream, handle)
        (tmp_path / "payloads").rename(tmp_path / "away")
        assert "ValueError" in djp("dead-letters", "list", "failing")
        (letter,) = [json.loads(line) for line in djp("dead-letters", "list", "failing", "--json").splitlines()]
        shown = json.loads(djp("dead-letters", "show", "failing", str(letter["id"]), "--json"))
        assert shown["record"] == record.to_dict()
        assert record.claim is not None
        assert record.claim.uri in djp("dead-letters", "show", "failing", str(letter["id"]))
        assert counts["read"] == 0
