"""The `Coordinator` contract on every backend: members, open batches, readers of outputs, counts of dead letters."""

from __future__ import annotations

import pytest

from djp_dagster.errors import InvalidSettingError, UnknownGroupError
from djp_dagster.streams.model import MemberInfo, ReaderPosition
from djp_dagster.streams.stream import EventStream
from djp_dagster.testing import Clock
from tests.streams.conftest import Backend
from tests.streams.kit import intent_of, together
from tests.streams.test_contract_coordinator import OUTPUT, TTL, commit_all, letter, make_group

HOUR = 3600.0


def live(stream: EventStream, group: str = "g") -> set[str]:
    """Who is there."""
    return {member.owner for member in stream.coordinator.members(group) if member.live}


# Members


def test_members_are_seen_by_everybody(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one)
    make_group(one, "other")
    assert two.coordinator.members("g") == []
    one.coordinator.join("g", "b", 60)
    one.coordinator.join("g", "a", 60, paused=True)
    one.coordinator.join("other", "c", 60)
    assert two.coordinator.members("g") == [
        MemberInfo("a", live=True, paused=True, asked_to_leave=False),
        MemberInfo("b", live=True, paused=False, asked_to_leave=False),
    ]
    assert live(two, "other") == {"c"}
    two.coordinator.leave("g", "b")
    assert live(one) == {"a"}


