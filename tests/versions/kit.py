"""What the tests of versions share: clicks that come twice, late and in disorder, and consumers that count them."""

import random
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import djp_dagster as djp

PARTITIONS = 3
CLICKS = djp.Topic("clicks", partitions=PARTITIONS, key="user")
SEEN = djp.Topic("seen", partitions=2, key="user")
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
LEASE = "600ms"
State = dict[str, Any]


def counted(before: State | None, record: djp.Event, step: int) -> State:
    """What becomes of a user's state by a click: each counts once, by its number; some come late."""
    old = before or {"ids": [], "n": 0, "latest": "", "late": 0}
    n, at = record.data["n"], record.data["at"]
    if n in old["ids"]:
        return old
    return {
        "ids": [*old["ids"], n],
        "n": old["n"] + step,
        "latest": max(old["latest"], at),
        "late": old["late"] + (at < old["latest"]),
    }


def counting(step: int = 1, code: str = "v1", *, most: int = 20, **settings: Any) -> djp.Consumer:
    """A consumer of the group ``counts``; it emits every click, with what it has counted."""
    given: dict[str, Any] = {"topic": CLICKS, "group": "counts"} | settings

    @djp.consumer(
        emits=[SEEN],
        stateful=True,
        code_version=code,
        max_batch=djp.Threshold(events=most),
        **given,
    )
    def counts(batch: djp.Batch) -> None:
        for record in batch:
            user = record.data["user"]
            batch.state.set(user, state := counted(batch.state.get(user), record, step))
            batch.emit(SEEN.event(user=user, n=record.data["n"], count=state["n"], code=code))

    return counts


V1, V2 = counting(1, "v1"), counting(10, "v2")


def clicks(seed: random.Random, count: int, start: int = 0) -> list[djp.Event]:
    """Clicks, of which some come again, and some long after they happened."""
    made = []
    for n in range(start, start + count):
        at = START + timedelta(seconds=n - seed.choice([0, 0, 0, 3, 500]))
        made.append(CLICKS.event(user=f"u{seed.randrange(12)}", n=n, at=at.isoformat()))
    again = [CLICKS.event(**event.data) for event in made if seed.random() < 0.1]
    mixed = made + again
    for _ in range(len(mixed) // 3):
        i = seed.randrange(len(mixed) - 1)
        mixed[i], mixed[i + 1] = mixed[i + 1], mixed[i]
    return mixed


def publish(stream: djp.EventStream, events: Iterable[djp.Event]) -> None:
    stream.create_topic(CLICKS)
    stream.publish(CLICKS, list(events))


def folded(stream: djp.EventStream, step: int = 1, start: int = 0) -> dict[str, State]:
    """What the state must be, from the log itself."""
    state: dict[str, State] = {}
    for partition in range(PARTITIONS):
        for record in stream.records(CLICKS, partition):
            if record.offset >= start:
                user = record.data["user"]
                state[user] = counted(state.get(user), record, step)
    return state


def state_of(stream: djp.EventStream, consumer: djp.Consumer, folder: Path) -> dict[Any, Any]:
    with stream.view(consumer, folder=folder / "views") as view:
        return dict(view.items())


def emitted(stream: djp.EventStream, topic: djp.Topic = SEEN) -> list[djp.Record]:
    return [record for partition in range(topic.partitions) for record in stream.records(topic, partition)]


def effects(stream: djp.EventStream) -> list[tuple[str, Any]]:
    """What has been emitted, in order."""
    return [(record.id, record.data) for record in emitted(stream)]


def causes(stream: djp.EventStream) -> list[int]:
    """The numbers of the clicks that were emitted, sorted; a click that came again was emitted again."""
    return sorted(record.data["n"] for record in emitted(stream))


def published(stream: djp.EventStream) -> list[int]:
    """The numbers of all clicks, sorted."""
    return sorted(record.data["n"] for record in emitted(stream, CLICKS))


def names(stream: djp.EventStream) -> list[str]:
    """Of all groups."""
    return [info.name for info in stream.groups()]


def wait_until(holds: Callable[[], bool], what: str, patience_s: float = 30.0) -> None:
    give_up = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < give_up, f"waited {patience_s} s for {what}"
        time.sleep(0.01)
