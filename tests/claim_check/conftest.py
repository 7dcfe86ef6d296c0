"""Fixtures: an empty place for payloads in a folder, on an S3 server, and on an emulator of one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.claim_check.kit import Place, eventually, own_threads, s3_place
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.seaweedfs import SeaweedServer

SEAWEEDFS = pytest.param("seaweedfs", marks=pytest.mark.servers)
MOTO = pytest.param("moto", marks=pytest.mark.servers)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Uploads and downloads end with whoever asked for them."""
    yield
    eventually(lambda: not own_threads(), within_s=20)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("at-once")]


@pytest.fixture(params=["folder", SEAWEEDFS, MOTO])
def any_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each of the three, for what all of them do."""
    yield from _made(request, request.param, tmp_path)


@pytest.fixture(params=["folder", SEAWEEDFS])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A folder, and a real server."""
    yield from _made(request, request.param, tmp_path)


@pytest.fixture
def s3(s3_server: SeaweedServer, s3_bucket: str, tmp_path: Path) -> Place:
    """A real server."""
    return s3_place(s3_server, f"s3://{s3_bucket}/pre", spool_folder=str(tmp_path / "spool"))


@pytest.fixture(scope="session")
def _proxy(s3_server: SeaweedServer) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(_proxy: FaultyS3) -> Iterator[FaultyS3]:
    """As everywhere, but on one port for all tests, and so with one client."""
    _proxy.server.start()
    yield _proxy
    _proxy.clear()


@pytest.fixture
def faulty(faulty_s3: FaultyS3, s3_bucket: str, tmp_path: Path) -> Place:
    """The same, through a proxy that fails when told to."""
    return s3_place(
        faulty_s3.server, f"s3://{s3_bucket}/pre", faulty_s3.endpoint_url, spool_folder=str(tmp_path / "spool")
    )


def _made(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Iterator[Place]:
    if kind == "folder":
        yield Place(str(tmp_path / "payloads"))
        return
    spool = str(tmp_path / "spool")
    if kind == "seaweedfs":
        server, bucket = request.getfixturevalue("s3_server"), request.getfixturevalue("s3_bucket")
        yield s3_place(server, f"s3://{bucket}/pre", spool_folder=spool)
        return
    server = request.getfixturevalue("moto_server")
    bucket = server.new_bucket()
    yield s3_place(server, f"s3://{bucket}/pre", spool_folder=spool)
    server.drop_bucket(bucket)
