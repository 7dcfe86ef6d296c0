"""Never more calls in any second than agreed, nor at the same time."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from djp_dagster import HttpLookup
from djp_dagster.errors import LookupUnavailableError
from djp_dagster.lookups.limits import RateLimit
from djp_dagster.lookups.lookup import Lookup
from djp_dagster.testing import Clock
from tests.lookups.kit import PATIENT_S, Service, Users, counts_of, quick_policy, users_of
from tests.servers.scripted_http import ScriptedHttp


def most_within(times: list[float], window_s: float) -> int:
    """The most that lie in any window, its end not included."""
    times = sorted(times)
    return max(sum(begin <= at < begin + window_s for at in times[index:]) for index, begin in enumerate(times))


def test_in_no_second_are_there_more(seed: random.Random) -> None:
    for _ in range(20):
        clock = Clock(seed.uniform(0, 1e6))
        rate = seed.choice([1, 2, 2.9, 7, 50])
        limit = RateLimit(rate, clock.advance, clock=clock)
        times = []
        for _ in range(200):
            clock.advance(seed.choice([0.0, 0.0, 0.001, seed.expovariate(rate), seed.uniform(0, 3)]))
            limit.wait()
            times.append(clock())
        assert most_within(times, 1.0) <= int(rate)


def test_it_waits_no_longer_than_it_must(seed: random.Random) -> None:
    clock = Clock()
    limit = RateLimit(10, clock.advance, clock=clock)
    started = clock()
    for _ in range(1000):
        limit.wait()
    assert clock() - started == pytest.approx(99, abs=99 * 0.01)
    clock.advance(1.01)
    before = clock()
    for _ in range(10):
        limit.wait()
    assert clock() == before, "after a quiet second there is no wait for as many as are allowed"


@pytest.mark.parametrize(("rate", "apart_s"), [(0.5, 2.0), (0.3, 10 / 3), (0.001, 1000.0)])
def test_less_than_one_a_second(rate: float, apart_s: float) -> None:
    clock = Clock()
    limit = RateLimit(rate, clock.advance, clock=clock)
    times = []
    for _ in range(5):
        limit.wait()
        times.append(clock())
    gaps = [after - before for before, after in pairwise(times)]
    assert all(apart_s <= gap <= apart_s + 0.01 for gap in gaps)


def test_what_it_remembers_does_not_grow() -> None:
    clock = Clock()
    limit = RateLimit(100, clock.advance, clock=clock)
    for _ in range(10_000):
        limit.wait()
    assert limit._bucket.count() <= 300


def test_threads_wait_for_their_turn(closing: Callable[[Lookup], Lookup]) -> None:
    begun: list[float] = []
    lock = threading.Lock()

    def fetch(keys: Any) -> dict[Any, Any]:
        with lock:
            begun.append(time.monotonic())
        return {}

    users = closing(Lookup("users", fetch, quick_policy(bulk_size=1, rate_limit=20, max_concurrency=8)))
    started = time.monotonic()
    users.get_many(range(50))
    took = time.monotonic() - started
    assert len(begun) == 50
    assert took >= 2.0
    # A call begins a little later than it was let through; what follows a second later may be quicker.
    assert most_within(begun, 0.8) <= 20
    assert users.figures.take()[1]["wait_seconds"] > 2.0


def test_each_try_counts(closing: Callable[[Lookup], Lookup]) -> None:
    service = Service()
    service.fail(*[LookupUnavailableError("away")] * 5)
    users = closing(Lookup("users", service, quick_policy(attempts=6, rate_limit=5)))
    started = time.monotonic()
    users.get(1)
    assert len(service.calls) == 6
    assert time.monotonic() - started >= 1.0


def test_nobody_waits_for_a_rate_once_closed(closing: Callable[[Lookup], Lookup]) -> None:
    service = Service()
    users = closing(Lookup("users", service, quick_policy(rate_limit=0.001)))
    users.get(0)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(users.get_many, [number]) for number in range(3)]
        users.close()
        for one in waiting:
            assert isinstance(one.exception(PATIENT_S), LookupUnavailableError)
    assert len(service.calls) == 1


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_server_never_has_more_at_the_same_time(
    server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup], seed: random.Random, at_once: int
) -> None:
    """Whoever asks, and however: by one key, by many, by writing."""
    service = Users(range(1000))
    server.responder = service
    users = closing(users_of(server, bulk_size=5, max_concurrency=at_once))
    with ThreadPoolExecutor(12) as pool:
        with server.holding():
            asking = [pool.submit(users.get_many, range(50)) for _ in range(3)]
            asking += [pool.submit(users.get, number) for number in range(6)]
            asking += [pool.submit(users.write, "POST", "/users/search", {"ids": [1]}) for _ in range(3)]
            server.wait_for_requests(at_once)
        assert all(one.result(PATIENT_S) for one in asking)
    assert server.most_at_once == at_once
    assert counts_of(users)["calls"] == len(server.requests)


def test_calls_are_made_at_the_same_time(server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup]) -> None:
    server.responder = Users(range(40))
    users = closing(users_of(server, bulk_size=10))
    with ThreadPoolExecutor(1) as pool:
        with server.holding():
            asking = pool.submit(users.get_many, range(40))
            server.wait_for_requests(4)
        assert len(asking.result(PATIENT_S)) == 40
