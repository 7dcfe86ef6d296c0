"""Ends a server, and removes its files, when the tests that started it die without a chance to do so themselves."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_STOP_SECONDS = 10.0


class Guard:
    """A process in a session of its own that outlives a killed test run by what it takes to tidy up.

    Guarantees, even if this process is ended by SIGKILL: the server entrusted last is killed, and the paths entrusted
    with it are removed. (PR_SET_PDEATHSIG would end the server with the *thread* that started it, and leave its files.)
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            cwd="/",
            env={},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def entrust(self, pid: int | None, paths: Iterable[Path]) -> None:
        """From now on it is this process that must not survive, and these paths that must not remain."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([pid, [str(path) for path in paths]]).encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """Let the guard go, with nothing left to do."""
        if self._process.poll() is None:
            self.entrust(None, ())
        with suppress(BrokenPipeError):
            self._process.communicate(timeout=_STOP_SECONDS)


def remove(paths: Iterable[Path]) -> None:
    """Remove files, sockets and whole folders, as far as they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class _Server:
    """A process that is not our child. Its descriptor keeps its id from passing to another process unnoticed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor: int | None = None
        if hasattr(os, "pidfd_open"):
            with suppress(ProcessLookupError):
                self._descriptor = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._descriptor is None:
            if not hasattr(os, "pidfd_open"):
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)
        select.select([self._descriptor], [], [], _STOP_SECONDS)

    def release(self) -> None:
        """Forget the process."""
        if self._descriptor is not None:
            os.close(self._descriptor)


def _main() -> None:
    server: _Server | None = None
    paths: list[str] = []
    for line in sys.stdin:
        pid, paths = json.loads(line)
        if server is not None:
            server.release()
        server = _Server(pid) if pid is not None else None
    if server is not None:
        server.kill()
    remove(map(Path, paths))


if __name__ == "__main__":
    _main()
