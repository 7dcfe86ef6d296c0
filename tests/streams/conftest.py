"""The three backends of the stream, for the contract tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.streams.sql import schema
from djp_dagster.streams.stream import EventStream, open_stream
from djp_dagster.testing import Clock, memory_stream
from tests.servers.postgres import PostgresServer


class Backend:
    """One store, and the streams opened on it; all are closed after the test."""

    def __init__(self, name: str, target: str | Path | None, payloads: Path) -> None:
        self.name = name
        self._target, self._payloads = target, payloads
        self._stack = ExitStack()
        self._first: EventStream | None = None

    def open(self, clock: Clock | None = None) -> EventStream:
        """Another stream on the same store; in memory, where there can be only one, the first."""
        if self._target is None:
            if self._first is None:
                self._first = self._stack.enter_context(memory_stream(clock=clock))
            return self._first
        stream = open_stream(self._target, payloads=open_payload_store(self._payloads), clock=clock)
        return self._stack.enter_context(stream)

    def close(self) -> None:
        """Close every stream."""
        self._stack.close()


@pytest.fixture(scope="module")
def contract_database(postgres_server: PostgresServer) -> Iterator[str]:
    """One database for the tests of a module: a fresh one for each of them would be half of their time."""
    postgres_server.start()
    url = postgres_server.create_database()
    yield url
    postgres_server.start()
    postgres_server.drop_database(url)


def emptied(url: str) -> str:
    """The URL, after removing whatever a test has left in its tables."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    if sa.inspect(engine).has_table(schema.meta.name):
        tables = ", ".join(table.name for table in schema.metadata.sorted_tables if table is not schema.meta)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"TRUNCATE {tables} RESTART IDENTITY")
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers), "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """An empty store of each kind in turn."""
    target: str | Path | None = None
    if request.param == "sqlite":
        target = tmp_path / "stream.db"
    elif request.param == "postgresql":
        target = emptied(request.getfixturevalue("contract_database"))
    backend = Backend(request.param, target, tmp_path / "payloads")
    yield backend
    backend.close()


@pytest.fixture
def stream(backend: Backend) -> EventStream:
    """A stream by the store's own clock."""
    return backend.open()


@pytest.fixture
def clock() -> Clock:
    """The virtual clock of `timed`."""
    return Clock()


@pytest.fixture
def timed(backend: Backend, clock: Clock) -> EventStream:
    """A stream by the virtual clock."""
    return backend.open(clock)
