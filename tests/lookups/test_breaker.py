"""The breaker: opens, lets one try, closes; by a clock of its own, by many threads, and by a server that comes back."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from djp_dagster import HttpLookup
from djp_dagster.errors import LookupForbiddenError, LookupRefusedError, LookupUnavailableError
from djp_dagster.lookups.breaker import Breaker
from djp_dagster.testing import Clock
from tests.lookups.kit import PATIENT_S, Users, all_at_once, counts_of, users_of, wait_until
from tests.servers.scripted_http import Answer, ScriptedHttp

RESET_S = 15.0


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("users", failures=3, reset_s=RESET_S, clock=clock)


def passes(breaker: Breaker) -> bool:
    try:
        breaker.enter()
    except LookupUnavailableError as error:
        assert error.transient
        assert error.facts["sent"] is False
        assert error.facts["retry_after_s"] > 0
        return False
    return True


def opened(breaker: Breaker) -> Breaker:
    assert [breaker.failed() for _ in range(3)] == [False, False, True]
    return breaker


def test_failures_in_a_row_open_it(breaker: Breaker) -> None:
    for _ in range(5):
        assert not breaker.failed()
        assert not breaker.failed()
        breaker.succeeded()
    assert not breaker.is_open
    assert passes(opened(breaker)) is False
    assert breaker.is_open


def test_it_says_why_and_for_how_long(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(5)
    with pytest.raises(LookupUnavailableError, match=r"users has failed 3 times in a row .* in 10\.0 s") as caught:
        breaker.check()
    assert caught.value.facts["retry_after_s"] == pytest.approx(10)


def test_one_may_try_and_its_success_closes_it(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(RESET_S)
    assert [passes(breaker) for _ in range(3)] == [True, False, False]
    breaker.succeeded()
    assert [passes(breaker) for _ in range(3)] == [True, True, True]
    assert not breaker.failed(), "they are counted from the beginning"


def test_its_failure_opens_it_again_for_as_long(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(RESET_S)
    assert passes(breaker)
    assert breaker.failed()
    clock.advance(RESET_S - 0.1)
    assert not passes(breaker)
    clock.advance(0.1)
    assert passes(breaker)


def test_looking_is_not_trying(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(RESET_S)
    breaker.check()
    breaker.check()
    assert passes(breaker)
    with pytest.raises(LookupUnavailableError):
        breaker.check()


def test_who_never_says_how_it_went_keeps_the_others_out_for_a_while_only(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(RESET_S)
    assert passes(breaker)
    clock.advance(RESET_S - 1)
    assert not passes(breaker)
    clock.advance(1)
    assert passes(breaker)


def test_after_an_interruption_the_next_may_try_at_once(breaker: Breaker, clock: Clock) -> None:
    opened(breaker)
    clock.advance(RESET_S)
    assert passes(breaker)
    breaker.interrupted()
    assert breaker.is_open
    assert [passes(breaker) for _ in range(2)] == [True, False]


def test_calls_that_began_before_it_opened_end_after(breaker: Breaker, clock: Clock) -> None:
    assert all(passes(breaker) for _ in range(9))
    assert [breaker.failed() for _ in range(9)] == [False, False, True, *[False] * 6]
    clock.advance(RESET_S - 1)
    assert not passes(breaker), "late failures do not make it longer, nor shorter"
    clock.advance(1)
    assert passes(breaker)
    assert breaker.failed(), "a late failure of another counts as the trial's"
    assert not passes(breaker)
    breaker.succeeded()
    assert passes(breaker), "a late answer shows that it is there"


def test_a_service_that_wants_quiet_has_it(breaker: Breaker, clock: Clock) -> None:
    assert not breaker.failed(quiet_s=20)
    assert not breaker.failed(quiet_s=5)
    assert not breaker.is_open
    breaker.succeeded()
    clock.advance(19.9)
    with pytest.raises(LookupUnavailableError, match="users has asked not to be called"):
        breaker.check()
    clock.advance(0.1)
    assert passes(breaker)


def test_of_many_threads_one_tries(clock: Clock) -> None:
    for _ in range(20):
        breaker = opened(Breaker("users", failures=3, reset_s=RESET_S, clock=clock))
        clock.advance(RESET_S)
        assert sum(all_at_once(*[lambda breaker=breaker: passes(breaker)] * 16)) == 1


def test_whatever_happens_it_is_what_it_says(seed: random.Random) -> None:
    """Against a model: a call passes if closed; if open, once each reset time."""
    clock = Clock()
    limit, reset_s = seed.randint(1, 4), seed.choice([1.0, 10.0])
    breaker = Breaker("users", failures=limit, reset_s=reset_s, clock=clock)
    row, open_since, tried_at = 0, None, None
    for _ in range(5_000):
        step = seed.random()
        if step < 0.3:
            clock.advance(seed.choice([0.0, 0.1, reset_s / 2, reset_s]))
        elif step < 0.6:
            due = open_since is not None and clock() >= open_since + reset_s
            free = tried_at is None or clock() >= tried_at + reset_s
            assert passes(breaker) is (open_since is None or (due and free))
            if open_since is not None and due and free:
                tried_at = clock()
        elif step < 0.8:
            row += 1
            opens = tried_at is not None or (open_since is None and row >= limit)
            assert breaker.failed() is opens
            if opens:
                open_since, tried_at = clock(), None
        elif step < 0.95:
            breaker.succeeded()
            row, open_since, tried_at = 0, None, None
        else:
            breaker.interrupted()
            tried_at = None
        assert breaker.is_open is (open_since is not None)


# The whole, against a server


def test_it_opens_and_closes_with_the_server(server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup]) -> None:
    users = closing(users_of(server, attempts=1, breaker_failures=3, breaker_reset="100ms"))
    server.responder = lambda _: Answer(503)
    for _ in range(3):
        with pytest.raises(LookupUnavailableError, match="503"):
            users.get(1)
    with pytest.raises(LookupUnavailableError, match="failed 3 times in a row"):
        users.get(1)
    counts, measures = users.take_figures()
    assert counts == {
        "keys": 4, "calls": 3, "fetched": 3, "failures": 3, "refused": 1, "breaker_opened": 1
    }  # fmt: skip
    assert measures["breaker_open"] == 1.0
    assert len(server.requests) == 3
    server.responder = Users([1])
    wait_until(lambda: _answers(users), "the breaker to close")
    counts, measures = users.take_figures()
    assert measures["breaker_open"] == 0.0
    assert counts["calls"] == 1, "the first that was let through was answered"
    assert len(server.requests) == 4


def _answers(users: HttpLookup) -> bool:
    try:
        return bool(users.get(1)["name"] == "user 1")
    except LookupUnavailableError:
        return False


def test_who_waits_for_a_place_meanwhile_is_turned_away(
    server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup]
) -> None:
    """The first of those under way fails, and opens it; of those behind them none calls."""
    users = closing(users_of(server, attempts=1, max_concurrency=2, bulk_path=None, breaker_failures=1))
    server.responder = lambda _: Answer(503)
    with ThreadPoolExecutor(8) as pool:
        with server.holding():
            asking = [pool.submit(users.get_many, [number]) for number in range(8)]
            server.wait_for_requests(2)
        failures = [one.exception(PATIENT_S) for one in asking]
    assert all(isinstance(failure, LookupUnavailableError) for failure in failures)
    assert len(server.requests) == 2
    assert counts_of(users)["refused"] == 6


def test_one_call_tries_a_server_that_is_away_while_many_ask(
    server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = closing(users_of(server, attempts=1, bulk_path=None, breaker_failures=1))
    monkeypatch.setattr(users.lookup._breaker, "_clock", clock)
    server.script(Answer(503))
    server.responder = Users([1])
    with pytest.raises(LookupUnavailableError):
        users.get(0)
    clock.advance(RESET_S)
    with ThreadPoolExecutor(8) as pool:
        with server.holding():
            asking = [pool.submit(users.get_many, [1]) for _ in range(8)]
            server.wait_for_requests(2)
            wait_until(lambda: sum(one.done() for one in asking) == 7, "the others to be turned away")
        failures = [one.exception(PATIENT_S) for one in asking]
    assert failures.count(None) == 1
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_service_that_says_no_is_there(
    server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup], status: int
) -> None:
    users = closing(users_of(server, attempts=1, breaker_failures=2))
    server.script(Answer(503), Answer(status), Answer(503), Answer(status))
    server.responder = Users([1])
    for key in range(4):
        with suppress(LookupUnavailableError, LookupRefusedError):
            users.get(key)
    assert users.get(1)["id"] == 1


def test_so_is_one_that_does_not_like_us(server: ScriptedHttp, closing: Callable[[HttpLookup], HttpLookup]) -> None:
    users = closing(users_of(server, attempts=1, breaker_failures=1))
    server.responder = lambda _: Answer(401)
    for _ in range(3):
        with pytest.raises(LookupForbiddenError):
            users.get(1)
    assert len(server.requests) == 3
