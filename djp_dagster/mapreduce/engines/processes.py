"""`Processes`: processes of this machine, which may die.

Each is a Python of its own that imports this package and nothing else: not the program that started it, which may take
a second to import, and may not be meant to be imported. Functions come by value. They speak over a socket pair; a
worker whose socket closes ends at once, whatever it is doing, so none outlives the one who started it, killed or not.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.engines.base import Alive, Attempt, Died, News, Setup
from djp_dagster.units import is_count

_END_S = 5.0


class _Worker:
    """A process, and what it is doing."""

    def __init__(self, hello: bytes) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._process = subprocess.Popen(  # noqa: S603  this very Python
                [sys.executable, "-m", "djp_dagster.mapreduce.engines.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        self.connection = Connection(ours.detach())
        self.attempt: Attempt | None = None
        self._hello = hello

    def give(self, attempt: Attempt) -> None:
        """Have an attempt done. If the worker has died meanwhile, that is told by its connection."""
        self.attempt = attempt
        with suppress(OSError):
            if self._hello:
                self.connection.send_bytes(self._hello)
                self._hello = b""
            self.connection.send_bytes(pickle.dumps(attempt))

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait(_END_S)
        self.connection.close()

    def why_dead(self) -> str:
        """How it ended, after its connection has closed."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with exit code {code}"
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"was ended by signal {-code}"


class Processes:
    """Tasks run in processes of this machine. A process that dies takes one attempt with it, and is replaced.

    See `Engine`.

    Args:
        workers: how many; as many as this process may use processors unless given.
    """

    name = "processes"
    can_kill = True
    shares_disks = True

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and (not is_count(workers) or workers < 1):
            raise InvalidSettingError(
                f"Processes(workers={workers!r}) must be 1 or more", setting="workers", value=workers
            )
        self.slots = workers or len(os.sched_getaffinity(0))
        self._hello = b""
        self._workers: list[_Worker] = []
        self._waiting: deque[Attempt] = deque()
        self._known: list[News] = []

    def start(self, setup: Setup) -> None:
        """See `Engine`."""
        self._hello = dumps_by_value(setup)
        self._workers = [_Worker(self._hello) for _ in range(self.slots)]

    def submit(self, attempt: Attempt) -> None:
        """See `Engine`."""
        self._waiting.append(attempt)
        self._give()

    def _give(self) -> None:
        for worker in self._workers:
            if worker.attempt is None and self._waiting:
                attempt = self._waiting.popleft()
                worker.give(attempt)
                self._known.append(Alive(attempt, 0))

    def news(self, timeout_s: float) -> Sequence[News]:
        """See `Engine`."""
        found, self._known = self._known, []
        if found:
            return found
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(by_connection), timeout_s):
            worker = by_connection[connection]
            try:
                message = pickle.loads(worker.connection.recv_bytes())  # noqa: S301  our own process
            except (EOFError, OSError):
                self._replace(worker)
                continue
            if not isinstance(message, Alive):
                worker.attempt = None
            found.append(message)
        found += self._known
        self._known = []
        self._give()
        return found

    def _replace(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        if worker.attempt is not None:
            self._known.append(Died(worker.attempt, f"the process {worker.why_dead()}"))
        worker.kill()
        if worker.attempt is None and not self._waiting:
            # It never began: whatever ends it would end its successor, and nobody waits for one.
            time.sleep(0.1)
        self._workers.append(_Worker(self._hello))

    def cancel(self, attempt: Attempt) -> None:
        """See `Engine`."""
        with suppress(ValueError):
            self._waiting.remove(attempt)
        for worker in [worker for worker in self._workers if worker.attempt == attempt]:
            worker.attempt = None
            self._workers.remove(worker)
            worker.kill()
            self._workers.append(_Worker(self._hello))
        self._give()

    def close(self) -> None:
        """See `Engine`."""
        workers, self._workers = self._workers, []
        self._waiting.clear()
        for worker in workers:
            worker.kill()


def dumps_by_value(setup: Setup) -> bytes:
    """The setup as bytes, with the functions of the modules that the job's functions are of.

    By reference they could not be found where a decorator has put something else under their name, or where their
    module cannot be imported; and importing it might take long.

    Raises:
        InvalidSettingError: they hold something that cannot be sent, such as a lock or an open file.
    """
    import cloudpickle

    job = setup.job
    functions = [job.mapper, job.reduce, job.partition_by, job.sort_by, job.combine and type(job.combine)]
    names = {getattr(one, "__module__", None) for one in functions if one is not None}
    modules = [sys.modules[name] for name in names if name in sys.modules and not _is_library(name)]
    registered = []
    try:
        for module in modules:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                registered.append(module)
        return bytes(cloudpickle.dumps(setup))
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        raise InvalidSettingError(
            f"job {job.name!r} cannot be sent to another process: {error}; let its functions make what they need, or "
            "run it with engine='inline'",
            setting="engine",
            value=None,
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _is_library(name: str | None) -> bool:
    """Whether a module is found under its name by everybody: of this package, of the standard library, or built in."""
    top = (name or "").partition(".")[0]
    return top in {"djp_dagster", "builtins", *sys.stdlib_module_names} and top != "__main__"
