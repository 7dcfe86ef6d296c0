"""A replay: it moves nothing, sends nothing, and gives what the live consumer gave; in shadow topics, too."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, Event, EventStream, Record, Table, Topic, consumer, replay, run_pending
from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.errors import InvalidSettingError, ProducerFencedError, SystemicFailureError
from djp_dagster.processing.threshold import Threshold
from djp_dagster.replaying import shadowing
from djp_dagster.replaying.plan import TimeOf, plan_ranges
from djp_dagster.streams.records import EncodedBatch
from djp_dagster.streams.stream import open_stream
from djp_dagster.testing import Clock
from tests.replaying.kit import (
    CLICKS,
    COPIES,
    DAY,
    SHADOWS,
    click,
    contents,
    count,
    everything,
    hours,
    publish,
    records_of,
    run_live,
    window,
)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Shadow topics get some events at a time, not some thousand."""
    monkeypatch.setattr(shadowing, "_EMITS_PER_PUBLISH", 7)
    return 7


def fill(stream: EventStream, clock: Clock, seed: random.Random, number: int = 60) -> None:
    """Clicks over a day, in and out of order, some late, some twice, some without a time."""
    stream.create_topic(CLICKS)
    made: list[Event] = []
    for _ in range(number):
        clock.advance(seed.expovariate(number / 86_400))
        now = datetime.fromtimestamp(clock(), timezone.utc)
        for _ in range(seed.randrange(1, 6)):
            late = timedelta(seconds=seed.choice([0, 0, 10, 3600, 20 * 3600]) * seed.random())
            made.append(
                click(f"u{seed.randrange(12)}", seed.choice([None, now - late, now - late]), n=seed.randrange(5))
            )
        stream.publish(CLICKS, made[-seed.randrange(1, 9) :])
    # A day's last window must be over.
    clock.advance(86_400)


@pytest.mark.parametrize("by", ["event_time", "append_time"])
@pytest.mark.parametrize("round_", range(5))
def test_live_equals_replay(stream: EventStream, clock: Clock, seed: random.Random, by: TimeOf, round_: int) -> None:
    fill(stream, clock, seed)

    @consumer(topic=CLICKS, emits=[COPIES], group="count", max_batch=Threshold(events=seed.randrange(1, 50)))
    def live(batch: Batch) -> dict[str, int]:
        return count.handler(batch)  # type: ignore[no-any-return]

    expected = run_live(stream, live)
    assert sum(expected.values()) == sum(one.data["n"] for one in records_of(stream, CLICKS)) > 0
    emitted = Counter(dict.fromkeys(expected, 0))
    for copy in records_of(stream, COPIES):
        emitted[copy.data["user"]] += 1

    positions, total, events = stream.positions("count"), Counter[str](), 0
    edges = [DAY - timedelta(days=1), *sorted(DAY + timedelta(seconds=seed.uniform(0, 86_400)) for _ in range(8))]
    for start, end in pairwise([*edges, DAY + timedelta(days=3)]):
        report = replay(stream, count, window(stream, start, end, by=by))
        total.update(report.value or {})
        events += report.events
    assert total == expected
    assert events == len(records_of(stream, CLICKS)) == sum(emitted.values())
    assert stream.positions("count") == positions
    assert len(records_of(stream, COPIES)) == events


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("isolate", ["batch", "per_event", "concurrently"])
@pytest.mark.parametrize("round_", range(2))
def test_the_shadow_topic_is_what_live_emitted(
    stream: EventStream, clock: Clock, seed: random.Random, isolate: str, round_: int
) -> None:
    """Same ids, same contents: several events of a record, some with ids or times of their own, some passed on."""
    fill(stream, clock, seed)

    def emit(batch: Batch, record: Record) -> None:
        user, n = record.data["user"], record.data["n"]
        for number in range(n):
            batch.emit(COPIES.event(user=user, number=number), source=record)
        if n == 1:
            batch.emit(COPIES.event(user=user, own=True).replace(id=f"own-{record.position}", time=DAY), source=record)
        if n == 2:
            batch.emit(record, topic=COPIES, source=record)
        if n == 3 and isolate != "batch":
            raise ValueError("never a 3")

    def each(record: Record, batch: Batch) -> None:
        emit(batch, record)

    def whole(batch: Batch) -> None:
        records = list(batch)
        for record in (*records, *reversed(records)):  # the second events of a record long after its first ones
            emit(batch, record)

    how: dict[str, Any] = {"topic": CLICKS, "emits": [COPIES], "group": "echo", "max_poison": 1000}
    if isolate == "batch":
        echo = consumer(max_batch=Threshold(events=seed.randrange(1, 40)), **how)(whole)
    else:
        echo = consumer(isolate="per_event", concurrency=4 if isolate == "concurrently" else 1, **how)(each)
    run_pending(stream, echo, wait=0)
    letters = len(stream.dead_letters("echo"))
    report = replay(
        stream,
        echo,
        window(stream, DAY - timedelta(days=2), hours(99, 99)[0], by="append_time"),
        emit_to={COPIES: SHADOWS},
    )
    live, shadow = records_of(stream, COPIES), records_of(stream, SHADOWS)
    assert contents(shadow) == contents(live)
    assert report.emitted == len(live) > 50
    assert report.failed == letters
    assert (letters > 0) is (isolate != "batch")
    assert len(stream.dead_letters("echo")) == letters


