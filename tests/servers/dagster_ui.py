"""A real dagster-webserver, and the dagster-daemon beside it, for tests: started and stopped by them.

Each is the leader of a session of its own, so that the code servers and the runs they start are found again by the
process group, and none is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tests.servers.ports import free_port

_START_SECONDS = 120.0
_STOP_SECONDS = 30.0
_ANSWER_SECONDS = 30.0

DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}
"""


_AUTOMATIONS = """{ workspaceOrError { __typename ... on Workspace { locationEntries { name locationOrLoadError {
  ... on PythonError { message }
  ... on RepositoryLocation { repositories { name
    sensors { name sensorState { id status } }
    schedules { name scheduleState { id status } } } } } } } } }"""
_STOP_SENSOR = "mutation ($id: String!) { stopSensor(id: $id) { __typename ... on PythonError { message } } }"
_STOP_SCHEDULE = (
    "mutation ($id: String!) { stopRunningSchedule(id: $id) { __typename ... on PythonError { message } } }"
)
_START_SENSOR = """mutation ($sensor: SensorSelector!) {
  startSensor(sensorSelector: $sensor) { __typename ... on PythonError { message } } }"""
_START_SCHEDULE = """mutation ($schedule: ScheduleSelector!) {
  startSchedule(scheduleSelector: $schedule) { __typename ... on PythonError { message } } }"""
_TICKS = """query ($sensor: SensorSelector!) { sensorOrError(sensorSelector: $sensor) { __typename
  ... on Sensor { sensorState { ticks(limit: 50) { tickId status runIds } } } } }"""
_SCHEDULE_TICKS = """query ($schedule: ScheduleSelector!) { scheduleOrError(scheduleSelector: $schedule) { __typename
  ... on Schedule { scheduleState { ticks(limit: 50) { tickId status runIds } } } } }"""


@dataclass(frozen=True)
class Automation:
    """A sensor or a schedule, and whether it is on."""

    name: str
    id: str
    on: bool
    selector: Mapping[str, str]

    @property
    def is_sensor(self) -> bool:
        """Whether it is no schedule."""
        return "sensorName" in self.selector


@dataclass(frozen=True)
class Tick:
    """One evaluation of a sensor or schedule: STARTED, SKIPPED, SUCCESS or FAILURE, and the runs it asked for."""

    id: int
    status: str
    runs: tuple[str, ...]


