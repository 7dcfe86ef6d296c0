"""`Table`: the latest value of each key, whatever order updates come in; and tables that are made anew."""

import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djp_dagster import Event, EventStream, Table, Threshold, Topic, Worker, run_pending
from djp_dagster.errors import CoPartitionError, LeaseBusyError, TerminalError
from djp_dagster.processing.commands import rebuild, request_command
from djp_dagster.state.keys import encode_key
from djp_dagster.streams.model import Intent, Range
from djp_dagster.streams.records import CODEC_CHANGES, EncodedBatch, TopicPartition, encode_changes, encode_value
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import memory_stream, run_consumer
from tests.processing.kit import NO_EVENT, append_raw, at, in_thread, open_intents, raw, wait_until
from tests.state.kit import state_of, values_of

UPDATES = Topic("updates", partitions=2, key="id")
KEYS = st.sampled_from([1, 2, 3, "1", "a", "b", -5, 2**64 - 1])
VALUES: Any = (
    st.none() | st.integers(0, 5) | st.text(max_size=2) | st.lists(st.integers(0, 9), max_size=2) | st.booleans()
)
CUTS = st.sampled_from([2, 5, 1000])


def update(key: Any, value: Any, sequence: Any = None, **attributes: Any) -> Event:
    return UPDATES.event(id=key, value=value, at=sequence).replace(**attributes)


def table(value: Any = "value", sequence: str | None = None, events: int = 1000, **more: Any) -> Table:
    return Table("table", topic=UPDATES, value=value, sequence=sequence, max_batch=Threshold(events=events), **more)


class TestAgainstDict:
    @settings(max_examples=25)
    @given(st.lists(st.tuples(KEYS, VALUES), max_size=20), CUTS)
    def test_without_a_sequence_the_last_update_wins(self, updates: list[tuple[Any, Any]], events: int) -> None:
        expected: dict[Any, Any] = {}
        for key, value in updates:
            expected.pop(key, None)
            if value is not None:
                expected[key] = value
        run = run_consumer(table(events=events), [update(*one) for one in updates])
        assert run.state == expected
        assert run.dead_letters == []

    @pytest.mark.parametrize("sequences", [st.integers(-3, 3) | st.floats(-2, 2), st.text("ab", max_size=2)])
    def test_with_one_the_highest_wins_however_late_it_comes(self, sequences: Any) -> None:
        @settings(max_examples=25)
        @given(st.lists(st.tuples(KEYS, VALUES, sequences), max_size=20), CUTS)
        def check(updates: list[tuple[Any, Any, Any]], events: int) -> None:
            expected: dict[Any, Any] = {}
            for wanted in {key for key, *_ in updates}:
                value = _latest(updates, wanted)
                if value is not None:
                    expected[wanted] = value
            run = run_consumer(table(sequence="at", events=events), [update(*one) for one in updates])
            assert run.state == expected
            assert run.dead_letters == []

        check()

    @settings(max_examples=15)
    @given(st.lists(st.tuples(KEYS, VALUES), max_size=12), st.randoms(use_true_random=False), CUTS)
    def test_order_and_duplicates_do_not_matter_then(
        self, updates: list[tuple[Any, Any]], rng: random.Random, events: int
    ) -> None:
        numbered = [update(key, value, sequence) for sequence, (key, value) in enumerate(updates)]
        shuffled = [*numbered, *rng.choices(numbered, k=len(numbered) // 2)] if numbered else []
        rng.shuffle(shuffled)
        sequenced = table(sequence="at", events=events)
        assert run_consumer(sequenced, shuffled).state == run_consumer(sequenced, numbered).state


def _latest(updates: list[tuple[Any, Any, Any]], wanted: Any) -> Any:
    """Of the updates of a key the one of the highest sequence; of equal ones the last."""
    of_key = [(sequence, place, value) for place, (key, value, sequence) in enumerate(updates) if key == wanted]
    return max(of_key, key=lambda found: found[:2])[-1]


def test_a_deleted_key_does_not_come_back() -> None:
    events = [update("a", 1, 1), update("a", None, 3), update("a", 2, 2), update("b", None, 5), update("b", 1, 4)]
    assert run_consumer(table(sequence="at"), events).state == {}
    assert run_consumer(table(sequence="at"), [*events, update("a", 9, 3)]).state == {"a": 9}


class TestValues:
    DATA: dict[str, Any] = {"id": 7, "value": {"x": {"y": 5}, "z": None}, "at": 1}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, DATA),
            ("value", {"x": {"y": 5}, "z": None}),
            ("value.x.y", 5),
            (["value.x.y", "at", "none"], {"value.x.y": 5, "at": 1, "none": None}),
            ("value.z", None),
            ("value.x.y.too.deep", None),
            ("nothing", None),
        ],
    )
    def test_what_of_the_data_is_kept(self, value: Any, expected: Any) -> None:
        run = run_consumer(table(value), [UPDATES.event(self.DATA)])
        assert run.state == ({} if expected is None else {7: expected})

    @pytest.mark.parametrize("value", [None, "value", ["value", "at"]])
    def test_an_event_without_data_deletes(self, value: Any) -> None:
        gone = Event(type="updates", source="/t", ext={"partitionkey": "a"})
        assert run_consumer(table(value), [update("a", 1), update("b", 2), gone]).state.keys() == {"b"}

    def test_an_explicit_key_is_the_key(self) -> None:
        run = run_consumer(table(), [update("a", 1, ext={"partitionkey": "b"})])
        assert run.state == {"b": 1}

    @pytest.mark.parametrize("data", [{"sequence": None}, {}])
    def test_the_attribute_of_cloudevents_orders_too(self, data: dict[str, Any]) -> None:
        events = [
            UPDATES.event(id="a", value=number, **data).replace(ext={"sequence": f"{number:03}"})
            for number in (5, 30, 12)
        ]
        assert run_consumer(table(sequence="sequence"), events).state == {"a": 30}

    def test_a_field_of_that_name_goes_before_it(self) -> None:
        events = [
            UPDATES.event(id="a", value=number, sequence=number).replace(ext={"sequence": str(-number)})
            for number in (1, 3, 2)
        ]
        assert run_consumer(table(sequence="sequence"), events).state == {"a": 3}


