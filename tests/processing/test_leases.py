"""`LeaseKeeper`: leases of this process, and the thread that prolongs them."""

import threading

import pytest

from djp_dagster import EventStream, Topic, consumer
from djp_dagster.errors import LeaseBusyError, StreamUnavailableError
from djp_dagster.processing.leases import LeaseKeeper, new_owner
from djp_dagster.testing import Clock
from tests.processing.kit import wait_until

WIDE = Topic("wide", partitions=3)


@consumer(topic=WIDE, group="g")
def handler(batch: object) -> None: ...


def expiry(stream: EventStream) -> list[int]:
    return [task.expires_micros for task in stream.coordinator.tasks("g")]


def test_owners_differ() -> None:
    assert new_owner() != new_owner()


def test_it_prolongs_what_it_holds_and_gives_it_back(stream: EventStream, clock: Clock) -> None:
    handler.register(stream)
    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=0.06) as keeper:
        lease = keeper.acquire("g", [0, 1])
        before = expiry(stream)
        clock.advance(0.05)
        wait_until(
            lambda: all(now > then for now, then in zip(expiry(stream)[:2], before[:2], strict=True)), "a heartbeat"
        )
        assert [task.owner for task in stream.coordinator.tasks("g")] == ["me", "me", None]
        assert keeper.holds(lease)
        keeper.release(lease.part([0]))
        assert not keeper.holds(lease)
        assert [task.owner for task in stream.coordinator.tasks("g")] == [None, "me", None]
    assert [task.owner for task in stream.coordinator.tasks("g")] == [None, None, None]
    assert not [thread for thread in threading.enumerate() if thread.name == "djp-leases-me"]


def test_a_task_taken_over_is_lost_and_the_others_are_kept(stream: EventStream, clock: Clock) -> None:
    handler.register(stream)
    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=0.3) as keeper:
        kept, lost = keeper.acquire("g", [0]), keeper.acquire("g", [1])
        clock.advance(1)
        stolen = stream.coordinator.acquire("g", [1], "thief", 60.0)
        wait_until(lambda: not keeper.holds(lost), "the loss to be noticed")
        assert keeper.holds(kept)
        clock.advance(0.2)
        at_least = round(clock.now_s * 1e6)
        wait_until(lambda: expiry(stream)[0] > at_least, "a heartbeat of what is kept")
        keeper.forget(lost)
    assert [task.owner for task in stream.coordinator.tasks("g")] == [None, "thief", None]
    stream.coordinator.heartbeat([stolen])


def test_what_somebody_else_holds_is_busy(stream: EventStream) -> None:
    handler.register(stream)
    stream.coordinator.acquire("g", [2], "somebody", 60.0)
    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=60.0) as keeper:
        with pytest.raises(LeaseBusyError):
            keeper.acquire("g")
        keeper.acquire("g", [0])
    assert [task.owner for task in stream.coordinator.tasks("g")] == [None, None, "somebody"]


def test_an_outage_ends_no_lease(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    handler.register(stream)
    original = stream.coordinator.heartbeat
    beats: list[bool] = []

    def away(leases: object) -> None:
        beats.append(True)
        if len(beats) < 3:
            raise StreamUnavailableError("away")
        original(leases)  # type: ignore[arg-type]

    monkeypatch.setattr(stream.coordinator, "heartbeat", away)
    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=0.03) as keeper:
        lease = keeper.acquire("g")
        wait_until(lambda: len(beats) > 3, "heartbeats after the outage")
        assert keeper.holds(lease)


def test_giving_back_to_a_stream_that_is_away_is_no_error(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    handler.register(stream)

    def away(lease: object) -> None:
        raise StreamUnavailableError("away")

    with LeaseKeeper(stream.coordinator, owner="me", ttl_s=60.0) as keeper:
        keeper.acquire("g")
        monkeypatch.setattr(stream.coordinator, "release", away)
    assert not [thread for thread in threading.enumerate() if thread.name == "djp-leases-me"]
