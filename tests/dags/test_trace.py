"""Where an entity is: handled, pending, waiting for parts, failed; and how long each step took."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Consumer, Event, EventDag, EventStream, Topic, open_stream, run_pending, trace
from djp_dagster.dags.tracing import Step, Trace, describe
from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.records import from_micros
from djp_dagster.testing import Clock
from tests.dags.kit import meeting, passing, topic
from tests.streams.heavy import counted_store, payload_files

UPLOADS, VIDEO, IMAGES, PRODUCTS = (topic(name, partitions=2) for name in ("uploads", "video", "images", "products"))
TRANSCODE = passing("transcode", [UPLOADS], [VIDEO])
RESIZE = passing("resize", [UPLOADS], [IMAGES])
CREATE = meeting("create", {"video": VIDEO, "images": IMAGES}, [PRODUCTS], deadline="1h")
CATALOG = EventDag([TRANSCODE, RESIZE, CREATE])
KEYS: list[str | int] = ["p1", 7]
both_kinds_of_keys = pytest.mark.parametrize("key", KEYS)


def upload(stream: EventStream, *keys: str | int, **more: Any) -> None:
    for consumer in CATALOG.consumers:
        consumer.register(stream)
    stream.publish(UPLOADS, [UPLOADS.event(k=key, **more) for key in keys])


def do(stream: EventStream, *consumers: Consumer) -> None:
    for consumer in consumers:
        run_pending(stream, consumer)


def statuses(found: Trace) -> dict[str, str]:
    return {step.consumer: step.status for step in found.steps}


def step_of(found: Trace, consumer: str) -> Step:
    (step,) = [step for step in found.steps if step.consumer == consumer]
    return step


class TestStatuses:
    """What is said of each consumer, as an entity goes through the chain."""

    @both_kinds_of_keys
    def test_from_nothing_to_done(self, stream: EventStream, key: str | int) -> None:
        # Others, one of them of the same text but another kind.
        others: list[str | int] = ["other", 8, "7" if key == 7 else 1]
        assert statuses(trace(stream, CATALOG, key)) == dict.fromkeys(("transcode", "resize", "create"), "nothing yet")
        upload(stream, key, *others)
        found = trace(stream, CATALOG, key)
        assert statuses(found) == {"transcode": "pending", "resize": "pending", "create": "nothing yet"}
        assert (found.complete, found.waits_for) == (False, ["transcode", "resize"])
        do(stream, TRANSCODE)
        found = trace(stream, CATALOG, key)
        assert statuses(found) == {"transcode": "done", "resize": "pending", "create": "pending"}
        do(stream, CREATE)
        found = trace(stream, CATALOG, key)
        assert statuses(found)["create"] == "buffered"
        assert step_of(found, "create").missing == ("images",)
        do(stream, RESIZE)
        # The last part is there, unread.
        assert statuses(trace(stream, CATALOG, key))["create"] == "pending"
        do(stream, CREATE)
        found = trace(stream, CATALOG, key)
        assert statuses(found) == {"transcode": "done", "resize": "done", "create": "done"}
        assert (found.key, found.complete, found.waits_for) == (key, True, [])
        assert [(step.read, step.emitted) for step in found.steps] == [(1, 1), (1, 1), (2, 1)]
        assert not trace(stream, CATALOG, "nobody").complete

    def test_before_a_consumer_has_ever_run(self, stream: EventStream) -> None:
        stream.create_topic(UPLOADS)
        stream.publish(UPLOADS, [UPLOADS.event(k="p1")])
        assert statuses(trace(stream, CATALOG, "p1")) == {
            "transcode": "pending",
            "resize": "pending",
            "create": "nothing yet",
        }

    @both_kinds_of_keys
    def test_a_dead_letter(self, stream: EventStream, key: str | int) -> None:
        upload(stream, key, bad="resize")
        upload(stream, "other")
        do(stream, TRANSCODE, RESIZE, CREATE)
        found = trace(stream, CATALOG, key)
        assert statuses(found) == {"transcode": "done", "resize": "dead letter", "create": "buffered"}
        assert found.waits_for == ["resize", "create"]
        assert trace(stream, CATALOG, "other").complete
        # What was discarded, or sent through again, is none any more.
        (letter,) = stream.dead_letters("resize")
        stream.discard_dead_letters("resize", [letter.id])
        assert statuses(trace(stream, CATALOG, key))["resize"] == "done"

    @both_kinds_of_keys
    def test_expired(self, stream: EventStream, clock: Clock, key: str | int) -> None:
        upload(stream, key, bad="resize")
        do(stream, TRANSCODE, RESIZE, CREATE)
        clock.advance(3600)
        do(stream, CREATE)
        found = trace(stream, CATALOG, key)
        assert statuses(found)["create"] == "expired"
        assert step_of(found, "create").missing == ()

    def test_failed(self, stream: EventStream) -> None:
        upload(stream, "broken")
        do(stream, TRANSCODE, RESIZE, CREATE)
        found = trace(stream, CATALOG, "broken")
        assert statuses(found)["create"] == "failed"
        assert not found.complete

    def test_done_though_something_late_is_unread(self, stream: EventStream) -> None:
        upload(stream, "p1")
        do(stream, TRANSCODE, RESIZE, CREATE)
        stream.publish(VIDEO, [VIDEO.event(k="p1")])
        assert statuses(trace(stream, CATALOG, "p1"))["create"] == "done"

    def test_dead_letters_are_looked_through_to_the_last(
        self, stream: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("djp_dagster.dags.tracing._LETTERS_PER_PAGE", 3)
        upload(stream, *(f"k{n}" for n in range(10)), bad="transcode")
        do(stream, TRANSCODE)
        for n in range(10):
            assert statuses(trace(stream, CATALOG, f"k{n}"))["transcode"] == "dead letter"

    @pytest.mark.parametrize("count", [2, "of"])
    def test_parts_of_several_events_are_missing_until_all_are_there(
        self, stream: EventStream, count: int | str
    ) -> None:
        join = meeting("album", {"cover": VIDEO, "page": IMAGES}, [PRODUCTS], count={"page": count})
        dag = EventDag([join])
        join.register(stream)
        for number, missing in enumerate([("cover", "page"), ("cover",)]):
            stream.publish(IMAGES, [IMAGES.event(k="p1", of=2, n=number)])
            do(stream, join)
            assert step_of(trace(stream, dag, "p1"), "album").missing == missing

    def test_a_key_that_was_forgotten_is_done(self, stream: EventStream, clock: Clock) -> None:
        join = meeting("create", {"video": VIDEO, "images": IMAGES}, [PRODUCTS], remember="1h")
        dag = EventDag([join])
        join.register(stream)
        for target in (VIDEO, IMAGES):
            stream.publish(target, [target.event(k="p1")])
        do(stream, join)
        clock.advance(7200)
        stream.publish(VIDEO, [VIDEO.event(k=f"k{n}") for n in range(10)])
        do(stream, join)
        assert trace(stream, dag, "p1").complete

    def test_a_result_that_is_missing_is_not_complete(self, stream: EventStream) -> None:
        """A consumer has read the entity and emitted nothing of it."""
        silent = passing("silent", [UPLOADS])
        talking = passing("talking", [UPLOADS], [VIDEO])
        upload(stream, "p1", bad="talking")
        dag = EventDag([silent, talking])
        do(stream, silent, talking)
        assert statuses(trace(stream, dag, "p1")) == {"silent": "done", "talking": "dead letter"}
        (letter,) = stream.dead_letters("talking")
        stream.discard_dead_letters("talking", [letter.id])
        found = trace(stream, dag, "p1")
        assert statuses(found) == {"silent": "done", "talking": "done"}
        assert not found.complete


class TestTimes:
    """When events came and went."""

    def test_each_step_and_the_whole(self, stream: EventStream, clock: Clock) -> None:
        start = from_micros(round(clock() * 1e6))
        upload(stream, "p1")
        clock.advance(2)
        do(stream, TRANSCODE)
        clock.advance(3)
        do(stream, RESIZE)
        clock.advance(5)
        do(stream, CREATE)
        found = trace(stream, CATALOG, "p1")

        def after(seconds: float) -> datetime:
            return start + timedelta(seconds=seconds)

        times = {step.consumer: (step.arrived, step.finished, step.seconds) for step in found.steps}
        assert times == {
            "transcode": (start, after(2), 2.0),
            "resize": (start, after(5), 5.0),
            "create": (after(5), after(10), 8.0),  # from the first part on
        }
        assert describe(found)[2] == {
            "consumer": "create",
            "status": "done",
            "read": 2,
            "emitted": 1,
            "arrived": after(5).isoformat(timespec="milliseconds"),
            "seconds": "8.000",
        }

    def test_what_is_not_finished_took_no_time(self, stream: EventStream, clock: Clock) -> None:
        upload(stream, "p1")
        do(stream, TRANSCODE, CREATE)
        clock.advance(60)
        upload(stream, "p1")
        found = trace(stream, CATALOG, "p1")
        # It has come again since the last that was emitted.
        assert step_of(found, "transcode").seconds is None
        assert step_of(found, "create").seconds is None
        rows = describe(found)
        assert [(row["consumer"], row["status"], row["arrived"] != "", row["seconds"]) for row in rows] == [
            ("transcode", "pending", True, ""),
            ("resize", "pending", True, ""),
            ("create", "buffered (images missing)", True, ""),
        ]

    def test_since(self, stream: EventStream, clock: Clock) -> None:
        upload(stream, "p1", "p2")
        do(stream, TRANSCODE)
        clock.advance(100)
        since = from_micros(round(clock() * 1e6))
        assert statuses(trace(stream, CATALOG, "p1", since=since))["transcode"] == "nothing yet"
        upload(stream, "p1")
        found = trace(stream, CATALOG, "p1", since=since)
        assert step_of(found, "transcode").read == 1
        assert step_of(trace(stream, CATALOG, "p1"), "transcode").read == 2
        with pytest.raises(InvalidSettingError, match="needs a time zone"):
            trace(stream, CATALOG, "p1", since=datetime(2024, 1, 1))  # noqa: DTZ001


class TestWhoseEventItIs:
    """By key, by subject, by id; in data, or wherever that is."""

    def read(self, stream: EventStream, source: Topic, events: Sequence[Event], key: str | int) -> int:
        consumer = passing("reader", [source])
        consumer.register(stream)
        for event in events:
            stream.publish(source, [event])
        return step_of(trace(stream, EventDag([consumer]), key), "reader").read

    @both_kinds_of_keys
    @pytest.mark.parametrize("partitions", [1, 3])
    def test_in_a_topic_without_keys(self, stream: EventStream, key: str | int, partitions: int) -> None:
        events = [
            Event(type="t", source="/s", data={"k": key}),  # nobody knows that this is a key
            Event(type="t", source="/s", id=str(key)),
            Event(type="t", source="/s", subject=str(key)),
            Event(type="t", source="/s", ext={"partitionkey": key}),
            Event(type="t", source="/s", ext={"partitionkey": f"not {key}"}),
        ]
        found = self.read(stream, Topic("plain", partitions=partitions), events, key)
        # Ids are texts.
        assert found == (3 if isinstance(key, str) else 2)

    @both_kinds_of_keys
    def test_numbers_are_not_texts(self, stream: EventStream, key: str | int) -> None:
        source = topic("keyed", partitions=1)
        other: str | int = str(key) if isinstance(key, int) else 1
        events = [source.event(k=key), source.event(k=other), source.event(k=f"{key}{key}"), source.event(k=key)]
        assert self.read(stream, source, events, key) == 2

    @pytest.mark.parametrize("key", ["plain", 'with "quotes"', "back\\slash", "ümläut", "tab\t", 7, -3, 2**40])
    @pytest.mark.parametrize("keyed_by", ["k", "deep.k"])
    def test_whose_data_is_in_the_payload_store(
        self, clock: Clock, tmp_path: Path, key: str | int, keyed_by: str
    ) -> None:
        store, counts = counted_store(tmp_path / "payloads")
        source = topic("heavy", key=keyed_by, partitions=2, offload_above=1000)
        events = [
            source.event(k=one, deep={"k": one}, text="long " * 500, n=n) for n, one in enumerate([key, "other", key])
        ]
        with open_stream(tmp_path / "stream.db", payloads=store, clock=clock) as stream:
            stream.create_topic(source)
            assert self.read(stream, source, events, key) == 2
        assert counts["read"] == 0, "the key travels with the event"

    def test_whose_key_is_in_the_payload_alone(self, clock: Clock, tmp_path: Path) -> None:
        """It was passed on to a topic with another key, and its data stayed where it is."""
        store, _ = counted_store(tmp_path / "payloads")
        source, target = topic("heavy", key="other", offload_above=1000), topic("moved")
        with open_stream(tmp_path / "stream.db", payloads=store, clock=clock) as stream:
            for one in (source, target):
                stream.create_topic(one)
            stream.publish(source, [source.event(k=key, other=1, text="long " * 500) for key in ("p1", "p2")])
            for record in stream.records(source, 0):
                stream.publish(target, [record])
            assert self.read(stream, target, [], "p1") == 1
            # A payload that is lost is no reason not to find the others.
            first, second = (record.claim for record in stream.records(target, 0))
            assert first is not None
            assert second is not None
            (lost,) = [file for file in payload_files(tmp_path / "payloads") if first.uri.endswith(file.name)]
            lost.unlink()
        with open_stream(tmp_path / "stream.db", payloads=store, clock=clock) as stream:
            assert self.read(stream, target, [], "p2") == 1


def test_nothing_is_left_where_it_should_not_be(stream: EventStream, folder: Path, tmp_path: Path) -> None:
    """Replicas of joins lie where state lies, unless told otherwise."""
    upload(stream, "p1")
    do(stream, TRANSCODE)
    trace(stream, CATALOG, "p1", state_folder=tmp_path / "here")
    assert list((tmp_path / "here").rglob("replica-*.db"))
    assert not list(folder.rglob("replica-*.db"))
    trace(stream, CATALOG, "p1")
    assert list(folder.rglob("replica-*.db"))


def test_a_copied_input_is_a_step_of_its_own(stream: EventStream) -> None:
    other = Topic("other", partitions=3, key="image")
    join = meeting("create", {"video": VIDEO, "other": other}, [PRODUCTS], repartition=True)
    dag = EventDag([join])
    join.register(stream)
    stream.publish(VIDEO, [VIDEO.event(k="p1")])
    stream.publish(other, [Event(type="other", source="/s", data={"k": "p1", "image": "i"}, subject="p1")])
    do(stream, *dag.in_order())
    found = trace(stream, dag, "p1")
    assert statuses(found)["create"] == "done"
    assert found.complete
    assert [step.consumer for step in found.steps] == ["create-repartition-other", "create"]
