"""Writers, readers and collections in random interleavings, step by step: nothing in use is deleted, all garbage is."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from djp_dagster import Claim
from djp_dagster.claim_check import collection
from djp_dagster.claim_check.collection import MIN_GRACE_S
from tests.claim_check.interleaving import Actor, World
from tests.claim_check.kit import keys

GRACE_S = MIN_GRACE_S
ANY = st.integers(0, 99)
WRITERS_GO_TO = st.sampled_from(["one step", "read", "put", "info", "write", "end", "end"])
COLLECTIONS_GO_TO = st.sampled_from(["one step", "ask", "write", "write", "delete", "delete", "end", "end"])
SHRINK = "DJP_SHRINK" in os.environ  # it takes minutes
EXAMPLES = int(os.environ.get("DJP_MODEL_EXAMPLES", "60"))
STALLED_S = 300.0
"""A request for deletion is on its way for no longer."""


class Collections(RuleBasedStateMachine):
    """Writers make a claim visible within ``bound_s`` of beginning to store its payload, or never."""

    @initialize(
        prompt=st.booleans(),
        earlier=st.sampled_from([0, 1, 2, 2, 2, 3]),
        under_way=st.lists(st.sampled_from(["ask", "write", "delete"]), max_size=2),
    )
    def begin(self, prompt: bool, earlier: int, under_way: list[str]) -> None:
        """Some garbage, as far as ``earlier`` collections have come with it; others are ``under_way``."""
        self.failed = False
        self.exits = contextlib.ExitStack()
        folder = Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="djp-model-", dir=_quick_folder())))
        patch = self.exits.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(collection, "require_atomic", lambda _objects: None)  # it is, and to ask takes longest
        self.world = World(folder, patch)
        self.clock, self.objects, self.visible = self.world.clock, self.world.objects, self.world.visible
        self.stores = [self.world.process() for _ in range(3)]
        self.writers: list[tuple[Actor, float, int]] = []
        self.collectors: list[Actor] = []
        self.withdrawn: list[tuple[Claim, float]] = []
        # Readers are promised something if writers are quick.
        self.bound_s, self.reads_s = (GRACE_S / 2, GRACE_S / 2) if prompt else (GRACE_S, 0.0)
        for content in (b"a", b"b"):
            self.stores[0].put(content)
        for _ in range(earlier):
            self.clock.now_s += GRACE_S + 121
            self.world.collect()
        self.clock.now_s += GRACE_S + 121
        for to in under_way:
            self.collect(to, loses=False)

    # Writers and readers

    @rule(process=st.integers(0, 2), content=st.sampled_from([b"a", b"a", b"b"]), to=WRITERS_GO_TO, loses=st.booleans())
    def store(self, process: int, content: bytes, to: str, loses: bool) -> None:
        # One at a time in each process: whoever reads the list keeps its other threads waiting.
        if process not in [number for _, _, number in self.writers]:
            self.writers.append((self.world.putting(content, self.stores[process]), self.clock.now_s, process))
            _go_on(self.writers[-1][0], to, loses)

    @precondition(lambda self: self.writers)
    @rule(which=ANY, to=WRITERS_GO_TO, loses=st.booleans())
    def go_on_storing(self, which: int, to: str, loses: bool) -> None:
        _go_on(_one_of(self.writers, which)[0], to, loses)

    @precondition(lambda self: self.writers)
    @rule(which=ANY)
    def publish(self, which: int) -> None:
        writer = _one_of(self.writers, which)
        self.writers.remove(writer)
        self.visible.append(writer[0].finish())

    @rule(process=st.integers(0, 2))
    def restart(self, process: int) -> None:
        self.stores[process] = self.world.process()

    @precondition(lambda self: self.visible)
    @rule(which=ANY, all_of_them=st.booleans())
    def withdraw(self, which: int, all_of_them: bool) -> None:
        for _ in range(len(self.visible) if all_of_them else 1):
            claim = self.visible.pop(which % len(self.visible))
            self.withdrawn.append((claim, self.clock.now_s))

    @precondition(lambda self: self.readable())
    @rule(which=ANY)
    def hand_on(self, which: int) -> None:
        self.visible.append(_one_of(self.readable(), which))

    def readable(self) -> list[Claim]:
        return [claim for claim, at in self.withdrawn if self.reads_s and self.clock.now_s <= at + self.reads_s]

    # Collections

    @precondition(lambda self: len(self.collectors) < 2)
    @rule(to=COLLECTIONS_GO_TO, loses=st.booleans())
    def collect(self, to: str, loses: bool) -> None:
        self.collectors.append(self.world.collecting())
        _go_on(self.collectors[-1], to, loses)

    @precondition(lambda self: self.collectors)
    @rule(which=ANY, to=COLLECTIONS_GO_TO, loses=st.booleans())
    def go_on_collecting(self, which: int, to: str, loses: bool) -> None:
        actor = _one_of(self.collectors, which)
        _go_on(actor, to, loses)
        if actor.at is None:
            actor.finish()
            self.collectors.remove(actor)

    @precondition(lambda self: self.collectors)
    @rule(which=ANY, after=st.booleans())
    def kill_a_collection(self, which: int, after: bool) -> None:
        actor = _one_of(self.collectors, which)
        self.collectors.remove(actor)
        actor.kill(after=after)

    # Time

    @rule(seconds=st.sampled_from([1.0, 50.0, 61.0, 130.0, 241.0, GRACE_S / 2, GRACE_S / 2 + 121]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds
        now = self.clock.now_s
        self.withdrawn = [(claim, at) for claim, at in self.withdrawn if now <= at + self.reads_s]
        late = [actor for actor, began, _ in self.writers if now > began + self.bound_s]
        stalled = [
            actor
            for actor in self.collectors
            if (actor.at or "").startswith("delete") and now > actor.asked_at + STALLED_S
        ]
        for actor in (*late, *stalled):
            actor.kill()
        self.writers = [found for found in self.writers if found[0] not in late]
        self.collectors = [actor for actor in self.collectors if actor not in stalled]

    # What must hold

    @invariant()
    def nothing_in_use_is_deleted(self) -> None:
        if not hasattr(self, "clock"):
            return
        for claim in (*self.visible, *self.readable()):
            self.failed = not self.world.is_there(claim)
            assert not self.failed, claim.uri

    def teardown(self) -> None:
        if not hasattr(self, "exits"):
            return
        with self.exits:
            for actor in (*(actor for actor, *_ in self.writers), *self.collectors):
                actor.kill() if self.failed else actor.finish()
            if self.failed:
                return
            self.visible.clear()
            for _ in range(8):
                self.world.wait(GRACE_S)
                self.world.collect()
            assert keys(self.objects.inner) == ["rooms/memory"]
            assert self.world.listed() == {}


def _quick_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _one_of(things: list[Any], which: int) -> Any:
    return things[which % len(things)]


def _go_on(actor: Actor, to: str, loses: bool) -> None:
    """To the next operation of that kind; the answer to the first is lost."""
    while actor.at is not None:
        actor.step(loses=loses)
        loses = False
        if to == "one step" or (actor.at or "").startswith(to):
            return


TestCollections = Collections.TestCase
TestCollections.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * SHRINK,
)