def test_a_membership_runs_out_unless_it_is_renewed(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.join("g", "a", TTL)
    timed.coordinator.join("g", "b", TTL)
    clock.advance(TTL - 0.001)
    assert live(timed) == {"a", "b"}
    timed.coordinator.join("g", "b", TTL)
    clock.advance(0.001)
    assert live(timed) == {"b"}
    assert timed.coordinator.join("g", "b", TTL).members == 1


def test_what_ran_out_tells_of_a_death_for_a_while_and_what_left_does_not(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.join("g", "dead", TTL)
    timed.coordinator.join("g", "gone", TTL)
    timed.coordinator.leave("g", "gone")
    clock.advance(10 * TTL)
    timed.coordinator.join("g", "next", TTL)
    assert [(member.owner, member.live) for member in timed.coordinator.members("g")] == [
        ("dead", False),
        ("next", True),
    ]
    clock.advance(100 * HOUR)
    timed.coordinator.join("g", "next", TTL)
    assert [member.owner for member in timed.coordinator.members("g")] == ["next"], "but not for ever"


def test_a_member_that_was_dead_is_alive_again_when_it_says_so(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.join("g", "a", TTL)
    clock.advance(2 * TTL)
    assert live(timed) == set()
    assert timed.coordinator.join("g", "a", TTL).members == 1
    assert live(timed) == {"a"}
    assert len(timed.coordinator.members("g")) == 1


def test_a_paused_member_is_there_and_wants_no_share(stream: EventStream) -> None:
    make_group(stream)
    assert stream.coordinator.join("g", "a", 60).members == 1
    assert stream.coordinator.join("g", "b", 60, paused=True).members == 1
    assert live(stream) == {"a", "b"}
    assert stream.coordinator.join("g", "b", 60).members == 2
    assert stream.coordinator.join("g", "a", 60, paused=True).members == 1


def test_leaving_is_asked_for_by_the_beginning_of_a_name(stream: EventStream) -> None:
    make_group(stream)
    for owner in ("run-1-a", "run-1-b", "run-2-a", "x-run-1"):
        stream.coordinator.join("g", owner, 60)
    assert stream.coordinator.ask_to_leave("g", "run-1") == 2
    asked = {member.owner for member in stream.coordinator.members("g") if member.asked_to_leave}
    assert asked == {"run-1-a", "run-1-b"}
    told = stream.coordinator.join("g", "run-1-a", 60)
    assert told.asked_to_leave
    assert told.members == 2, "who leaves wants no share"
    assert not stream.coordinator.join("g", "run-2-a", 60).asked_to_leave
    assert stream.coordinator.ask_to_leave("g", "run-1") == 2, "they are still there"
    for owner in ("run-1-a", "run-1-b"):
        stream.coordinator.leave("g", owner)
    assert stream.coordinator.ask_to_leave("g", "run-1") == 0
    assert stream.coordinator.ask_to_leave("g", "nobody") == 0
    assert not stream.coordinator.join("g", "run-1-a", 60).asked_to_leave, "a new one of the name was not asked"


@pytest.mark.parametrize("name", ["run_", "run%", "%", "_un-1", "RUN-1"])
def test_a_name_is_no_pattern(stream: EventStream, name: str) -> None:
    make_group(stream)
    stream.coordinator.join("g", "run-1-a", 60)
    assert stream.coordinator.ask_to_leave("g", name) == 0
    assert not stream.coordinator.join("g", "run-1-a", 60).asked_to_leave


def test_the_dead_are_not_asked(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.join("g", "run-1-a", TTL)
    clock.advance(TTL)
    assert timed.coordinator.ask_to_leave("g", "run-1") == 0


def test_other_groups_are_not_asked(stream: EventStream) -> None:
    make_group(stream)
    make_group(stream, "other")
    for group in ("g", "other"):
        stream.coordinator.join(group, "run-1-a", 60)
    assert stream.coordinator.ask_to_leave("g", "run-1") == 1
    assert not stream.coordinator.join("other", "run-1-a", 60).asked_to_leave


def test_a_clock_set_back_leaves_no_ghosts(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.join("g", "ghost", TTL)
    clock.advance(-HOUR)
    assert live(timed) == set()
    assert timed.coordinator.join("g", "a", TTL).members == 1
    assert live(timed) == {"a"}


def test_many_join_at_once(backend: Backend) -> None:
    streams = [backend.open() for _ in range(4)]
    make_group(streams[0])
    together(*(lambda n=n: streams[n].coordinator.join("g", f"owner{n}", 60) for n in range(4)))
    assert live(streams[0]) == {f"owner{n}" for n in range(4)}
    assert streams[1].coordinator.join("g", "owner1", 60).members == 4


# Open batches


def test_open_batches_are_seen_without_a_lease(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    make_group(timed, "other")
    assert timed.coordinator.intents("g") == []
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    first = intent_of(timed, lease, [0], take=2)
    second = intent_of(timed, lease, [1, 2])
    for intent in (first, second):
        timed.coordinator.begin(lease, intent)
    before = timed.coordinator.tasks("g")
    assert {one.batch_id: one for one in timed.coordinator.intents("g")} == {
        first.batch_id: first,
        second.batch_id: second,
    }
    assert timed.coordinator.intents("other") == []
    assert timed.coordinator.tasks("g") == before, "looking changes nothing"
    clock.advance(TTL)
    next_lease = timed.coordinator.acquire("g", None, "b", TTL)
    resumed = timed.coordinator.resume(next_lease, first.batch_id)
    (seen,) = [one for one in timed.coordinator.intents("g") if one.batch_id == first.batch_id]
    assert seen == resumed
    assert (seen.attempt, seen.deaths) == (2, 1)


def test_a_committed_batch_is_no_longer_open(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    commit_all(stream, lease)
    assert stream.coordinator.intents("g") == []


# Outputs and their readers


def test_the_last_output(stream: EventStream) -> None:
    make_group(stream)
    make_group(stream, "other")
    assert stream.coordinator.last_output("g") is None
    lease = stream.coordinator.acquire("g", None, "a", 60)
    for task in range(3):
        commit_all(stream, lease, [task], output=OUTPUT if task < 2 else None)
        expected = stream.outputs("g")[-1]
        assert stream.coordinator.last_output("g") == expected
    assert len(stream.outputs("g")) == 2
    other = stream.coordinator.acquire("other", None, "a", 60)
    commit_all(stream, other, [0], output=OUTPUT)
    last = stream.coordinator.last_output("g")
    assert last is not None
    assert last.group == "g"


def test_a_reader_begins_at_the_beginning_and_stays_where_it_was_put(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one)
    make_group(one, "other")
    assert two.coordinator.reader("g", "me") == ReaderPosition(0, None, None)
    for position in (
        ReaderPosition(3, 7, "run-1/step"),
        ReaderPosition(7),
        ReaderPosition(7, 9, "run-2/step"),
        ReaderPosition(2),
    ):
        one.coordinator.move_reader("g", "me", position)
        assert two.coordinator.reader("g", "me") == position
    assert two.coordinator.reader("g", "you") == ReaderPosition()
    assert two.coordinator.reader("other", "me") == ReaderPosition()


def test_readers_move_at_once_in_several_processes(backend: Backend) -> None:
    streams = [backend.open() for _ in range(3)]
    make_group(streams[0])
    for round_number in range(1, 6):
        together(
            *(
                lambda n=n, s=round_number: streams[n].coordinator.move_reader("g", "me", ReaderPosition(10 * s + n))
                for n in range(3)
            )
        )
        position = streams[0].coordinator.reader("g", "me")
        assert position.sequence in {10 * round_number + n for n in range(3)}
        assert (position.proposed, position.proposer) == (None, None)


@pytest.mark.parametrize("name", ["", "a/b", "x" * 201, "with space"])
def test_a_readers_name_is_checked(stream: EventStream, name: str) -> None:
    make_group(stream)
    with pytest.raises(InvalidSettingError, match="reader"):
        stream.coordinator.move_reader("g", name, ReaderPosition(1))


def test_a_deleted_group_takes_its_readers_and_members_along(stream: EventStream) -> None:
    make_group(stream)
    stream.coordinator.move_reader("g", "me", ReaderPosition(5, 6, "somebody"))
    stream.coordinator.join("g", "a", 60)
    stream.delete_group("g")
    make_group(stream)
    assert stream.coordinator.reader("g", "me") == ReaderPosition()
    assert stream.coordinator.members("g") == []


# Dead letters


def test_dead_letters_are_counted_by_status(stream: EventStream) -> None:
    make_group(stream)
    make_group(stream, "other")
    lease = stream.coordinator.acquire("g", None, "a", 60)

    def counts(group: str = "g") -> list[int]:
        return [stream.coordinator.count_dead_letters(group, status) for status in ("pending", "redriven", "discarded")]

    assert counts() == [0, 0, 0]
    commit_all(stream, lease, [0], dead_letters=tuple(letter(offset) for offset in range(4)))
    assert counts() == [4, 0, 0]
    assert counts("other") == [0, 0, 0]
    ids = [one.id for one in stream.dead_letters("g")]
    stream.discard_dead_letters("g", ids[:1])
    commit_all(stream, lease, [1], redriven=tuple(ids[1:3]))
    assert counts() == [1, 2, 1]


def test_an_unknown_group_is_named(stream: EventStream) -> None:
    coordinator = stream.coordinator
    for use in (
        lambda: coordinator.members("nobody"),
        lambda: coordinator.ask_to_leave("nobody", "run-1"),
        lambda: coordinator.leave("nobody", "a"),
        lambda: coordinator.intents("nobody"),
        lambda: coordinator.last_output("nobody"),
        lambda: coordinator.reader("nobody", "me"),
        lambda: coordinator.move_reader("nobody", "me", ReaderPosition(1)),
        lambda: coordinator.count_dead_letters("nobody", "pending"),
    ):
        with pytest.raises(UnknownGroupError, match="nobody") as caught:
            use()
        assert caught.value.facts["group"] == "nobody"
