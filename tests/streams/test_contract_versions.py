"""What the `Coordinator` contract says of versions of a group, on every backend."""

from __future__ import annotations

import pytest

from djp_dagster.errors import FencedError, NotCaughtUpError, StateLostError, UnknownGroupError
from djp_dagster.streams.model import Deadline, GroupSpec, Lease, ReaderPosition
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic, changelog_of
from djp_dagster.testing import Clock
from tests.streams.conftest import Backend
from tests.streams.kit import FAR, at, encoded, ids, intent_of, named, together, visible
from tests.streams.test_contract_coordinator import OUTPUT, TTL, change, commit_all, letter, make_group

NEXT, PREVIOUS = "g.next", "g.previous"


def make_versions(stream: EventStream) -> None:
    """A live group that has done all there is, and a follower that has done nothing."""
    make_group(stream, stateful=True)
    stream.coordinator.ensure_group(GroupSpec(NEXT, ("in",), stateful=True, code_version="new", version_of="g"))


def take_both(stream: EventStream) -> tuple[Lease, Lease]:
    return tuple(stream.coordinator.take_over(name, f"promoter of {name}", TTL) for name in ("g", NEXT))  # type: ignore[return-value]


def do_all(stream: EventStream, group: str, value: bytes, **effects: object) -> None:
    """Handle everything, task by task, with one state change in each."""
    lease = stream.coordinator.acquire(group, None, f"holder of {group}", TTL)
    for task in sorted(lease.epochs):
        end = stream.log.spans([changelog_of(group)])[at(changelog_of(group), task)].end
        changelog = ((change(group, task, b"k", value), end),)
        commit_all(stream, lease, [task], changelog=changelog, **(effects if task == 0 else {}))
    stream.coordinator.release(lease)


def blobs(stream: EventStream, group: str) -> list[bytes]:
    """The changelog of task 0."""
    name = at(changelog_of(group))
    end = stream.log.spans([name.topic])[name].end
    return [batch.blob for batch in stream.log.read(name, 0, end=end, max_bytes=FAR)] if end else []


def test_taking_over_fences_whoever_holds_it(stream: EventStream) -> None:
    make_group(stream)
    held = stream.coordinator.acquire("g", None, "holder", TTL)
    intent = intent_of(stream, held)
    stream.coordinator.begin(held, intent)
    taken = stream.coordinator.take_over("g", "promoter", TTL)
    assert [found.batch_id for found in taken.intents] == [intent.batch_id]
    assert min(taken.epochs.values()) > max(held.epochs.values())
    with pytest.raises(FencedError):
        stream.coordinator.heartbeat([held])
    with pytest.raises(FencedError):
        stream.coordinator.update(held, intent)
    stream.coordinator.heartbeat([taken])
    again = stream.coordinator.resume(taken, intent.batch_id)
    assert (again.attempt, again.deaths) == (2, 0), "who was fenced has not died of it"
    stream.coordinator.release(taken)
    assert stream.coordinator.acquire("g", None, "holder", TTL).intents
    with pytest.raises(UnknownGroupError, match="nobody"):
        stream.coordinator.take_over("nobody", "promoter", TTL)


def test_a_swap_exchanges_what_came_of_them(stream: EventStream) -> None:
    make_versions(stream)
    do_all(
        stream, "g", b"old", output=OUTPUT, dead_letters=(letter(1), letter(2)), deadlines={(0, "k"): 10, (0, "o"): 9}
    )
    do_all(stream, NEXT, b"new", dead_letters=(letter(1), letter(3)), deadlines={(0, "k"): 20})
    (first, _) = stream.dead_letters("g")
    stream.discard_dead_letters("g", [first.id])
    stream.coordinator.move_reader("g", "me", ReaderPosition(7))
    asked = stream.coordinator.request("g", "cut", {"until": []})
    stream.coordinator.join("g", "worker", TTL)
    stream.coordinator.join(NEXT, "follower", TTL)
    old, new = blobs(stream, "g"), blobs(stream, NEXT)
    positions, outputs = stream.positions("g"), stream.outputs("g")
    live, follower = take_both(stream)
    stream.coordinator.swap(live, follower, becomes=PREVIOUS)

    assert [info.name for info in stream.groups()] == ["g", PREVIOUS]
    assert (blobs(stream, "g"), blobs(stream, PREVIOUS)) == (new, old)
    assert old != new
    assert [stream.coordinator.group(name).code_version for name in ("g", PREVIOUS)] == ["new", None]
    assert stream.positions("g") == stream.positions(PREVIOUS) == positions
    tasks = [0, 1, 2]
    assert stream.coordinator.due_deadlines("g", tasks, FAR, 10) == [Deadline(0, "k", 20)]
    assert [one.key for one in stream.coordinator.due_deadlines(PREVIOUS, tasks, FAR, 10)] == ["o", "k"]
    assert [(one.offset, one.status) for one in stream.dead_letters("g", status=None)] == [
        (1, "discarded"),
        (3, "pending"),
    ]
    assert [one.offset for one in stream.dead_letters(PREVIOUS, status=None)] == [1, 2]
    # What belongs to the group stays with it.
    assert stream.outputs("g") == outputs
    assert stream.outputs(PREVIOUS) == []
    assert stream.coordinator.reader("g", "me") == ReaderPosition(7)
    assert [one.id for one in stream.coordinator.requests("g")] == [asked]
    assert [one.owner for one in stream.coordinator.members("g")] == ["worker"]
    assert stream.coordinator.members(PREVIOUS) == []


