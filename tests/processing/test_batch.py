"""`Batch`: what a handler sees and may do."""

import logging
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from djp_dagster import Batch, Event, EventStream, Record, Topic, consumer, run_pending
from djp_dagster.errors import (
    CommitTooLargeError,
    InvalidEventError,
    InvalidSettingError,
    InvalidValueError,
    MissingKeyError,
    SystemicFailureError,
)
from djp_dagster.streams.records import TopicPartition
from djp_dagster.testing import Clock, run_consumer
from tests.processing.kit import (
    FAST,
    NO_EVENT,
    NUMBERS,
    OUT,
    all_records,
    append_raw,
    fill,
    numbers,
    raw,
    values,
)

TWO = Topic("two", partitions=2, key="n")


def test_iterating_gives_the_records_in_order_as_often_as_asked(stream: EventStream) -> None:
    seen: list[list[Any]] = []

    @consumer(topic=NUMBERS)
    def look(batch: Batch) -> None:
        seen.append([record.data["n"] for record in batch])
        seen.append([record.data["n"] for record in batch])
        seen.append([record.data["n"] for records in batch.chunks() for record in records])
        assert len(batch) == 5
        assert (batch.group, batch.attempt, batch.reason, batch.is_replay) == ("look", 1, "pending", False)
        assert [(part.at, part.start, part.end) for part in batch.ranges] == [(TopicPartition("numbers", 0), 0, 5)]
        assert batch.fencing_token >= 1
        assert batch.deadlines == ()

    fill(stream, NUMBERS, numbers(2))
    stream.publish(NUMBERS, numbers(3, start=2))
    report = run_pending(stream, look)
    assert seen == [[0, 1, 2, 3, 4]] * 3
    assert report.events == 5


def test_chunks_are_the_lists_as_they_were_appended(stream: EventStream) -> None:
    sizes: list[int] = []

    @consumer(topic=NUMBERS)
    def look(batch: Batch) -> None:
        sizes.extend(len(records) for records in batch.chunks())

    fill(stream, NUMBERS, numbers(2))
    stream.publish(NUMBERS, numbers(3))
    run_pending(stream, look)
    assert sizes == [2, 3]


def test_a_record_knows_where_it_comes_from(stream: EventStream, clock: Clock) -> None:
    found: list[Record] = []

    @consumer(topic=NUMBERS)
    def look(batch: Batch) -> None:
        found.extend(batch)

    when = datetime(2024, 2, 29, tzinfo=timezone.utc)
    fill(stream, NUMBERS, [NUMBERS.event(n=1), NUMBERS.event(n=2).replace(time=when)])
    run_pending(stream, look)
    first, second = found
    now = datetime.fromtimestamp(clock.now_s, timezone.utc)
    assert (first.topic, first.partition, first.offset) == ("numbers", 0, 0)
    assert first.position == ("numbers", 0, 0)
    assert first.append_time == now
    assert (first.event_time, second.event_time) == (now, when)
    assert first.idempotency_key == f"{stream.incarnation[:12]}/look/numbers/0/0"
    assert first.idempotency_key != second.idempotency_key


def test_by_key_groups_in_order() -> None:
    keyed: dict[Any, list[int]] = {}
    topic = Topic("orders", partitions=3, key="user.id")

    @consumer(topic=topic)
    def group(batch: Batch) -> None:
        keyed.update({key: [record.data["n"] for record in records] for key, records in batch.by_key().items()})

    events = [topic.event(user={"id": key}, n=n) for n, key in enumerate(["a", 7, "b", "a", 7, "a"])]
    run_consumer(group, events)
    assert keyed == {"a": [0, 3, 5], 7: [1, 4], "b": [2]}


def test_by_key_uses_the_partition_key_and_else_the_id() -> None:
    keys: set[Any] = set()
    topic = Topic("plain")

    @consumer(topic=topic)
    def group(batch: Batch) -> None:
        keys.update(batch.by_key())

    run_consumer(
        group,
        [
            Event(type="t", source="/s", id="one"),
            Event(type="t", source="/s", id="two", ext={"partitionkey": "k"}),
        ],
    )
    assert keys == {"one", "k"}


