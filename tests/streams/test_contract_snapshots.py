"""The `Coordinator` contract about snapshots of state, and about what a group's state is made of, on every backend."""

from __future__ import annotations

import pytest

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.errors import FencedError, OffsetOutOfRangeError, UnknownGroupError
from djp_dagster.streams.model import Commit, Lease, NewSnapshot, Snapshot
from djp_dagster.streams.records import CODEC_CHANGES, EncodedBatch, encode_changes
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import changelog_of
from djp_dagster.testing import Clock
from tests.streams.conftest import Backend
from tests.streams.kit import at, intent_of, together
from tests.streams.test_contract_coordinator import make_group

TTL = 5.0


def held(stream: EventStream, owner: str = "a", group: str = "g") -> Lease:
    """All tasks of the group."""
    return stream.coordinator.acquire(group, None, owner, TTL)


def change(stream: EventStream, lease: Lease, *, task: int = 0, keys: int = 2, take: int = 0) -> int:
    """Commit a batch that changes so many keys, in one record batch of the changelog; where that ends then."""
    intent = intent_of(stream, lease, [task], take=take)
    stream.coordinator.begin(lease, intent)
    changelog = at(changelog_of(lease.group), task)
    blob = encode_changes([(b"k%d" % number, b"\xc0") for number in range(keys)])
    end = stream.log.spans([changelog.topic])[changelog].end
    appended = (EncodedBatch(changelog.topic, task, keys, blob, CODEC_CHANGES), end)
    stream.coordinator.commit(Commit(lease.part([task]), intent, changelog=(appended,)))
    return end + keys


def snapshot(offset: int, task: int = 0, mentions: bytes = b"") -> NewSnapshot:
    return NewSnapshot(task, offset, PayloadRef(f"sha256/{offset}", offset, "0" * 64, "application/x"), mentions)


def known(stream: EventStream, task: int = 0, group: str = "g") -> list[int]:
    return [one.offset for one in stream.coordinator.snapshots(group, task)]


def held_of_changelog(stream: EventStream, task: int = 0, group: str = "g") -> tuple[int, int]:
    """Where the changelog of the task begins and ends."""
    changelog = at(changelog_of(group), task)
    span = stream.log.spans([changelog.topic])[changelog]
    return span.begin, span.end


def test_a_snapshot_is_described(timed: EventStream, clock: Clock) -> None:
    make_group(timed, stateful=True)
    lease = held(timed)
    change(timed, lease, task=1, keys=3)
    new = snapshot(3, task=1, mentions=b"sha256/aa\nsha256/bb")
    timed.coordinator.add_snapshot(lease, new, keep=2)
    [found] = timed.coordinator.snapshots("g", 1)
    assert found == Snapshot(found.number, 1, 3, new.payload, new.mentions, round(clock() * 1e6))
    assert known(timed, 0) == known(timed, 2) == []


def test_the_newest_are_kept_and_only_what_they_cover_goes(stream: EventStream) -> None:
    make_group(stream, stateful=True)
    lease, ends = held(stream), [0]
    for number in range(6):
        ends.append(change(stream, lease, keys=number + 1))
        change(stream, lease, task=1)
        stream.coordinator.add_snapshot(lease, snapshot(ends[-1]), keep=3)
        assert known(stream) == ends[:0:-1][:3]
        # Nothing goes before there are three of them; then what is before the oldest of these.
        assert held_of_changelog(stream) == (ends[-3] if number >= 2 else 0, ends[-1])
    assert held_of_changelog(stream, 1) == (0, 12)
    begin, end = held_of_changelog(stream)
    changelog = at(changelog_of("g"))
    kept = stream.log.read(changelog, begin, end=end, max_bytes=1 << 20)
    assert [(batch.base_offset, batch.end_offset) for batch in kept] == [(ends[4], ends[5]), (ends[5], ends[6])]
    with pytest.raises(OffsetOutOfRangeError) as caught:
        stream.log.read(changelog, begin - 1, end=end, max_bytes=1 << 20)
    assert (caught.value.facts["lost_from"], caught.value.facts["lost_to"]) == (begin - 1, begin)
    change(stream, lease)  # the changelog goes on where it was