class DagsterUi:
    """One dagster-webserver on 127.0.0.1 over one DAGSTER_HOME and some definitions.

    Guarantees that `close` ends both processes and all they started. Their logs lie in the home:
    ``webserver.log`` and ``daemon.log``.

    Args:
        home: See below.
        definitions: A file of definitions, or one or more ``workspace.yaml``; the first one's folder is worked in.
        environment: What the processes see besides the test's own environment.

    Attributes:
        home: The DAGSTER_HOME; a ``dagster.yaml`` without telemetry is put there if it has none.
        url: Where the UI is.
    """

    def __init__(self, home: Path, *definitions: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._definitions = definitions
        self._environment = _environment(home, environment or {})
        self._webserver: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "dagster.yaml").exists():
            (home / "dagster.yaml").write_text(DAGSTER_YAML)

    def __enter__(self) -> DagsterUi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def groups(self) -> list[int]:
        """The process groups of webserver and daemon, as far as they have been started."""
        return [process.pid for process in (self._webserver, self._daemon) if process is not None]

    def start(self) -> None:
        """Start the webserver and wait until it answers and has tried to load the definitions."""
        self._webserver = self._launch("dagster-webserver", "-h", "127.0.0.1", "-p", str(self._port))
        deadline = time.monotonic() + _START_SECONDS
        while self._webserver.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/server_info", timeout=_ANSWER_SECONDS):
                return
            time.sleep(0.05)
        end = self.log_end("webserver")
        self.close()
        raise RuntimeError(f"dagster-webserver did not start on {self.url}; the end of its log:\n{end}")

    def start_daemon(self) -> None:
        """Start the daemon; what it does from now on is seen through `graphql`."""
        self._daemon = self._launch("dagster-daemon", "run")

    def close(self) -> None:
        """Stop both, and every process they started."""
        processes = [process for process in (self._daemon, self._webserver) if process is not None]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            _end_group(process)
        self._daemon = self._webserver = None

    def graphql(self, query: str, **variables: Any) -> Any:
        """The data that a GraphQL query answers; raises if the server names errors."""
        for name, process in (("webserver", self._webserver), ("daemon", self._daemon)):
            if process is not None and process.poll() is not None:
                raise RuntimeError(f"the {name} ended with {process.returncode}:\n{self.log_end(name)}")
        request = urllib.request.Request(
            f"{self.url}/graphql",
            data=json.dumps({"query": query, "variables": variables}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"GraphQL answers {error.code}: {error.read().decode()[:2000]}") from error
        if answer.get("errors"):
            raise RuntimeError(f"GraphQL names errors: {json.dumps(answer['errors'])[:2000]}")
        return answer["data"]

    def automations(self) -> dict[str, Automation]:
        """The sensors and schedules of the definitions, by name; raises if a code location does not load."""
        found = {}
        for entry in self.graphql(_AUTOMATIONS)["workspaceOrError"]["locationEntries"]:
            location = entry["locationOrLoadError"]
            if location is None or "repositories" not in location:
                raise RuntimeError(
                    f"the code location {entry['name']} does not load: {(location or {}).get('message')}"
                )
            for repository in location["repositories"]:
                states = [(it, it["sensorState"]) for it in repository["sensors"]]
                states += [(it, it["scheduleState"]) for it in repository["schedules"]]
                for it, state in states:
                    selector = {
                        "repositoryLocationName": entry["name"],
                        "repositoryName": repository["name"],
                        "sensorName" if "sensorState" in it else "scheduleName": it["name"],
                    }
                    found[it["name"]] = Automation(it["name"], state["id"], state["status"] == "RUNNING", selector)
        return found

    def switch_all_off(self) -> None:
        """Stop every sensor and schedule, whatever its default. Before `start_daemon`, none ever ticks."""
        for automation in self.automations().values():
            self.graphql(_STOP_SENSOR if automation.is_sensor else _STOP_SCHEDULE, id=automation.id)
        on = [automation.name for automation in self.automations().values() if automation.on]
        if on:
            raise RuntimeError(f"{on} do not stop")

    def switch_on(self, automation: Automation) -> None:
        """Start a sensor or a schedule."""
        if automation.is_sensor:
            self.graphql(_START_SENSOR, sensor=automation.selector)
        else:
            self.graphql(_START_SCHEDULE, schedule=automation.selector)

    def ticks(self, automation: Automation) -> list[Tick]:
        """Its newest ticks, the newest first."""
        if automation.is_sensor:
            state = self.graphql(_TICKS, sensor=automation.selector)["sensorOrError"]["sensorState"]
        else:
            state = self.graphql(_SCHEDULE_TICKS, schedule=automation.selector)["scheduleOrError"]["scheduleState"]
        return [Tick(int(tick["tickId"]), tick["status"], tuple(tick["runIds"])) for tick in state["ticks"]]

    def wait_for(self, condition: Callable[[], bool], what: str, *, patience_s: float = 60.0) -> None:
        """Wait until ``condition`` holds; fail naming ``what`` if it never does.

        It asks a few times a second only: each answer costs the webserver what the daemon and the runs need.
        """
        give_up = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > give_up:
                raise AssertionError(
                    f"still waiting for {what}; the end of the daemon's log:\n{self.log_end('daemon')}"
                )
            time.sleep(0.25)

    def log_end(self, name: str) -> str:
        """The last lines of ``webserver`` or ``daemon``."""
        with suppress(FileNotFoundError):
            return "\n".join((self.home / f"{name}.log").read_text(errors="replace").splitlines()[-20:])
        return "(no log)"

    def _launch(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        loaded = (("-w" if path.suffix == ".yaml" else "-f", str(path)) for path in self._definitions)
        command = [str(Path(sys.executable).with_name(program)), *arguments, *chain.from_iterable(loaded)]
        with (self.home / f"{program.removeprefix('dagster-')}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self._definitions[0].parent,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def group_members(group: int) -> list[int]:
    """The living processes of a process group; a zombie is none."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = status.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                members.append(int(status.parent.name))
    return members


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """The test's own, without what measures coverage (it would slow every run) and with this home."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE_", "COV_CORE_"))}
    return {**own, "DAGSTER_HOME": str(home), "PYTHONUNBUFFERED": "1", **more}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Give the leader and its children time to leave, then kill what is left."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    if not _left(process.pid, _STOP_SECONDS / 3):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_STOP_SECONDS)
        if not _left(process.pid, _STOP_SECONDS):
            raise RuntimeError(f"processes {group_members(process.pid)} of group {process.pid} outlive SIGKILL")


def _left(group: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while group_members(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