class TestEmit:
    """Emitted events: where to, under which id, with which time."""

    def test_to_the_only_topic_declared(self) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))

        run = run_consumer(forward, numbers(3))
        assert [record.data["n"] for record in run.emitted["out"]] == [0, 1, 2]
        assert run.batches[0].emitted == 3

    def test_by_the_type_of_the_event_or_by_name(self) -> None:
        left, right = Topic("left"), Topic("right")

        @consumer(topic=NUMBERS, emits=[left, right])
        def sort(batch: Batch) -> None:
            batch.emit(left.event(n=1))
            batch.emit(right.event(n=2))
            batch.emit(left.event(n=3), topic="right")
            batch.emit(left.event(n=4), topic=right)

        run = run_consumer(sort, numbers(1))
        assert [record.data["n"] for record in run.emitted["left"]] == [1]
        assert [record.data["n"] for record in run.emitted["right"]] == [2, 3, 4]

    @pytest.mark.parametrize("emits", [(), (OUT,), (OUT, TWO)], ids=len)
    def test_to_an_undeclared_topic_stops(self, stream: EventStream, emits: tuple[Topic, ...]) -> None:
        @consumer(topic=NUMBERS, emits=emits, retry=FAST)
        def forward(batch: Batch) -> None:
            batch.emit(Event(type="other", source="/s"), topic="elsewhere")

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(InvalidSettingError, match="elsewhere"):
            run_pending(stream, forward)
        assert stream.pending("forward").events == 1
        assert stream.dead_letters() == []

    def test_the_wrong_thing_is_poison(self) -> None:
        @consumer(topic=NUMBERS, emits=[OUT, TWO])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit({"n": 1} if record.data["n"] == 1 else OUT.event(n=1))  # type: ignore[arg-type]

        run = run_consumer(forward, numbers(3))
        assert [letter.error_type for letter in run.dead_letters] == ["InvalidEventError"]
        assert len(run.emitted["out"]) == 2

    def test_ids_are_derived_from_the_cause_and_alike_at_each_attempt(self, stream: EventStream) -> None:
        ids: list[list[str]] = []

        @consumer(topic=NUMBERS, emits=[OUT], retry=FAST)
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))
                batch.emit(OUT.event(n=record.data["n"]))
            batch.emit(OUT.event(n=-1))
            batch.emit(OUT.event(n=-1))
            ids.append([found.id for emitted in batch.effects.encode_emits() for found in _decode(emitted.blob)])
            if batch.attempt < 3:
                raise OSError("try again")

        fill(stream, NUMBERS, numbers(4))
        run_pending(stream, forward)
        assert ids[0] == ids[1] == ids[2]
        stored = [record.id for record in all_records(stream, OUT)]
        assert stored == ids[2]
        assert len(set(stored)) == len(stored) == 10

    def test_ids_tied_to_records_do_not_depend_on_how_batches_are_cut(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], group="g")
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(6))
        run_pending(stream, forward)
        stream.seek("g", {TopicPartition("numbers", 0): 2})
        run_pending(stream, forward)
        ids = [record.id for record in all_records(stream, OUT)]
        assert ids[6:] == ids[2:6]

    def test_ids_differ_between_groups_topics_and_ordinals(self) -> None:
        ids: list[str] = []
        for name in ("g1", "g2"):

            @consumer(topic=NUMBERS, emits=[OUT, TWO], group=name)
            def forward(batch: Batch) -> None:
                for record in batch:
                    batch.emit(OUT.event(n=1), source=record)
                    batch.emit(TWO.event(n=1), source=record)
                    batch.emit(TWO.event(n=1), source=record)

            run = run_consumer(forward, numbers(2))
            ids += [record.id for records in run.emitted.values() for record in records]
        assert len(set(ids)) == len(ids) == 12

    def test_a_source_given_wins_over_the_iterator(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def forward(batch: Batch) -> None:
            first, *_ = records = list(batch)
            for record in records:
                batch.emit(OUT.event(n=record.data["n"]), source=record)
            for _ in batch:
                batch.emit(OUT.event(n=9), source=first)

        fill(stream, NUMBERS, numbers(2))
        run_pending(stream, forward)
        ids = [record.id for record in all_records(stream, OUT)]
        stems = [one.rpartition("-")[0] for one in ids]
        assert stems[0] == stems[2] == stems[3] != stems[1]
        assert len(set(ids)) == 4

    def test_an_explicit_id_is_kept(self) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(Event(type="t", source="/s", id=f"mine-{record.offset}"))

        run = run_consumer(forward, numbers(2))
        assert [record.id for record in run.emitted["out"]] == ["mine-0", "mine-1"]

    def test_a_record_passed_on_keeps_its_id_and_time(self) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(record)

        when = datetime(2024, 1, 1, tzinfo=timezone.utc)
        events = [NUMBERS.event(n=1).replace(id="a", time=when), NUMBERS.event(n=2)]
        run = run_consumer(forward, events)
        passed = run.emitted["out"]
        assert [(record.id, record.time, record.data) for record in passed] == [
            (event.id, event.time, event.data) for event in events
        ]

    def test_the_event_time_is_that_of_the_cause_unless_given(self) -> None:
        when = datetime(2024, 1, 1, tzinfo=timezone.utc)

        @consumer(topic=NUMBERS, emits=[OUT])
        def forward(batch: Batch) -> None:
            for _ in batch:
                batch.emit(OUT.event(k="inherited"))
                batch.emit(OUT.event(k="given").replace(time=when + timedelta(days=1)))
                batch.emit(Event(type="t", source="/s", id="named", data={"k": "named"}))
            batch.emit(OUT.event(k="batch"))

        run = run_consumer(forward, [NUMBERS.event(n=1).replace(time=when)])
        assert {record.data["k"]: record.time for record in run.emitted["out"]} == {
            "inherited": when,
            "given": when + timedelta(days=1),
            "named": None,
            "batch": None,
        }

    def test_to_the_partition_of_the_key(self) -> None:
        @consumer(topic=NUMBERS, emits=[TWO])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(TWO.event(n=str(record.data["n"])))

        run = run_consumer(forward, numbers(20))
        assert {record.partition for record in run.emitted["two"]} == {0, 1}
        assert all(TWO.partition_of(record) == record.partition for record in run.emitted["two"])

    def test_without_its_key_is_poison_and_named(self) -> None:
        @consumer(topic=NUMBERS, emits=[TWO])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(TWO.event(n=record.data["n"]) if record.data["n"] != 1 else TWO.event(m=1))

        run = run_consumer(forward, numbers(3))
        assert [(letter.offset, letter.error_type) for letter in run.dead_letters] == [(1, MissingKeyError.__name__)]

    def test_more_than_a_commit_carries_stops(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT], max_emit_bytes="1KiB")
        def flood(batch: Batch) -> None:
            for _ in batch:
                batch.emit(OUT.event(pad="x" * 600))

        fill(stream, NUMBERS, numbers(2))
        with pytest.raises(CommitTooLargeError) as caught:
            run_pending(stream, flood)
        assert caught.value.facts["limit"] == 1024 < caught.value.facts["bytes"]
        assert values(stream, OUT) == []
        assert stream.dead_letters() == []

    def test_an_event_above_its_topics_limit_is_poison(self) -> None:
        small = Topic("small", max_event_bytes=200)

        @consumer(topic=NUMBERS, emits=[small])
        def forward(batch: Batch) -> None:
            for record in batch:
                batch.emit(small.event(pad="x" * (300 if record.data["n"] == 1 else 3)))

        run = run_consumer(forward, numbers(3))
        assert [(letter.offset, letter.error_type) for letter in run.dead_letters] == [(1, "EventTooLargeError")]
        assert len(run.emitted["small"]) == 2


