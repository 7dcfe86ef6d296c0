"""Writers and collections that take their steps one at a time, in an order that a test chooses.

Each runs in a thread of its own, which stops before every operation on the store and goes on when it is told to. Time
passes when it is told to, for the store and for what writers remember of the list of condemned payloads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from djp_dagster.claim_check.conditional import RACE
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.objects import Content, Document, ObjectInfo

_PATIENCE_S = 60.0


class Time:
    """Stands for the module ``time`` where a writer remembers the list, and for the clock of a store."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def time(self) -> float:
        return self.now_s

    monotonic = time

    def sleep(self, _seconds: float) -> None:
        """Nothing: whoever waits is not asked to go on."""


class Killed(BaseException):
    """The process of an actor was killed here."""


class Actor:
    """Somebody who works on the store.

    Attributes:
        at: the operation before which it stands; None once it has ended.
        result: what it returned.
        asked_at: when it last asked the store for the time.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.at: str | None = "start"
        self.result: Any = None
        self.error: BaseException | None = None
        self.asked_at = 0.0
        self.dead = False
        self._loses = False
        self._kill_after = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=[work], name="at-once-actor", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        _of_thread.actor = self
        try:
            self.pause("begin")
            self.result = work()
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        self.at = None
        self._stopped.release()

    def pause(self, operation: str) -> None:
        """Stand before an operation until told to go on."""
        if self.dead:
            raise Killed
        self.at = operation
        self._stopped.release()
        self._go.acquire()
        if self.dead:
            raise Killed

    def done_with(self, again: Callable[[], Any]) -> None:
        """An operation was done: if its answer is lost, it is done once more, later; or the process dies."""
        if self._kill_after:
            self.dead = True
            raise Killed
        if self._loses:
            self._loses = False
            self.pause(f"{self.at} again")
            again()

    def wait(self) -> None:
        """Until it stands before its next operation, or has ended."""
        assert self._stopped.acquire(timeout=_PATIENCE_S), f"it does not come back from {self.at}"

    def step(self, *, loses: bool = False) -> None:
        """Do the operation it stands before, and come to the next; ``loses`` its answer, and so does it again."""
        self._loses = loses
        self._go.release()
        self.wait()

    def finish(self) -> None:
        """Do everything."""
        while self.at is not None:
            self.step()
        self._thread.join(_PATIENCE_S)
        if self.error is not None:
            raise self.error

    def kill(self, *, after: bool = False) -> None:
        """Die before the operation, or just after it."""
        if self.at is not None:
            self._kill_after, self.dead = after, not after
            self._go.release()
            self.wait()
        while self.at is not None:  # it had nothing to die after
            self.dead = True
            self._go.release()
            self.wait()
        self._thread.join(_PATIENCE_S)
        if self.error is not None:
            raise self.error


_of_thread = threading.local()


class SteppedObjects:
    """A folder whose operations are steps of actors, by a clock of the test."""

    def __init__(self, folder: Path, clock: Time) -> None:
        self.inner, self.clock = LocalObjects(folder), clock
        self.uri = self.inner.uri
        self.spool_folder = self.inner.spool_folder

    def _actor(self, operation: str) -> Actor | None:
        actor: Actor | None = getattr(_of_thread, "actor", None)
        if actor is not None:
            actor.pause(operation)
        return actor

    def _do(self, operation: str, work: Callable[[], Any]) -> Any:
        actor = self._actor(operation)
        result = work()
        if actor is not None:

            def again() -> None:
                nonlocal result
                result = work()

            actor.done_with(again)
        return result

    def put(self, key: str, content: Content, *, media_type: str, replace: bool = False) -> bool:
        def work() -> bool:
            created = self.inner.put(key, content, media_type=media_type, replace=replace)
            if created:
                os.utime(self.inner.path_of(key), (self.clock.now_s, self.clock.now_s))
            return created

        return bool(self._do(f"put {key}", work))

    def info(self, key: str) -> ObjectInfo | None:
        found: ObjectInfo | None = self._do(f"info {key}", lambda: self.inner.info(key))
        return found

    def open(self, key: str, *, expected_bytes: int | None = None) -> BinaryIO:
        return self.inner.open(key, expected_bytes=expected_bytes)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self._actor(f"list {prefix}")
        yield from sorted(self.inner.list(prefix), key=lambda found: found.key)

    def delete(self, keys: Sequence[str]) -> None:
        if not keys or keys[0].startswith(RACE):
            self.inner.delete(keys)
        else:
            self._do("delete", lambda: self.inner.delete(keys))

    def read_document(self, key: str) -> Document | None:
        if key.startswith((RACE, "rooms/")):
            return self.inner.read_document(key)
        found: Document | None = self._do(f"read {key}", lambda: self.inner.read_document(key))
        return found

    def write_document(self, key: str, body: bytes, *, expected: str | None) -> str:
        if key.startswith(RACE):
            return self.inner.write_document(key, body, expected=expected)
        return str(self._do(f"write {key}", lambda: self.inner.write_document(key, body, expected=expected)))

    def replace_document(self, key: str, body: bytes) -> None:
        self.inner.replace_document(key, body)

    def abandoned_uploads(self, older_than_s: float, *, remove: bool) -> int:
        return 0

    def now(self) -> float:
        actor: Actor | None = getattr(_of_thread, "actor", None)
        if actor is not None:
            actor.asked_at = self.clock.now_s
        return self.clock.now_s