class TestBadUpdates:
    @pytest.mark.parametrize(
        ("bad", "error_type"),
        [
            ({"value": 1, "at": 1}, "MissingKeyError"),
            ({"id": 1.5, "value": 1, "at": 1}, "MissingKeyError"),
            ({"id": True, "value": 1, "at": 1}, "MissingKeyError"),
            ({"id": ["a"], "value": 1, "at": 1}, "MissingKeyError"),
            ({"id": "a", "value": 1}, "InvalidValueError"),
            ({"id": "a", "value": 1, "at": True}, "InvalidValueError"),
            ({"id": "a", "value": 1, "at": [1]}, "InvalidValueError"),
            ({"id": "a", "value": 1, "at": float("nan")}, "InvalidValueError"),
            ({"id": "a", "value": 1, "at": "2"}, "InvalidValueError"),
        ],
        ids=repr,
    )
    def test_a_bad_one_is_a_dead_letter_and_nothing_else(
        self, bad: dict[str, Any], error_type: str, tmp_path: Path
    ) -> None:
        with memory_stream() as stream:
            sequenced = table(sequence="at")
            sequenced.register(stream)
            stream.publish(UPDATES, [update("a", "old", 1), update("b", "old", 1)])
            append_raw(stream, UPDATES, [raw(UPDATES.event(bad))], partition=UPDATES.partition_of(update("a", 0)))
            stream.publish(UPDATES, [update("a", "new", 2)])
            run_pending(stream, sequenced, state_folder=tmp_path)
            [letter] = stream.dead_letters("table")
            assert letter.error_type == error_type
            state = values_of(stream, "table", 0) | values_of(stream, "table", 1)
            assert state == {"a": [2, "new"], "b": [1, "old"]}

    @pytest.mark.parametrize(
        ("topic", "key"), [(Topic("t"), None), (Topic("t"), "id"), (Topic("t", key="user"), "id"), (UPDATES, "value")]
    )
    def test_a_topic_that_is_partitioned_otherwise_is_refused(self, topic: Topic, key: str | None) -> None:
        with pytest.raises(CoPartitionError, match="partitioned by"):
            Table("table", topic=topic, key=key)


# Tables made anew


def bogus(stream: EventStream, task: int, changes: list[tuple[bytes, bytes | None]]) -> None:
    """Something that no update has led to, in the middle of the truth."""
    batch = EncodedBatch(changelog_of("table"), task, len(changes), encode_changes(changes), CODEC_CHANGES)
    stream.log.append([batch])


def some_updates(rng: random.Random, count: int) -> list[Event]:
    return [update(rng.randrange(40), rng.choice([None, *range(9)]), rng.randrange(50)) for _ in range(count)]


def states(stream: EventStream) -> list[dict[bytes, bytes]]:
    return [state_of(stream, "table", task) for task in range(2)]


@pytest.fixture(params=[None, "at"], ids=["unordered", "sequenced"])
def kept(request: pytest.FixtureRequest) -> Table:
    return table(sequence=request.param, events=30)


