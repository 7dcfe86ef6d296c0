"""A stream in memory whose clock stands still; and a folder of its own for whoever names none."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster import EventStream
from djp_dagster.testing import Clock, memory_stream


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DJP_STATE_FOLDER", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        yield opened
