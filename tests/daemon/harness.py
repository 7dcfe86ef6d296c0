"""`Daemon`: a real dagster-daemon on a folder of its own; looked at from outside, killed, and surely ended.

Everything it starts (code servers, runs, their helpers) has its DAGSTER_HOME in its environment and, unless it left it,
its process group: that is how processes are found again. Nothing is found by name.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.scheduler.instigation import InstigatorTick, TickStatus

import djp_dagster as djp
from tests.crash.oracle import DATA, ID, Books
from tests.daemon.at_work import done_topic

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
_LOG_BYTES = 3_000
_TICKS = 20

# No capturing of logs: its helpers, four a run, would take longer than the runs. Sensors in threads: else each waits
# for the runs of all others to be launched.
DAGSTER_YAML = """
telemetry: {enabled: false}
nux: {enabled: false}
run_monitoring: {enabled: false}
sensors: {use_threads: true, num_workers: 4}
compute_logs: {module: dagster._core.storage.noop_compute_log_manager, class: NoOpComputeLogManager}
"""
AT_ONCE = "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"
QUEUED = """
run_coordinator:
  module: dagster
  class: QueuedRunCoordinator
  config: {dequeue_interval_seconds: 1, dequeue_use_threads: true}
"""


class Process(NamedTuple):
    """A living process of a daemon's home."""

    pid: int
    parent: int
    role: str


