"""A dagster-daemon with a home of its own, started for a block and surely stopped with everything it started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_STOP_S = 20.0
_KB_PER_MB = 1_024
_TICKS = os.sysconf("SC_CLK_TCK")

# As `demo/dagster.yaml`: the queue is looked at every second instead of every five, runs that died are reported.
DAGSTER_YAML = """\
telemetry: {enabled: false}
nux: {enabled: false}
concurrency: {runs: {max_concurrent_runs: 20}}
run_queue: {dequeue_interval_seconds: 1}
run_monitoring: {enabled: true, poll_interval_seconds: 5, start_timeout_seconds: 60}
sensors: {use_threads: true, num_workers: 4}
"""


class Memory(NamedTuple):
    """Of one process, in MB: what it has in memory, its share of it, and the most it ever had."""

    rss: float
    pss: float
    peak: float

    def __str__(self) -> str:
        return f"RSS {self.rss:,.0f} MB, PSS {self.pss:,.0f} MB, peak RSS {self.peak:,.0f} MB"


class Daemon:
    """A running daemon. Its process leads a session, in which its code servers and their runs stay.

    Attributes:
        home: its DAGSTER_HOME.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", home: Path) -> None:
        self._process, self.home = process, home

    def wait_for(self, condition: Callable[[], bool], what: str, patience_s: float, every_s: float = 0.05) -> None:
        """Poll until the condition holds.

        Raises:
            RuntimeError: it did not hold in time, or the daemon has ended; with the end of the daemon's log.
        """
        give_up = time.monotonic() + patience_s
        while not condition():
            if self._process.poll() is not None:
                raise RuntimeError(f"the daemon ended with {self._process.returncode}:\n{self._log_end()}")
            if time.monotonic() > give_up:
                raise RuntimeError(f"waited {patience_s:.0f} s for {what}:\n{self._log_end()}")
            time.sleep(every_s)

    def owns(self, pid: int) -> bool:
        """Whether the process is one of this daemon's."""
        return pid in members_of(self._process.pid)

    def stop(self) -> None:
        """Ask everybody to end, then kill who stays.

        Raises:
            RuntimeError: somebody outlives SIGKILL.
        """
        try:
            self._end(signal.SIGTERM)
        finally:
            self._end(signal.SIGKILL)
        if left := members_of(self._process.pid):
            raise RuntimeError(f"processes {left} of the daemon outlive SIGKILL")

    def _end(self, number: signal.Signals) -> None:
        group = self._process.pid
        if members_of(group):
            with suppress(ProcessLookupError):
                os.killpg(group, number)
        give_up = time.monotonic() + _STOP_S
        while (self._process.poll() is None or members_of(group)) and time.monotonic() < give_up:
            time.sleep(0.05)

    def _log_end(self) -> str:
        return "\n".join((self.home / "daemon.log").read_text(errors="replace").splitlines()[-30:])


@contextmanager
def running_daemon(home: Path, definitions: Path, environment: Mapping[str, str]) -> Iterator[Daemon]:
    """The daemon in a new home, with the definitions of a file; SIGTERM to us ends it as Ctrl-C does."""
    home.mkdir()
    (home / "dagster.yaml").write_text(DAGSTER_YAML)
    _make_instance(home)
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "-f", str(definitions)]
    own = {**os.environ, "DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with (home / "daemon.log").open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=home,
                env={**own, **environment},
                start_new_session=True,
            )
        daemon = Daemon(process, home)
        try:
            yield daemon
        finally:
            daemon.stop()
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _make_instance(home: Path) -> None:
    """Make Dagster's databases before the first two processes of a new home would do so at the same time."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_run_records(limit=1)
        instance.get_ticks("none", "none", limit=1)


def members_of(group: int) -> list[int]:
    """The living processes of a process group; a zombie is none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = entry.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(int(entry.parent.name))
    return found


def memory_of(pid: int | str) -> Memory:
    """The memory of a process now; ``"self"`` is this one."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    status = _fields(Path(f"/proc/{pid}/status"))
    return Memory(rollup["Rss"] / _KB_PER_MB, rollup["Pss"] / _KB_PER_MB, status["VmHWM"] / _KB_PER_MB)


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if line.endswith(" kB"))
    return {name.strip(): int(value.split()[0]) for name, value in pairs}


def processor_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def age_s(pid: int) -> float:
    """How long the process has been there."""
    started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def children_of(pid: int) -> list[int]:
    """Processes it has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.parent.name))
    return found
