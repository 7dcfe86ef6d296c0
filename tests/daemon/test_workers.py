"""Worker mode under the real daemon: workers are killed, come back, take over, share, and are terminated.

The tests share one daemon; each begins with workers at work, whoever they are by then.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster.testing import memory_stream
from tests.daemon.harness import Daemon
from tests.daemon.workers_defs import ALONE, BESIDE, SHARED

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("workers"), Path(__file__).with_name("workers_defs.py"))
    try:
        for topic in (ALONE, BESIDE, SHARED):
            daemon.stream.create_topic(topic)
        yield daemon.start()
    finally:
        daemon.close()


def _at_work(daemon: Daemon, group: str, job: str) -> str:
    """The newest worker run, once it holds tasks of the group."""
    found: list[str] = []

    def holds() -> bool:
        found[:] = daemon.run_ids(job)[-1:]
        return any(run_id in owner for run_id in found for owner in daemon.holders(group).values())

    daemon.wait(holds, f"a run of {job} to be at work")
    return found[0]


def test_a_killed_worker_comes_back(daemon: Daemon) -> None:
    run_id = _at_work(daemon, "alone", "solo_job")
    daemon.publish(ALONE, 10)
    daemon.publish(BESIDE, 10)
    daemon.wait_done("alone", "beside")
    pid = daemon.pid_of(run_id)
    assert pid is not None
    assert {output["pid"] for group in ("alone", "beside") for output in daemon.outputs(group)} == {pid}
    daemon.wait(lambda: daemon.materializations("alone"), "the worker to report")
    assert daemon.materializations("alone")[-1]["run_id"] == run_id

    daemon.hold("alone")
    daemon.publish(ALONE, 10)
    daemon.wait(lambda: daemon.held("alone") == pid, "the worker to be in the middle of a batch")
    before = len(daemon.outputs("alone"))
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    daemon.let_go("alone")
    daemon.publish(ALONE, 10)
    daemon.publish(BESIDE, 10)
    daemon.wait_done("alone", "beside")
    print(f"relaunched without a standby {time.monotonic() - killed:.1f} s after SIGKILL")

    daemon.wait(lambda: daemon.status(run_id) == "FAILURE", "Dagster to know")
    follower = _at_work(daemon, "alone", "solo_job")
    assert follower != run_id
    assert {output["pid"] for output in daemon.outputs("alone")[before:]} == {daemon.pid_of(follower)}
    assert len(daemon.run_ids("solo_job")) == 2
    daemon.check_once("alone", ALONE)
    daemon.check_once("beside", BESIDE)


def _shares(daemon: Daemon) -> dict[str, int]:
    """How many tasks each run holds of the shared group."""
    return dict(Counter(owner[4:40] for owner in daemon.holders("shared").values()))


def test_two_workers_share_and_one_takes_over(daemon: Daemon) -> None:
    daemon.wait(lambda: sorted(_shares(daemon).values()) == [2, 2], "two workers with two tasks each")
    runs = set(daemon.run_ids("pair_job"))
    assert set(_shares(daemon)) == runs
    pids = {run_id: daemon.pid_of(run_id) for run_id in runs}
    daemon.publish(SHARED, 60)
    daemon.wait_done("shared")
    assert {output["pid"] for output in daemon.outputs("shared")} == set(pids.values())
    before = len(daemon.outputs("shared"))

    daemon.wait_tick("pair_sensor")  # the next one is 5 s away
    victim, survivor = sorted(runs)
    pid = pids[victim]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    daemon.publish(SHARED, 60)
    daemon.wait_done("shared")
    print(f"the other worker had taken over {time.monotonic() - killed:.1f} s after SIGKILL")
    assert {output["pid"] for output in daemon.outputs("shared")[before:]} == {pids[survivor]}
    daemon.wait(lambda: daemon.status(victim) == "FAILURE", "Dagster to know")
    daemon.wait(
        lambda: sorted(_shares(daemon).values()) == [2, 2] and victim not in _shares(daemon),
        "two workers to share again",
    )
    assert survivor in _shares(daemon)
    daemon.publish(SHARED, 60)
    daemon.wait_done("shared")
    daemon.check_once("shared", SHARED)


def test_a_terminated_worker_commits_the_batch_under_way(daemon: Daemon) -> None:
    run_id = _at_work(daemon, "beside", "solo_job")
    pid = daemon.pid_of(run_id)
    daemon.hold("beside")
    daemon.publish(BESIDE, 10)
    daemon.wait(lambda: daemon.held("beside") == pid, "the worker to be in the middle of a batch")
    before = len(daemon.outputs("beside"))
    assert daemon.instance.run_coordinator.cancel_run(run_id)
    daemon.wait(lambda: daemon.status(run_id) == "CANCELING", "Dagster to ask it to end")
    daemon.let_go("beside")

    daemon.wait(lambda: daemon.status(run_id) == "CANCELED", "the run to end")
    assert daemon.outputs("beside")[before]["pid"] == pid
    follower = _at_work(daemon, "beside", "solo_job")
    assert follower != run_id
    daemon.publish(BESIDE, 10)
    daemon.wait_done("beside")
    assert daemon.outputs("beside")[-1]["pid"] == daemon.pid_of(follower)
    daemon.check_once("beside", BESIDE)


def test_a_worker_whose_code_server_is_gone_can_still_be_terminated(daemon: Daemon) -> None:
    """The last test of this daemon: it has no code server until it makes a new one, which may take a minute."""
    run_id = _at_work(daemon, "alone", "solo_job")
    pid = daemon.pid_of(run_id)
    for process in daemon.processes("server"):
        os.kill(process.pid, signal.SIGKILL)
    daemon.hold("alone")
    daemon.publish(ALONE, 10)
    daemon.wait(lambda: daemon.held("alone") == pid, "the orphan to go on")
    before = len(daemon.outputs("alone"))
    with pytest.raises(Exception, match="code server"):
        daemon.instance.run_coordinator.cancel_run(run_id)
    assert daemon.status(run_id) == "CANCELING"
    daemon.let_go("alone")
    daemon.wait(lambda: daemon.status(run_id) == "CANCELED", "the orphan to end")
    assert daemon.outputs("alone")[before]["pid"] == pid
    daemon.wait(lambda: pid not in [process.pid for process in daemon.processes()], "its process to end")


def test_a_worker_told_to_stop_begins_no_other_batch() -> None:
    """Without Dagster: the batch under way is finished, and no other is begun, however many tasks have something."""
    stop, handled = threading.Event(), []

    @djp.consumer(topic=SHARED, group="stopping", isolate="batch")
    def handle(batch: djp.Batch) -> None:
        handled.append(batch.id)
        stop.set()

    with memory_stream() as stream:
        handle.register(stream)
        stream.publish(SHARED, [SHARED.event(user=f"user-{n}", n=n) for n in range(40)])
        djp.Worker(stream, [handle]).run(stop)
    assert len(handled) == 1
