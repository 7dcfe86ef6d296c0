"""Batches whose data is in the payload store: the same to a handler; a bad payload is the fault of its own event."""

from __future__ import annotations

import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from djp_dagster import (
    Batch,
    Claim,
    Consumer,
    Event,
    EventStream,
    Record,
    Topic,
    TransientError,
    Worker,
    consumer,
    open_payload_store,
    open_stream,
    redrive,
    run_pending,
)
from djp_dagster.errors import (
    InvalidSettingError,
    PayloadStoreUnavailableError,
    PoisonBlockedError,
    SystemicFailureError,
)
from djp_dagster.testing import Clock, crash_at, memory_stream, run_consumer
from tests.processing.kit import FAST, Died, all_records, committed, in_thread, open_intents, wait_until
from tests.servers.seaweedfs import SeaweedServer
from tests.streams.conftest import contract_database, emptied  # noqa: F401
from tests.streams.heavy import content_of, counted_store, grow_old, payload_files

Isolation = Literal["batch", "per_event"]
both_isolations = pytest.mark.parametrize("isolation", ["batch", "per_event"])

UPLOADS = Topic("uploads", partitions=3, key="user", offload_above=1000)
INLINE = Topic("inline", partitions=3, key="user")
ONE = Topic("one", offload_above=1000)
OUT = Topic("out")
VARYING = ["topic", "idempotency_key", "append_time", "event_time"]
"""Columns that differ between two topics."""


everywhere = pytest.mark.parametrize(
    "opened", ["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)], indirect=True
)


@pytest.fixture
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[EventStream, Counter[str]]]:
    """A stream of either kind, SQLite unless told; and how often its payload store was asked for what."""
    target: str | Path = tmp_path / "stream.db"
    if getattr(request, "param", "sqlite") == "postgresql":
        target = emptied(request.getfixturevalue("contract_database"))
    store, counts = counted_store(tmp_path / "payloads")
    with open_stream(target, payloads=store) as stream:
        yield stream, counts


@pytest.fixture
def stream(opened: tuple[EventStream, Counter[str]]) -> EventStream:
    return opened[0]