def test_nobody_goes_on_after_a_swap(stream: EventStream) -> None:
    make_versions(stream)
    for name in ("g", NEXT):
        do_all(stream, name, b"v")
    stream.log.append([encoded("in", 0, named("more-", 2))])
    intents = {}
    for name in ("g", NEXT):
        lease = stream.coordinator.acquire(name, None, "holder", TTL)
        intents[name] = intent_of(stream, lease)
        stream.coordinator.begin(lease, intents[name])
    live, follower = take_both(stream)
    stream.coordinator.swap(live, follower, becomes=PREVIOUS)
    assert stream.coordinator.intents("g") == stream.coordinator.intents(PREVIOUS) == []
    for lease in (live, follower):
        for use in (
            lambda lease=lease: stream.coordinator.heartbeat([lease]),
            lambda lease=lease: stream.coordinator.begin(lease, intents[lease.group]),
            lambda lease=lease: stream.coordinator.update(lease, intents[lease.group]),
            lambda lease=lease: commit_all(stream, lease, [0]),
        ):
            with pytest.raises((FencedError, UnknownGroupError)):
                use()
        stream.coordinator.release(lease)  # a lost lease is no error
    taken = stream.coordinator.acquire("g", None, "holder", TTL)
    assert min(taken.epochs.values()) > max(*live.epochs.values(), *follower.epochs.values())


def test_what_does_not_fit_changes_nothing(stream: EventStream) -> None:
    make_versions(stream)
    do_all(stream, "g", b"old")
    live, follower = take_both(stream)
    seen = [visible(stream, name) for name in ("g", NEXT)]
    with pytest.raises(NotCaughtUpError, match="12 records behind 'g'") as caught:
        stream.coordinator.swap(live, follower, becomes=PREVIOUS)
    assert caught.value.facts["records"] == 12
    stream.coordinator.heartbeat([live, follower])
    stream.coordinator.release(follower)
    do_all(stream, NEXT, b"new")
    for lost in ("g", NEXT):
        live, follower = take_both(stream)
        stream.coordinator.take_over(lost, "another", TTL)
        seen = [visible(stream, name) for name in ("g", NEXT)]
        with pytest.raises(FencedError):
            stream.coordinator.swap(live, follower, becomes=PREVIOUS)
        assert [visible(stream, name) for name in ("g", NEXT)] == seen
    assert [info.name for info in stream.groups()] == ["g", NEXT]


def test_to_and_fro_and_a_third_is_deleted(stream: EventStream) -> None:
    make_versions(stream)
    do_all(stream, "g", b"1")
    do_all(stream, NEXT, b"2")
    stream.coordinator.swap(*take_both(stream), becomes=PREVIOUS)
    first, second = blobs(stream, PREVIOUS), blobs(stream, "g")
    for _ in range(2):
        live = stream.coordinator.take_over("g", "a", TTL)
        stream.coordinator.swap(live, stream.coordinator.take_over(PREVIOUS, "a", TTL), becomes=PREVIOUS)
        first, second = second, first
        assert (blobs(stream, "g"), blobs(stream, PREVIOUS)) == (second, first)
    stream.coordinator.ensure_group(GroupSpec(NEXT, ("in",), stateful=True, version_of="g"))
    do_all(stream, NEXT, b"3")
    stream.coordinator.swap(*take_both(stream), becomes=PREVIOUS)
    assert blobs(stream, PREVIOUS) == second
    assert first not in (blobs(stream, "g"), blobs(stream, PREVIOUS))
    internal = [info.name for info in stream.topics(internal=True) if info.name.startswith("__")]
    assert sorted(internal) == [changelog_of("g"), changelog_of(PREVIOUS)]


