"""A join does what the model says, whatever bounds its batches, whoever works on it, and whichever input lags."""

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from djp_dagster import Event, EventStream, Join, Joined, Threshold, Topic, Worker, open_stream, run_pending
from djp_dagster.orchestration.ticks import look
from djp_dagster.streams.records import from_micros
from djp_dagster.testing import Clock
from tests.joining.kit import (
    LATE,
    PARTS,
    TASKS,
    appended,
    emitted,
    joined,
    letters,
    part,
    statuses,
    tell,
    work,
    work_resident,
)
from tests.joining.model import Outcome, Rules, simulate
from tests.processing.kit import PATIENT_S, all_records, in_thread, wait_until
from tests.streams.conftest import contract_database, emptied  # noqa: F401

SECOND = 1_000_000
BOUNDS = (1, 7, 1000)
DYNAMIC = "of"
"""The field in which every event says how many the part takes."""


class Step(NamedTuple):
    """What happens at one moment: time passes, events are published, somebody works."""

    advance: int
    events: list[tuple[Topic, list[Event]]]
    work: str
    lag: list[float]


class Scenario(NamedTuple):
    rules: Rules
    dynamic: bool
    steps: list[Step]


def rules_from(chance: random.Random) -> Rules:
    deadline = chance.choice([None, 1, 5 * SECOND, 60 * SECOND, 60 * SECOND])
    many = chance.random() < 0.3
    return Rules(
        parts=("a", "b", "c"),
        deadline=deadline,
        by_event_time=chance.random() < 0.5,
        idle=chance.choice([1, SECOND, 30 * SECOND]),
        partial=chance.random() < 0.3,
        optional=frozenset(chance.sample(["b", "c"], chance.randint(0, 2))) if deadline else frozenset(),
        counts={"b": chance.randint(2, 3)} if many else {},
        duplicates=chance.choice(["first", "last", "all"]),
        late=chance.choice([None, "drop", "dead_letter", "topic"]),
        remember=chance.choice([float("inf"), float("inf"), 1, 20 * SECOND]),
        fails=(lambda key: str(key).endswith("3")) if chance.random() < 0.3 else (lambda key: False),
    )


def scenario_from(chance: random.Random) -> Scenario:
    rules = rules_from(chance)
    keys: list[str | int] = [f"k{n}" for n in range(chance.randint(3, 25))] + list(range(chance.randint(0, 4)))
    clock = Clock()
    steps = []
    for _ in range(chance.randint(3, 20)):
        advance = max(1, round(chance.choice([1, 10, SECOND, 5 * SECOND, 100 * SECOND]) * chance.choice([0.5, 1, 1])))
        clock.advance(advance / SECOND)
        events = [
            (topic, [event_of(topic, chance.choice(keys), clock, chance, rules) for _ in range(chance.randint(1, 12))])
            for topic in chance.sample(PARTS, chance.randint(0, 3))
        ]
        how = chance.choices(["nothing", "runs", "one run", "a lagging input", "a worker"], [8, 3, 3, 3, 1])[0]
        steps.append(Step(advance, events, how, [chance.random() for _ in range(len(PARTS) * TASKS)]))
    # In the end all of it is done, sometimes with nothing left that waits.
    steps.append(Step(chance.choice([1, 1000 * SECOND]), [], chance.choice(["runs", "runs", "a worker"]), []))
    return Scenario(rules, bool(rules.counts) and chance.random() < 0.5, steps)


def event_of(topic: Topic, key: str | int, clock: Clock, chance: random.Random, rules: Rules) -> Event:
    """Some are published twice; some happened long ago, or will."""
    time = from_micros(round(clock() * SECOND)) + timedelta(seconds=chance.choice([0, 0, -1, -4, -30, -200, 3]))
    stated = time if chance.random() < 0.8 else None
    # The same event always is of the same time and key.
    identity = chance.randint(0, 10**6) if chance.random() < 0.8 else f"twice-{topic.name}-{key}"
    if isinstance(identity, str):
        stated = from_micros(round(Clock()() * SECOND))
    return part(topic, key, f"{identity}", time=stated, of=rules.counts.get(topic.name, 1))


def join_of(scenario: Scenario, bound: int) -> Join:
    rules = scenario.rules

    def handle(parts: Joined) -> None:
        tell(parts)
        if rules.fails(parts.key):
            raise ValueError("a key that fails")

    settings: dict[str, Any] = {
        "deadline": None if rules.deadline is None else rules.deadline / SECOND,
        "clock": "event_time" if rules.by_event_time else "append_time",
        "idle_after": rules.idle / SECOND,
        "on_deadline": "partial" if rules.partial else "dead_letter",
        "optional": sorted(rules.optional),
        "count": {name: DYNAMIC if scenario.dynamic else number for name, number in rules.counts.items()},
        "duplicates": rules.duplicates,
        "late": LATE if rules.late == "topic" else rules.late,
        "remember": None if rules.remember == float("inf") else rules.remember / SECOND,
        "max_batch": Threshold(events=bound),
        "max_poison": 1000,
    }
    return joined(handler=handle, **settings)


class Played(NamedTuple):
    expected: Outcome
    emitted: dict[int, list[Any]]
    late: dict[int, list[str]]
    letters: Any
    status: dict[str | int, str]


