"""`Lookup`: values by key from a service, whatever it speaks; the rings of `djp_dagster.lookups`."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidSettingError, LookupUnavailableError, TransientError
from djp_dagster.lookups.breaker import Breaker
from djp_dagster.lookups.figures import Figures
from djp_dagster.units import Duration, is_count, parse_seconds

if TYPE_CHECKING:
    from pyrate_limiter import Limiter

Key = str | int
Fetch = Callable[[Sequence[Key]], Mapping[Key, Any]]
_ABSENT = object()
_ENOUGH_UNDER_WAY = 2
"""With so many calls under way, keys that are asked for one by one wait for one to end, and share the next."""


class LookupPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How a service is called.

    Args:
        bulk_size: how many keys one call takes; 1 for a service that takes one.
        max_concurrency: how many calls are under way at the same time.
        attempts: how often a call is tried in all.
        first_pause, longest_pause: between tries, at random up to twice as long each time; unless the service says
            more.
        give_up_after: no pause is begun that would end later than this after the first try.
        rate_limit: calls a second; None for as many as come.
        breaker_failures: so many failures in a row, and nobody calls for ``breaker_reset``.
        cache_ttl: how long an answer may be used again; None (the default) asks every time.
        cache_size: how many answers are kept.

    Raises:
        InvalidSettingError: naming the setting and what is allowed.
    """

    bulk_size: int = 100
    max_concurrency: int = 8
    attempts: int = 4
    first_pause: Duration = 0.2
    longest_pause: Duration = 10.0
    give_up_after: Duration = 60.0
    rate_limit: float | None = None
    breaker_failures: int = 10
    breaker_reset: Duration = 15.0
    cache_ttl: Duration | None = None
    cache_size: int = 10_000

    def __post_init__(self) -> None:
        for name in ("bulk_size", "max_concurrency", "attempts", "breaker_failures", "cache_size"):
            value = getattr(self, name)
            if not is_count(value) or value < 1:
                raise InvalidSettingError(f"{name}={value!r} must be 1 or more", setting=name, value=value)
        for name in ("first_pause", "longest_pause", "give_up_after", "breaker_reset", "cache_ttl"):
            value = getattr(self, name)
            if value is not None and parse_seconds(value, name=name) < 0:
                raise InvalidSettingError(f"{name}={value!r} must not be negative", setting=name, value=value)
        if self.rate_limit is not None and not self.rate_limit > 0:
            raise InvalidSettingError(
                f"rate_limit={self.rate_limit!r} must be above 0", setting="rate_limit", value=self.rate_limit
            )