@pytest.mark.usefixtures("few")
def test_many_events_of_one_record(stream: EventStream) -> None:
    @consumer(topic=CLICKS, emits=[COPIES], group="many")
    def many(batch: Batch) -> None:
        for _record in batch:
            for number in range(600):
                batch.emit(COPIES.event(user="u", number=number))

    publish(stream, click("a"), click("b"))
    run_pending(stream, many, wait=0)
    replay(stream, many, plan_ranges(stream.log, everything(stream)), emit_to={COPIES: SHADOWS})
    assert contents(records_of(stream, SHADOWS)) == contents(records_of(stream, COPIES))
    assert len({one.id for one in records_of(stream, SHADOWS)}) == 1200


@pytest.mark.usefixtures("few")
def test_what_a_record_emitted_before_it_failed_is_not_published(stream: EventStream) -> None:
    @consumer(topic=CLICKS, emits=[COPIES], isolate="per_event", max_poison=50)
    def half(record: Record, batch: Batch) -> None:
        for number in range(9):
            batch.emit(COPIES.event(user=record.data["user"], number=number))
        if record.data["user"] == "bad":
            raise ValueError

    publish(stream, *(click("bad" if number % 3 else "good") for number in range(30)))
    report = replay(stream, half, plan_ranges(stream.log, everything(stream)), emit_to={COPIES: SHADOWS})
    assert (report.events, report.failed, report.emitted) == (30, 20, 90)
    assert {one.data["user"] for one in records_of(stream, SHADOWS)} == {"good"}


@pytest.mark.usefixtures("few")
def test_a_replay_that_died_publishes_the_rest_and_nothing_twice(stream: EventStream) -> None:
    publish(stream, *(click(f"u{number}") for number in range(50)))
    dies = [True]

    def copy(batch: Batch) -> None:
        for number, record in enumerate(batch):
            if dies and number == 31:
                raise KeyboardInterrupt
            batch.emit(COPIES.event(user=record.data["user"]))

    copying = consumer(topic=CLICKS, emits=[COPIES], code_version="1")(copy)
    plan = plan_ranges(stream.log, everything(stream))
    with pytest.raises(KeyboardInterrupt):
        replay(stream, copying, plan, emit_to={COPIES: SHADOWS})
    assert len(records_of(stream, SHADOWS)) == 28
    dies.clear()
    for _ in range(2):
        assert replay(stream, copying, plan, emit_to={COPIES: SHADOWS}).emitted == 50
        assert sorted(one.data["user"] for one in records_of(stream, SHADOWS)) == sorted(f"u{n}" for n in range(50))

    # Other code, another shadow topic, or the same one made anew: nothing was published there yet.
    other = Topic("other_shadows", partitions=2, key="user")
    replay(stream, copying, plan, emit_to={COPIES: other})
    assert len(records_of(stream, other)) == 50
    stream.delete_topic(SHADOWS)
    replay(stream, copying, plan, emit_to={COPIES: SHADOWS})
    assert len(records_of(stream, SHADOWS)) == 50
    changed = consumer(topic=CLICKS, emits=[COPIES], code_version="2")(copy)
    replay(stream, changed, plan, emit_to={COPIES: SHADOWS})
    assert len(records_of(stream, SHADOWS)) == 100


