"""`Child`: a started process and everything it starts in turn, found and stopped by one id."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.1
_TAIL_BYTES = 4_000


class Child:
    """A process that leads a session and a process group of its own; what it starts stays in them.

    So a Ctrl-C in the terminal reaches nobody but us, and all of it can be stopped in the right order.

    Args:
        name: for messages.
        command: what to run.
        environment: its environment.
        folder: where it runs.
        log: where its output goes, after what is there.
        inherits: files it keeps open.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        log: Path,
        inherits: Sequence[int],
    ) -> None:
        self.name, self.log = name, log
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
                pass_fds=inherits,
            )

    @property
    def pid(self) -> int:
        """Its process id, which is the id of its process group and of its session too."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """How it ended; None while it lives."""
        return self._process.poll()

    def members(self) -> list[int]:
        """The live processes of its group, itself included."""
        self._process.poll()  # a zombie of ours is dead
        return group_members(self.pid)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def send_to_all(self, number: signal.Signals) -> None:
        """Send a signal to every process of its group."""
        if self.members():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def tail(self) -> str:
        """The end of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-20:])


def group_members(group: int) -> list[int]:
    """The processes of a process group, without zombies."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return []
        return [group]
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, member_of = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue  # it has just ended
            if int(member_of) == group and state != "Z":
                members.append(int(entry.name))
    return members


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until ``condition`` holds, at most ``seconds``; whether it does."""
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= give_up:
            return False
        time.sleep(_POLL_S)
    return True
