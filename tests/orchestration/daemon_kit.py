"""Dagster's sensor daemon, one look at a time, in this process or in one that dies on the way."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import dagster as dg
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.storage.tags import RUN_KEY_TAG
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.sensor import execute_sensor_iteration

SENSOR = "copy_sensor"
_STEP_S = 40
"""More than the interval of any sensor here."""
_BEGUN = 1_900_000_000.0
_DEFINITIONS = """
import dagster as dg
import djp_dagster as djp
from tests.orchestration.kit import copy

defs = dg.Definitions(
    assets=[djp.build_stream_asset(copy)],
    sensors=[djp.build_stream_sensor(copy, default_status=dg.DefaultSensorStatus.RUNNING)],
    resources={{"event_stream": djp.SqlEventStream(url={url!r})}},
)
"""


class Daemon:
    """The sensor daemon of one instance, on definitions of its own: one consumer, its asset and its sensor.

    Args:
        folder: where everything lies.
        instance: with files, whose runs are done in the process that launches them.
        url: of the stream.
    """

    def __init__(self, folder: Path, instance: dg.DagsterInstance, url: str) -> None:
        self.instance = instance
        # Dagster keeps what it has loaded in this process by the file's name.
        self._file = folder / f"shop_{uuid4().hex}.py"
        self._file.write_text(_DEFINITIONS.format(url=url))

    def look(self, number: int, crash: dict[str, Any] | None = None) -> None:
        """The ``number``-th look; the runs it launches are done when this returns."""
        _look(self.instance, self._file, number, crash)

    def order_to_die(self, number: int, point: str) -> str:
        """The order to a `Nursery` for the same, in a process that kills itself at one of Dagster's crash points."""
        return json.dumps([self.instance.root_directory, str(self._file), number, point])


class Nursery:
    """A process that has loaded Dagster and forks one for each order: a fresh one would load it for seconds."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.orchestration.daemon_kit"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
        )

    def die(self, order: str) -> int:
        """Let a process die as ordered; its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()
            if self._process.stdout is not None:
                self._process.stdout.close()


def _raise_children() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.dup2(2, 1)
            folder, file, number, point = json.loads(line)
            status = 1
            try:
                signal.alarm(120)
                with dg.DagsterInstance.from_config(folder) as instance:
                    _look(instance, Path(file), number, {point: signal.SIGKILL})
                status = 0
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _look(instance: dg.DagsterInstance, file: Path, number: int, crash: dict[str, Any] | None) -> None:
    target = LoadableTargetOrigin(
        executable_path=sys.executable, python_file=str(file), working_directory=str(Path.cwd())
    )
    location = InProcessCodeLocationOrigin(target, location_name="shop")
    flags = None if crash is None else {SENSOR: crash}
    with (
        create_test_daemon_workspace_context(InProcessWorkspaceLoadTarget(location), instance) as workspace,
        freeze_time(_BEGUN + _STEP_S * number),
    ):
        errors = list(
            execute_sensor_iteration(workspace, logging.getLogger("djp-test"), None, None, debug_crash_flags=flags)
        )
    for error in errors:
        assert error is None, error.to_string()


@contextmanager
def home(folder: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with files, whose runs are done in the process that launches them."""
    folder.mkdir()
    with dg.instance_for_test(
        temp_dir=str(folder), synchronous_run_launcher=True, synchronous_run_coordinator=True
    ) as instance:
        yield instance


def keys(instance: dg.DagsterInstance) -> list[str]:
    """The run keys of all runs."""
    return [run.tags[RUN_KEY_TAG] for run in instance.get_runs()]


def ticks(instance: dg.DagsterInstance) -> list[str]:
    """How the sensor's ticks ended, the newest first."""
    (state,) = instance.all_instigator_state()
    return [tick.status.value for tick in instance.get_ticks(state.instigator_origin_id, state.selector_id)]


def forget_cursor(instance: dg.DagsterInstance) -> None:
    """Wipe all that the daemon remembers of its sensors."""
    storage = instance.schedule_storage
    assert storage is not None
    for state in instance.all_instigator_state():
        storage.delete_instigator_state(state.instigator_origin_id, state.selector_id)


if __name__ == "__main__":
    _raise_children()
