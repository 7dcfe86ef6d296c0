"""Dagster's daemon killed at its own crash points between tick and run: one run per key, and every event once."""

import signal
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from djp_dagster import EventStream, open_stream
from tests.orchestration.daemon_kit import Daemon, Nursery, forget_cursor, home, keys, ticks
from tests.orchestration.kit import copied, publish

POINTS = [
    "TICK_CREATED",
    "TICK_HELD",
    "AUTOMATION_EVALUATIONS_ADDED",
    "RUN_IDS_RESERVED",
    "RUN_CREATED",
    "RUN_LAUNCHED",
    "RUN_IDS_ADDED_TO_EVALUATIONS",
]
LAUNCHED_BEFORE = {"RUN_LAUNCHED", "RUN_IDS_ADDED_TO_EVALUATIONS"}


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[EventStream]:
    """A stream with ten orders."""
    with open_stream(url_in(tmp_path)) as opened:
        publish(opened, 10)
        yield opened


@pytest.fixture
def daemon(tmp_path: Path, stream: EventStream) -> Iterator[Daemon]:
    with home(tmp_path / "home") as instance:
        yield Daemon(tmp_path, instance, url_in(tmp_path))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


def url_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'stream.db'}"


def check_books(daemon: Daemon, stream: EventStream, count: int, runs: int) -> None:
    """Every event once, one run per key, and each run a success."""
    assert {run.status for run in daemon.instance.get_runs()} <= {dg.DagsterRunStatus.SUCCESS}
    assert copied(stream) == list(range(count))
    assert stream.pending("copy").events == 0
    assert stream.coordinator.intents("copy") == []
    assert len(set(keys(daemon.instance))) == len(keys(daemon.instance)) == runs


@pytest.mark.crash
@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_killed_on_its_way(nursery: Nursery, daemon: Daemon, stream: EventStream, point: str) -> None:
    assert nursery.die(daemon.order_to_die(1, point)) == -signal.SIGKILL
    assert copied(stream) == (list(range(10)) if point in LAUNCHED_BEFORE else [])
    daemon.look(2)
    check_books(daemon, stream, 10, 1)
    publish(stream, 5, start=10)
    for number in (3, 4):
        daemon.look(number)
    check_books(daemon, stream, 15, 2)


@pytest.mark.crash
def test_a_daemon_killed_at_one_point_after_the_other(nursery: Nursery, daemon: Daemon, stream: EventStream) -> None:
    for number, point in enumerate(["RUN_IDS_RESERVED", "RUN_CREATED", "RUN_LAUNCHED"], start=1):
        assert nursery.die(daemon.order_to_die(number, point)) == -signal.SIGKILL
        publish(stream, 3, start=7 + 3 * number)
    for number in (4, 5):
        daemon.look(number)
    assert copied(stream) == list(range(19))
    assert len(set(keys(daemon.instance))) == len(keys(daemon.instance))


def test_a_run_that_could_not_be_submitted(
    daemon: Daemon, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("the queue is away")

    with monkeypatch.context() as patched:
        patched.setattr(daemon.instance, "submit_run", refuse)
        for number in (1, 2):
            with pytest.raises(AssertionError, match="the queue is away"):
                daemon.look(number)
            (run,) = daemon.instance.get_runs()
            assert run.status == dg.DagsterRunStatus.NOT_STARTED
            assert copied(stream) == []
    daemon.look(3)
    check_books(daemon, stream, 10, 1)


def test_the_cursor_and_all_that_the_daemon_remembers_is_wiped(daemon: Daemon, stream: EventStream) -> None:
    daemon.look(1)
    forget_cursor(daemon.instance)
    publish(stream, 5, start=10)
    daemon.look(2)
    forget_cursor(daemon.instance)
    daemon.look(3)
    check_books(daemon, stream, 15, 2)
    assert ticks(daemon.instance)[0] == "SKIPPED"


def test_all_runs_are_deleted(daemon: Daemon, stream: EventStream) -> None:
    for number in range(1, 4):
        daemon.look(number)
        assert copied(stream) == list(range(5 + 5 * number))
        for run in daemon.instance.get_runs():
            daemon.instance.delete_run(run.run_id)
        publish(stream, 5, start=5 + 5 * number)
    daemon.look(4)
    check_books(daemon, stream, 25, 1)


def test_everything_dagster_knows_is_wiped(tmp_path: Path, stream: EventStream) -> None:
    for number in range(1, 4):
        with home(tmp_path / f"home-{number}") as instance:
            daemon = Daemon(tmp_path, instance, url_in(tmp_path))
            daemon.look(number)
            assert instance.get_runs_count() == 1
            daemon.look(number + 10)
            assert instance.get_runs_count() == 1, "nothing is pending"
        assert copied(stream) == list(range(5 + 5 * number))
        publish(stream, 5, start=5 + 5 * number)


def test_nothing_pending_is_a_skipped_tick(daemon: Daemon, stream: EventStream) -> None:
    for number in (1, 2, 3):
        daemon.look(number)
    assert ticks(daemon.instance) == ["SKIPPED", "SKIPPED", "SUCCESS"]
    assert daemon.instance.get_runs_count() == 1
