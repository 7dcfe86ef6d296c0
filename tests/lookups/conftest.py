"""A stream in memory, a scripted server, look-ups that are closed, and a check that no thread is left behind."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from djp_dagster import EventStream
from djp_dagster.testing import Clock, memory_stream
from tests.lookups.kit import wait_until
from tests.servers.scripted_http import ScriptedHttp

Closable = TypeVar("Closable")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(clock: Clock) -> Iterator[EventStream]:
    with memory_stream(clock=clock) as opened:
        yield opened


@pytest.fixture
def server() -> Iterator[ScriptedHttp]:
    with ScriptedHttp() as started:
        yield started


@pytest.fixture
def closing() -> Iterator[Callable[[Closable], Closable]]:
    """Registers what is closed after the test; then none of its threads may be left."""
    before = set(threading.enumerate())
    made: list[Any] = []

    def register(one: Closable) -> Closable:
        made.append(one)
        return one

    yield register
    for one in made:
        one.close()
    ours = ("djp-", "PyrateLimiter")

    def left() -> list[threading.Thread]:
        return [one for one in threading.enumerate() if one.name.startswith(ours) and one not in before]

    wait_until(lambda: not left(), f"the end of {left()}")
