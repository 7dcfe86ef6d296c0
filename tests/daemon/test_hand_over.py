"""Hand-over: the definitions change under a worker, or its time is up.

No event is lost or done twice, nobody is left on old code, and no process is left at all.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import djp_dagster as djp
from tests.daemon.harness import Daemon

pytestmark = [pytest.mark.daemon, pytest.mark.timeout(600)]

SHOP = djp.Topic("shop_in", partitions=2, key="user")
DEFINITIONS = '''
"""Definitions that a test rewrites."""

import dagster as dg

import djp_dagster as djp
from tests.daemon.at_work import RUNNING, done_topic, relay


@djp.consumer(topic=djp.Topic("shop_in", partitions=2, key="user"), emits=[done_topic("shop")])
def shop(batch):
    return relay(batch, code="{code}")


defs = dg.Definitions(
    assets=[djp.build_stream_asset(shop)],
    sensors=[
        djp.build_worker_sensor(
            [shop], name="crew", max_runtime={max_runtime}, minimum_interval_seconds=1, default_status=RUNNING
        )
    ],
    resources={{"event_stream": djp.SqlEventStream()}},
)
'''


def _write(daemon: Daemon, code: str, max_runtime: str | None = None) -> None:
    """Replace the definitions, in one go: they may be read at any time."""
    draft = daemon.definitions.with_suffix(".draft")
    draft.write_text(DEFINITIONS.format(code=code, max_runtime=repr(max_runtime)))
    draft.rename(daemon.definitions)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, tmp_path / "shop_defs.py")
    try:
        daemon.stream.create_topic(SHOP)
        _write(daemon, "v1")
        yield daemon.start()
    finally:
        daemon.close()


@contextmanager
def _traffic(daemon: Daemon) -> Iterator[None]:
    """Publish all the time while the block runs."""
    stop, failures = threading.Event(), []

    def publish() -> None:
        try:
            while not stop.wait(0.05):
                daemon.publish(SHOP, 3)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failures


def _codes(daemon: Daemon) -> list[str]:
    return [output["code"] for output in daemon.outputs("shop")]


def _check_hand_over(daemon: Daemon, old: str, new: str) -> None:
    """The old run has ended in order, after the new one was ready; what it leaves is the new one's."""
    daemon.wait(lambda: daemon.status(old) == "SUCCESS", "the old run to leave")
    old_record, new_record = daemon.instance.get_run_record_by_id(old), daemon.instance.get_run_record_by_id(new)
    assert old_record is not None
    assert new_record is not None
    assert (old_record.end_time or 0) > (new_record.start_time or 0) > 0
    pid = daemon.pid_of(old)
    daemon.wait(lambda: pid not in _pids(daemon), "the old process to end")


def _pids(daemon: Daemon) -> list[int]:
    return [process.pid for process in daemon.processes()]


def test_a_worker_hands_over_on_new_code_and_when_its_time_is_up(daemon: Daemon) -> None:
    with _traffic(daemon):
        daemon.wait(lambda: daemon.pending("shop") >= 0 and _codes(daemon), "the first worker to work")
        daemon.stop()
        for process in daemon.processes("server"):
            os.kill(process.pid, signal.SIGKILL)
        by_now = len(_codes(daemon))
        daemon.wait(lambda: len(_codes(daemon)) > by_now, "the worker to work on without daemon and code server")
        _write(daemon, "v2", "8s")
        daemon.start()
        daemon.wait(lambda: "v2" in _codes(daemon), "a worker on new code")
        first, second = daemon.run_ids("crew_job")[:2]
        _check_hand_over(daemon, first, second)
        by_now = len(_codes(daemon))
        daemon.wait(lambda: len(daemon.run_ids("crew_job")) >= 3, "a third worker, for the second's time is up")
        _check_hand_over(daemon, second, daemon.run_ids("crew_job")[2])
        assert set(_codes(daemon)[by_now:]) == {"v2"}, "somebody works on old code"
    daemon.wait_done("shop")
    daemon.check_once("shop", SHOP)


@pytest.mark.soak
def test_new_code_is_taken_over_without_a_restart(daemon: Daemon) -> None:
    with _traffic(daemon):
        daemon.wait(lambda: daemon.pending("shop") >= 0 and _codes(daemon), "the first worker to work")
        (server,) = (process.parent for process in daemon.processes("run"))
        _write(daemon, "v2")
        daemon.wait(lambda: "v2" in _codes(daemon), "a worker on new code", patience_s=200)
        first, second = daemon.run_ids("crew_job")
        _check_hand_over(daemon, first, second)
        by_now = len(_codes(daemon))
        daemon.wait(lambda: server not in _pids(daemon), "the old code server to end", patience_s=200)
        assert set(_codes(daemon)[by_now:]) == {"v2"}, "somebody works on old code"
        assert daemon.run_ids("crew_job") == [first, second]
    daemon.wait_done("shop")
    daemon.check_once("shop", SHOP)
