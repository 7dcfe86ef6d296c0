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

import pytest

from djp_dagster import Claim, PayloadStore
from djp_dagster.claim_check import condemned
from djp_dagster.claim_check.collection import MIN_GRACE_S, CollectionReport, collect
from djp_dagster.claim_check.condemned import Condemned, Sentences
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

    def until(self, operation: str) -> Actor:
        """Go on to the next operation of that kind, and stand before it."""
        while not (self.at or "").startswith(operation):
            assert self.at is not None, f"it has ended, and came to no {operation}: {self.error!r}"
            self.step()
        return self

    def finish(self) -> Any:
        """Do everything."""
        while self.at is not None:
            self.step()
        self._thread.join(_PATIENCE_S)
        if self.error is not None:
            raise self.error
        return self.result

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


class MemoryRoom:
    """Who keeps claims, in a list; asking it is a step."""

    name = "memory"

    def __init__(self, objects: SteppedObjects, held: Sequence[Claim]) -> None:
        self.objects, self.held = objects, held

    def references(self) -> Iterator[bytes]:
        self.objects._actor("ask")
        yield from [claim.to_json() for claim in self.held]


class World:
    """A folder of payloads, the claims that are visible, and time.

    Attributes:
        grace_s: of every collection.
        visible: claims that anybody may see.
    """

    grace_s = MIN_GRACE_S

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.clock = Time()
        patch.setattr(condemned, "time", self.clock)
        self.objects = SteppedObjects(folder, self.clock)
        self.visible: list[Claim] = []
        self.process().announce()

    def process(self) -> PayloadStore:
        """The store as another process has it, which knows nothing of the list yet."""
        return PayloadStore(self.objects, room="memory")

    def put(self, content: bytes, store: PayloadStore | None = None) -> Claim:
        return (store or self.process()).put(content).claim

    def putting(self, content: bytes, store: PayloadStore | None = None) -> Actor:
        known = store or self.process()
        return self._begun(lambda: known.put(content).claim)

    def collecting(self) -> Actor:
        return self._begun(self.collect)

    @staticmethod
    def _begun(work: Callable[[], Any]) -> Actor:
        actor = Actor(work)
        actor.wait()
        return actor

    def collect(self) -> CollectionReport:
        room = MemoryRoom(self.objects, self.visible)
        return collect(PayloadStore(self.objects), [room], grace=self.grace_s, dry_run=False)

    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    def garbage(self, content: bytes, *, collections: int) -> str:
        """The key of a payload nobody refers to, with which so many collections have come further, and one more may."""
        claim = self.put(content)
        for _ in range(collections):
            self.wait(self.grace_s + 121)
            self.collect()
        self.wait(self.grace_s + 121)
        return self.key_of(claim)

    def key_of(self, claim: Claim) -> str:
        return claim.uri.removeprefix(f"{self.objects.uri}/")

    def is_there(self, claim: Claim) -> bool:
        return self.objects.inner.info(self.key_of(claim)) is not None

    def listed(self) -> Sentences:
        return Condemned(self.objects).read()
