"""Values by key: each asked for once, in as few calls as possible, tried again within a budget, not from memory."""

import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from djp_dagster import TransientError
from djp_dagster.errors import InvalidSettingError, LookupForbiddenError, LookupRefusedError, LookupUnavailableError
from djp_dagster.lookups.gathering import Key
from djp_dagster.lookups.lookup import Lookup, LookupPolicy
from tests.lookups.kit import PATIENT_S, Service, all_at_once, away, counts_of, quick_policy, wait_until

Closing = Callable[[Lookup], Lookup]


def lookup(fetch: Any, **policy: Any) -> Lookup:
    return Lookup("users", fetch, quick_policy(**policy))


# Keys and calls


def test_ten_thousand_events_of_five_hundred_users_are_five_calls(closing: Closing, seed: random.Random) -> None:
    service = Service()
    users = closing(lookup(service))
    wanted = [f"user-{number}" for number in [*range(500), *(seed.randrange(500) for _ in range(9_500))]]
    seed.shuffle(wanted)
    found = users.get_many(wanted)
    assert found == {user: f"{user} v0" for user in wanted}
    assert list(found) == list(dict.fromkeys(wanted)), "in the order of the question"
    assert sorted(map(len, service.calls)) == [100] * 5
    assert counts_of(users) == {"keys": 10_000, "calls": 5, "fetched": 500}


def test_nothing_is_asked_for_nothing(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service))
    assert users.get_many([]) == {}
    assert users.get_many(iter(())) == {}
    assert service.calls == []
    assert counts_of(users) == {"keys": 0}


def test_a_number_and_its_text_are_two_keys(closing: Closing) -> None:
    users = closing(lookup(lambda keys: {key: type(key).__name__ for key in keys}))
    assert users.get_many([1, "1", 1]) == {1: "int", "1": "str"}
    assert (users.get(1), users.get("1")) == ("int", "str")


def test_nothing_known_and_not_known_are_two_answers(closing: Closing) -> None:
    users = closing(lookup(lambda keys: {key: None for key in keys if key == "nothing"}))
    assert users.get_many(["nothing", "unknown"]) == {"nothing": None}
    assert users.get("nothing", "default") is None
    assert users.get("unknown", "default") == "default"
    assert users.get("unknown") is None
    assert counts_of(users)["not_found"] == 3


def test_calls_hold_what_fits(closing: Closing, seed: random.Random) -> None:
    def fitting(keys: Any) -> int:
        """Up to 20 letters; 0 where not even the first does, which is asked for alone."""
        lengths = [sum(len(str(key)) for key in keys[: number + 1]) for number in range(len(keys))]
        return sum(length <= 20 for length in lengths)

    service = Service()
    users = closing(Lookup("users", service, quick_policy(bulk_size=5), fitting=fitting))
    wanted: list[Key] = list({"x" * seed.randint(1, 30) + str(number) for number in range(100)})
    assert users.get_many(wanted) == {key: f"{key} v0" for key in wanted}
    assert sorted(key for call in service.calls for key in call) == sorted(wanted)
    for call in service.calls:
        assert len(call) <= 5
        assert len(call) == 1 or sum(map(len, map(str, call))) <= 20


# Tries


@pytest.mark.parametrize("error", [away(), TransientError("later"), OSError("reset"), TimeoutError("late")])
def test_what_may_pass_is_tried_again(closing: Closing, error: Exception) -> None:
    service = Service()
    service.fail(error, error)
    users = closing(lookup(service))
    assert users.get_many([1]) == {1: "1 v0"}
    assert service.calls == [[1]] * 3
    assert counts_of(users) == {"keys": 1, "calls": 3, "fetched": 3, "failures": 2, "retries": 2}


@pytest.mark.parametrize("ask", [lambda users: users.get(1), lambda users: users.get_many([1])])
def test_it_is_given_up_after_as_many_attempts(closing: Closing, ask: Callable[[Lookup], Any]) -> None:
    service = Service()
    service.fail(*[OSError("reset")] * 9)
    users = closing(lookup(service, attempts=3))
    with pytest.raises(LookupUnavailableError, match="users did not answer: OSError: reset") as caught:
        ask(users)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(service.calls) == 3
    assert counts_of(users)["retries"] == 2


@pytest.mark.parametrize("error", [LookupRefusedError("wrong"), LookupForbiddenError("who?"), ValueError("bug")])
def test_what_will_not_pass_is_not_tried_again(closing: Closing, error: Exception) -> None:
    service = Service()
    service.fail(error)
    users = closing(lookup(service))
    with pytest.raises(type(error)):
        users.get_many([1])
    assert len(service.calls) == 1
    assert users.get(1) == "1 v0"


