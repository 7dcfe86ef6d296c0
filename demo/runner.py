"""`Shop`: user interface, daemon, user service and traffic as processes, started, watched and stopped together.

Stopping goes from the outside in: the traffic; the daemon, so that no new run is launched; the runs under way, which
are asked to stop, so that a resident worker finishes its batch; the user interface. What is left of any process group
after that is killed.
"""

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

import click

from demo.errors import DemoError
from demo.home import REPOSITORY, Home
from demo.processes import Child, wait_until
from demo.traffic import Settings, as_options
from demo.ui import Ui, UiAwayError
from djp_dagster.processing.stopping import SignalledEvent

_FIRST_PORT, _FIRST_SERVICE_PORT, _PORTS = 3000, 8750, 100
_START_S = 180.0
_SENSORS_S = 60.0
_STOP_S = 20.0
_RUNS_STOP_S = 30.0
_KILL_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Wish(SignalledEvent):
    """Set when a person, or the system, asks to stop; asked twice, it is urgent."""

    def __init__(self) -> None:
        super().__init__()
        self.urgent = False

    def listen(self) -> None:
        """Be set by Ctrl-C, SIGTERM, and the terminal closing."""
        for number in _SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.urgent = self.is_set()
        self.set()


class Shop:
    """The processes of the demonstration. Use it as a context manager; leaving it leaves no process behind.

    Args:
        home: where everything lies.
        traffic: what is published.
        port: of the user interface; the first free one from 3000 on unless given.
        wish: set when it is to end.
    """

    def __init__(self, home: Home, traffic: Settings, port: int | None, wish: Wish) -> None:
        self._home, self._settings, self._wish = home, traffic, wish
        self._port = port or _free_port(_FIRST_PORT)
        self.ui = Ui(f"http://127.0.0.1:{self._port}")
        # It listens already, and the service goes on with that: nobody else can take the port meanwhile.
        self._service = _listening(_FIRST_SERVICE_PORT)
        self._service_url = f"http://127.0.0.1:{self._service.getsockname()[1]}"
        self._children: dict[str, Child] = {}

    def __enter__(self) -> "Shop":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(child.members() for child in self._children.values()):
            click.echo("Stopping ... (Ctrl-C again kills)")
        self.stop()
        self._service.close()

    def start(self) -> bool:
        """Start everything; whether it is up, or somebody wished it to end meanwhile.

        Raises:
            DemoError: it does not come up; the message shows why.
        """
        self._home.make_instance()
        began = time.time()
        workspace = ["-w", str(REPOSITORY / "workspace.yaml")]
        self._start("webserver", [_script("dagster-webserver"), *workspace, "-h", "127.0.0.1", "-p", str(self._port)])
        with self._service as service:
            listening = service.fileno()
            command = [sys.executable, "-m", "demo.user_service", "--listening", str(listening)]
            self._start("users", command, listening)
        self._start("daemon", [_script("dagster-daemon"), "run", *workspace])
        self._start("traffic", [sys.executable, "-m", "demo.traffic", *as_options(self._settings)])
        # Whoever kills us leaves these groups; they keep the lock, and what has started is told how to be rid of them.
        groups = " ".join(f"-{child.pid}" for child in self._children.values())
        self._home.tell_users(
            f"the demonstration at {self.ui.url}: stop process {os.getpid()} with Ctrl-C or kill; if that is gone, "
            f"stop what it has left with `kill -- {groups}`"
        )
        for what, condition in (
            ("the user interface to answer", self.ui.answers),
            ("the definitions to load", self.ui.has_loaded),
        ):
            if not self._wait(what, condition, _START_S) and not self._wish.is_set():
                raise DemoError(f"still waiting for {what} after {_START_S:.0f} s. {self._why('webserver')}")
        # Not worth giving up for: in a home that was made elsewhere, Dagster does not show the ticks of today.
        looked = self._wait("the sensors to look", lambda: not self.ui.silent_sensors(began), _SENSORS_S)
        if not looked and not self._wish.is_set():
            click.echo(f"  not seen yet; {self.ui.url}/automation may show why")
        return not self._wish.is_set()

    def _start(self, name: str, command: Sequence[str], *inherits: int) -> None:
        self._children[name] = Child(
            name,
            command,
            environment={
                **self._home.environment(),
                "USER_SERVICE_URL": self._service_url,
            },
            folder=REPOSITORY,
            log=self._home.logs / f"{name}.log",
            inherits=[self._home.lock, *inherits],
        )

    def _wait(self, what: str, condition: Callable[[], bool], seconds: float) -> bool:
        click.echo(f"Waiting for {what} ...")
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and not self._wish.wait(0.5):
            self.check()
            with suppress(UiAwayError):  # a busy machine
                if condition():
                    return True
        return False

    def check(self) -> None:
        """See that everything still runs.

        Raises:
            DemoError: naming what has ended by itself, with the end of its log.
        """
        for name, child in self._children.items():
            code = child.exit_code()
            if code is not None:
                raise DemoError(f"{name} has ended by itself, exit code {code}. {self._why(name)}")

    def _why(self, name: str) -> str:
        child = self._children[name]
        return f"The end of {child.log}:\n{child.tail()}"

    def stop_traffic(self) -> None:
        """Stop publishing, for good."""
        traffic = self._children.pop("traffic", None)
        if traffic is not None:
            traffic.send(signal.SIGTERM)
            self._ended(traffic, _STOP_S)
            self._kill([traffic])

    def stop(self) -> None:
        """Stop everything that was started, and all that it has started."""
        self.stop_traffic()
        daemon, webserver = self._children.get("daemon"), self._children.get("webserver")
        if daemon is not None:
            daemon.send(signal.SIGTERM)
            wait_until(lambda: daemon.exit_code() is not None or self._wish.urgent, _STOP_S)
            self._stop_runs(daemon)
            self._ended(daemon, _STOP_S if daemon.exit_code() == 0 else _KILL_S)  # its code server leaves by itself
        users = self._children.get("users")
        if users is not None:  # after the runs that ask it
            users.send(signal.SIGTERM)
            self._ended(users, _STOP_S)
        if webserver is not None:
            webserver.send(signal.SIGTERM)
            self._ended(webserver, _STOP_S)
        self._kill([child for child in (daemon, users, webserver) if child is not None])
        self._children.clear()

    def _stop_runs(self, daemon: Child) -> None:
        # Through the user interface, as a person would: the run ends as canceled, and none is left open for next time.
        try:
            wait_until(lambda: self._wish.urgent or not daemon.members() or self._runs_have_ended(), _RUNS_STOP_S)
        except DemoError as error:
            click.echo(f"  runs are stopped by signal: {error.message}")
            daemon.send_to_all(signal.SIGTERM)

    def _runs_have_ended(self) -> bool:
        """Whether no run is left; asks those to stop that do not know it, as one may that has just been starting."""
        left = self.ui.runs_under_way()
        unaware = [run for run in left if not run.canceling]
        if unaware:
            click.echo(f"  asking runs to stop: {', '.join(sorted(run.job for run in unaware))}")
            self.ui.terminate([run.id for run in unaware])
        return not left

    def _ended(self, child: Child, seconds: float) -> bool:
        return wait_until(lambda: not child.members() or self._wish.urgent, seconds)

    def _kill(self, children: Sequence[Child]) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            left = [child for child in children if child.members()]
            for child in left:
                click.echo(f"  {child.name}: {number.name} to {child.members()}")
                child.send_to_all(number)
            for child in left:
                wait_until(lambda child=child: not child.members(), _KILL_S)  # type: ignore[misc]


def _script(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise DemoError(f"{name} is not installed; `make venv` installs it")
    return found


def _free_port(first: int) -> int:
    with _listening(first) as found:
        return int(found.getsockname()[1])


def _listening(first: int) -> socket.socket:
    """A socket that listens on the first free port."""
    for port in range(first, first + _PORTS):
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
    raise DemoError(f"no port from {first} to {first + _PORTS - 1} is free; give one with --port")