@pytest.mark.usefixtures("few")
def test_two_replays_of_the_same_at_once(stream: EventStream) -> None:
    publish(stream, *(click("u") for _ in range(20)))
    plan = plan_ranges(stream.log, everything(stream))
    begun: list[str] = []

    @consumer(topic=CLICKS, emits=[COPIES])
    def copy(batch: Batch) -> None:
        if not begun:
            begun.append("first")
            replay(stream, copy, plan, emit_to={COPIES: SHADOWS})
        for record in batch:
            batch.emit(COPIES.event(user="u", of=record.id))

    with pytest.raises(ProducerFencedError):
        replay(stream, copy, plan, emit_to={COPIES: SHADOWS})
    assert len(records_of(stream, SHADOWS)) == 20


def test_several_topics_of_which_one_has_a_shadow(stream: EventStream, few: int) -> None:
    logs = Topic("logs")

    @consumer(topic=CLICKS, emits=[COPIES, logs])
    def both(batch: Batch) -> None:
        for record in batch:
            batch.emit(logs.event(of=record.id), topic=logs)
            batch.emit(COPIES.event(user=record.data["user"]), topic=COPIES)

    publish(stream, *(click("u") for _ in range(3 * few + 1)))
    report = replay(stream, both, plan_ranges(stream.log, everything(stream)), emit_to={COPIES: SHADOWS})
    assert report.emitted == len(records_of(stream, SHADOWS)) == 3 * few + 1
    assert records_of(stream, logs) == records_of(stream, COPIES) == []


def test_heavy_data_of_shadow_events_goes_to_the_payload_store(stream: EventStream) -> None:
    heavy = Topic("heavy", offload_above=1000)
    shadow = Topic("heavy_shadow", offload_above=1000)

    @consumer(topic=CLICKS, emits=[heavy])
    def blow_up(batch: Batch) -> None:
        for record in batch:
            batch.emit(heavy.event(text=record.data["user"] * 5000))

    publish(stream, click("u"))
    replay(stream, blow_up, plan_ranges(stream.log, everything(stream)), emit_to={heavy: shadow})
    (copy,) = records_of(stream, shadow)
    assert copy.claim is not None
    assert copy.data["text"] == "u" * 5000


def test_heavy_data_is_loaded(tmp_path: Path) -> None:
    topic = Topic("clicks", offload_above=1000)
    with open_stream("sqlite://", payloads=open_payload_store(tmp_path)) as stream:
        stream.create_topic(topic)
        stream.publish(topic, [topic.event(text="x" * 5000), topic.event(text="y")])

        @consumer(topic=topic)
        def lengths(batch: Batch) -> list[int]:
            return [len(record.data["text"]) for record in batch]

        assert replay(stream, lengths, plan_ranges(stream.log, everything(stream))).value == [5000, 1]


def test_same_as_of_same_replay(stream: EventStream, clock: Clock, seed: random.Random) -> None:
    fill(stream, clock, seed)
    plan = window(stream, *hours(0, 24))
    before = replay(stream, count, plan)
    fill(stream, clock, seed)
    stream.publish(CLICKS, [click("late", hours(1, 2)[0], n=1)])
    again = replay(stream, count, plan)
    assert before.value == again.value != replay(stream, count, window(stream, *hours(0, 24))).value
    assert (before.events, before.bytes) == (again.events, again.bytes)


