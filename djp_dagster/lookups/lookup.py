"""`Lookup`: values by key from a service, whatever it speaks; the rings of `djp_dagster.lookups`."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidSettingError, LookupRefusedError, LookupUnavailableError, TransientError
from djp_dagster.lookups.breaker import Breaker
from djp_dagster.lookups.figures import Figures
from djp_dagster.lookups.gathering import ABSENT, Gathering, Key
from djp_dagster.lookups.limits import RateLimit
from djp_dagster.units import Duration, is_count, parse_seconds

if TYPE_CHECKING:
    from tenacity import RetryCallState

Fetch = Callable[[Sequence[Key]], Mapping[Key, Any]]
_ENOUGH_UNDER_WAY = 2
"""With so many calls of several keys under way, keys that are asked for one by one wait for one to end."""


class LookupPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How a service is called.

    Args:
        bulk_size: how many keys one call takes; 1 for a service that takes one.
        max_concurrency: how many calls are under way at the same time.
        attempts: how often a call is tried in all.
        first_pause, longest_pause: between tries, at random up to twice as long each time; what the service asks for
            is added.
        give_up_after: no pause is begun that would end later than this after the first try; waiting for a place or for
            the rate is not counted.
        rate_limit: as many calls at most begin in any second; None for as many as come.
        breaker_failures: so many failures in a row, and nobody calls for ``breaker_reset``.
        cache_ttl: how long an answer may be used again, also that a key is not known; None (the default) asks every
            time.
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
        for name in ("first_pause", "longest_pause", "give_up_after", "breaker_reset"):
            parse_seconds(getattr(self, name), name=name)
        if self.cache_ttl is not None:
            parse_seconds(self.cache_ttl, name="cache_ttl")
        if self.rate_limit is not None and not 0 < self.rate_limit < math.inf:
            raise InvalidSettingError(
                f"rate_limit={self.rate_limit!r} must be above 0", setting="rate_limit", value=self.rate_limit
            )


class Lookup:
    """Values by key, asked of a service. Safe to share between threads; close it after use.

    Args:
        name: of the service, for errors and figures; never with credentials.
        fetch: asks for up to ``bulk_size`` keys; keys it does not know are missing in the answer. It raises
            `LookupUnavailableError` for what may be tried again, naming ``retry_after_s`` if the service did. It must
            not ask this look-up itself.
        policy: how it is called.
        fitting: how many of the first of some keys fit into one call; as many as ``bulk_size`` unless given.

    Example:
        >>> users = Lookup("users", lambda keys: {key: {"name": f"user {key}"} for key in keys if key != 3})
        >>> users.get_many([1, 2, 2, 3])
        {1: {'name': 'user 1'}, 2: {'name': 'user 2'}}
        >>> users.figures.take()[0]
        {'keys': 4, 'calls': 1, 'fetched': 3, 'not_found': 1}
        >>> users.close()
    """

    def __init__(
        self,
        name: str,
        fetch: Fetch,
        policy: LookupPolicy | None = None,
        *,
        fitting: Callable[[Sequence[Key]], int] | None = None,
    ) -> None:
        _require_extra()
        self.name, self.policy, self._fetch, self._fitting = name, policy or LookupPolicy(), fetch, fitting
        at_once = self.policy.max_concurrency
        self._breaker = Breaker(
            name,
            failures=self.policy.breaker_failures,
            reset_s=parse_seconds(self.policy.breaker_reset, name="breaker_reset"),
        )
        self.figures = Figures(lambda: self._breaker.is_open)
        self._closing = threading.Event()
        self._places = threading.BoundedSemaphore(at_once)
        rate = self.policy.rate_limit
        self._limit = None if rate is None else RateLimit(rate, self._closing.wait)
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix=f"djp-lookup-{name}")
        # One key to a call: they are made as many at once as allowed, and gathered beyond that.
        enough = at_once if self.policy.bulk_size == 1 else min(_ENOUGH_UNDER_WAY, at_once)
        self._gathering = Gathering(name, self._call, self._divided, self._submit, enough)
        self._cache, self._caching = _cache_of(self.policy), threading.Lock()
        self._thread = threading.local()

    def close(self) -> None:
        """End its threads, when the calls under way have ended; nobody waits any longer to try again."""
        self._closing.set()
        self._pool.shutdown(wait=True)

    def get(self, key: Key, default: Any = None) -> Any:
        """The value of ``key``, or ``default`` if the service does not know it.

        Threads that ask at the same time share a call.

        Raises:
            LookupUnavailableError: the service did not answer; transient.
        """
        self._require_outside()
        self.figures.add("keys")
        found: dict[Key, Any] = {}
        value = found[key] if self._from_cache(key, found) else self._gathering.get(key)
        return default if value is ABSENT else value

    def get_many(self, keys: Iterable[Key]) -> dict[Key, Any]:
        """The values of those keys that the service knows; each key is asked for once, in as few calls as possible.

        Raises:
            LookupUnavailableError: the service did not answer for some; transient.
        """
        self._require_outside()
        asked = list(keys)
        self.figures.add("keys", len(asked))
        wanted = list(dict.fromkeys(asked))
        found: dict[Key, Any] = {}
        pieces = self._divided([key for key in wanted if not self._from_cache(key, found)])
        answers = [self._call(piece) for piece in pieces] if len(pieces) < 2 else self._all_of(pieces)
        for piece, answer in zip(pieces, answers, strict=True):
            found.update({key: answer[key] for key in piece if key in answer})
        return {key: found[key] for key in wanted if key in found and found[key] is not ABSENT}

    def _divided(self, keys: list[Key]) -> list[list[Key]]:
        """The keys of each call."""
        pieces, start = [], 0
        while start < len(keys):
            piece = keys[start : start + self.policy.bulk_size]
            if self._fitting is not None:
                piece = piece[: max(self._fitting(piece), 1)]
            pieces.append(piece)
            start += len(piece)
        return pieces

    def _all_of(self, pieces: Sequence[list[Key]]) -> list[Mapping[Key, Any]]:
        """All at the same time; if one fails, none is begun any more, and those under way are waited for."""
        futures: list[Future[Mapping[Key, Any]]] = []
        try:
            for piece in pieces:
                futures.append(self._submit(self._call, piece))
            return [future.result() for future in futures]
        except BaseException as error:
            for future in futures:
                future.cancel()
            if isinstance(error, Exception):
                wait(futures)
            raise

    def _submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        try:
            return self._pool.submit(function, *arguments)
        except RuntimeError as error:  # it has been closed, or the system has no more threads
            raise LookupUnavailableError(f"{self.name} is not called: {error}", name=self.name, sent=False) from None

    def _from_cache(self, key: Key, found: dict[Key, Any]) -> bool:
        if self._cache is None:
            return False
        with self._caching:
            value = self._cache.get(key, None)
        if value is None:
            return False
        found[key] = value[0]
        self.figures.add("cache_hits")
        return True

    def _call(self, keys: Sequence[Key]) -> Mapping[Key, Any]:
        """One call, tried until it is answered or given up."""
        answer = self.attempt(lambda: self._fetch(keys), keys=len(keys))
        if not isinstance(answer, Mapping):
            raise InvalidSettingError(
                f"what asks {self.name} must return a mapping by key, not a {type(answer).__name__}",
                setting="fetch",
                value=type(answer).__name__,
            )
        missing = len(keys) - sum(key in answer for key in keys)
        if missing:
            self.figures.add("not_found", missing)
        if self._cache is not None:
            with self._caching:
                self._cache.update({key: (answer.get(key, ABSENT),) for key in keys})
        return answer

    def attempt(self, call: Callable[[], Any], *, may_repeat: bool = True, keys: int = 0) -> Any:
        """Make ``call`` through rings 3 to 6.

        Args:
            call: raises `LookupUnavailableError` for what may be tried again.
            may_repeat: whether doing it twice does no harm; else it is tried again only if nothing has been sent.
            keys: how many it asks for, for the figures.

        Raises:
            LookupUnavailableError: it was given up.
        """
        import tenacity

        self._require_outside()
        self._thread.waited_s = 0.0
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: self._is_worth_another(error, may_repeat)),
            wait=self._pause,
            stop=self._gives_up,
            before_sleep=lambda _: self.figures.add("retries"),
            sleep=tenacity.sleep_using_event(self._closing),
            reraise=True,
        )
        return retrying(self._guarded, call, keys)

    def _is_worth_another(self, error: BaseException, may_repeat: bool) -> bool:
        if isinstance(error, LookupUnavailableError):
            return may_repeat or error.facts.get("sent") is False
        return isinstance(error, LookupRefusedError) and bool(error.facts.get("again"))

    def _pause(self, state: "RetryCallState") -> float:
        """How long to wait: at random, longer each time, and not before the service wants it."""
        policy = self.policy
        longest = parse_seconds(policy.longest_pause, name="longest_pause")
        bound = min(parse_seconds(policy.first_pause, name="first_pause") * 2.0 ** (state.attempt_number - 1), longest)
        return bound * random.uniform(0.5, 1.0) + _asked_for_s(state)  # noqa: S311

    def _gives_up(self, state: "RetryCallState") -> bool:
        if self._closing.is_set() or state.attempt_number >= self.policy.attempts:
            return True
        spent_s = (state.seconds_since_start or 0.0) - self._thread.waited_s
        return bool(spent_s + state.upcoming_sleep > parse_seconds(self.policy.give_up_after, name="give_up_after"))

    def _guarded(self, call: Callable[[], Any], keys: int) -> Any:
        self._pass(self._breaker.check)
        with self._place():
            self._pass(self._breaker.enter)  # it may have opened meanwhile
            try:
                answer = self._timed(call, keys)
            except (TransientError, OSError) as error:
                raise self._failed(error) from _cause_of(error)
            except Exception:
                self._breaker.succeeded()  # it was there, whatever it said
                raise
            except BaseException:
                self._breaker.interrupted()
                raise
        self._breaker.succeeded()
        return answer

    def _pass(self, gate: Callable[[], None]) -> None:
        if self._closing.is_set():
            raise LookupUnavailableError(f"{self.name} is not called: it was closed", name=self.name, sent=False)
        try:
            gate()
        except LookupUnavailableError:
            self.figures.add("refused")
            raise

    def _failed(self, error: TransientError | OSError) -> LookupUnavailableError:
        """Count a failure; what it is for whoever asked."""
        self.figures.add("failures")
        unavailable = (
            error
            if isinstance(error, LookupUnavailableError)
            else LookupUnavailableError(f"{self.name} did not answer: {type(error).__name__}: {error}", name=self.name)
        )
        if self._breaker.failed(unavailable.facts.get("retry_after_s") or 0.0):
            self.figures.add("breaker_opened")
        return unavailable

    def _timed(self, call: Callable[[], Any], keys: int) -> Any:
        started = time.perf_counter()
        self._thread.calls = True
        try:
            return call()
        finally:
            self._thread.calls = False
            self.figures.called(time.perf_counter() - started, keys)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """Wait for a place among the calls under way, and for the rate."""
        started = time.perf_counter()
        with self._places:
            if self._limit is not None:
                self._limit.wait()
            waited_s = time.perf_counter() - started
            self._thread.waited_s += waited_s
            if waited_s > 1e-4:
                self.figures.add("wait_seconds", waited_s)
            yield

    def _require_outside(self) -> None:
        """A call that waits for another one of the same look-up may wait for itself."""
        if getattr(self._thread, "calls", False):
            raise InvalidSettingError(
                f"what asks {self.name} must not ask it through the look-up again", setting="fetch", value=self.name
            )


def _asked_for_s(state: "RetryCallState") -> float:
    """How long the service has asked to be left alone."""
    error = state.outcome.exception() if state.outcome is not None else None
    return float(error.facts.get("retry_after_s") or 0.0) if isinstance(error, LookupUnavailableError) else 0.0


def _cause_of(error: BaseException) -> BaseException | None:
    return error.__cause__ if isinstance(error, LookupUnavailableError) else error


def _require_extra() -> None:
    try:
        import tenacity  # noqa: F401
    except ImportError:
        raise InvalidSettingError(
            "look-ups need some packages more: pip install 'djp-dagster[lookup]'", setting="lookup", value=None
        ) from None


def _cache_of(policy: LookupPolicy) -> Any:
    if policy.cache_ttl is None:
        return None
    from cachetools import TTLCache

    return TTLCache(policy.cache_size, parse_seconds(policy.cache_ttl, name="cache_ttl"))
