"""Which records a replay reads: windows, their borders, days of 23 and 25 hours, what has no time, what is gone."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone

import pytest

from djp_dagster import EventStream, Topic, TopicPartition, open_stream, replay
from djp_dagster.errors import InvalidSettingError, ReplayExpiredError
from djp_dagster.replaying.plan import ReplayPlan, TimeOf, parse_as_of, plan_ranges, plan_window
from djp_dagster.streams.model import Range
from djp_dagster.testing import Clock
from tests.replaying.kit import BERLIN, CLICKS, DAY, click, count, everything, hours, publish, window

MICRO = timedelta(microseconds=1)
AT = TopicPartition("clicks", 0)
ONE = Topic("clicks", key="user", retention="10h", retention_cap="10h")


def users(stream: EventStream, plan: ReplayPlan) -> list[str]:
    """Whose clicks a replay of the plan sees."""
    return sorted(replay(stream, count, plan).value or ())


def test_a_window_has_its_first_moment_and_not_its_last(stream: EventStream) -> None:
    start, end = hours(3, 4)
    moments = {"before": start - MICRO, "first": start, "last": end - MICRO, "after": end}
    publish(stream, *(click(user, at) for user, at in moments.items()))
    assert users(stream, window(stream, start, end)) == ["first", "last"]


@pytest.mark.parametrize(
    ("day", "length"), [(datetime(2026, 3, 29, tzinfo=BERLIN), 23), (datetime(2026, 10, 25, tzinfo=BERLIN), 25)]
)
def test_days_of_23_and_25_hours(stream: EventStream, day: datetime, length: int) -> None:
    first = day.astimezone(timezone.utc)
    publish(stream, *(click(f"{hour:+03}", first + timedelta(hours=hour, minutes=30)) for hour in range(-2, 28)))
    found = users(stream, window(stream, day, day + timedelta(days=1)))
    assert found == [f"{hour:+03}" for hour in range(length)]


def test_the_hour_that_comes_twice_is_two_windows(stream: EventStream) -> None:
    once = datetime(2026, 10, 25, 2, tzinfo=BERLIN)
    again = once.replace(fold=1)
    publish(stream, click("once", once.replace(minute=30)), click("again", again.replace(minute=30)))
    three = datetime(2026, 10, 25, 3, tzinfo=BERLIN)
    assert users(stream, window(stream, once, again)) == ["once"]
    assert users(stream, window(stream, again, three)) == ["again"]


def test_times_of_the_hour_that_comes_twice_in_one_record_batch(stream: EventStream) -> None:
    once, again = datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN), datetime(2026, 10, 25, 2, 10, fold=1, tzinfo=BERLIN)
    publish(stream, click("u", once), click("u", again))
    start = datetime(2026, 10, 25, 1, tzinfo=timezone.utc)
    assert replay(stream, count, window(stream, start, start + timedelta(hours=1))).events == 1


def test_what_says_no_time_happened_when_it_came_whatever_its_neighbours_say(stream: EventStream, clock: Clock) -> None:
    clock.now_s = (DAY + timedelta(hours=5, minutes=10)).timestamp()
    publish(stream, click("early", hours(1, 2)[0]), click("none"), click("future", hours(40, 41)[0]))
    assert [users(stream, window(stream, *hours(hour, hour + 1))) for hour in (1, 5, 40)] == [
        ["early"],
        ["none"],
        ["future"],
    ]
    clock.advance(3600)
    publish(stream, click("alone"))
    assert users(stream, window(stream, *hours(6, 7))) == ["alone"]
    assert users(stream, window(stream, *hours(5, 7))) == ["alone", "none"]


def test_windows_cover_everything_once(stream: EventStream, clock: Clock, seed: random.Random) -> None:
    topics = [Topic("clicks", partitions=3, key="user"), Topic("others", key="user")]
    for topic in topics:
        stream.create_topic(topic)
    for _ in range(40):
        clock.advance(seed.uniform(0, 7200))
        some = [
            click(f"u{seed.randrange(9)}", seed.choice([None, DAY + timedelta(seconds=seed.uniform(0, 86_400))]))
            for _ in range(seed.randrange(1, 9))
        ]
        stream.publish(seed.choice(topics), some)
    records = [one for topic in topics for at in range(topic.partitions) for one in stream.records(topic, at)]
    by: TimeOf
    for by in ("event_time", "append_time"):
        for hour in range(-1, 100):
            start, end = hours(hour, hour + 1)
            plan = window(stream, start, end, by=by, topics=["clicks", "others"])
            read = [
                record
                for part in plan.ranges
                for record in stream.records(part.topic, part.partition, part.start, part.end)
            ]
            picked = plan.pick(read, {"clicks": "user", "others": "user"})
            moments = [(one.event_time if by == "event_time" else one.append_time, one.position) for one in records]
            wanted = sorted(position for moment, position in moments if start <= moment < end)
            assert sorted(one.position for one in picked) == wanted


def test_record_batches_that_happened_at_another_time_are_not_read(stream: EventStream) -> None:
    for hour in range(24):
        publish(stream, click("u", DAY - timedelta(days=9) + timedelta(hours=hour)))
    plan = window(stream, *(moment - timedelta(days=9) for moment in hours(3, 5)))
    assert [part.end - part.start for part in plan.ranges] == [2]


def expired(stream: EventStream, clock: Clock) -> None:
    """Of 24 hours, one event each, the last ten are left."""
    stream.create_topic(ONE)
    for _ in range(24):
        stream.publish(ONE, [click("u")])
        clock.advance(3600)
    stream.apply_retention()
    assert stream.log.spans(["clicks"])[AT].begin == 14


@pytest.mark.parametrize("by", ["event_time", "append_time"])
def test_a_window_begun_to_be_trimmed_is_refused_before_anything_is_read(
    stream: EventStream, clock: Clock, by: TimeOf
) -> None:
    expired(stream, clock)
    for first in (0, 5, 13, 14):  # at 14 o'clock there may have been a second one
        with pytest.raises(ReplayExpiredError, match="retention has removed what was before 2026-11-20T14:00:00") as it:
            window(stream, *hours(first, 24), by=by)
        assert it.value.facts == {"topic": "clicks", "partition": 0, "begin": 14}
    whole = window(stream, *hours(14.5, 24), by=by)
    assert sum(part.end - part.start for part in whole.ranges) == 9
    with pytest.raises(ReplayExpiredError, match="retention has removed what was before 14"):
        plan_ranges(stream.log, [Range("clicks", 0, 13, 20)])


def test_an_idle_partition_that_lost_everything_long_ago_keeps_no_later_window(
    stream: EventStream, clock: Clock
) -> None:
    expired(stream, clock)
    clock.advance(20 * 3600)
    stream.apply_retention()
    assert stream.log.spans(["clicks"])[AT].begin == 24
    with pytest.raises(ReplayExpiredError, match="retention has removed all of it"):
        window(stream, *hours(20, 24))
    assert window(stream, *hours(24, 48)).ranges == ()


def test_as_of_reproduces_whatever_came_later(stream: EventStream) -> None:
    publish(stream, click("a", DAY), click("b", DAY))
    plan = window(stream, *hours(0, 1))
    publish(stream, click("a", DAY), click("c", DAY))
    as_of = parse_as_of({f"{topic}:{partition}": end for topic, partition, end in plan.as_of})
    assert window(stream, *hours(0, 1), as_of=as_of) == plan
    assert users(stream, plan) == ["a", "b"]
    assert users(stream, window(stream, *hours(0, 1))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "as_of", [{"clicks:0": 0}, {"clicks:0": 0, "clicks:1": 0, "clicks:2": 999}, {"others:0": 0}, {"clicks:7": 0}]
)
def test_as_of_that_cannot_be_followed(stream: EventStream, as_of: dict[str, int]) -> None:
    publish(stream, click("a", DAY))
    with pytest.raises(InvalidSettingError, match="as_of must name each partition"):
        window(stream, *hours(0, 1), as_of=parse_as_of(as_of))


@pytest.mark.parametrize("text", [{"clicks": 1}, {":0": 1}, {"clicks:x": 1}, {"clicks:0": -1}])
def test_as_of_that_is_none(text: dict[str, int]) -> None:
    with pytest.raises(InvalidSettingError, match="as_of"):
        parse_as_of(text)


def test_windows_that_are_none(stream: EventStream) -> None:
    stream.create_topic(CLICKS)
    with pytest.raises(InvalidSettingError, match="needs a time zone"):
        plan_window(stream.log, ["clicks"], DAY.replace(tzinfo=None), DAY, by="event_time")
    for end in (DAY, DAY - MICRO):
        with pytest.raises(InvalidSettingError, match="must end after it begins"):
            window(stream, DAY, end)


def test_ranges(stream: EventStream) -> None:
    publish(stream, *(click(f"u{number}", number=number) for number in range(30)))
    parts = everything(stream)
    plan = plan_ranges(stream.log, parts)
    assert plan.is_whole
    assert users(stream, plan) == sorted(f"u{number}" for number in range(30))
    (first, *_) = parts
    half = plan_ranges(stream.log, [Range("clicks", first.partition, 1, 3), Range("clicks", first.partition, 0, 1)])
    assert replay(stream, count, half).events == 3


@pytest.mark.parametrize(
    ("ranges", "told"),
    [
        ([Range("clicks", 0, 0, 99)], "it holds 0 to"),
        ([Range("clicks", 0, 2, 1)], "it holds 0 to"),
        ([Range("clicks", 7, 0, 1)], "it holds nothing"),
        ([Range("clicks", 0, 0, 2), Range("clicks", 0, 1, 3)], "offsets 1 to 2 .* are named twice"),
    ],
)
def test_ranges_that_are_none(stream: EventStream, ranges: list[Range], told: str) -> None:
    publish(stream, *(click(f"u{number}") for number in range(30)))
    with pytest.raises(InvalidSettingError, match=told):
        plan_ranges(stream.log, ranges)


def test_keys_and_ids(stream: EventStream) -> None:
    clicks = [click(f"u{number % 5}", DAY + timedelta(minutes=number)) for number in range(60)]
    publish(stream, *clicks)
    parts = everything(stream)
    by_key = plan_ranges(stream.log, parts, keys=["u1", "u3", "nobody"])
    assert replay(stream, count, by_key).value == {"u1": 12, "u3": 12}
    by_id = plan_ranges(stream.log, parts, ids=[clicks[7].id, clicks[8].id])
    assert replay(stream, count, by_id).value == {"u2": 1, "u3": 1}
    first_half = window(stream, *hours(0, 0.5)).of(["u1"], None)
    assert replay(stream, count, first_half).value == {"u1": 6}
    assert replay(stream, count, first_half.of(None, [clicks[6].id])).value == {"u1": 1}
    assert replay(stream, count, plan_ranges(stream.log, parts, keys=[])).events == 0


def test_keys_of_a_topic_that_has_none(stream: EventStream) -> None:
    plain = Topic("clicks", partitions=3)
    stream.create_topic(plain)
    stream.publish(plain, [plain.event(user="a").replace(ext={"partitionkey": "k"}), plain.event(user="b")])
    plan = plan_ranges(stream.log, everything(stream), keys=["k"])
    read = [one for part in plan.ranges for one in stream.records("clicks", part.partition, part.start, part.end)]
    assert [one.data["user"] for one in plan.pick(read, {"clicks": None})] == ["a"]
    assert plan.pick(read, {"clicks": "nowhere"})[0].data["user"] == "a"


@pytest.mark.servers
def test_on_postgresql(postgres_url: str) -> None:
    with open_stream(postgres_url) as stream:
        publish(stream, click("a", DAY), click("none"), click("b", DAY + timedelta(hours=1)))
        assert users(stream, window(stream, *hours(0, 1))) == ["a"]
        assert users(stream, window(stream, *hours(1, 2))) == ["b"]
        now = datetime.now(timezone.utc)
        late = window(stream, now - timedelta(hours=1), now + timedelta(hours=1), by="append_time")
        assert users(stream, late) == ["a", "b", "none"]