def play(scenario: Scenario, bound: int, folder: Path, target: str = "sqlite://") -> Played:
    clock = Clock()
    join = join_of(scenario, bound)
    with open_stream(target, clock=clock) as stream:
        join.register(stream)
        stream.create_topic(LATE)
        for step in scenario.steps:
            clock.advance(step.advance / SECOND)
            for topic, events in step.events:
                stream.publish(topic, events)
            HOW[step.work](stream, join, folder, step)
        now = round(clock() * SECOND)
        late: dict[int, list[str]] = {partition: [] for partition in range(TASKS)}
        for record in all_records(stream, LATE):
            late[record.partition].append(record.id)
        expected = simulate(scenario.rules, appended(stream), TASKS, now)
        return Played(expected, emitted(stream), late, letters(stream), statuses(stream, folder))


def lagging(stream: EventStream, join: Join, folder: Path, step: Step) -> None:
    """Some inputs are read further than others, as far as that is possible."""
    positions = sorted(stream.positions(join.group).items())
    spans = stream.log.spans([topic.name for topic in join.topics])
    until = [
        [*at, start + round((spans[at].end - start) * share)]
        for (at, start), share in zip(positions, step.lag, strict=True)
    ]
    stream.coordinator.request(join.group, "cut", {"until": until})
    run_pending(stream, join, state_folder=folder, only_requests=True)


HOW: dict[str, Callable[[EventStream, Join, Path, Step], Any]] = {
    "nothing": lambda stream, join, folder, step: None,
    "one run": lambda stream, join, folder, step: run_pending(stream, join, state_folder=folder),
    "runs": lambda stream, join, folder, step: work(stream, join, folder),
    "a worker": lambda stream, join, folder, step: work_resident(stream, join, folder),
    "a lagging input": lagging,
}


def check(
    chance: random.Random,
    folder: Path,
    scenarios: int,
    bounds: Sequence[int] = BOUNDS,
    target: Callable[[], str] = lambda: "sqlite://",
) -> None:
    for number in range(scenarios):
        scenario = scenario_from(chance)
        for bound in bounds:
            found = play(scenario, bound, folder / f"{number}-{bound}", target())
            told = f"bound {bound}, scenario {number}: {scenario.rules}"
            assert found.emitted == found.expected.emitted, told
            assert found.letters == found.expected.letters, told
            assert found.late == found.expected.late, told
            # A mark may be kept for longer than it counts: until the next batch.
            assert {key: found.status.get(key) for key in found.expected.status} == found.expected.status, told
            waiting = {key for key, status in found.status.items() if status == "pending"}
            assert waiting == {key for key, status in found.expected.status.items() if status == "pending"}, told


@pytest.mark.parametrize("group", range(6))
def test_it_does_what_the_model_says_whatever_the_bounds(seed: random.Random, tmp_path: Path, group: int) -> None:
    check(seed, tmp_path, 2)


def test_it_does_so_on_postgresql(seed: random.Random, tmp_path: Path, contract_database: str) -> None:  # noqa: F811
    check(seed, tmp_path, 2, (7,), lambda: emptied(contract_database))


@pytest.mark.parametrize("backend", ["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def test_it_does_so_while_others_publish(
    request: pytest.FixtureRequest, seed: random.Random, tmp_path: Path, backend: str
) -> None:
    """By the clock on the wall: what is appended just before a deadline, and read just after it, counts."""
    url = backend == "postgresql" and emptied(request.getfixturevalue("contract_database"))
    rules = Rules(parts=("a", "b", "c"), deadline=100_000, late="dead_letter")
    join = join_of(Scenario(rules, False, []), 20)
    parts = {topic: [part(topic, f"k{n}", pad="x" * 100) for n in range(150)] for topic in PARTS}
    for events in parts.values():
        # All in about the same order: some keys are complete in time, some are not.
        events.sort(key=lambda event: int(event.data["k"][1:]) + seed.uniform(-10, 10))
    with open_stream(url or tmp_path / "stream.db") as stream:
        for topic in (LATE, *join.topics):
            stream.create_topic(topic)
        join.register(stream)
        stop = threading.Event()
        worker = Worker(stream, [join], state_folder=tmp_path / "state")
        with ExitStack() as stack:
            stack.enter_context(in_thread(lambda: worker.run(stop), stop))
            publish = partial(publish_all, stream, threading.Barrier(len(PARTS)))
            producers = [stack.enter_context(in_thread(partial(publish, *one))) for one in parts.items()]
            wait_until(lambda: all(producers), "everything to be published")
            wait_until(lambda: is_done(stream, join), "the worker to be done, deadlines and all")
        assert producers == [[None]] * 3
        expected = simulate(rules, appended(stream), TASKS, 1 << 62)
        assert emitted(stream) == expected.emitted
        assert letters(stream) == expected.letters
        assert statuses(stream, tmp_path / "state") == expected.status
        assert len(expected.status) == 150


def publish_all(stream: EventStream, in_step: threading.Barrier, topic: Topic, events: Sequence[Event]) -> None:
    for event in events:
        in_step.wait(PATIENT_S)
        stream.publish(topic, [event])


def is_done(stream: EventStream, join: Join) -> bool:
    """Nothing is pending, and nothing will ever be due."""
    return look(stream, join).reason is None and stream.coordinator.next_deadline(join.group, range(TASKS)) is None


@pytest.mark.soak
@pytest.mark.parametrize("group", range(30))
def test_it_does_what_the_model_says_many_times(seed: random.Random, tmp_path: Path, group: int) -> None:
    check(seed, tmp_path, 10)
