"""What the tests of look-ups share: a user service, a mail service, and threads that ask at the same time."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from djp_dagster import HttpLookup, LookupResource
from djp_dagster.errors import LookupUnavailableError
from djp_dagster.lookups.gathering import Key
from djp_dagster.lookups.lookup import Lookup, LookupPolicy
from tests.servers.scripted_http import Answer, Request, ScriptedHttp

PATIENT_S = 30.0
QUICK: dict[str, Any] = {"first_pause": "1ms", "longest_pause": "4ms"}
"""Settings of a look-up that does not keep a test waiting."""


class Users:
    """Answers for users: ``/users/{id}``, ``/users?ids=1,2`` and ``POST /users/search``, in a list or by id.

    Attributes:
        known: the users there are, by id as text; a test may change them.
        asked: how often each id was asked for.
        keys: how many ids each request has asked for.
    """

    def __init__(self, ids: Iterable[Key] = (), *, shape: str = "list", delay_s: float = 0.0) -> None:
        self.known: dict[str, dict[str, Any]] = {str(one): {"id": one, "name": f"user {one}"} for one in ids}
        self.asked: Counter[str] = Counter()
        self.keys: list[int] = []
        self.delay_s = delay_s
        self._shape, self._lock = shape, threading.Lock()

    def __call__(self, request: Request) -> Answer:
        ids = self._ids_of(request)
        with self._lock:
            self.asked.update(ids)
            self.keys.append(len(ids))
            found = {one: self.known[one] for one in ids if one in self.known}
        if request.path.startswith("/users/") and request.method == "GET":
            (wanted,) = ids
            return Answer(404) if wanted not in found else Answer(body=found[wanted], delay_s=self.delay_s)
        body: Any = {"list": list(found.values()), "object": found, "items": {"users": list(found.values())}}[
            self._shape
        ]
        return Answer(body=body, delay_s=self.delay_s)

    def _ids_of(self, request: Request) -> list[str]:
        if request.method == "POST":
            return [str(one) for one in request.json["ids"]]
        if request.path == "/users":
            return request.query["ids"].split(",")
        return [request.path.removeprefix("/users/")]


class Mails:
    """Sends mails: ``POST /mails``. With ``honours_keys`` it does once what it is asked with the same key.

    Attributes:
        sent: what was sent, in order.
    """

    def __init__(self, *, honours_keys: bool = True) -> None:
        self.sent: list[Any] = []
        self.answers: dict[str, int] = {}
        self._honours_keys, self._lock = honours_keys, threading.Lock()

    def __call__(self, request: Request) -> Answer:
        return Answer(201, {"mail": self.send(request)})

    def send(self, request: Request) -> int:
        """Do it, and tell its number."""
        key = request.headers.get("Idempotency-Key") if self._honours_keys else None
        with self._lock:
            if key is None or key not in self.answers:
                self.sent.append(request.json)
                if key is None:
                    return len(self.sent)
                self.answers[key] = len(self.sent)
            return self.answers[key]


class Service:
    """What a `Lookup` without HTTP asks: it answers at once, unless it is held or told to fail.

    Attributes:
        calls: the keys of each call, as they began.
        most_at_once: how many calls were under way, at most.
    """

    def __init__(self, known: Callable[[Key], bool] = lambda _: True) -> None:
        self.calls: list[list[Key]] = []
        self.most_at_once = 0
        self.version = 0
        self._known = known
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._gate = threading.Event()
        self._gate.set()
        self._at_once = 0

    def __call__(self, keys: Any) -> Mapping[Key, Any]:
        with self._changed:
            self.calls.append(list(keys))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            failure = self._failures.pop(0) if self._failures else None
            answer = {key: f"{key} v{self.version}" for key in keys if self._known(key)}
            self._changed.notify_all()
        try:
            self._gate.wait(PATIENT_S)
            if failure is not None:
                raise failure
            return answer
        finally:
            with self._changed:
                self._at_once -= 1

    def fail(self, *errors: BaseException) -> None:
        """The next calls raise these."""
        self._failures.extend(errors)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Calls that begin within the block end after it."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def wait_for_calls(self, number: int) -> None:
        """Wait until so many have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= number, PATIENT_S)


def away(**facts: Any) -> LookupUnavailableError:
    """A service that is away."""
    return LookupUnavailableError("away", **facts)


def quick_policy(**more: Any) -> LookupPolicy:
    return LookupPolicy(**{**QUICK, **more})


def users_of(server: ScriptedHttp, **more: Any) -> HttpLookup:
    """A look-up of a `Users` service."""
    return HttpLookup(**{"base_url": server.url, "path": "/users/{key}", "bulk_path": "/users", **QUICK, **more})


def counts_of(made: Lookup | LookupResource) -> dict[str, int]:
    """What it has counted since the last time."""
    return (made.figures.take() if isinstance(made, Lookup) else made.take_figures())[0]


def all_at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, each in a thread of its own, all begun together."""
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        begin.wait(PATIENT_S)
        try:
            return work()
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(PATIENT_S) for future in [pool.submit(run, work) for work in works]]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the time limit only ends a test that would never end."""
    give_up = time.monotonic() + PATIENT_S
    while not holds():
        assert time.monotonic() < give_up, f"waited {PATIENT_S} s for {what}"
        time.sleep(0.002)
