"""Threads that ask for keys one by one share calls; nobody waits for ever, whatever becomes of whoever calls."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from djp_dagster.errors import InvalidSettingError, LookupForbiddenError, LookupRefusedError, LookupUnavailableError
from djp_dagster.lookups.gathering import Key
from djp_dagster.lookups.lookup import Lookup
from tests.lookups.kit import PATIENT_S, Service, all_at_once, away, counts_of, quick_policy, wait_until

Closing = Callable[[Lookup], Lookup]


def lookup(fetch: Any, **policy: Any) -> Lookup:
    return Lookup("users", fetch, quick_policy(**policy))


def waiting(users: Lookup) -> int:
    """How many threads wait for a call that has not begun: the one that leads, and those that wait for it."""
    gathering: Any = users._gathering
    with gathering._ended:
        promised = gathering._promised.values()
        return sum(len(future._condition._waiters) for future in promised) + bool(promised)


def is_idle(users: Lookup) -> bool:
    return not users._gathering._promised and users._gathering._under_way == 0


def busy(users: Lookup, service: Service, pool: ThreadPoolExecutor, calls: int = 2) -> list[Any]:
    """So many calls under way, as it takes for keys to be gathered."""
    asking = []
    for number in range(calls):
        asking.append(pool.submit(users.get, f"busy-{number}"))
        service.wait_for_calls(len(asking))
    return asking


def asked(users: Lookup, pool: ThreadPoolExecutor, *keys: Key) -> list[Any]:
    """Threads that ask, and wait with others."""
    before = waiting(users)
    asking = [pool.submit(users.get, key, "default") for key in keys]
    wait_until(lambda: waiting(users) == before + len(keys), "all to wait")
    return asking


def results(asking: list[Any]) -> list[Any]:
    return [one.exception(PATIENT_S) or one.result() for one in asking]


def test_keys_gathered_while_calls_are_under_way_share_the_next(closing: Closing) -> None:
    service = Service(known=lambda key: key != "nobody")
    users = closing(lookup(service))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            asking = asked(users, pool, "ada", "bob", "nobody", 1, "1", "ada", "ada")
        assert results(asking) == ["ada v0", "bob v0", "default", "1 v0", "1 v0", "ada v0", "ada v0"]
    assert [set(call) for call in service.calls[2:]] == [{"ada", "bob", "nobody", 1, "1"}]
    assert counts_of(users) == {"keys": 9, "calls": 3, "fetched": 7, "not_found": 1}
    assert is_idle(users)


def test_nobody_joins_a_call_that_has_begun(closing: Closing) -> None:
    """Its answer may be older than the event that asks."""
    service = Service()
    users = closing(lookup(service))
    with ThreadPoolExecutor(2) as pool:
        with service.holding():
            early = pool.submit(users.get, "ada")
            service.wait_for_calls(1)
            service.version = 1
            late = pool.submit(users.get, "ada")
            service.wait_for_calls(2)
        assert (early.result(PATIENT_S), late.result(PATIENT_S)) == ("ada v0", "ada v1")


def test_more_keys_than_a_call_takes_are_several(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, bulk_size=3))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            asking = asked(users, pool, *range(8))
        assert results(asking) == [f"{number} v0" for number in range(8)]
    assert sorted(map(len, service.calls[2:])) == [2, 3, 3]
    assert is_idle(users)


def test_a_service_that_takes_one_key_is_called_as_often_at_once_as_allowed(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, bulk_size=1, max_concurrency=3))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool, calls=3)
            asking = asked(users, pool, "ada", "ada", "ada", "bob")
        assert results(asking) == ["ada v0"] * 3 + ["bob v0"]
    assert service.most_at_once == 3
    assert sorted(service.calls[3:]) == [["ada"], ["bob"]], "who waited for the same key shared a call"


def test_a_failing_call_fails_all_who_share_it_each_with_an_error_of_its_own(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, attempts=2))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            service.fail(*[away(status=503)] * 2)
            asking = asked(users, pool, "ada", "bob", "bob")
        found = results(asking)
    assert [type(error) for error in found] == [LookupUnavailableError] * 3
    assert all(error.facts["status"] == 503 for error in found)
    assert found[0] is not found[1], "each thread adds to its traceback"
    assert len(service.calls) == 4, "what may pass is tried again as it was"
    assert users.get("ada") == "ada v0"
    assert is_idle(users)


@pytest.mark.parametrize("error", [LookupForbiddenError("who?"), InvalidSettingError("wrong", setting="x", value=1)])
def test_what_no_key_is_to_blame_for_is_not_asked_again(closing: Closing, error: Exception) -> None:
    service = Service()
    users = closing(lookup(service))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            service.fail(error)
            asking = asked(users, pool, "ada", "bob")
        assert [type(found) for found in results(asking)] == [type(error)] * 2
    assert len(service.calls) == 3


@pytest.mark.parametrize("kind", [LookupRefusedError, ValueError])
def test_a_key_that_is_refused_takes_no_other_with_it(
    closing: Closing, seed: random.Random, kind: type[Exception]
) -> None:
    keys = list(range(17))
    bad = set(seed.sample(keys, seed.randint(1, 3)))
    service = Service()

    def fetch(asked: Any) -> Any:
        answer = service(asked)
        if bad & set(asked):
            raise kind("one of them is no key")
        return answer

    users = closing(lookup(fetch))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            asking = asked(users, pool, *keys)
        found = results(asking)
    for key, value in zip(keys, found, strict=True):
        assert isinstance(value, kind) if key in bad else value == f"{key} v0"
    assert is_idle(users)


# Whoever calls for the others is stopped


def test_interrupted_while_it_calls(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            leader = asked(users, pool, "ada")
            service.fail(KeyboardInterrupt())
            asking = asked(users, pool, "bob", "ada")
        assert isinstance(results(leader)[0], KeyboardInterrupt)
        for error in results(asking):
            assert isinstance(error, LookupUnavailableError), "others are not interrupted, and may try again"
    assert users.get("bob") == "bob v0"
    assert is_idle(users)


def test_interrupted_while_it_waits(closing: Closing, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    users = closing(lookup(service))
    condition = users._gathering._ended
    wait_for = condition.wait_for

    def interrupted(holds: Callable[[], bool]) -> bool:
        wait_for(lambda: len(users._gathering._promised) == 3)
        raise KeyboardInterrupt

    with ThreadPoolExecutor(20) as pool:
        monkeypatch.setattr(condition, "wait_for", interrupted)
        leader = pool.submit(users.get, "ada")
        wait_until(lambda: waiting(users) == 1, "one to lead")
        followers = [pool.submit(users.get, key) for key in ("bob", "cleo")]
        wait_until(lambda: waiting(users) == 3, "all to wait")
        with condition:
            condition.notify_all()
        wait_until(leader.done, "the interruption")
        monkeypatch.undo()
        assert isinstance(leader.exception(PATIENT_S), KeyboardInterrupt)
        assert [type(error) for error in results(followers)] == [LookupUnavailableError] * 2
    assert service.calls == []
    assert users.get("bob") == "bob v0"
    assert is_idle(users)


def test_closed_while_keys_are_gathered(closing: Closing) -> None:
    """The calls under way end, and nobody is left waiting."""
    service = Service()
    users = closing(lookup(service, bulk_size=2))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            first = busy(users, service, pool)
            asking = asked(users, pool, *range(7))
            users.close()
        assert results(first) == ["busy-0 v0", "busy-1 v0"]
        assert [type(error) for error in results(asking)] == [LookupUnavailableError] * 7
    assert len(service.calls) == 2
    assert is_idle(users)


def test_an_answer_that_is_none_leaves_nobody_waiting(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(lambda keys: service(keys) if str(keys[0]).startswith("busy") else None))
    with ThreadPoolExecutor(20) as pool:
        with service.holding():
            busy(users, service, pool)
            asking = asked(users, pool, "ada", "bob")
        assert [type(error) for error in results(asking)] == [InvalidSettingError] * 2
    assert is_idle(users)


# Everything at once


def test_many_threads_keys_and_failures(closing: Closing, seed: random.Random) -> None:
    """Each gets its own value, an error that was raised for its key, or one that may pass; and all get something."""
    bad = set(seed.sample(range(60), 3))
    chance = random.Random(seed.random())
    lock = threading.Lock()

    def fetch(keys: Any) -> dict[Key, Any]:
        with lock:
            fails = chance.random() < 0.15
        if fails:
            raise away()
        if bad & set(keys):
            raise LookupRefusedError("bad", keys=list(keys))
        return {key: f"user {key}" for key in keys if key % 5}

    users = closing(lookup(fetch, bulk_size=7, max_concurrency=3, attempts=3, breaker_failures=10_000))
    plans = [[seed.randrange(60) for _ in range(60)] for _ in range(12)]

    def ask(plan: list[int]) -> int:
        answered = 0
        for key in plan:
            try:
                value = users.get(key, "default")
            except LookupUnavailableError:
                continue
            except LookupRefusedError as error:
                assert error.facts["keys"] == [key]
                assert key in bad
            else:
                assert value == (f"user {key}" if key % 5 else "default")
                assert key not in bad
            answered += 1
        return answered

    answered = all_at_once(*(lambda plan=plan: ask(plan) for plan in plans))
    assert all(isinstance(one, int) for one in answered), answered
    assert sum(answered) > 12 * 60 * 0.8
    assert counts_of(users)["keys"] == 12 * 60
    assert is_idle(users)


def test_threads_that_ask_again_and_again_leave_nobody_out(closing: Closing) -> None:
    """However busy others keep the service with calls of their own."""
    service = Service()
    users = closing(lookup(service, max_concurrency=2))
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            users.get_many(range(300))

    with ThreadPoolExecutor(8) as pool:
        hammering = [pool.submit(hammer) for _ in range(4)]
        for number in range(50):
            assert users.get(f"patient-{number}") == f"patient-{number} v0"
        stop.set()
        assert [one.result(PATIENT_S) for one in hammering] == [None] * 4
    assert service.most_at_once <= 2