def test_a_replay_sends_no_mail(stream: EventStream) -> None:
    sent: list[str] = []

    @consumer(topic=CLICKS)
    def mail(batch: Batch) -> int:
        for record in batch:
            if not batch.is_replay:
                sent.append(record.data["user"])
            batch.set_deadline("replayed" if batch.is_replay else "live", hours(99, 99)[0])
        return len(batch)

    publish(stream, click("a"), click("b"))
    run_pending(stream, mail, wait=0)
    assert replay(stream, mail, plan_ranges(stream.log, everything(stream))).value == 2
    assert sorted(sent) == ["a", "b"]
    due = stream.coordinator.due_deadlines("mail", [0, 1, 2], 1 << 60, 10)
    assert {deadline.key for deadline in due} == {"live"}


def test_without_records_the_handler_is_not_called(stream: EventStream) -> None:
    @consumer(topic=CLICKS)
    def by_page(batch: Batch) -> Any:
        return batch.to_pandas().groupby("user").size()

    publish(stream, click("u", DAY))
    report = replay(stream, by_page, window(stream, *hours(5, 6)))
    assert (report.value, report.events, report.failed) == (None, 0, 0)
    assert replay(stream, by_page, window(stream, *hours(0, 1))).value.to_dict() == {"u": 1}


def test_a_batch_of_picked_records(stream: EventStream) -> None:
    @consumer(topic=CLICKS)
    def look(batch: Batch) -> Any:
        first = next(iter(batch)).data["user"]
        frames = [piece.num_rows for piece in batch.arrow_batches(rows=4)]
        return first, len(batch), len(list(batch)), sum(frames), len(batch.to_pandas()), sorted(batch.by_key())

    publish(stream, *(click(f"u{number % 3}", DAY + timedelta(minutes=number)) for number in range(60)))
    report = replay(stream, look, window(stream, *hours(0, 0.5)).of(["u1", "u2"], None))
    assert report.value[1:] == (20, 20, 20, 20, ["u1", "u2"])
    assert report.events == 20


def test_what_a_handler_leaves_unread_is_counted_as_far_as_it_is_known(stream: EventStream) -> None:
    @consumer(topic=CLICKS)
    def first(batch: Batch) -> int:
        return len([next(iter(batch))]) + len(batch)

    publish(stream, *(click(f"u{number}", DAY) for number in range(9)))
    assert replay(stream, first, window(stream, *hours(0, 1))).events == 9


def broken(stream: EventStream, number: int) -> None:
    """Records that are no events, and as many that are."""
    stream.create_topic(CLICKS)
    for _ in range(number):
        stream.log.append([EncodedBatch("clicks", 0, 1, b"\x91\x01")])
        publish(stream, click("u"))


def test_records_that_are_no_events(stream: EventStream) -> None:
    broken(stream, 10)
    report = replay(stream, count, plan_ranges(stream.log, everything(stream)))
    assert (report.value, report.events, report.failed) == ({"u": 10}, 10, 10)
    broken(stream, 1)
    with pytest.raises(SystemicFailureError, match="11 records that are no events"):
        replay(stream, count, plan_ranges(stream.log, everything(stream)))
    assert stream.dead_letters() == []


@pytest.mark.parametrize("concurrency", [1, 3])
def test_records_that_fail(stream: EventStream, concurrency: int) -> None:
    @consumer(topic=CLICKS, isolate="per_event", max_poison=2, concurrency=concurrency, on_poison="block")
    def strict(record: Record, batch: Batch) -> None:
        batch.count("seen")
        if record.data["user"] == "bad":
            raise ValueError("bad")
        if record.data["user"] == "ugly":
            batch.fail(record, "ugly")

    publish(stream, click("bad"), click("bad"), *(click("ugly") for _ in range(5)), click("good"))
    report = replay(stream, strict, plan_ranges(stream.log, everything(stream)))
    assert (report.events, report.failed) == (8, 7)
    publish(stream, click("bad"))
    with pytest.raises(SystemicFailureError):
        replay(stream, strict, plan_ranges(stream.log, everything(stream)))
    assert stream.dead_letters() == []


class Service:
    """Figures of its own, as a look-up has them."""

    def take_figures(self) -> tuple[dict[str, int], dict[str, float]]:
        return {"calls": 3}, {"p50_seconds": 0.5}


