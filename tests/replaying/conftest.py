"""A stream in memory whose clock stands still."""

from collections.abc import Iterator

import pytest

from djp_dagster import EventStream
from djp_dagster.testing import Clock, memory_stream
from tests.replaying.kit import DAY


@pytest.fixture
def clock() -> Clock:
    return Clock(DAY.timestamp())


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        yield opened