def test_record_batches_go_as_a_whole(stream: EventStream) -> None:
    make_group(stream, stateful=True)
    lease = held(stream)
    for _ in range(3):
        change(stream, lease, keys=4)
    for offset in (5, 7):
        stream.coordinator.add_snapshot(lease, snapshot(offset), keep=2)
    assert held_of_changelog(stream) == (4, 12)
    stream.coordinator.add_snapshot(lease, snapshot(8), keep=2)
    assert held_of_changelog(stream) == (4, 12)
    stream.coordinator.add_snapshot(lease, snapshot(12), keep=2)
    assert held_of_changelog(stream) == (8, 12)


def test_it_may_keep_fewer_or_more_than_before(stream: EventStream) -> None:
    make_group(stream, stateful=True)
    lease, ends = held(stream), []
    for keep, expected in ((5, 1), (5, 2), (5, 3), (2, 2), (4, 3), (4, 4), (4, 4)):
        ends.append(change(stream, lease))
        stream.coordinator.add_snapshot(lease, snapshot(ends[-1]), keep=keep)
        assert known(stream) == ends[::-1][:expected]
        begin, _ = held_of_changelog(stream)
        assert begin <= known(stream)[-1], "the oldest known snapshot must have its tail"


def test_a_fenced_holder_changes_nothing(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    old = held(one)
    ends = [change(one, old) for _ in range(3)]
    for end in ends[:2]:
        one.coordinator.add_snapshot(old, snapshot(end), keep=2)
    one.coordinator.release(old)
    new = held(two, "b")
    before = one.coordinator.snapshots("g", 0), held_of_changelog(one)
    for lease in (old, old.part([0]), Lease("g", "b", TTL, old.epochs)):
        with pytest.raises(FencedError):
            one.coordinator.add_snapshot(lease, snapshot(ends[2]), keep=2)
    assert (one.coordinator.snapshots("g", 0), held_of_changelog(one)) == before
    assert known(two) == ends[1::-1]
    two.coordinator.add_snapshot(new, snapshot(ends[2]), keep=2)
    assert known(one) == ends[:0:-1]


def test_making_one_known_prolongs_the_lease_of_its_task(timed: EventStream, clock: Clock) -> None:
    make_group(timed, stateful=True)
    lease = held(timed)
    end = change(timed, lease)
    clock.advance(TTL - 1)
    timed.coordinator.add_snapshot(lease, snapshot(end), keep=2)
    left = [info.expires_micros / 1e6 - clock() for info in timed.coordinator.tasks("g")]
    assert left == pytest.approx([TTL, 1.0, 1.0])


def test_a_seek_and_a_deletion_forget_them(stream: EventStream) -> None:
    make_group(stream, stateful=True)
    make_group(stream, "other", stateful=True)
    for group in ("g", "other"):
        lease = held(stream, group=group)
        stream.coordinator.add_snapshot(lease, snapshot(change(stream, lease)), keep=2)
        stream.coordinator.release(lease)
    stream.coordinator.seek("g", "earliest", reset_state=True)
    assert (known(stream), held_of_changelog(stream)) == ([], (0, 0))
    lease = held(stream)
    stream.coordinator.add_snapshot(lease, snapshot(change(stream, lease)), keep=2)
    stream.coordinator.release(lease)
    assert known(stream) == [2]
    stream.coordinator.delete_group("g")
    with pytest.raises(UnknownGroupError):
        stream.coordinator.snapshots("g", 0)
    make_group(stream, stateful=True)
    assert (known(stream), known(stream, group="other")) == ([], [2])


def test_whoever_was_fenced_by_a_seek_makes_none_known(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    old = held(one)
    end = change(one, old)
    one.coordinator.release(old)
    two.coordinator.seek("g", "earliest", reset_state=True)
    with pytest.raises(FencedError):
        one.coordinator.add_snapshot(old, snapshot(end), keep=2)
    assert known(two) == []


def test_a_lease_knows_that_another_process_has_replaced_the_changelog(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    lease = held(one)
    change(one, lease, keys=5)
    before = one.log.topic(changelog_of("g")).identity
    one.coordinator.release(lease)
    two.coordinator.seek("g", "earliest", reset_state=True)
    lease = held(one)
    assert one.log.topic(changelog_of("g")).identity != before
    assert held_of_changelog(one) == (0, 0)
    one.coordinator.add_snapshot(lease, snapshot(change(one, lease, keys=7)), keep=2)
    assert known(one) == known(two) == [7]


def test_snapshots_of_several_tasks_at_once(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    lease = held(one)
    ends = {task: [change(one, lease, task=task) for _ in range(6)] for task in (0, 1)}

    def take(stream: EventStream, task: int) -> None:
        for end in ends[task]:
            stream.coordinator.add_snapshot(lease, snapshot(end, task), keep=2)

    together(lambda: take(one, 0), lambda: take(two, 1))
    for task in (0, 1):
        assert known(one, task) == ends[task][:3:-1]
        assert held_of_changelog(one, task) == (ends[task][4], ends[task][5])


# Views


def test_a_view_is_of_one_moment(timed: EventStream, clock: Clock) -> None:
    make_group(timed, stateful=True)
    lease = held(timed)
    clock.advance(7)
    view = timed.coordinator.view("g")
    assert view.positions == {at("in", task): 0 for task in range(3)} == timed.positions("g")
    assert view.changelog == {0: 0, 1: 0, 2: 0}
    assert (view.backlog.events, view.backlog.age_s) == (12, 7.0)
    change(timed, lease, task=2, keys=5, take=4)
    view = timed.coordinator.view("g")
    assert view.positions == {at("in", 0): 0, at("in", 1): 0, at("in", 2): 4}
    assert view.changelog == {0: 0, 1: 0, 2: 5}
    assert (view.backlog.events, view.backlog.age_s) == (8, 7.0)


def test_positions_and_changelog_never_disagree(backend: Backend) -> None:
    """Each commit moves one record on and appends one change, so a view that was torn would show it."""
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    lease = held(one)

    def work() -> None:
        for task in (0, 1, 2):
            for _ in range(4):
                change(one, lease, task=task, keys=1, take=1)

    def look() -> int:
        looks = 0
        while True:
            view = two.coordinator.view("g")
            assert {at("in", task): end for task, end in view.changelog.items()} == view.positions
            assert view.backlog.events == 12 - sum(view.positions.values())
            looks += 1
            if view.backlog.events == 0:
                return looks

    _, looks = together(work, look)
    assert looks > 0


def test_a_view_follows_what_other_processes_do_to_the_group(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, stateful=True)
    lease = held(one)
    change(one, lease, keys=5, take=4)
    assert two.coordinator.view("g").changelog[0] == 5
    one.coordinator.release(lease)
    first = two.coordinator.view("g").identity
    one.coordinator.seek("g", "earliest", reset_state=True)
    view = two.coordinator.view("g")
    assert (view.changelog[0], view.positions[at("in")], view.backlog.events) == (0, 0, 12)
    assert view.identity == two.log.topic(changelog_of("g")).identity != first
    one.coordinator.delete_group("g")
    with pytest.raises(UnknownGroupError):
        two.coordinator.view("g")
    make_group(one, stateful=True)
    assert two.coordinator.view("g").changelog == {0: 0, 1: 0, 2: 0}


def test_a_view_of_a_group_without_state_has_no_changelog(stream: EventStream) -> None:
    make_group(stream)
    view = stream.coordinator.view("g")
    assert (view.positions, view.changelog, view.identity) == (stream.positions("g"), {}, None)