def upload(n: int, topic: Topic = UPLOADS, size: int = 2000, **more: Any) -> Event:
    return Event(
        id=f"e{n}",
        type=topic.name,
        source="/uploads",
        data={"n": n, "user": f"u{n % 5}", "text": f"{n} " * (size // 3), "more": [1.5, None], **more},
    )


def publish(stream: EventStream, topic: Topic, *events: Event) -> None:
    stream.create_topic(topic)
    for event in events:  # one record batch each
        stream.publish(topic, [event])


class Seen:
    """A consumer that keeps what it got of each record, and emits its number."""

    def __init__(self, isolation: Isolation = "batch", topic: Topic = ONE, **settings: Any) -> None:
        self.got: list[tuple[str, Any]] = []
        self.attempts = 0
        chosen: dict[str, Any] = {"topic": topic, "emits": [OUT], "group": "seen", "retry": FAST, **settings}

        if isolation == "batch":

            @consumer(**chosen)
            def handle(batch: Batch) -> None:
                self.attempts += 1
                for record in batch:
                    self.take(record, batch)
        else:

            @consumer(isolate="per_event", **chosen)
            def handle(record: Record, batch: Batch) -> None:
                self.take(record, batch)

        self.consumer: Consumer = handle

    def take(self, record: Record, batch: Batch) -> None:
        data = record.data
        self.got.append((record.id, data))
        batch.emit(OUT.event(id=record.id))


def emitted(stream: EventStream) -> list[str]:
    return [record.data["id"] for record in all_records(stream, OUT)]


def dead(stream: EventStream, group: str = "seen") -> list[tuple[int, str]]:
    return [(letter.offset, letter.error_type) for letter in stream.dead_letters(group)]


class TestTheSameToAHandler:
    """Iterated, as tables, by key: as if all had come inline."""

    def look(self, stream: EventStream, topic: Topic, how: Callable[[Batch], Any]) -> Any:
        publish(stream, topic, *[upload(n, size=(0, 900, 2000, 50_000)[n % 4]) for n in range(40)])
        found: list[Any] = []

        @consumer(topic=topic, group=f"look-{topic.name}")
        def handle(batch: Batch) -> None:
            found.append(how(batch))

        run_pending(stream, handle)
        assert stream.dead_letters(handle.group) == []
        (only,) = found
        return only

    @pytest.mark.parametrize(
        "how",
        [
            lambda batch: [(r.partition, r.offset, r.id, r.data) for r in batch],
            lambda batch: [[(r.id, r.data) for r in batch] for _ in range(2)],
            lambda batch: {key: [(r.id, r.data["n"]) for r in rs] for key, rs in batch.by_key().items()},
            lambda batch: [(r.id, content_of(r)) for r in batch],
            lambda batch: rows_of(batch.to_arrow()),
            lambda batch: [rows_of(piece) for piece in batch.arrow_batches(rows=7)],
            lambda batch: batch.to_pandas().drop(columns=VARYING).to_json(),
        ],
        ids=["iterated", "twice", "by key", "as files", "Arrow", "Arrow batches", "pandas"],
    )
    def test_all_ways(self, opened: tuple[EventStream, Counter[str]], how: Callable[[Batch], Any]) -> None:
        stream, counts = opened
        expected = self.look(stream, INLINE, how)
        assert counts == Counter()
        assert self.look(stream, UPLOADS, how) == expected
        assert counts["written"] == 20
        assert counts["read"] <= 20

    def test_looking_at_keys_and_claims_loads_nothing(self, opened: tuple[EventStream, Counter[str]]) -> None:
        stream, counts = opened
        self.look(stream, UPLOADS, lambda batch: [batch.by_key(), [r.claim for r in batch], [r.event() for r in batch]])
        assert counts["read"] == 0

    def test_the_public_test_kit(self) -> None:
        @consumer(topic=UPLOADS, emits=[ONE])
        def handle(batch: Batch) -> int:
            for record in batch:
                batch.emit(ONE.event(text=record.data["text"]))
            return sum(len(record.data["text"]) for record in batch)

        events = [upload(n) for n in range(6)]
        run = run_consumer(handle, events)
        assert run.outputs == [sum(len(event.data["text"]) for event in events)]
        assert sorted(record.data["text"] for record in run.emitted["one"]) == sorted(e.data["text"] for e in events)

    def test_memory_of_what_a_handler_did_is_none(self, stream: EventStream) -> None:
        """Data that an attempt has changed is whole again at the next, and for the next consumer."""
        publish(stream, ONE, upload(1))
        found: list[list[str]] = []

        def handle(batch: Batch) -> None:
            for record in batch:
                found.append(sorted(record.data))
                record.data.clear()
                assert record.data == {}
            if len(found) == 1:
                raise TransientError("once more")

        for group in ("first", "second"):
            run_pending(stream, consumer(topic=ONE, group=group, retry=FAST)(handle))
        assert found == [["more", "n", "text", "user"]] * 3

    @everywhere
    def test_workers_too(self, stream: EventStream) -> None:
        first, second = Seen(topic=UPLOADS, group="first"), Seen("per_event", topic=UPLOADS, group="second")
        for seen in (first, second):
            seen.consumer.register(stream)
        events = [upload(n) for n in range(30)]
        stop = threading.Event()
        worker = Worker(stream, [first.consumer, second.consumer], lease=5)
        with in_thread(lambda: worker.run(stop), stop):
            publish(stream, UPLOADS, *events)
            wait_until(lambda: len(emitted(stream)) == 60, "both to see all")
        expected = {event.id: event.data for event in events}
        assert dict(first.got) == dict(second.got) == expected
        assert len(first.got) == len(second.got) == 30


def payloads_of(stream: EventStream, folder: Path) -> dict[int, Path]:
    """The payloads of the records of `ONE`, by offset."""
    by_name = {path.name: path for path in payload_files(folder)}
    claims = {record.offset: record.claim for record in all_records(stream, ONE)}
    return {offset: by_name[claim.uri.rsplit("/", 1)[1]] for offset, claim in claims.items() if claim is not None}


def rows_of(table: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in VARYING} for row in table.to_pylist()]


class Listener:
    """Somebody on the loopback who would notice if he were called."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen()
        self._socket.settimeout(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/latest/meta-data"

    def was_called(self) -> bool:
        try:
            self._socket.accept()
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


class TestBadPayloads:
    """Their own event goes to the dead letters, and that alone; its neighbours are handled once."""

    def run(self, stream: EventStream, isolation: Isolation, bad: dict[int, str], **settings: Any) -> None:
        seen = Seen(isolation, **settings)
        run_pending(stream, seen.consumer)
        total = sum(span.end for span in stream.log.spans(["one"]).values())
        assert sorted(dead(stream)) == sorted(bad.items())
        good = [record.id for record in all_records(stream, ONE) if record.offset not in bad]
        assert emitted(stream) == good
        assert set(good) == {id_ for id_, _ in seen.got}
        assert committed(stream, seen.consumer) == [total]
        if isolation == "per_event":
            assert [id_ for id_, _ in seen.got] == good
        assert run_pending(stream, seen.consumer).events == 0

    @everywhere
    @both_isolations
    def test_missing_damaged_and_expired(self, stream: EventStream, tmp_path: Path, isolation: Isolation) -> None:
        publish(stream, ONE, *[upload(n) for n in range(8)])
        expired = stream.payloads.put(b"{}", media_type="application/json").claim
        publish(
            stream,
            ONE,
            Event(type="t", source="/s", ext={**expired.to_attributes(), "datarefexpires": "1700000000"}),
            upload(9),
        )
        paths = payloads_of(stream, tmp_path)
        paths[1].unlink()
        paths[4].write_bytes(paths[4].read_bytes()[:-1])
        paths[5].write_bytes(paths[6].read_bytes())
        wrong = {1: "PayloadMissingError", 4: "PayloadCorruptError", 5: "PayloadCorruptError", 8: "PayloadExpiredError"}
        self.run(stream, isolation, wrong)
        assert "sha256/" in stream.dead_letters("seen")[0].error

    @both_isolations
    def test_hostile_claims(
        self, stream: EventStream, listener: Listener, tmp_path: Path, isolation: Isolation
    ) -> None:
        (tmp_path / "secret").write_bytes(b"{}")
        for n in range(2):
            publish(stream, ONE, upload(n))
        uri = stream.payloads.uri
        hostile = [
            "s3://other/sha256/ab/cd",
            listener.url,
            "file:///etc/passwd",
            f"{uri}/../../secret",
            f"{uri.rpartition('/')[0]}/rooms/stream",
            "ftp://host/x",
            "\x1b[2J",
        ]
        for number, dataref in enumerate(hostile):
            event = Event(type="t", source="/s", datacontenttype="application/json", ext={"dataref": dataref})
            publish(stream, ONE, event, upload(100 + number))
        wrong = {2 + 2 * number: "PayloadForbiddenError" for number in range(len(hostile) - 1)}
        self.run(stream, isolation, {**wrong, 14: "InvalidClaimError"})
        assert not listener.was_called()

    def test_who_does_not_ask_for_the_data_does_not_mind(self, stream: EventStream, tmp_path: Path) -> None:
        publish(stream, ONE, *[upload(n) for n in range(3)])
        for path in payload_files(tmp_path):
            path.unlink()
        found: list[str] = []

        @consumer(topic=ONE)
        def handle(batch: Batch) -> None:
            found.extend(record.id for record in batch)

        run_pending(stream, handle)
        assert found == ["e0", "e1", "e2"]

    def test_tables(self, stream: EventStream, tmp_path: Path) -> None:
        """All of a batch is loaded at once, and still only one record is at fault."""
        publish(stream, ONE, *[upload(n) for n in range(9)])
        payloads_of(stream, tmp_path)[4].unlink()
        sizes = []

        @consumer(topic=ONE, retry=FAST)
        def handle(batch: Batch) -> int:
            frame = batch.to_pandas()
            sizes.append(len(frame))
            return len(frame)

        run_pending(stream, handle)
        assert dead(stream, "handle") == [(4, "PayloadMissingError")]
        assert sizes[-1] == 8

    def test_a_group_that_keeps_order_stops(self, stream: EventStream, tmp_path: Path) -> None:
        publish(stream, ONE, *[upload(n) for n in range(3)])
        aside, path = tmp_path / "aside", payloads_of(stream, tmp_path)[1]
        path.rename(aside)
        seen = Seen(on_poison="block")
        with pytest.raises(PoisonBlockedError, match="PayloadMissingError"):
            run_pending(stream, seen.consumer)
        assert (dead(stream), emitted(stream), committed(stream, seen.consumer)) == ([], [], [0])
        aside.rename(path)
        run_pending(stream, seen.consumer)
        assert emitted(stream) == ["e0", "e1", "e2"]

    @both_isolations
    def test_too_many_are_nobodys_data(self, stream: EventStream, tmp_path: Path, isolation: Isolation) -> None:
        """A store that was emptied: nothing is dead-lettered, and all is handled when it is back."""
        publish(stream, ONE, *[upload(n) for n in range(15)])
        aside = {path: path.read_bytes() for path in payload_files(tmp_path)}
        for path in aside:
            path.unlink()
        seen = Seen(isolation)
        with pytest.raises(SystemicFailureError):
            run_pending(stream, seen.consumer)
        assert (dead(stream), emitted(stream), committed(stream, seen.consumer)) == ([], [], [0])
        for path, content in aside.items():
            path.write_bytes(content)
        run_pending(stream, seen.consumer)
        assert emitted(stream) == [f"e{n}" for n in range(15)]

    @both_isolations
    def test_without_a_store_nothing_is_blamed(self, stream: EventStream, isolation: Isolation) -> None:
        publish(stream, ONE, upload(0, size=10), upload(1))
        bare = EventStream(stream.log, stream.coordinator, label="bare")
        seen = Seen(isolation)
        with pytest.raises(InvalidSettingError, match="payload store"):
            run_pending(bare, seen.consumer)
        assert (dead(stream), emitted(stream), committed(stream, seen.consumer)) == ([], [], [0])
        run_pending(stream, seen.consumer)
        assert emitted(stream) == ["e0", "e1"]


class TestOutages:
    """A store that is away is waited for: nothing is dead-lettered, no offset moves, later it succeeds."""

    def check(
        self, stream: EventStream, seen: Seen, caplog: pytest.LogCaptureFixture, come_back: Callable[[], object]
    ) -> None:
        with caplog.at_level(logging.WARNING, "djp_dagster"):
            with in_thread(lambda: run_pending(stream, seen.consumer)) as outcome:
                wait_until(lambda: "waiting:" in caplog.text or bool(outcome), "the run to notice")
                assert not outcome, outcome
                assert (dead(stream), emitted(stream), committed(stream, seen.consumer)) == ([], [], [0])
                come_back()
            assert not isinstance(outcome[0], BaseException), outcome
        assert dead(stream) == []
        assert emitted(stream) == ["e0", "e1", "e2"]
        assert committed(stream, seen.consumer) == [3]
        (report,) = outcome[0].batches
        assert report.events == 3

    @both_isolations
    def test_a_folder(
        self, stream: EventStream, tmp_path: Path, caplog: pytest.LogCaptureFixture, isolation: Isolation
    ) -> None:
        publish(stream, ONE, upload(0, size=10), upload(1), upload(2))
        (tmp_path / "payloads").rename(tmp_path / "away")
        self.check(stream, Seen(isolation), caplog, lambda: (tmp_path / "away").rename(tmp_path / "payloads"))

    @both_isolations
    def test_a_server(
        self,
        s3_server: SeaweedServer,
        s3_bucket: str,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        isolation: Isolation,
    ) -> None:
        with self.on_s3(s3_server, s3_bucket, tmp_path) as stream:
            publish(stream, ONE, upload(0, size=10), upload(1), upload(2))
            s3_server.kill()
            self.check(stream, Seen(isolation), caplog, s3_server.start)

    def test_a_server_that_is_away_for_what_is_emitted(
        self, s3_server: SeaweedServer, s3_bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        big = Topic("big", offload_above=1000)

        class Heavy(Seen):
            def take(self, record: Record, batch: Batch) -> None:
                super().take(record, batch)
                batch.emit(big.event(text="x" * 5000, of=record.id), topic=big)

        with self.on_s3(s3_server, s3_bucket, tmp_path) as stream:
            publish(stream, ONE, *[upload(n, size=10) for n in range(3)])
            s3_server.kill()
            self.check(stream, Heavy(emits=[OUT, big]), caplog, s3_server.start)
            assert [record.data["of"] for record in all_records(stream, big)] == ["e0", "e1", "e2"]

    def on_s3(self, server: SeaweedServer, bucket: str, tmp_path: Path) -> EventStream:
        store = open_payload_store(
            f"s3://{bucket}/pre",
            endpoint_url=server.endpoint_url,
            region="us-east-1",
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
            addressing="path",
            max_attempts=2,
        )
        return open_stream(tmp_path / "s3.db", payloads=store)

    def test_whoever_is_told_to_stop_does_not_wait(
        self, s3_server: SeaweedServer, s3_bucket: str, tmp_path: Path
    ) -> None:
        with self.on_s3(s3_server, s3_bucket, tmp_path) as stream:
            publish(stream, ONE, upload(0), upload(1), upload(2))
            s3_server.kill()
            stop = threading.Event()

            class Stopped(Seen):
                def take(self, record: Record, batch: Batch) -> None:
                    stop.set()
                    super().take(record, batch)

            seen = Stopped()
            with pytest.raises(PayloadStoreUnavailableError):
                run_pending(stream, seen.consumer, stop=stop)
            assert (dead(stream), emitted(stream), committed(stream, seen.consumer)) == ([], [], [0])
            (intent,) = open_intents(stream, seen.consumer)
            assert not intent.running
            s3_server.start()
            run_pending(stream, seen.consumer)
            assert emitted(stream) == ["e0", "e1", "e2"]


class TestEmits:
    """What is emitted is offloaded like what is published, once."""

    BIG = Topic("big", partitions=3, key="user", offload_above=1000)

    def passing_on(self, how: Callable[[Batch, Record], None], *topics: Topic, **settings: Any) -> Consumer:
        @consumer(topic=UPLOADS, emits=list(topics), group="passing", retry=FAST, **settings)
        def handle(batch: Batch) -> None:
            for record in batch:
                how(batch, record)

        return handle

    def test_above_the_threshold(self, stream: EventStream) -> None:
        inline = Topic("inline", partitions=3, key="user")
        publish(stream, UPLOADS, *[upload(n, size=10) for n in range(10)])

        def emit(batch: Batch, record: Record) -> None:
            for size in (10, 5000):
                data = {"n": record.data["n"], "user": record.data["user"], "text": "x" * size}
                batch.emit(Event(type="t", source="/s", data=data), topic=inline)
                batch.emit(Event(type="t", source="/s", data=data), topic=self.BIG)

        run_pending(stream, self.passing_on(emit, inline, self.BIG))
        records, expected = all_records(stream, self.BIG), all_records(stream, inline)
        assert [(r.partition, r.offset, r.data) for r in records] == [(r.partition, r.offset, r.data) for r in expected]
        assert sum(record.claim is not None for record in records) == 10
        assert len({record.id for record in records}) == 20
        assert {r.id.split("-", 1)[1] for r in records} == {r.id.split("-", 1)[1] for r in expected}
        assert stream.coordinator.count_dead_letters("passing", "pending") == 0

    @everywhere
    @pytest.mark.parametrize("bare", [False, True], ids=["record", "event"])
    def test_passed_on(self, opened: tuple[EventStream, Counter[str]], bare: bool) -> None:
        """A claim passed on is neither loaded nor stored again."""
        stream, counts = opened
        keyless = Topic("keyless", partitions=2)
        publish(stream, UPLOADS, *[upload(n) for n in range(10)])

        def emit(batch: Batch, record: Record) -> None:
            for topic in (self.BIG, keyless):
                batch.emit(record.event() if bare else record, topic=topic)

        run_pending(stream, self.passing_on(emit, self.BIG, keyless))
        originals = {r.id: r for r in all_records(stream, UPLOADS)}
        for topic in (self.BIG, keyless):
            copies = all_records(stream, topic)
            assert len(copies) == 10
            assert all(copy.claim == originals[copy.id].claim for copy in copies)
        assert all(copy.partition == originals[copy.id].partition for copy in all_records(stream, self.BIG))
        assert (counts["written"], counts["read"]) == (10, 0)
        assert [copy.data["n"] for copy in all_records(stream, self.BIG)]

    def test_passed_on_by_another_key(self, stream: EventStream) -> None:
        by_number = Topic("by-number", partitions=3, key="n", offload_above=1000)
        publish(stream, UPLOADS, *[upload(n) for n in range(10)])
        run_pending(stream, self.passing_on(lambda batch, record: batch.emit(record), by_number))
        copies = all_records(stream, by_number)
        assert sorted(copy.data["n"] for copy in copies) == list(range(10))
        assert all(by_number.key_of(copy) == copy.data["n"] for copy in copies)
        assert all(copy.partition == by_number.partition_of(upload(copy.data["n"])) for copy in copies)

    def test_changed_on_the_way(self, opened: tuple[EventStream, Counter[str]]) -> None:
        stream, counts = opened
        publish(stream, UPLOADS, *[upload(n) for n in range(4)])

        def emit(batch: Batch, record: Record) -> None:
            batch.emit(record.replace(subject="passed on"), topic=self.BIG)
            batch.emit(record.replace(data={"user": "new", "text": "y" * 3000}, id=f"new-{record.id}"), topic=self.BIG)

        run_pending(stream, self.passing_on(emit, self.BIG))
        assert (counts["written"], counts["read"]) == (5, 0)
        found = {record.id: record for record in all_records(stream, self.BIG)}
        assert {found[f"e{n}"].data["n"] for n in range(4)} == set(range(4))
        assert {found[f"e{n}"].subject for n in range(4)} == {"passed on"}
        assert {self.BIG.key_of(found[f"new-e{n}"]) for n in range(4)} == {"new"}
        assert found["new-e1"].data == {"user": "new", "text": "y" * 3000}

    @everywhere
    @pytest.mark.parametrize("point", ["4.handled", "5.stored"])
    def test_a_batch_done_again_stores_and_emits_once(
        self, opened: tuple[EventStream, Counter[str]], point: Any
    ) -> None:
        stream, counts = opened
        publish(stream, UPLOADS, *[upload(n, size=10) for n in range(4)])
        handle = self.passing_on(
            lambda batch, record: batch.emit(self.BIG.event(user="u", text=f"{record.id} " * 500)), self.BIG
        )
        with crash_at(point, Died()), pytest.raises(Died):
            run_pending(stream, handle)
        assert all_records(stream, self.BIG) == []
        assert counts["written"] == 4
        run_pending(stream, handle)
        assert len(all_records(stream, self.BIG)) == 4
        assert (counts["written"], counts["found"]) == (4, 4)

    def test_without_a_store_they_stop_the_consumer(self, stream: EventStream) -> None:
        publish(stream, UPLOADS, upload(1, size=10))
        bare = EventStream(stream.log, stream.coordinator, label="bare")
        handle = self.passing_on(lambda batch, record: batch.emit(self.BIG.event(user="u", text="x" * 5000)), self.BIG)
        with pytest.raises(InvalidSettingError, match="has no payload store"):
            run_pending(bare, handle)
        assert stream.dead_letters("passing") == []
        run_pending(stream, handle)
        assert len(all_records(stream, self.BIG)) == 1


class TestRedrive:
    """A dead letter keeps its claim, and its claim keeps the payload."""

    def test_after_the_log_has_moved_on(self, tmp_path: Path) -> None:
        clock, topic = Clock(), Topic("short", offload_above=1000, retention="1h")
        with open_stream(tmp_path / "stream.db", clock=clock) as stream:
            publish(stream, topic, *[upload(n) for n in range(3)])
            is_broken = True
            found: list[Any] = []

            @consumer(topic=topic, retry=FAST, emits=[OUT])
            def handle(batch: Batch) -> None:
                for record in batch:
                    if is_broken and record.data["n"] != 1:
                        raise ValueError("broken")
                    found.append(record.data)
                    batch.emit(OUT.event(id=record.id))

            run_pending(stream, handle)
            assert dead(stream, "handle") == [(0, "ValueError"), (2, "ValueError")]
            clock.advance(3 * 3600)
            stream.apply_retention()
            assert all_records(stream, topic) == []
            grow_old(tmp_path / "stream-payloads")
            report = stream.collect_payloads(grace="10min", dry_run=False)
            gone = all_payloads_of(upload(1), topic)
            assert [found.key for found in report.garbage] == gone
            assert report.in_use == 2
            is_broken = False
            found.clear()
            assert [letter.status for letter in redrive(stream, handle)] == ["redriven"] * 2
            assert found == [upload(0).data, upload(2).data]
            assert sorted(emitted(stream)) == ["e0", "e1", "e2"]

    @everywhere
    def test_a_payload_that_comes_back(self, stream: EventStream, tmp_path: Path) -> None:
        publish(stream, ONE, *[upload(n) for n in range(3)])
        path = payload_files(tmp_path)[0]
        content = path.read_bytes()
        path.unlink()
        seen = Seen()
        run_pending(stream, seen.consumer)
        assert [error for _, error in dead(stream)] == ["PayloadMissingError"]
        assert [letter.status for letter in redrive(stream, seen.consumer)] == ["pending"]
        path.write_bytes(content)
        assert [letter.status for letter in redrive(stream, seen.consumer)] == ["redriven"]
        assert sorted(emitted(stream)) == ["e0", "e1", "e2"]


def all_payloads_of(event: Event, topic: Topic) -> list[str]:
    """The key under which the event's data is stored, wherever that is."""
    with memory_stream() as elsewhere:
        publish(elsewhere, topic, event)
        return [found.key for found in elsewhere.payloads.objects.list("sha256/")]


class TestClaimsInData:
    """Claims that handlers make and follow themselves."""

    @everywhere
    def test_claim_events_nested_claims_and_payloads_of_a_batch(
        self, opened: tuple[EventStream, Counter[str]], tmp_path: Path
    ) -> None:
        stream, _ = opened
        products = Topic("products", key="product")
        thumbnails = Topic("thumbnails", partitions=2, key="product")
        image = stream.payloads.put(b"\x89PNG" * 1000, media_type="image/png").claim
        video = tmp_path / "video"
        video.write_bytes(b"\0" * (9 << 20))
        publish(
            stream,
            products,
            products.event(product="p1", images=[image.to_dict()], video=stream.payloads.put(video).claim.to_dict()),
            products.claim_event(image, key="p2"),
        )

        @consumer(topic=products, emits=[thumbnails])
        def shrink(batch: Batch) -> dict[str, Any]:
            sizes: dict[Any, Any] = {}
            for record in batch:
                claims = [record.claim] if record.claim else [Claim.from_dict(one) for one in record.data["images"]]
                for claim in claims:
                    assert claim is not None
                    with batch.payloads.open(claim) as file:
                        small = batch.payloads.put(file.read()[:40], media_type=claim.media_type).claim
                    key = products.key_of(record)
                    batch.emit(thumbnails.claim_event(small, key=key, subject="thumbnail"))
                    sizes[key] = small.size
                if record.claim is None:
                    with batch.payloads.open(Claim.from_dict(record.data["video"])) as file:
                        assert sum(map(len, iter(lambda: file.read(1 << 20), b""))) == 9 << 20
            return sizes

        run_pending(stream, shrink)
        assert stream.dead_letters("shrink") == []
        made = all_records(stream, thumbnails)
        assert {thumbnails.key_of(record) for record in made} == {"p1", "p2"}
        assert [record.data for record in made] == [b"\x89PNG" * 10] * 2
        assert {record.datacontenttype for record in made} == {"image/png"}

    def test_a_hostile_claim_inside_data(self, stream: EventStream, listener: Listener) -> None:
        topic = Topic("t")
        good = stream.payloads.put(b"good").claim
        uris = ["file:///etc/passwd", listener.url, good.uri, "s3://other/x", f"{stream.payloads.uri}/../x"]
        publish(stream, topic, *[topic.event(image={**good.to_dict(), "uri": uri}) for uri in uris])
        found = []

        @consumer(topic=topic, isolate="per_event")
        def handle(record: Record, batch: Batch) -> None:
            found.append(batch.payloads.read(Claim.from_dict(record.data["image"])))

        run_pending(stream, handle)
        assert found == [b"good"]
        assert dead(stream, "handle") == [(n, "PayloadForbiddenError") for n in (0, 1, 3, 4)]
        assert not listener.was_called()
