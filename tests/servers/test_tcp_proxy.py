from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import TcpProxy, When


@pytest.fixture
def proxy(postgres_server: PostgresServer, postgres_url: str) -> Iterator[TcpProxy]:
    threads = threading.active_count()
    with TcpProxy(postgres_server.port) as proxy:
        yield proxy
    assert threading.active_count() == threads


@pytest.fixture
def direct(postgres_url: str) -> str:
    return postgres_url.replace("+psycopg", "")


@pytest.fixture
def proxied(postgres_server: PostgresServer, proxy: TcpProxy, direct: str) -> str:
    return direct.replace(f":{postgres_server.port}/", f":{proxy.port}/")


def count(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT count(*) FROM entry").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize(("when", "kept"), [("before", 0), ("after", 1)])
def test_commit_is_cut_once(proxy: TcpProxy, proxied: str, direct: str, when: When, kept: int) -> None:
    with psycopg.connect(direct) as connection:
        connection.execute("CREATE TABLE entry (id int)")
    connection = psycopg.connect(proxied)
    connection.execute("INSERT INTO entry VALUES (1)")
    cut = proxy.cut_on(b"COMMIT", when)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    assert cut.done.wait(5)
    assert connection.broken
    connection.close()
    assert count(direct) == kept
    with psycopg.connect(proxied) as again:
        again.execute("INSERT INTO entry VALUES (2)")
    assert count(direct) == kept + 1


def test_pause_refuses_and_resume_accepts(proxy: TcpProxy, proxied: str) -> None:
    connection = psycopg.connect(proxied)
    proxy.pause()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))
    proxy.resume()
    with psycopg.connect(proxied) as again:
        assert again.execute("SELECT 1").fetchone() == (1,)


def test_pattern_split_between_two_reads_is_seen() -> None:
    received = bytearray()

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while chunk := connection.recv(1024):
                received.extend(chunk)
                connection.sendall(b"ok")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=[listener])
        server.start()
        with TcpProxy(listener.getsockname()[1]) as proxy:
            cut = proxy.cut_on(b"COMMIT", "before")
            with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(b"INSERT; COM")
                assert client.recv(1024) == b"ok"
                client.sendall(b"MIT;")
                assert client.recv(1024) == b""
            assert cut.done.wait(5)
        server.join(5)
    assert bytes(received) == b"INSERT; COM"


def test_an_unreachable_server_is_a_closed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        unused = listener.getsockname()[1]
    with (
        TcpProxy(unused) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port)) as client,
    ):
        assert client.recv(1024) == b""