def _decode(blob: bytes) -> list[Record]:
    import msgspec

    return msgspec.msgpack.decode(blob, type=list[Record])


class TestFail:
    """`Batch.fail`: dead letters by the handler's own judgement."""

    def test_the_record_goes_to_the_dead_letters_and_the_rest_goes_on(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def some(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 1:
                    batch.fail(record, "not wanted")
                elif record.data["n"] == 2:
                    batch.fail(record, ValueError("wrong"))
                else:
                    batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, numbers(4))
        report = run_pending(stream, some)
        assert values(stream, OUT) == [0, 3]
        letters = stream.dead_letters("some")
        assert [(one.offset, one.error_type, one.error) for one in letters] == [
            (1, "Failed", "not wanted"),
            (2, "ValueError", "wrong"),
        ]
        assert report.batches[0].dead_letters == 2
        assert {one.batch_id for one in letters} == {report.batches[0].batch_id}
        assert stream.pending("some").events == 0

    def test_twice_is_one_dead_letter_with_the_last_reason(self) -> None:
        @consumer(topic=NUMBERS)
        def some(batch: Batch) -> None:
            for record in batch:
                batch.fail(record, "first")
                batch.fail(record, "second")

        assert [letter.error for letter in run_consumer(some, numbers(1)).dead_letters] == ["second"]

    def test_a_dead_letter_holds_the_record_whole(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS)
        def some(batch: Batch) -> None:
            for record in batch:
                batch.fail(record, "no")

        events = numbers(3)
        fill(stream, NUMBERS, events)
        run_pending(stream, some)
        assert [letter.raw for letter in stream.dead_letters()] == [raw(event) for event in events]

    def test_a_long_reason_is_cut(self) -> None:
        @consumer(topic=NUMBERS)
        def some(batch: Batch) -> None:
            for record in batch:
                batch.fail(record, ValueError("x" * 10_000))

        (letter,) = run_consumer(some, numbers(1)).dead_letters
        assert len(letter.error) == 2000
        assert letter.error.endswith("...")


class TestUndecodable:
    """Records whose bytes are no event."""

    def test_they_go_to_the_dead_letters_and_their_neighbours_do_not(self, stream: EventStream) -> None:
        seen: list[int] = []

        @consumer(topic=NUMBERS)
        def look(batch: Batch) -> None:
            assert len(list(batch)) == len(list(batch)) == 3
            seen.extend(record.data["n"] for record in batch)

        fill(stream, NUMBERS, [])
        one, two, three = numbers(3)
        broken_text = raw(numbers(1)[0]).replace(b"numbers", b"num\xffers")
        append_raw(stream, NUMBERS, [raw(one), NO_EVENT, raw(two), broken_text, raw(three)])
        report = run_pending(stream, look)
        assert seen == [0, 1, 2]
        letters = stream.dead_letters("look")
        assert [(letter.offset, letter.error_type) for letter in letters] == [
            (1, "UndecodableRecordError"),
            (3, "UndecodableRecordError"),
        ]
        assert letters[0].raw == NO_EVENT
        assert report.batches[0].dead_letters == 2
        assert stream.pending("look").events == 0

    def test_more_than_max_poison_of_them_stop(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, max_poison=1)
        def look(batch: Batch) -> None:
            list(batch)

        fill(stream, NUMBERS, [])
        append_raw(stream, NUMBERS, [NO_EVENT, NO_EVENT])
        with pytest.raises(SystemicFailureError, match="written by something else"):
            run_pending(stream, look)
        assert stream.dead_letters() == []
        assert stream.pending("look").events == 2

    def test_beside_a_failing_record(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS, emits=[OUT])
        def look(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 2:
                    raise ValueError("two")
                batch.emit(OUT.event(n=record.data["n"]))

        fill(stream, NUMBERS, [])
        append_raw(stream, NUMBERS, [NO_EVENT, *map(raw, numbers(4)), NO_EVENT])
        run_pending(stream, look)
        assert values(stream, OUT) == [0, 1, 3]
        assert sorted((letter.offset, letter.error_type) for letter in stream.dead_letters()) == [
            (0, "UndecodableRecordError"),
            (3, "ValueError"),
            (5, "UndecodableRecordError"),
        ]


class TestResources:
    """Further parameters of a handler."""

    def test_they_are_given_by_name(self) -> None:
        @consumer(topic=NUMBERS)
        def use(batch: Batch, database: list[int], *, factor: int, optional: int = 5) -> None:
            database.extend(record.data["n"] * factor + optional for record in batch)

        database: list[int] = []
        run_consumer(use, numbers(3), resources={"database": database, "factor": 10, "unused": None})
        assert database == [5, 15, 25]

    def test_missing_ones_are_named_before_anything_is_done(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS)
        def use(batch: Batch, database: object, cache: object) -> None: ...

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(InvalidSettingError, match=r"\['database'\]") as caught:
            run_pending(stream, use, resources={"cache": 1})
        assert caught.value.facts["value"] == ["database"]
        assert stream.pending("use").events == 1

    def test_a_handler_takes_the_batch_first(self) -> None:
        with pytest.raises(InvalidSettingError, match="first parameter"):
            consumer(topic=NUMBERS, group="g")(lambda: None)
        with pytest.raises(InvalidSettingError, match="first parameter"):
            consumer(topic=NUMBERS, group="g")(lambda *, batch: None)


def test_the_log_works_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    @consumer(topic=NUMBERS)
    def speak(batch: Batch) -> None:
        batch.log.info("%d records", len(batch))

    with caplog.at_level(logging.INFO, "djp_dagster.handler"):
        run_consumer(speak, numbers(2))
    assert "2 records" in caplog.text


def test_publishing_what_is_no_event_is_refused(stream: EventStream) -> None:
    stream.create_topic(NUMBERS)
    with pytest.raises(InvalidEventError, match="dict"):
        stream.publish(NUMBERS, [{"n": 1}])  # type: ignore[list-item]


class TestDeadlines:
    """Wake-ups a handler asks for."""

    @staticmethod
    def run(stream: EventStream, clock: Clock, steps: list[Any], handler: Any) -> list[list[str]]:
        """Run the handler after each step (seconds to wait, or events to publish); the deadlines fired each time."""
        fired: list[list[str]] = []

        @consumer(topic=NUMBERS, group="waiter")
        def waiter(batch: Batch) -> None:
            fired.append(sorted(deadline.key for deadline in batch.deadlines))
            handler(batch)

        stream.create_topic(NUMBERS)
        for step in steps:
            if isinstance(step, list):
                stream.publish(NUMBERS, step)
            else:
                clock.advance(step)
            run_pending(stream, waiter)
        return fired

    @staticmethod
    def at(clock: Clock, seconds: float) -> datetime:
        return datetime.fromtimestamp(clock.now_s + seconds, timezone.utc)

    def test_it_fires_once_and_not_before(self, stream: EventStream, clock: Clock) -> None:
        start = self.at(clock, 60)

        def handle(batch: Batch) -> None:
            if len(batch):
                batch.set_deadline("k", start)

        assert self.run(stream, clock, [numbers(1), 59, 1, 100], handle) == [[], ["k"]]

    def test_setting_it_again_moves_it_and_clearing_forgets_it(self, stream: EventStream, clock: Clock) -> None:
        start = clock.now_s

        def handle(batch: Batch) -> None:
            for record in batch:
                if record.data["n"] == 9:
                    batch.clear_deadline("gone")
                    batch.clear_deadline("never there")
                else:
                    due = datetime.fromtimestamp(start + record.data["n"], timezone.utc)
                    batch.set_deadline("moved", due)
                    batch.set_deadline("gone", due)

        steps = [numbers(1, start=10), numbers(1, start=50), numbers(1, start=9), 10, 39, 1]
        assert self.run(stream, clock, steps, handle) == [[], [], [], ["moved"]]

    def test_a_batch_that_fires_it_may_set_it_again(self, stream: EventStream, clock: Clock) -> None:
        def handle(batch: Batch) -> None:
            batch.set_deadline("tick", self.at(clock, 10))

        assert self.run(stream, clock, [numbers(1), 10, 10, 9, 1], handle) == [[], ["tick"], ["tick"], ["tick"]]

    def test_it_belongs_to_the_commit(self, stream: EventStream, clock: Clock) -> None:
        def handle(batch: Batch) -> None:
            batch.set_deadline("k", self.at(clock, 1))
            for record in batch:
                batch.set_deadline(f"k{record.data['n']}", self.at(clock, 1))
                if record.data["n"] == 0:
                    raise ValueError("no")

        assert self.run(stream, clock, [numbers(2), 5], handle)[-1] == ["k", "k1"]

    def test_what_was_appended_before_it_is_read_first(self, stream: EventStream, clock: Clock) -> None:
        seen: list[tuple[list[int], list[str]]] = []

        @consumer(topic=NUMBERS, group="waiter", max_batch=_one())
        def waiter(batch: Batch) -> None:
            seen.append(([record.data["n"] for record in batch], [deadline.key for deadline in batch.deadlines]))
            if batch.ranges[0].start == 0 and not batch.deadlines:
                batch.set_deadline("k", self.at(clock, 60))

        fill(stream, NUMBERS, numbers(1))
        run_pending(stream, waiter)
        clock.advance(30)
        stream.publish(NUMBERS, numbers(2, start=1))
        clock.advance(60)
        stream.publish(NUMBERS, numbers(1, start=3))
        run_pending(stream, waiter)
        assert seen == [([0], []), ([1], []), ([2], ["k"]), ([3], [])]

    def test_of_a_batch_of_several_tasks_needs_a_record(self, stream: EventStream, clock: Clock) -> None:
        fired: list[Any] = []

        @consumer(topic=TWO)
        def waiter(batch: Batch) -> None:
            fired.extend((deadline.task, deadline.key) for deadline in batch.deadlines)
            if len(batch):
                records = list(batch)
                with pytest.raises(InvalidSettingError, match="source=record"):
                    batch.set_deadline("k", self.at(clock, 1))
                with pytest.raises(InvalidValueError, match="NUL"):
                    batch.set_deadline("k\0", self.at(clock, 1), source=records[0])
                with pytest.raises(InvalidValueError, match="time zone"):
                    batch.set_deadline("k", datetime(2024, 1, 1), source=records[0])  # noqa: DTZ001
                for record in records:
                    batch.set_deadline("given", self.at(clock, 1), source=record)
                for _ in batch:
                    batch.set_deadline("standing", self.at(clock, 1))
                batch.clear_deadline("given", source=records[0])

        fill(stream, TWO, [TWO.event(n=str(n)) for n in range(20)])
        run_pending(stream, waiter)
        clock.advance(1)
        run_pending(stream, waiter)
        assert sorted(fired) == [(0, "standing"), (1, "given"), (1, "standing")]


def _one() -> Any:
    from djp_dagster import Threshold

    return Threshold(events=1)


class TestState:
    """A stateful handler's memory."""

    def test_it_lasts_from_batch_to_batch(self, stream: EventStream, tmp_path: Any) -> None:
        @consumer(topic=NUMBERS, stateful=True)
        def count(batch: Batch) -> None:
            for record in batch:
                batch.state.set(record.data["n"], batch.state.get(record.data["n"], 0) + 1)
            assert batch.state.get_many([0, 1, 99]) == {
                key: batch.state.get(key) for key in (0, 1) if batch.state.get(key) is not None
            }

        fill(stream, NUMBERS, numbers(3))
        report = run_pending(stream, count, state_folder=tmp_path)
        assert report.batches[0].state_changes == 3
        stream.publish(NUMBERS, numbers(2))

        seen: dict[Any, Any] = {}

        @consumer(topic=NUMBERS, stateful=True, group="count")
        def again(batch: Batch) -> None:
            seen.update(batch.state.get_many([0, 1, 2, 3]))
            batch.state.delete(1)
            batch.state.delete("not there")
            assert batch.state.get(1) is None
            assert batch.state.get(1, "none") == "none"

        run_pending(stream, again, state_folder=tmp_path)
        assert seen == {0: 1, 1: 1, 2: 1}

    def test_what_a_failed_attempt_changed_is_forgotten(self, stream: EventStream, tmp_path: Any) -> None:
        @consumer(topic=NUMBERS, stateful=True, retry=FAST)
        def count(batch: Batch) -> dict[str, int]:
            total = batch.state.get("total", 0) + len(batch)
            batch.state.set("total", total)
            if batch.attempt == 1:
                raise OSError("try again")
            return {"total": total}

        run = run_consumer(count, numbers(3))
        assert run.outputs == [{"total": 3}]
        assert run.state == {"total": 3}

    def test_none_is_refused(self) -> None:
        @consumer(topic=NUMBERS, stateful=True)
        def handle(batch: Batch) -> None:
            batch.state.set("k", None)

        with pytest.raises(SystemicFailureError, match=r"InvalidValueError.*delete"):
            run_consumer(handle, numbers(1))

    def test_undeclared_is_refused(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS)
        def handle(batch: Batch) -> None:
            batch.state.get("k")

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(InvalidSettingError, match="stateful=True"):
            run_pending(stream, handle)
        assert stream.pending("handle").events == 1

    def test_what_cannot_be_stored_names_its_key(self) -> None:
        @consumer(topic=NUMBERS, stateful=True)
        def handle(batch: Batch) -> None:
            batch.state.set("k", object())

        with pytest.raises(SystemicFailureError, match=r"InvalidValueError.*'k'"):
            run_consumer(handle, numbers(1))

    def test_each_batch_holds_one_task(self, stream: EventStream, tmp_path: Any) -> None:
        tasks: list[set[int]] = []

        @consumer(topic=TWO, stateful=True)
        def count(batch: Batch) -> None:
            tasks.append({record.partition for record in batch})
            batch.state.set("seen", len(batch))

        fill(stream, TWO, [TWO.event(n=str(n)) for n in range(20)])
        run_pending(stream, count, state_folder=tmp_path)
        assert tasks == [{0}, {1}]


class TestOutput:
    """What a handler returns."""

    def test_it_is_stored_and_referred_to(self, stream: EventStream) -> None:
        from djp_dagster.claim_check.serializers import load_value

        @consumer(topic=NUMBERS, max_batch=_one())
        def produce(batch: Batch) -> Any:
            (record,) = batch
            return {0: {"n": 0}, 1: "text", 2: b"bytes", 3: None}[record.data["n"]]

        fill(stream, NUMBERS, numbers(4))
        report = run_pending(stream, produce)
        outputs = stream.outputs("produce")
        assert [load_value(stream.payloads, output.payload) for output in outputs] == [{"n": 0}, "text", b"bytes"]
        assert [output.batch_id for output in outputs] == [batch.batch_id for batch in report.batches[:3]]
        assert [batch.output for batch in report.batches] == [*(output.payload for output in outputs), None]

    def test_what_cannot_be_stored_stops(self, stream: EventStream) -> None:
        @consumer(topic=NUMBERS)
        def produce(batch: Batch) -> object:
            return object()

        fill(stream, NUMBERS, numbers(1))
        with pytest.raises(InvalidSettingError, match="cannot be stored"):
            run_pending(stream, produce)
        assert stream.pending("produce").events == 1
        assert stream.dead_letters() == []