def test_no_pause_ends_after_the_budget(closing: Closing) -> None:
    """The service asks for more than there is: whoever asks is told at once, and it is not called before that time."""
    service = Service()
    service.fail(away(retry_after_s=100.0))
    users = closing(lookup(service, give_up_after="10s"))
    started = time.monotonic()
    with pytest.raises(LookupUnavailableError):
        users.get(1)
    with pytest.raises(LookupUnavailableError, match="users has asked not to be called") as caught:
        users.get(2)
    assert time.monotonic() - started < 10
    assert caught.value.facts["retry_after_s"] > 89
    assert service.calls == [[1]]
    assert counts_of(users)["refused"] == 1


def test_pauses_are_as_long_as_the_service_wants_and_not_all_alike(closing: Closing) -> None:
    begun: list[float] = []

    def fetch(keys: Any) -> dict[Key, Any]:
        begun.append(time.monotonic())
        if len(begun) % 3:
            raise away(retry_after_s=0.02)
        return {}

    users = closing(lookup(fetch))
    for key in range(5):
        users.get(key)
    pauses = [after - before for number, (before, after) in enumerate(pairwise(begun)) if number % 3 < 2]
    assert len(pauses) == 10
    assert min(pauses) >= 0.02
    assert len(set(pauses)) == 10


def test_waiting_for_a_place_costs_nothing_of_the_budget(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, max_concurrency=1, bulk_size=1, give_up_after=0.05))
    with ThreadPoolExecutor(2) as pool:
        with service.holding():
            first = pool.submit(users.get_many, [1])
            service.wait_for_calls(1)
            service.fail(away())
            second = pool.submit(users.get_many, [2])
            held = time.monotonic()
            wait_until(lambda: time.monotonic() - held > 0.1, "the budget to be spent")
        assert (first.result(PATIENT_S), second.result(PATIENT_S)) == ({1: "1 v0"}, {2: "2 v0"})
    assert service.calls == [[1], [2], [2]]


def test_one_of_many_calls_fails(closing: Closing) -> None:
    """Those under way are waited for, the others are not begun."""
    service = Service()
    service.fail(LookupForbiddenError("who?"))
    users = closing(lookup(service, bulk_size=1, max_concurrency=2))
    with pytest.raises(LookupForbiddenError):
        users.get_many(range(1000))
    assert 1 <= len(service.calls) < 1000
    begun = len(service.calls)
    assert users.get(5) == "5 v0"
    assert len(service.calls) == begun + 1


@pytest.mark.parametrize("answer", [None, [1, 2], "text"])
def test_what_asks_must_return_a_mapping(closing: Closing, answer: Any) -> None:
    users = closing(lookup(lambda keys: answer))
    for ask in (lambda: users.get(1), lambda: users.get_many([1])):
        with pytest.raises(InvalidSettingError, match="must return a mapping"):
            ask()


# The cache


def test_without_a_cache_a_change_is_seen_at_once(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service))
    assert users.get_many([1]) == {1: "1 v0"}
    service.version = 1
    assert users.get_many([1]) == {1: "1 v1"}
    service.version = 2
    assert users.get(1) == "1 v2"


def test_a_cache_answers_until_its_time_is_up(closing: Closing) -> None:
    service = Service(known=lambda key: key != "nobody")
    users = closing(lookup(service, cache_ttl="100ms"))
    assert users.get_many(["ada", "nobody"]) == {"ada": "ada v0"}
    service.version = 1
    assert users.get_many(["ada", "nobody", "bob"]) == {"ada": "ada v0", "bob": "bob v1"}
    assert users.get("nobody", "default") == "default"
    assert [sorted(map(str, call)) for call in service.calls] == [["ada", "nobody"], ["bob"]]
    counts = counts_of(users)
    assert (counts["cache_hits"], counts["keys"], counts["fetched"]) == (3, 6, 3)
    wait_until(lambda: users.get("ada") == "ada v1", "the answer's end")


def test_a_cached_key_waits_for_nobody(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, cache_ttl="1h"))
    users.get("cached")
    with ThreadPoolExecutor(2) as pool:
        with service.holding():
            others = [pool.submit(users.get, "one")]
            service.wait_for_calls(2)
            others.append(pool.submit(users.get, "two"))
            service.wait_for_calls(3)
            assert users.get("cached") == "cached v0"
        assert [other.result(PATIENT_S) for other in others] == ["one v0", "two v0"]


def test_a_cache_keeps_no_more_than_it_may(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, cache_ttl="1h", cache_size=10))
    users.get_many(range(100))
    counts_of(users)
    assert len(users.get_many(range(100))) == 100
    assert counts_of(users)["cache_hits"] == 10


# Its end


def test_once_closed_it_calls_nobody(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, bulk_size=1))
    users.get_many([1, 2])
    users.close()
    for ask in (lambda: users.get(3), lambda: users.get_many([3]), lambda: users.get_many([3, 4])):
        with pytest.raises(LookupUnavailableError, match="users is not called"):
            ask()
    assert len(service.calls) == 2


