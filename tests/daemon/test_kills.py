"""Accidents of the daemon, code servers and Dagster's storage: the stream knows what was done, whoever forgets it.

The tests share a home, a group each; whoever kills the daemon starts it again. Kills of runs between the steps of the
commit protocol are in `test_thin_path`, those of workers in `test_workers`.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import Daemon
from tests.daemon.kills_defs import CREATED, KEPT, LAUNCHED, LOST, REFUSED, STARTING, TOPICS, WIPED
from tests.daemon.unreliable import SETTINGS

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("kills"), Path(__file__).with_name("kills_defs.py"), SETTINGS)
    try:
        for topic in TOPICS:
            daemon.stream.create_topic(topic)
        yield daemon.start()
    finally:
        daemon.close()


def _order(daemon: Daemon, order: str) -> None:
    (daemon.folder / order).touch()


def _is_done(daemon: Daemon, order: str) -> bool:
    return (daemon.folder / f"{order}.done").exists()


@pytest.mark.parametrize("forgets", [False, True], ids=["", "and forgets its ticks"])
def test_the_daemon_dies_between_creating_and_submitting_a_run(daemon: Daemon, forgets: bool) -> None:
    known = daemon.run_ids("created_job")
    order = "kill.created.created"
    (daemon.folder / f"{order}.done").unlink(missing_ok=True)
    _order(daemon, order)
    daemon.publish(CREATED, 20)
    daemon.wait(lambda: _is_done(daemon, order) and daemon.is_dead(), "the daemon to die")
    (run_id,) = daemon.run_ids("created_job")[len(known) :]
    assert daemon.status(run_id) == "NOT_STARTED"
    if forgets:
        daemon.instance.wipe_all_schedules()
    daemon.start()
    daemon.wait_done("created")
    daemon.wait(lambda: daemon.status(run_id) == "SUCCESS", "the run that was created before to end")
    assert daemon.run_ids("created_job") == [*known, run_id]
    daemon.check_once("created", CREATED)


def test_the_daemon_and_its_code_server_die_and_one_of_three_runs(daemon: Daemon) -> None:
    for group in ("launched", "kept", "lost"):
        daemon.hold(group)
    daemon.publish(KEPT, 20)
    daemon.publish(LOST, 20)
    daemon.wait(lambda: daemon.held("kept") and daemon.held("lost"), "two runs to be at work")
    _order(daemon, "kill.launched.launched")
    daemon.publish(LAUNCHED, 20)
    daemon.wait(lambda: _is_done(daemon, "kill.launched.launched") and daemon.is_dead(), "the daemon to die")
    daemon.wait(lambda: daemon.held("launched"), "the launched run to work without a daemon")
    (dead,) = daemon.run_ids("lost_job")
    assert daemon.pid_of(dead) == daemon.held("lost")
    for pid in [*(process.pid for process in daemon.processes("server")), daemon.held("lost")]:
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    daemon.let_go("lost")
    assert daemon.status(dead) == "STARTED"  # nobody is left to say otherwise
    daemon.publish(KEPT, 5)

    _refuse_once(daemon)
    daemon.start()
    for group in ("launched", "kept"):
        daemon.wait_tick(f"{group}_sensor", "is at work", after=daemon.started_at)
        assert len(daemon.run_ids(f"{group}_job")) == 1
    daemon.let_go("launched", "kept")
    daemon.wait_done("launched", "kept")
    for group, runs, topic in (("launched", 1, LAUNCHED), ("kept", 2, KEPT)):
        daemon.check_once(group, topic)
        assert len(daemon.run_ids(f"{group}_job")) == runs
        for run_id in daemon.run_ids(f"{group}_job"):
            daemon.wait(lambda run_id=run_id: daemon.status(run_id) == "SUCCESS", "the runs to end")  # type: ignore[misc]
    _check_taken_over(daemon, dead)


def _check_taken_over(daemon: Daemon, dead: str) -> None:
    """The run whose death nobody saw was reported by the sensor, and another did its work."""
    daemon.wait_done("lost")
    assert daemon.status(dead) == "FAILURE"
    told = [entry.message for entry in daemon.instance.all_logs(dead)]
    assert any("process of this run is gone" in message for message in told), told
    runs = daemon.run_ids("lost_job")
    assert runs[-2] == dead
    daemon.wait(lambda: daemon.status(runs[-1]) == "SUCCESS", "the second run to end")
    assert daemon.outputs("lost")[-1]["pid"] == daemon.pid_of(runs[-1])
    daemon.check_once("lost", LOST)


def _refuse_once(daemon: Daemon) -> None:
    """Begin what `test_a_submission_fails` looks at; it includes a pause, which others can use."""
    if not daemon.books.topic(REFUSED.name):
        _order(daemon, "refuse.refused")
        daemon.publish(REFUSED, 20)


def test_a_submission_fails(daemon: Daemon) -> None:
    _refuse_once(daemon)
    daemon.wait(lambda: _is_done(daemon, "refuse.refused"), "a submission to fail")
    daemon.wait_done("refused")
    first, second = daemon.run_ids("refused_job")
    assert daemon.status(first) == "FAILURE"
    assert daemon.pid_of(first) is None
    daemon.wait(lambda: daemon.status(second) == "SUCCESS", "the second run to end")
    daemon.check_once("refused", REFUSED)


def test_all_runs_and_ticks_are_wiped_while_events_are_pending(daemon: Daemon) -> None:
    daemon.hold("wiped")
    daemon.publish(WIPED, 10)
    daemon.wait(lambda: daemon.held("wiped"), "a run to be at work")
    daemon.publish(WIPED, 10)
    daemon.instance.wipe()
    daemon.instance.wipe_all_schedules()
    assert daemon.instance.get_runs() == []
    # There is no run, but somebody who holds the lease.
    daemon.wait_tick("wiped_sensor", "is at work")
    daemon.let_go("wiped")
    daemon.wait_done("wiped")
    daemon.check_once("wiped", WIPED)
    (run_id,) = daemon.run_ids("wiped_job")
    daemon.wait(lambda: daemon.status(run_id) == "SUCCESS", "the only run Dagster knows to end")


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_daemon_dies_when_a_run_is_starting(daemon: Daemon) -> None:
    """Nobody ever starts that run, and nobody says so: the sensor waits for it as long as it is young."""
    _order(daemon, "kill.starting.starting")
    daemon.publish(STARTING, 20)
    daemon.wait(lambda: _is_done(daemon, "kill.starting.starting") and daemon.is_dead(), "the daemon to die")
    (run_id,) = daemon.run_ids("starting_job")
    daemon.start()
    daemon.wait_tick("starting_sensor", "is starting", after=daemon.started_at)
    daemon.wait_done("starting", patience_s=900)
    assert daemon.status(run_id) == "STARTING"
    assert len(daemon.run_ids("starting_job")) == 2
    daemon.check_once("starting", STARTING)


@pytest.mark.soak
def test_the_machine_is_lost(daemon: Daemon) -> None:
    run_id = _held_run(daemon)
    daemon.lose_machine()
    assert daemon.status(run_id) == "STARTED"
    daemon.let_go("lost")
    daemon.start()
    _check_taken_over(daemon, run_id)


@pytest.mark.soak
def test_a_run_and_its_code_server_are_killed(daemon: Daemon) -> None:
    run_id = _held_run(daemon)
    for process in [*daemon.processes("server"), *daemon.processes("run")]:
        os.kill(process.pid, signal.SIGKILL)
    daemon.let_go("lost")
    assert daemon.status(run_id) == "STARTED"
    _check_taken_over(daemon, run_id)  # once the daemon has made a new code server, within a minute


def _held_run(daemon: Daemon) -> str:
    """A run that is in the middle of a batch."""
    daemon.hold("lost")
    daemon.publish(LOST, 20)
    daemon.wait(lambda: daemon.held("lost"), "a run to be at work")
    run_id = daemon.run_ids("lost_job")[-1]
    assert daemon.pid_of(run_id) == daemon.held("lost")
    return run_id