class Daemon:
    """One DAGSTER_HOME, its stream, and the daemons started on it, one after the other.

    Args:
        folder: the DAGSTER_HOME, where the stream lies too.
        definitions: the file of definitions.
        settings: what ``dagster.yaml`` says beside `DAGSTER_YAML`.
    """

    def __init__(self, folder: Path, definitions: Path, settings: str = AT_ONCE) -> None:
        self.started_at = 0.0
        self.folder, self.definitions = folder, definitions
        (folder / "dagster.yaml").write_text(DAGSTER_YAML + settings)
        self.instance = dg.DagsterInstance.from_config(str(folder))
        self.stream = djp.open_stream(folder / "stream.db")
        self.books = Books(folder)
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._published: Counter[str] = Counter()
        self._instigators: dict[str, tuple[str, str]] = {}

    # Starting, killing, ending

    def environment(self) -> dict[str, str]:
        """What the daemon, and whatever else works on its home, is started with."""
        path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {
            **os.environ,
            "DAGSTER_HOME": str(self.folder),
            "DJP_TEST_FOLDER": str(self.folder),
            "DJP_STREAM_URL": f"sqlite:///{self.folder / 'stream.db'}",
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }

    def start(self) -> "Daemon":
        """Start a daemon; the one before it must be dead."""
        assert not self._daemons or self.is_dead()
        self.started_at = time.time()
        self._daemons.append(self.spawn("dagster-daemon", "run", "-f", str(self.definitions)))
        return self

    def spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a program of Dagster's on this home, in a session of its own; it ends with the daemon."""
        with (self.folder / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                [str(Path(sys.executable).with_name(program)), *arguments],
                cwd=self.folder,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_dead(self) -> bool:
        """Whether the daemon has ended; its code server and runs may live on."""
        return self._daemons[-1].poll() is not None

    def lose_machine(self) -> None:
        """SIGKILL everything at once."""
        for process in self.processes():
            _kill(process.pid)
        self._daemons[-1].wait(30)
        assert _until(lambda: not self.processes(), 30)

    def stop(self) -> None:
        """End the daemon in order; its code server and runs live on, the server until its last run has ended."""
        if not self.is_dead():
            self._daemons[-1].terminate()
            self._daemons[-1].wait(60)

    def close(self) -> None:
        """End the daemon, then the runs, then whatever is left, and make sure that nothing is."""
        try:
            if self._daemons:
                with suppress(subprocess.TimeoutExpired):
                    self.stop()
                for process in self.processes("run"):
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)
                _until(lambda: not self.processes(), 10)
        finally:
            for _ in range(3):  # one may have been starting another
                for process in self.processes():
                    _kill(process.pid)
                if _until(lambda: not self.processes(), 5):
                    break
            left = self.processes()
            for daemon in self._daemons:
                daemon.wait(5)
            self.books.close()
            self.stream.close()
            self.instance.dispose()
            assert not left, f"outlive SIGKILL: {left}"

    # Looking

    def processes(self, role: str | None = None) -> list[Process]:
        """The living processes of this home; ``role`` is ``daemon``, ``server``, ``run`` or ``other``."""
        for daemon in self._daemons:
            daemon.poll()  # reap it
        groups = {daemon.pid for daemon in self._daemons}
        found = [process for process in _all_processes(str(self.folder), groups) if process.pid != os.getpid()]
        return [process for process in found if role is None or process.role == role]

    def runs(self, job: str) -> list[dg.RunRecord]:
        """The runs of a job (``<group>_job``, ``<worker>_job``), the oldest first."""
        return list(reversed(self.instance.get_run_records(dg.RunsFilter(job_name=job))))

    def run_ids(self, job: str) -> list[str]:
        """Their ids."""
        return [record.dagster_run.run_id for record in self.runs(job)]

    def status(self, run_id: str) -> str:
        """What Dagster holds a run for."""
        run = self.instance.get_run_by_id(run_id)
        return "DELETED" if run is None else run.status.value

    def pid_of(self, run_id: str) -> int | None:
        """The process of a run, by its engine event; None if it has not begun."""
        for entry in self.instance.all_logs(run_id):
            event = entry.dagster_event
            if event is not None and event.is_engine_event and "Started process for run" in (event.message or ""):
                return int(str(event.engine_event_data.metadata["pid"].value))
        return None

    def has_begun(self, run_id: str) -> bool:
        """Whether the run's step has begun."""
        events = (entry.dagster_event for entry in self.instance.all_logs(run_id))
        return any(event is not None and event.is_step_start for event in events)

    def ticks(self, name: str) -> list[InstigatorTick]:
        """The last ticks of a sensor or schedule, the newest first."""
        if name not in self._instigators:
            for state in self.instance.all_instigator_state():
                self._instigators[state.instigator_name] = (state.instigator_origin_id, state.selector_id)
        known = self._instigators.get(name)
        return [] if known is None else list(self.instance.get_ticks(*known, limit=_TICKS))

    def wait_tick(self, name: str, because: str = "", *, after: float | None = None) -> None:
        """Wait for a tick that began after ``after`` (now, unless given) and has ended, saying ``because``."""
        since = time.time() if after is None else after
        self.wait(
            lambda: any(
                tick.timestamp > since and tick.status != TickStatus.STARTED and because in (tick.skip_reason or "")
                for tick in self.ticks(name)
            ),
            f"a tick of {name} that says {because!r}",
        )

    def materializations(self, group: str) -> list[dict[str, Any]]:
        """The metadata of each materialization of a group's asset, the newest first; and its ``run_id``."""
        result = self.instance.fetch_materializations(dg.AssetKey(group), limit=100)
        found = []
        for record in result.records:
            materialization = record.asset_materialization
            assert materialization is not None
            values = {name: value.value for name, value in materialization.metadata.items()}
            found.append({**values, "run_id": record.run_id})
        return found

    def wait(self, condition: Callable[[], object], what: str, *, patience_s: float = PATIENCE_S) -> None:
        """Wait until ``condition`` holds; if it never does, say what for, and how things stand."""
        give_up = time.monotonic() + patience_s
        while True:
            began = time.monotonic()
            if condition():
                return
            if time.monotonic() > give_up:
                raise AssertionError(f"still waiting for {what}\n{self.report()}")
            time.sleep(0.05 + 5 * (time.monotonic() - began))  # looking must not be what takes the time

    def report(self) -> str:
        """How things stand, for a failed test."""
        lines = [f"processes: {self.processes()}", f"open batches: {self.books.open_intents()}"]
        for record in self.instance.get_run_records(limit=20):
            run = record.dagster_run
            tags = {name: value for name, value in run.tags.items() if name.startswith("djp/")}
            lines.append(f"run {run.run_id[:8]} {run.job_name} {run.status.value} {tags}")
        for name in list(self._instigators):
            for tick in self.ticks(name)[:3]:
                told = tick.skip_reason or (tick.error.message if tick.error else list(tick.run_ids))
                lines.append(f"tick {name} {tick.status.value} {str(told)[:300]}")
        for log in sorted(self.folder.glob("*.log")):
            lines.append(f"--- {log.name}\n{log.read_text(errors='replace')[-_LOG_BYTES:]}")
        return "\n".join(lines)

    # Events and books

    def publish(self, topic: djp.Topic, count: int) -> None:
        """Publish numbered events."""
        first = self._published[topic.name]
        self.stream.publish(topic, [topic.event(user=f"user-{n % 13}", n=n) for n in range(first, first + count)])
        self._published[topic.name] += count

    def pending(self, group: str) -> int:
        """Events that the group has not committed, by the file; -1 before the group exists."""
        rows = self.books.db.execute(
            "SELECT p.partition, end_offset - committed FROM djp_positions p JOIN djp_groups g USING (group_id) "
            "JOIN djp_partitions q ON q.topic_id = p.topic_id AND q.partition = p.partition WHERE g.name = ?",
            (group,),
        ).fetchall()
        return sum(count for _, count in rows) if rows else -1

    def wait_done(self, *groups: str, patience_s: float = PATIENCE_S) -> None:
        """Wait until the groups have committed everything."""
        for group in groups:
            self.wait(lambda group=group: self.pending(group) == 0, f"{group} to be done", patience_s=patience_s)  # type: ignore[misc]

    def outputs(self, group: str) -> list[dict[str, Any]]:
        """The committed outputs of a group, by batch, in the order of their commits."""
        return self.books.outputs(group)

    def check_once(self, group: str, topic: djp.Topic) -> None:
        """Every published event was handled, and emitted, in exactly one committed batch."""
        published = self.books.topic(topic.name)
        assert Counter(event[DATA]["n"] for _, _, event in published) == Counter(range(self._published[topic.name]))
        seen = Counter(tuple(position) for output in self.outputs(group) for position in output["seen"])
        wanted = Counter((topic.name, partition, offset) for partition, offset, _ in published)
        assert seen == wanted, f"{group}: missing {wanted - seen}, too many {seen - wanted}"
        emitted = self.books.topic(done_topic(group).name)
        assert Counter(event[DATA]["n"] for _, _, event in emitted) == Counter(range(self._published[topic.name]))
        assert len({event[ID] for _, _, event in emitted}) == len(emitted)
        assert self.books.dead_letters(group) == []

    def holders(self, group: str) -> dict[int, str]:
        """Who holds each task of a group, by task, with a lease that has not run out."""
        rows = self.books.db.execute(
            "SELECT task, owner FROM djp_tasks JOIN djp_groups USING (group_id) "
            "WHERE name = ? AND owner IS NOT NULL AND expires_micros > ?",
            (group, time.time_ns() // 1000),
        )
        return dict(rows)

    # Handlers that wait

    def hold(self, group: str) -> None:
        """From now on the group's handler stays in its batch."""
        (self.folder / f"held.{group}").unlink(missing_ok=True)
        (self.folder / f"hold.{group}").touch()

    def held(self, group: str) -> int | None:
        """The process whose handler is being held; None if none is."""
        with suppress(FileNotFoundError, ValueError):
            return int((self.folder / f"held.{group}").read_text())
        return None

    def let_go(self, *groups: str) -> None:
        """Let the groups' handlers go on."""
        for group in groups:
            (self.folder / f"hold.{group}").unlink()


def _all_processes(home: str, groups: set[int]) -> Iterable[Process]:
    """The living processes with this DAGSTER_HOME, or in these process groups."""
    mark = f"DAGSTER_HOME={home}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            state, parent, group = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            if state == "Z" or (int(group) not in groups and mark not in (entry / "environ").read_bytes().split(b"\0")):
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield Process(int(entry.name), int(parent), _role(int(entry.name), groups, command))


def _role(pid: int, groups: set[int], command: str) -> str:
    if pid in groups:
        return "daemon"
    if "api grpc" in command:
        return "server"
    return "run" if "spawn_main" in command else "other"


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _until(condition: Callable[[], bool], patience_s: float) -> bool:
    give_up = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True