def test_resources_and_figures(stream: EventStream) -> None:
    @consumer(topic=CLICKS)
    def ask(batch: Batch, users: Service) -> int:
        batch.count("asked", 2)
        batch.gauge("depth", 1.5)
        return len(batch)

    publish(stream, click("u"))
    plan = plan_ranges(stream.log, everything(stream))
    report = replay(stream, ask, plan, resources={"users": Service()})
    assert report.counts == {"asked": 2, "users_calls": 3}
    assert report.gauges == {"depth": 1.5, "users_p50_seconds": 0.5}
    with pytest.raises(InvalidSettingError, match="asks for the resources \\['users'\\]"):
        replay(stream, ask, plan)


def test_tables_are_as_of_now(stream: EventStream, tmp_path: Path) -> None:
    names = Topic("names", key="user")
    table = Table("names_now", topic=names, value="name")

    @consumer(topic=CLICKS, tables=[table])
    def greet(batch: Batch) -> list[str]:
        return [batch.table(table).get(record.data["user"]) for record in batch]

    table.register(stream)
    publish(stream, click("u", DAY))
    plan = window(stream, *hours(0, 1))
    for name in ("Ada", "Grace"):
        stream.publish(names, [names.event(user="u", name=name)])
        run_pending(stream, table, wait=0, state_folder=tmp_path)
        assert replay(stream, greet, plan, state_folder=tmp_path / "replicas").value == [name]


def test_the_rate_bounds_what_is_read_wanted_or_not(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(0.0), []

    class Waiting(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            clock.advance(timeout)
            return False

    monkeypatch.setattr("djp_dagster.replaying.replay.time.monotonic", clock)
    for hour in range(10):
        publish(stream, click("a", hours(hour, 99)[0]), *(click("b", hours(hour, 99)[0]) for _ in range(9)))

    @consumer(topic=CLICKS)
    def slow(batch: Batch) -> int:
        clock.advance(1000)  # does not let more pass at once afterwards
        return sum(1 for _ in batch)

    plan = window(stream, *hours(0, 10)).of(["a"], None)
    assert replay(stream, slow, plan, max_events_per_second=2, stop=Waiting()).value == 10
    read, peeked = 100, 10
    assert sum(waits) == pytest.approx((read + peeked) / 2, abs=5)
    with pytest.raises(InvalidSettingError, match="max_events_per_second=0 must be above 0"):
        replay(stream, slow, plan, max_events_per_second=0)


def test_stopped(stream: EventStream) -> None:
    stop = threading.Event()

    @consumer(topic=CLICKS)
    def stops(batch: Batch) -> None:
        for _ in batch:
            stop.set()

    for _ in range(3):
        publish(stream, click("u"))
    with pytest.raises(InterruptedError, match="it moves no offsets"):
        replay(stream, stops, plan_ranges(stream.log, everything(stream)), stop=stop)


def refused() -> Iterator[tuple[Any, dict[Topic, Topic], str]]:
    keeps = consumer(topic=CLICKS, stateful=True, group="keeps")(count.handler)
    yield keeps, {}, "keeps state"
    yield count, {CLICKS: SHADOWS}, "does not emit to"
    yield count, {COPIES: Topic("shadows", partitions=3, key="user")}, "must have the partitions and the key"
    yield count, {COPIES: Topic("shadows", partitions=2)}, "must have the partitions and the key"
    yield count, {COPIES: COPIES}, "where live events are"
    yield count, {COPIES: Topic("clicks", partitions=2, key="user")}, "where live events are"


@pytest.mark.parametrize(("which", "emit_to", "told"), list(refused()))
def test_refused(stream: EventStream, which: Any, emit_to: dict[Topic, Topic], told: str) -> None:
    publish(stream, click("u"))
    with pytest.raises(InvalidSettingError, match=told):
        replay(stream, which, plan_ranges(stream.log, everything(stream)), emit_to=emit_to)


def test_a_plan_of_other_topics(stream: EventStream) -> None:
    other = Topic("others", key="user")
    publish(stream, click("u"), topic=other)
    with pytest.raises(InvalidSettingError, match="the plan names topic 'others'"):
        replay(stream, count, plan_ranges(stream.log, everything(stream, "others")))