def test_another_process_finds_them(backend: Backend) -> None:
    """It knows the names, and what they stood for."""
    here, there = backend.open(), backend.open()
    make_versions(here)
    do_all(here, "g", b"old")
    do_all(there, NEXT, b"new")
    seen = [blobs(there, name) for name in ("g", NEXT)]
    here.coordinator.swap(*take_both(here), becomes=PREVIOUS)
    assert there.coordinator.view("g").identity == here.coordinator.view("g").identity
    assert blobs(there, "g") == seen[1]
    with pytest.raises(UnknownGroupError):
        there.coordinator.group(NEXT)
    there.coordinator.ensure_group(GroupSpec(NEXT, ("in",), stateful=True, version_of="g"))
    do_all(there, NEXT, b"newer")
    assert blobs(there, "g") == seen[1], "it has not written to what bore the name before"
    assert len(blobs(there, NEXT)) == 1


def test_a_version_begins_where_the_other_has_begun(timed: EventStream, clock: Clock) -> None:
    make_group(timed, partitions=1, stateful=True)
    timed.coordinator.ensure_group(GroupSpec("late", ("in",), start="latest", stateful=True))
    timed.log.append([encoded("in", 0, named("more-", 3))])
    timed.coordinator.ensure_group(GroupSpec("late.next", ("in",), stateful=True, version_of="late"))
    assert timed.positions("late.next") == {at("in"): 4}
    timed.coordinator.seek("late", {at("in"): 2}, reset_state=True)
    timed.coordinator.delete_group("late.next")
    timed.coordinator.ensure_group(GroupSpec("late.next", ("in",), stateful=True, version_of="late"))
    assert timed.positions("late.next") == {at("in"): 2}
    do_all(timed, "late", b"v")
    timed.coordinator.ensure_group(GroupSpec("late.other", ("in",), stateful=True, version_of="late"))
    assert timed.positions("late.other") == {at("in"): 2}, "not where it has come to"


def test_retention_may_have_been_there(timed: EventStream, clock: Clock) -> None:
    timed.create_topic(Topic("in", retention="5s"))
    timed.log.append([encoded("in", 0, named("a-", 4))])
    timed.coordinator.ensure_group(GroupSpec("g", ("in",), stateful=True))
    do_all(timed, "g", b"v")
    clock.advance(10)
    timed.log.append([encoded("in", 0, named("b-", 4))])
    assert timed.apply_retention()
    spec = GroupSpec(NEXT, ("in",), stateful=True, version_of="g")
    with pytest.raises(StateLostError, match="began at offset 0 of 'in' partition 0, and retention has removed"):
        timed.coordinator.ensure_group(spec)
    assert [info.name for info in timed.groups()] == ["g"]
    timed.coordinator.ensure_group(GroupSpec(NEXT, ("in",), stateful=True, version_of="g", from_what_is_left=True))
    assert timed.positions(NEXT) == {at("in"): 4}


def test_commits_and_swaps_do_not_wait_for_each_other_for_ever(backend: Backend) -> None:
    """Whoever commits to the live group, the follower and the third one while they are exchanged ends, one way or
    the other."""
    stream = backend.open()
    make_versions(stream)
    for name in ("g", NEXT):
        do_all(stream, name, b"v")
    stream.coordinator.swap(*take_both(stream), becomes=PREVIOUS)
    stream.coordinator.ensure_group(GroupSpec(NEXT, ("in",), stateful=True, version_of="g"))
    do_all(stream, NEXT, b"v")
    others = {name: backend.open() for name in ("g", NEXT, PREVIOUS)}

    def swap() -> object:
        try:
            stream.coordinator.swap(*take_both(stream), becomes=PREVIOUS)
        except FencedError as error:
            return error
        return "swapped"

    def use(name: str) -> object:
        other = others[name]
        try:
            for _ in range(5):
                lease = other.coordinator.acquire(name, None, f"holder of {name}", TTL)
                commit_all(other, lease, [0], deadlines={(0, "k"): 5}, dead_letters=(letter(0),))
                other.coordinator.release(lease)
        except Exception as error:
            return type(error).__name__
        return "done"

    outcomes = together(swap, *(lambda name=name: use(name) for name in others))
    assert set(outcomes[1:]) <= {"done", "FencedError", "LeaseBusyError", "UnknownGroupError"}, outcomes
    if outcomes[0] == "swapped":
        assert [info.name for info in stream.groups()] == ["g", PREVIOUS]
    assert len(ids(stream, "in")) == 4