@pytest.mark.parametrize("ask", [lambda users: users.get(1), lambda users: users.get_many([1, 2, 3])])
def test_nobody_waits_longer_to_try_again(closing: Closing, ask: Callable[[Lookup], Any]) -> None:
    service = Service()
    service.fail(*[away(retry_after_s=3000.0)] * 9)
    users = closing(lookup(service, give_up_after="1h", bulk_size=1))
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, users)
        service.wait_for_calls(1)
        users.close()
        with pytest.raises(LookupUnavailableError):
            asking.result(PATIENT_S)


def test_what_asks_must_not_ask_through_the_lookup(closing: Closing) -> None:
    """It may ask another one."""
    made: dict[str, Lookup] = {}
    other = closing(lookup(lambda keys: dict.fromkeys(keys, "other")))
    for ask in (lambda: made["users"].get(2), lambda: made["users"].get_many([2, 3])):
        made["users"] = closing(lookup(lambda keys, ask=ask: ask(), max_concurrency=1))
        with pytest.raises(InvalidSettingError, match="must not ask it through the look-up again"):
            made["users"].get(1)
    users = closing(lookup(lambda keys: {key: other.get(key) for key in keys}, max_concurrency=1))
    assert users.get(1) == "other"


def test_an_interrupted_call_leaves_it_usable(closing: Closing) -> None:
    service = Service()
    service.fail(*[away()] * 2, KeyboardInterrupt())
    users = closing(lookup(service, attempts=1, breaker_failures=2, breaker_reset="1us"))
    for _ in range(2):
        with pytest.raises(LookupUnavailableError):
            users.get_many([1])
    with pytest.raises(KeyboardInterrupt):
        users.get_many([1])
    assert users.figures.take()[1]["breaker_open"] == 1.0, "an interruption does not say that the service is well"
    assert users.get_many([1]) == {1: "1 v0"}
    assert users.figures.take()[1]["breaker_open"] == 0.0


# Settings and figures


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("bulk_size", 0),
        ("bulk_size", True),
        ("max_concurrency", -1),
        ("attempts", 0),
        ("breaker_failures", 0),
        ("cache_size", 0),
        ("first_pause", "soon"),
        ("longest_pause", -1),
        ("give_up_after", "x"),
        ("breaker_reset", None),
        ("cache_ttl", "1 fortnight"),
        ("rate_limit", 0),
        ("rate_limit", -1.5),
        ("rate_limit", float("nan")),
        ("rate_limit", float("inf")),
    ],
)
def test_wrong_settings_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(InvalidSettingError, match=setting) as caught:
        LookupPolicy(**{setting: value})
    assert caught.value.facts["setting"] == setting


def test_figures_are_those_of_the_service(closing: Closing, seed: random.Random) -> None:
    """Whatever fails meanwhile, and however many ask: each call, and each key in it, is counted once."""
    service = Service(known=lambda key: int(key) % 7 != 0)
    service.fail(*[away() for _ in range(20)])
    users = closing(lookup(service, bulk_size=3, attempts=30, breaker_failures=1000))
    asked = [[seed.randrange(50) for _ in range(seed.randint(1, 20))] for _ in range(20)]
    answers = all_at_once(*(lambda keys=keys: users.get_many(keys) for keys in asked))
    assert answers == [{key: f"{key} v0" for key in dict.fromkeys(keys) if key % 7} for keys in asked]
    counts, measures = users.figures.take()
    sent = [key for call in service.calls for key in call]
    assert counts == {
        "keys": sum(map(len, asked)),
        "calls": len(service.calls),
        "fetched": len(sent),
        "not_found": sum(len({key for key in keys if key % 7 == 0}) for keys in asked),
        "failures": 20,
        "retries": 20,
    }
    assert measures["keys_per_call"] == pytest.approx(len(sent) / len(service.calls), abs=1e-3)
    assert 0 < measures["p50_seconds"] <= measures["p99_seconds"]
    assert users.figures.take()[0] == {}


def test_latencies_are_measured_and_waits_apart(closing: Closing) -> None:
    service = Service()
    users = closing(lookup(service, max_concurrency=1, bulk_size=1))
    with ThreadPoolExecutor(2) as pool:
        with service.holding():
            asking = [pool.submit(users.get_many, [number]) for number in range(2)]
            service.wait_for_calls(1)
            held = time.monotonic()
            wait_until(lambda: time.monotonic() - held > 0.05, "some time")
        assert [one.result(PATIENT_S) for one in asking]
    _, measures = users.figures.take()
    assert measures["p99_seconds"] >= 0.05
    assert 0.0 < measures["wait_seconds"] <= time.monotonic() - held + 1


def test_without_the_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    with pytest.raises(InvalidSettingError, match=r"djp-dagster\[lookup\]"):
        lookup(lambda keys: {})


def test_threads_are_few_and_end(closing: Closing) -> None:
    before = threading.active_count()
    service = Service()
    users = lookup(service, bulk_size=1, max_concurrency=3, rate_limit=1e6)
    users.get_many(range(100))
    assert service.most_at_once <= 3
    assert threading.active_count() <= before + 3
    users.close()
    assert threading.active_count() == before
