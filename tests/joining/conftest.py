"""A stream in memory whose clock stands still, with the topics that are looked at afterwards."""

from collections.abc import Iterator

import pytest

from djp_dagster import EventStream
from djp_dagster.testing import Clock, memory_stream
from tests.joining.kit import LATE, OUT


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        for topic in (OUT, LATE):
            opened.create_topic(topic)
        yield opened
