"""A stream in a file as Dagster's resource, an instance that forgets, and a virtual clock."""

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from djp_dagster import EventStream, SqlEventStream
from djp_dagster.resources import event_stream
from djp_dagster.testing import Clock, memory_stream


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(clock: Clock) -> Iterator[EventStream]:
    """A stream in memory by the virtual clock."""
    with memory_stream(clock=clock) as opened:
        yield opened


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def lasting(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with files, which other processes and contexts can open."""
    home = tmp_path / "home"
    home.mkdir()
    with dg.instance_for_test(temp_dir=str(home)) as made:
        yield made


@pytest.fixture
def resource(tmp_path: Path) -> Iterator[SqlEventStream]:
    """The resource `event_stream`, on a file of this test; closed afterwards."""
    made = SqlEventStream(url=f"sqlite:///{tmp_path / 'stream.db'}", state_folder=str(tmp_path / "state"))
    yield made
    key = (os.getpid(), made.url or "", None)
    opened = event_stream._open_streams.pop(key, None)
    if opened is not None:
        opened.stream.close()


@pytest.fixture
def stream(resource: SqlEventStream) -> EventStream:
    """What the resource opens."""
    return resource.open()
