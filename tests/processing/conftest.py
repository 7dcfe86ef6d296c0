"""A stream in memory whose clock stands still, and a folder for state."""

from collections.abc import Iterator

import pytest

from djp_dagster import EventStream
from djp_dagster.testing import Clock, memory_stream


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        yield opened