@pytest.fixture
def stream(kept: Table, seed: random.Random, tmp_path: Path) -> Iterator[EventStream]:
    """With a table of some hundred updates, some of which were bad."""
    with memory_stream() as opened:
        kept.register(opened)
        opened.publish(UPDATES, some_updates(seed, 150))
        append_raw(opened, UPDATES, [NO_EVENT, raw(UPDATES.event(value=1))])
        opened.publish(UPDATES, some_updates(seed, 150))
        run_pending(opened, kept, state_folder=tmp_path)
        yield opened


class TestRebuild:
    def test_of_a_right_one_changes_nothing(self, kept: Table, stream: EventStream, tmp_path: Path) -> None:
        before, letters = states(stream), stream.dead_letters(status=None)
        ends = stream.log.spans([changelog_of("table")])
        reports = rebuild(stream, kept, state_folder=tmp_path)
        assert [(report.counts["corrected_keys"], report.events) for report in reports] == [(0, 0), (0, 0)]
        assert [report.gauges["keys"] for report in reports] == list(map(len, before))
        assert (states(stream), stream.dead_letters(status=None)) == (before, letters)
        assert stream.log.spans([changelog_of("table")]) == ends
        assert len(letters) == 2

    def test_of_a_wrong_one_corrects_it(
        self, kept: Table, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        before = states(stream)
        for task, right in enumerate(before):
            some = seed.sample(sorted(right), 6)
            wrong: list[tuple[bytes, bytes | None]] = [
                (some[0], None),
                (some[1], encode_value([99, "wrong"])),
                (some[2], right[some[3]] + b"\xc1 no MessagePack"),
                (encode_key("ghost"), encode_value(1)),
                (encode_key(("no", "key")), encode_value(1)),
                (b"\x40\x07 nothing that decodes", b""),
                (b"", b"\xc1"),
            ]
            bogus(stream, task, wrong)
        reports = rebuild(stream, kept, state_folder=tmp_path)
        assert [report.counts["corrected_keys"] for report in reports] == [7, 7]
        assert states(stream) == before
        assert stream.positions("table") == {place: span.end for place, span in stream.log.spans(["updates"]).items()}

    def test_one_that_is_equal_and_not_the_same_is_corrected(self, tmp_path: Path) -> None:
        with memory_stream() as stream:
            table().register(stream)
            stream.publish(UPDATES, [update("a", True)])
            run_pending(stream, table(), state_folder=tmp_path)
            task = UPDATES.partition_of(update("a", 0))
            bogus(stream, task, [(encode_key("a"), encode_value(1))])
            rebuild(stream, table(), state_folder=tmp_path)
            assert values_of(stream, "table", task)["a"] is True

    def test_by_other_fields_than_before(self, seed: random.Random, tmp_path: Path) -> None:
        with memory_stream() as stream, memory_stream() as golden:
            before, after = table("value"), table(["at", "value"])
            updates = some_updates(seed, 200)
            for one, kept in ((stream, before), (golden, after)):
                kept.register(one)
                one.publish(UPDATES, updates)
                run_pending(one, kept, state_folder=tmp_path)
            rebuild(stream, after, state_folder=tmp_path)
            assert states(stream) == states(golden)

    def test_updates_come_meanwhile_and_after(
        self, kept: Table, stream: EventStream, seed: random.Random, tmp_path: Path
    ) -> None:
        stream.publish(UPDATES, some_updates(seed, 40))
        bogus(stream, 0, [(encode_key("ghost"), b"\x01")])
        rebuild(stream, kept, state_folder=tmp_path)
        run_pending(stream, kept, state_folder=tmp_path)
        [first, second] = rebuild(stream, kept, state_folder=tmp_path)
        assert (first.counts["corrected_keys"], second.counts["corrected_keys"]) == (0, 0)
        assert encode_key("ghost") not in states(stream)[0]

    def test_more_that_is_no_event_than_a_batch_may_hold_is_in_nobodys_way(self, tmp_path: Path) -> None:
        kept = table(max_poison=2)
        with memory_stream() as stream:
            kept.register(stream)
            for _ in range(4):
                append_raw(stream, UPDATES, [NO_EVENT, NO_EVENT])
                stream.publish(UPDATES, [update("a", 1)])
                run_pending(stream, kept, state_folder=tmp_path)
            rebuild(stream, kept, state_folder=tmp_path)
            assert open_intents(stream, kept) == []
            assert len(stream.dead_letters("table", status=None)) == 8

    def test_by_a_worker_that_holds_it(self, kept: Table, stream: EventStream, tmp_path: Path) -> None:
        before, stop = states(stream), threading.Event()
        with in_thread(lambda: Worker(stream, [kept], state_folder=tmp_path).run(stop), stop) as outcome:
            wait_until(lambda: all(info.owner for info in stream.coordinator.tasks("table")), "a worker")
            bogus_under_a_worker(stream, kept, before)
            assert rebuild(stream, kept, state_folder=tmp_path / "own") == []
            assert states(stream) == before
        assert outcome == [None]

    def test_who_holds_it_and_does_not_answer_is_waited_for_so_long(
        self, kept: Table, stream: EventStream, tmp_path: Path
    ) -> None:
        stream.coordinator.acquire("table", None, "deaf", 60)
        with pytest.raises(LeaseBusyError, match="deaf"):
            rebuild(stream, kept, state_folder=tmp_path, wait=0)

    def test_readers_never_see_half_of_it(self, tmp_path: Path) -> None:
        """One task, two hundred wrong keys: a reader sees all of them wrong, or none."""
        topic, count = Topic("updates", key="id"), 200
        kept = Table("table", topic=topic, value="value")
        with memory_stream() as stream:
            kept.register(stream)
            stream.publish(topic, [topic.event(id=number, value="right") for number in range(count)])
            run_pending(stream, kept, state_folder=tmp_path / "run")
            bogus(stream, 0, [(encode_key(number), encode_value("wrong")) for number in range(count)])
            seen, stop = list[int](), threading.Event()

            def look() -> None:
                with stream.view(kept, folder=tmp_path) as view:
                    while not (stop.is_set() and seen and seen[-1] == 0):
                        with view.refresh().pinned():
                            seen.append(sum(value == "wrong" for _, value in view.items()))

            with in_thread(look, stop):
                wait_until(lambda: bool(seen), "a look")
                rebuild(stream, kept, state_folder=tmp_path / "run")
        assert set(seen) == {0, count}
        assert seen == sorted(seen, reverse=True)


def bogus_under_a_worker(stream: EventStream, kept: Table, before: list[dict[bytes, bytes]]) -> None:
    """Write into a changelog whose end a worker knows: it is idle, and catches up before its next batch."""
    for task in range(2):
        bogus(stream, task, [(encode_key("ghost"), encode_value(1)), (min(before[task]), None)])


class TestHistoryThatIsGone:
    @pytest.fixture
    def short(self) -> Table:
        return Table("table", topic=Topic("updates", partitions=2, key="id", retention="1s"), value="value")

    @pytest.fixture
    def trimmed(self, short: Table, seed: random.Random, tmp_path: Path) -> Iterator[EventStream]:
        with memory_stream() as stream:
            short.register(stream)
            stream.publish(UPDATES, some_updates(seed, 100))
            run_pending(stream, short, state_folder=tmp_path)
            yield stream

    @staticmethod
    def trim(stream: EventStream) -> None:
        stream.log.trim(stream.log.now_micros() + 10_000_000)

    def test_a_table_that_cannot_be_made_anew_is_kept(self, short: Table, trimmed: EventStream, tmp_path: Path) -> None:
        before = states(trimmed)
        self.trim(trimmed)
        with pytest.raises(TerminalError, match="retention has removed"):
            rebuild(trimmed, short, state_folder=tmp_path)
        assert (states(trimmed), trimmed.coordinator.requests("table")) == (before, [])
        trimmed.publish(UPDATES, [update("a", "new")])
        run_pending(trimmed, short, state_folder=tmp_path)
        assert values_of(trimmed, "table", UPDATES.partition_of(update("a", 0)))["a"] == "new"

    def test_also_if_it_is_trimmed_while_it_is_made(
        self, short: Table, trimmed: EventStream, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Whoever began died, and the beginning went before the next took it up."""
        before, committed = states(trimmed), trimmed.positions("table")
        requests = request_command(trimmed, "table", [{"kind": "rebuild", "task": task} for task in range(2)])
        lease = trimmed.coordinator.acquire("table", None, "dying", 60)
        trimmed.coordinator.begin(lease, open_rebuild(short, committed, requests[0]))
        trimmed.coordinator.release(lease)
        self.trim(trimmed)
        with caplog.at_level(logging.ERROR):
            run_pending(trimmed, short, state_folder=tmp_path)
        assert "is kept as it is" in caplog.text
        assert (states(trimmed), trimmed.positions("table")) == (before, committed)
        assert open_intents(trimmed, short) == []
        statuses = [trimmed.coordinator.request_status(number).partition(":")[0] for number in requests]
        assert statuses == ["done", "failed"]


def open_rebuild(kept: Table, committed: dict[TopicPartition, int], request: int) -> Intent:
    end = committed[at(UPDATES, 0)]
    return Intent(
        batch_id="r", group=kept.group, kind="cut", tasks=(0,), ranges=(Range("updates", 0, end, end),),
        reason="rebuild", now_micros=0, command={"kind": "rebuild", "task": 0}, requests=(request,),
    )  # fmt: skip
