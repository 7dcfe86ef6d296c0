"""Processes that can be started in milliseconds and killed for real."""

import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests.crash.oracle import Books
from tests.crash.world import STOP

PATIENCE_S = 60.0


def wait_for(condition: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until ``condition`` holds; fail naming ``what`` if it never does."""
    give_up = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up, f"still waiting for {what}"
        time.sleep(0.01)


class Arena:
    """Starts processes of one of the worlds on one folder, and makes sure that none survives the test."""

    def __init__(self, folder: Path, context: ForkServerContext, open_books: Callable[[Path], Books] = Books) -> None:
        self.folder, self.context, self.open_books = folder, context, open_books
        self.processes: list[ForkServerProcess] = []
        self._books: Books | None = None

    def start(self, role: Callable[..., None], *arguments: Any, **options: Any) -> ForkServerProcess:
        process = self.context.Process(target=role, args=(str(self.folder), *arguments), kwargs=options, daemon=True)
        process.start()
        self.processes.append(process)
        return process

    def wait_until_at_work(self, process: ForkServerProcess) -> None:
        """Wait until a process has announced that it does its work; unless it has ended."""
        signs = self.folder / f"alive-{process.pid}"
        wait_for(lambda: signs.exists() or not process.is_alive(), f"{process} to work")

    def wait_until_stopped(self, process: ForkServerProcess, where: str) -> None:
        """Wait until a process has stopped, and holds no lock: SQLite would wait for it for ever."""
        status = Path(f"/proc/{process.pid}/stat")

        def is_stopped() -> bool:
            if status.read_text().rsplit(")", 1)[1].split()[0] != "T":
                return False
            with closing(sqlite3.connect(self.folder / "stream.db", timeout=0, isolation_level=None)) as db:
                try:
                    db.execute("BEGIN IMMEDIATE")
                    db.execute("ROLLBACK")
                except sqlite3.OperationalError:
                    os.kill(process.pid or 0, signal.SIGCONT)
                    return False
            return True

        wait_for(is_stopped, f"a process to stop at {where}")

    def wake(self, process: ForkServerProcess) -> None:
        """Let a stopped process go on."""
        (self.folder / f"wake-{process.pid}").touch()
        os.kill(process.pid or 0, signal.SIGCONT)

    @property
    def books(self) -> Books:
        if self._books is None:
            self._books = self.open_books(self.folder)
        return self._books

    def settle(self) -> None:
        """Wait until everything is done, then stop all processes; none may have failed."""
        wait_for(self._done_or_broken, "everything to be done")
        (self.folder / STOP).touch()
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode in (0, -9), f"{process} ended with {process.exitcode}"

    def _done_or_broken(self) -> bool:
        broken = [process for process in self.processes if process.exitcode not in (None, 0, -9)]
        assert not broken, f"{broken} ended by themselves"
        return self.books.everything_done()

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(PATIENCE_S)
        if self._books is not None:
            self._books.close()


@pytest.fixture(scope="session")
def fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash.world", "tests.crash.joined_world"])
    with pytest.MonkeyPatch.context() as patch:
        # Measuring coverage would slow the victims, and a killed process reports none.
        for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
            patch.delenv(name)
        forkserver.ensure_running()
    return context


@pytest.fixture
def arena(tmp_path: Path, fork_server: ForkServerContext) -> Iterator[Arena]:
    arena = Arena(tmp_path, fork_server)
    yield arena
    arena.close()