class Lookup:
    """Values by key, asked of a service. Safe to share between threads; close it after use.

    Args:
        name: of the service, for errors and figures; never with credentials.
        fetch: asks for up to ``bulk_size`` keys; keys it does not know are missing in the answer. It raises
            `LookupUnavailableError` for what may be tried again, naming ``retry_after_s`` if the service did.
        policy: how it is called.

    Example:
        >>> users = Lookup("users", lambda keys: {key: {"name": f"user {key}"} for key in keys if key != 3})
        >>> users.get_many([1, 2, 2, 3])
        {1: {'name': 'user 1'}, 2: {'name': 'user 2'}}
        >>> users.figures.take()[0]
        {'keys': 4, 'fetched': 3, 'calls': 1, 'not_found': 1}
        >>> users.close()
    """

    def __init__(self, name: str, fetch: Fetch, policy: LookupPolicy | None = None) -> None:
        self.name, self.policy, self._fetch = name, policy or LookupPolicy(), fetch
        self.figures = Figures()
        self._breaker = Breaker(
            name,
            failures=self.policy.breaker_failures,
            reset_s=parse_seconds(self.policy.breaker_reset, name="breaker_reset"),
        )
        self._places = threading.BoundedSemaphore(self.policy.max_concurrency)
        self._limiter = None if self.policy.rate_limit is None else _limiter(self.policy.rate_limit)
        self._pool = ThreadPoolExecutor(self.policy.max_concurrency, thread_name_prefix=f"djp-lookup-{name}")
        self._lock = threading.Lock()
        self._asked: dict[Key, Future[Any]] = {}
        self._gathering: list[Key] = []
        self._cache = _cache_of(self.policy)
        self._under_way = 0
        self._call_ended = threading.Condition(self._lock)

    def close(self) -> None:
        """End its threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` if the service does not know it.

        Threads that ask at the same time share a call.

        Raises:
            LookupUnavailableError: the service did not answer; transient.
        """
        self.figures.add("keys")
        mine, leads = self._join(key)
        if leads:
            self._ask_for(self._gathered())
        value = mine.result()
        return default if value is _ABSENT else value

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those keys that the service knows; each key is asked for once, in as few calls as possible.

        Raises:
            LookupUnavailableError: the service did not answer for some; transient.
        """
        asked = list(keys)
        self.figures.add("keys", len(asked))
        wanted = list(dict.fromkeys(asked))
        found: dict[Key, Any] = {}
        missing = [key for key in wanted if not self._from_cache(key, found)]
        size = self.policy.bulk_size
        pieces = [missing[start : start + size] for start in range(0, len(missing), size)]
        answers = [self._call(piece) for piece in pieces] if len(pieces) < 2 else self._all_of(pieces)
        for piece, answer in zip(pieces, answers, strict=True):
            found.update({key: answer[key] for key in piece if key in answer})
        return {key: found[key] for key in wanted if key in found and found[key] is not _ABSENT}

    def _all_of(self, pieces: Sequence[list[Key]]) -> list[Mapping[Key, Any]]:
        """All at the same time; if one fails, after the others have ended."""
        futures = [self._pool.submit(self._call, piece) for piece in pieces]
        failed: BaseException | None = None
        answers: list[Mapping[Key, Any]] = []
        for future in futures:
            try:
                answers.append(future.result())
            except Exception as error:  # noqa: BLE001
                failed = failed or error
        if failed is not None:
            raise failed
        return answers

    def _join(self, key: Key) -> tuple["Future[Any]", bool]:
        """The answer to come for ``key``, and whether this thread is the first of those who gather keys."""
        with self._lock:
            known = self._asked.get(key)
            if known is not None:
                return known, False
            mine = self._asked[key] = Future()
            self._gathering.append(key)
            return mine, len(self._gathering) == 1

    def _gathered(self) -> list[Key]:
        with self._lock:
            if self.policy.bulk_size > 1:
                self._call_ended.wait_for(lambda: self._under_way < _ENOUGH_UNDER_WAY)
            keys, self._gathering = self._gathering, []
            return keys

    def _ask_for(self, keys: Sequence[Key]) -> None:
        """Ask, and tell all who wait: each call tells its own."""
        found: dict[Key, Any] = {}
        missing = [key for key in keys if not self._from_cache(key, found)]
        self._tell(list(found), found)
        size = self.policy.bulk_size
        for start in range(0, len(missing), size):
            piece = missing[start : start + size]
            if start + size < len(missing):
                self._pool.submit(self._ask_and_tell, piece)
            else:
                self._ask_and_tell(piece)

    def _ask_and_tell(self, piece: list[Key]) -> None:
        try:
            answer = self._call(piece)
        except BaseException as error:
            for future in self._let_go(piece):
                future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._tell(piece, answer)

    def _tell(self, keys: Sequence[Key], answer: Mapping[Key, Any]) -> None:
        for key, future in zip(keys, self._let_go(keys), strict=True):
            future.set_result(answer.get(key, _ABSENT))

    def _let_go(self, keys: Sequence[Key]) -> list["Future[Any]"]:
        with self._lock:
            return [self._asked.pop(key) for key in keys]

    def _from_cache(self, key: Key, found: dict[Key, Any]) -> bool:
        if self._cache is None:
            return False
        with self._lock:
            value = self._cache.get(key, None)
        if value is None:
            return False
        found[key] = value[0]
        self.figures.add("cache_hits")
        return True

    def _call(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """One call, tried until it is answered or given up."""
        self.figures.add("fetched", len(keys))
        answer: Mapping[Key, Any] = self.attempt(lambda: self._fetch(keys))
        missing = len(keys) - sum(key in answer for key in keys)
        if missing:
            self.figures.add("not_found", missing)
        if self._cache is not None:
            with self._lock:
                self._cache.update({key: (answer.get(key, _ABSENT),) for key in keys})
        return answer

    def attempt(self, call: Callable[[], Any], *, may_repeat: bool = True) -> Any:
        """Make ``call`` through rings 3 to 6.

        Args:
            call: raises `LookupUnavailableError` for what may be tried again.
            may_repeat: whether doing it twice does no harm.

        Raises:
            LookupUnavailableError: it was given up.
        """
        import tenacity

        policy = self.policy
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(policy.attempts if may_repeat else 1),
            wait=self._pause,
            retry=tenacity.retry_if_exception(self._is_worth_another),
            before_sleep=lambda _: self.figures.add("retries"),
            reraise=True,
        )
        return retrying(self._guarded, call)

    def _is_worth_another(self, error: BaseException) -> bool:
        """Whether a pause that this error asks for fits into the budget."""
        longest = parse_seconds(self.policy.give_up_after, name="give_up_after")
        return isinstance(error, LookupUnavailableError) and error.facts.get("retry_after_s", 0.0) <= longest

    def _pause(self, state: Any) -> float:
        """How long to wait: at random, longer each time, but as long as the service says."""
        import random

        policy = self.policy
        error = state.outcome.exception()
        longest = parse_seconds(policy.longest_pause, name="longest_pause")
        bound = min(parse_seconds(policy.first_pause, name="first_pause") * 2 ** (state.attempt_number - 1), longest)
        pause: float = bound * random.uniform(0.5, 1.0)  # noqa: S311
        pause = max(pause, float(error.facts.get("retry_after_s", 0.0)))
        if state.seconds_since_start + pause > parse_seconds(policy.give_up_after, name="give_up_after"):
            raise error
        return pause

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            self._breaker.enter()
        except LookupUnavailableError:
            self.figures.add("refused")
            raise
        with self._place():
            try:
                answer = self._timed(call)
            except (TransientError, OSError) as error:
                self.figures.add("failures")
                self.figures.breaker_open = self._breaker.failed() or self._breaker.is_open
                if isinstance(error, LookupUnavailableError):
                    raise
                raise LookupUnavailableError(
                    f"{self.name} did not answer: {type(error).__name__}: {error}", name=self.name
                ) from error
            except BaseException:
                self._breaker.succeeded()  # it was there, whatever it said
                raise
        self._breaker.succeeded()
        self.figures.breaker_open = False
        return answer

    def _timed(self, call: Callable[[], Any]) -> Any:
        with self._lock:
            self._under_way += 1
        started = time.perf_counter()
        try:
            return call()
        finally:
            self.figures.called(time.perf_counter() - started)
            with self._lock:
                self._under_way -= 1
                self._call_ended.notify_all()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Wait for a place among the calls under way, and for the rate."""
        started = time.perf_counter()
        with self._places:
            if self._limiter is not None:
                self._limiter.try_acquire(self.name)
            waited = time.perf_counter() - started
            if waited > 1e-4:
                self.figures.add("wait_seconds", waited)
            yield


def _limiter(per_second: float) -> "Limiter":
    from pyrate_limiter import Limiter, Rate

    # As many as fit into a second, or one in as many milliseconds as it takes.
    whole = max(1, round(per_second))
    return Limiter(Rate(whole, round(1000 * whole / per_second)))


def _cache_of(policy: LookupPolicy) -> Any:
    if policy.cache_ttl is None:
        return None
    from cachetools import TTLCache

    return TTLCache(policy.cache_size, parse_seconds(policy.cache_ttl, name="cache_ttl"))
