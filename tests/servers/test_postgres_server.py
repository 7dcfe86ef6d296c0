from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.servers.postgres import Binaries, PostgresServer, _children, debian_binaries, wheel_binaries


def connect(url: str) -> psycopg.Connection:
    return psycopg.connect(url.replace("+psycopg", ""), connect_timeout=5)


def write_row(url: str) -> None:
    with connect(url) as connection:
        connection.execute("CREATE TABLE kept (id int)")
        connection.execute("INSERT INTO kept VALUES (1)")


def read_rows(url: str) -> list[tuple[object, ...]]:
    with connect(url) as connection:
        return connection.execute("SELECT id FROM kept").fetchall()


def test_databases_are_separate(postgres_server: PostgresServer, postgres_url: str) -> None:
    write_row(postgres_url)
    other = postgres_server.create_database()
    with pytest.raises(psycopg.errors.UndefinedTable):
        read_rows(other)
    postgres_server.drop_database(other)
    with pytest.raises(psycopg.OperationalError):
        connect(other)


@pytest.mark.parametrize("outage", ["restart", "stop", "kill"])
def test_commits_outlive_an_outage(postgres_server: PostgresServer, postgres_url: str, outage: str) -> None:
    write_row(postgres_url)
    port, pid = postgres_server.port, postgres_server.pid
    with connect(postgres_url) as open_connection:
        getattr(postgres_server, outage)()
        with pytest.raises(psycopg.OperationalError):
            open_connection.execute("SELECT 1")
    if outage != "restart":
        with pytest.raises(psycopg.OperationalError):
            connect(postgres_url)
        postgres_server.start()
    assert (postgres_server.port, postgres_server.pid != pid) == (port, True)
    assert read_rows(postgres_url) == [(1,)]


def test_kill_leaves_no_process(postgres_server: PostgresServer, postgres_url: str) -> None:
    with connect(postgres_url):
        family = _children(postgres_server.pid)
        assert family
        postgres_server.kill()
    deadline = time.monotonic() + 5
    while any(is_alive(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_alive(pid) for pid in family)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.servers
@pytest.mark.parametrize("find", [debian_binaries, wheel_binaries])
def test_a_server_of_its_own_leaves_nothing_behind(find: Callable[[], Binaries | None]) -> None:
    binaries = find()
    if binaries is None:
        pytest.skip(f"{find.__name__} found none")
    server = PostgresServer(binaries)
    try:
        server.start()
        server.start()
        write_row(server.create_database())
    finally:
        server.close()
    assert not server.running
    assert not server._home.exists()
