"""When what has piled up is enough."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Threshold, Topic, consumer, open_stream
from djp_dagster.errors import InvalidSettingError
from djp_dagster.streams.model import Backlog
from djp_dagster.testing import Clock
from tests.processing.kit import numbers

LIMITS: dict[str, Any] = {"bytes": 100, "events": 10, "age": 60, "idle": 5}
ORDER = ("bytes", "events", "age", "idle")


def backlog(reached: frozenset[str] = frozenset(), *, events: int = 3, now: int = 10**9) -> Backlog:
    """A backlog that has just reached the named limits, and just not the others."""
    idle_s = 5 if "idle" in reached else 4
    age_s = 60 if "age" in reached else 59
    return Backlog(
        events=10 if "events" in reached else events,
        bytes=100 if "bytes" in reached else 99,
        estimated=False,
        oldest_micros=now - age_s * 10**6,
        newest_micros=now - idle_s * 10**6,
        now_micros=now,
    )


SUBSETS = [frozenset(names) for size in range(5) for names in combinations(ORDER, size)]


@pytest.mark.parametrize("reached", SUBSETS, ids=lambda names: "+".join(sorted(names)) or "none")
@pytest.mark.parametrize("asked", SUBSETS[1:], ids=lambda names: "+".join(sorted(names)))
def test_the_first_limit_reached_wins(asked: frozenset[str], reached: frozenset[str]) -> None:
    threshold = Threshold(**{name: LIMITS[name] for name in asked})
    expected = next((name for name in ORDER if name in asked & reached), None)
    assert threshold.reached(backlog(reached)) == expected


@pytest.mark.parametrize("name", ORDER)
def test_nothing_pending_reaches_nothing(name: str) -> None:
    nothing = Backlog(0, 0, False, None, None, 10**15)
    assert Threshold(**{name: LIMITS[name]}).reached(nothing) is None
    assert nothing.age_s == nothing.idle_s == 0.0


def test_unknown_bytes_reach_no_size() -> None:
    unknown = Backlog(3, None, False, 0, 0, 0)
    assert Threshold(bytes=1).reached(unknown) is None
    assert Threshold(bytes=1, events=3).reached(unknown) == "events"


def test_sizes_and_durations_as_people_write_them() -> None:
    threshold = Threshold(bytes="100MB", events=7, age="12h", idle="90s")
    assert (threshold.max_bytes, threshold.max_events, threshold.age_s, threshold.idle_s) == (10**8, 7, 43200.0, 90.0)
    assert Threshold(events=1).max_bytes is None


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (Threshold, "threshold"),
        (lambda: Threshold(events=0), "events"),
        (lambda: Threshold(events=-1), "events"),
        (lambda: Threshold(events=1.5), "events"),  # type: ignore[arg-type]
        (lambda: Threshold(events=True), "events"),
        (lambda: Threshold(events="10"), "events"),  # type: ignore[arg-type]
        (lambda: Threshold(bytes=0), "bytes"),
        (lambda: Threshold(bytes="1 apple"), "bytes"),
        (lambda: Threshold(age=0), "age"),
        (lambda: Threshold(age="-1h"), "age"),
        (lambda: Threshold(idle="soon"), "idle"),
        (lambda: Threshold(idle=0.0), "idle"),
    ],
)
def test_a_wrong_limit_is_named(make: Callable[[], Threshold], setting: str) -> None:
    with pytest.raises(InvalidSettingError, match=setting if setting != "threshold" else "at least one") as caught:
        make()
    assert caught.value.facts["setting"] == setting


def test_age_counts_from_when_it_was_appended_whoever_looks(tmp_path: Path) -> None:
    clock = Clock()
    topic = Topic("t")

    @consumer(topic=topic)
    def late(batch: Any) -> None: ...

    with open_stream(tmp_path / "s.db", clock=clock) as stream:
        late.register(stream)
        stream.publish(topic, numbers(2, topic))
    clock.advance(3599)
    with open_stream(tmp_path / "s.db", clock=clock) as stream:
        assert Threshold(age="1h").reached(stream.pending("late")) is None
        stream.publish(topic, numbers(1, topic))
    clock.advance(1)
    with open_stream(tmp_path / "s.db", clock=clock) as stream:
        pending = stream.pending("late")
        assert (pending.age_s, pending.idle_s) == (3600.0, 1.0)
        assert Threshold(age="1h").reached(pending) == "age"
        assert Threshold(idle="2s").reached(pending) is None


def test_a_clock_that_goes_back_makes_nothing_younger_than_its_newest(tmp_path: Path) -> None:
    clock = Clock()
    topic = Topic("t")

    @consumer(topic=topic)
    def late(batch: Any) -> None: ...

    with open_stream(tmp_path / "s.db", clock=clock) as stream:
        late.register(stream)
        stream.publish(topic, numbers(1, topic))
        clock.advance(100)
        stream.publish(topic, numbers(1, topic))
        clock.advance(-3600)
        pending = stream.pending("late")
    assert (pending.age_s, pending.idle_s) == (100.0, 0.0)
