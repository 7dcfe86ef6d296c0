"""The `Coordinator` contract, on every backend."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import msgspec
import pytest

from djp_dagster.claim_check.claims import PayloadRef
from djp_dagster.errors import (
    DeadlineOvertakenError,
    DjpError,
    FencedError,
    GroupMismatchError,
    InvalidSettingError,
    LeaseBusyError,
    OffsetOutOfRangeError,
    UnknownGroupError,
    UnknownTopicError,
)
from djp_dagster.streams.model import (
    Commit,
    Deadline,
    GroupSpec,
    Intent,
    Lease,
    NewDeadLetter,
    Poison,
    Probe,
    Start,
)
from djp_dagster.streams.records import CODEC_CHANGES, EncodedBatch, TopicPartition, encode_changes
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import Topic, changelog_of
from djp_dagster.testing import Clock
from tests.streams.conftest import Backend
from tests.streams.kit import FAR, at, encoded, ids, intent_of, named, together, visible

TTL = 5.0
OUTPUT = PayloadRef(key="attempts/g/b/1/output", bytes=3, sha256="0" * 64, media_type="application/json")


def make_group(stream: EventStream, name: str = "g", *, partitions: int = 3, stateful: bool = False) -> None:
    """A group on topic ``in`` with four records in each partition, and a topic ``out``."""
    stream.create_topic(Topic("in", partitions=partitions))
    stream.create_topic(Topic("out", partitions=2))
    stream.log.append([encoded("in", partition, named(f"{partition}-", 4)) for partition in range(partitions)])
    stream.coordinator.ensure_group(GroupSpec(name, ("in",), stateful=stateful))


def letter(offset: int, partition: int = 0, topic: str = "in") -> NewDeadLetter:
    return NewDeadLetter(topic, partition, offset, 77, b"\xc1raw", "ValueError", f"bad {offset}")


def change(group: str = "g", task: int = 0, key: bytes = b"k", value: bytes | None = b"v") -> EncodedBatch:
    return EncodedBatch(changelog_of(group), task, 1, encode_changes([(key, value)]), CODEC_CHANGES)


def commit_all(stream: EventStream, lease: Lease, tasks: list[int] | None = None, **effects: object) -> Commit:
    """Begin and commit a batch of everything pending on the tasks, with these effects."""
    intent = intent_of(stream, lease, tasks)
    stream.coordinator.begin(lease, intent)
    commit = Commit(lease.part(intent.tasks), intent, **effects)  # type: ignore[arg-type]
    stream.coordinator.commit(commit)
    return commit


# Groups


def test_a_new_group_is_described(timed: EventStream, clock: Clock) -> None:
    timed.create_topic(Topic("a", partitions=2))
    timed.create_topic(Topic("b", partitions=4))
    info = timed.coordinator.ensure_group(GroupSpec("g", ("b", "a"), stateful=True))
    assert (info.name, info.topics, info.tasks, info.stateful) == ("g", ("b", "a"), 4, True)
    assert info.created_micros == round(clock() * 1e6)
    assert timed.coordinator.group("g") == info
    assert timed.log.topic(changelog_of("g")).partitions == 4
    timed.coordinator.ensure_group(GroupSpec("first", ("a",)))
    assert [one.name for one in timed.groups()] == ["first", "g"]
    tasks = timed.coordinator.tasks("g")
    assert [one.task for one in tasks] == [0, 1, 2, 3]
    assert all(
        (one.epoch, one.owner, one.last_batch, one.last_attempt, one.worth_asking) == (0, None, None, 0, True)
        for one in tasks
    )
    assert timed.positions("g") == {at(t, p): 0 for t, count in (("a", 2), ("b", 4)) for p in range(count)}


def test_a_group_begins_where_it_says(timed: EventStream, clock: Clock) -> None:
    timed.create_topic(Topic("t", retention="25s"))
    begun = clock()
    for _ in range(4):
        timed.log.append([encoded("t", 0, ["x", "y"])])
        clock.advance(10)
    clock.advance(-5)
    timed.apply_retention()  # takes the first record batch
    cases: list[tuple[Start, int]] = [
        ("earliest", 2),
        ("latest", 8),
        (round((begun + 20) * 1e6), 4),
        (round((begun + 20) * 1e6) + 1, 6),
        (0, 2),
        (FAR, 8),
    ]
    for number, (start, committed) in enumerate(cases):
        timed.coordinator.ensure_group(GroupSpec(f"g{number}", ("t",), start=start))
        assert timed.positions(f"g{number}") == {at("t"): committed}, start
        assert timed.pending(f"g{number}").events == 8 - committed


def test_a_group_that_exists_stays_where_it_is(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", TTL)
    commit_all(stream, lease)
    before = stream.positions("g")
    stream.coordinator.ensure_group(GroupSpec("g", ("in",), start="latest"))
    stream.coordinator.ensure_group(GroupSpec("g", ("in",), start="earliest"))
    assert stream.positions("g") == before == {at("in", p): 4 for p in range(3)}


@pytest.mark.parametrize("spec", [GroupSpec("g", ("in", "out")), GroupSpec("g", ("in",), stateful=True)])
def test_a_group_declared_otherwise_is_refused(stream: EventStream, spec: GroupSpec) -> None:
    make_group(stream)
    with pytest.raises(GroupMismatchError, match="'g'"):
        stream.coordinator.ensure_group(spec)


def test_bad_groups_are_refused(stream: EventStream) -> None:
    with pytest.raises(InvalidSettingError, match="no topic"):
        stream.coordinator.ensure_group(GroupSpec("g", ()))
    with pytest.raises(InvalidSettingError, match="name"):
        stream.coordinator.ensure_group(GroupSpec("g/h", ("in",)))
    with pytest.raises(UnknownTopicError):
        stream.coordinator.ensure_group(GroupSpec("g", ("in",)))
    assert stream.groups() == []


def test_two_processes_may_create_the_same_group_at_once(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    one.create_topic(Topic("t", partitions=2))
    for number in range(5):
        spec = GroupSpec(f"g{number}", ("t",), stateful=number % 2 == 0)
        first, second = together(
            lambda spec=spec: one.coordinator.ensure_group(spec), lambda spec=spec: two.coordinator.ensure_group(spec)
        )
        assert first == second
        assert len(one.coordinator.tasks(spec.name)) == 2


def test_an_unknown_group_is_named(stream: EventStream) -> None:
    for use in (
        lambda: stream.coordinator.group("nobody"),
        lambda: stream.positions("nobody"),
        lambda: stream.pending("nobody"),
        lambda: stream.coordinator.tasks("nobody"),
        lambda: stream.coordinator.acquire("nobody", None, "a", TTL),
        lambda: stream.coordinator.join("nobody", "a", TTL),
        lambda: stream.coordinator.seek("nobody", "earliest"),
        lambda: stream.coordinator.delete_group("nobody"),
        lambda: stream.outputs("nobody"),
        lambda: stream.dead_letters("nobody"),
        lambda: stream.coordinator.request("nobody", "cut", {}),
    ):
        with pytest.raises(UnknownGroupError, match="nobody") as caught:
            use()
        assert caught.value.facts["group"] == "nobody"


def test_a_deleted_group_leaves_nothing(timed: EventStream, clock: Clock) -> None:
    make_group(timed, stateful=True)
    make_group(timed, "other")
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    commit_all(timed, lease, [0], output=OUTPUT, dead_letters=(letter(1),), deadlines={(0, "k"): 5})
    timed.coordinator.request("g", "cut", {})
    timed.coordinator.join("g", "a", 60)
    timed.coordinator.begin(lease, intent_of(timed, lease, [1]))
    with pytest.raises(LeaseBusyError, match="'a'") as caught:
        timed.delete_group("g")
    assert caught.value.facts["holder"] == "a"
    clock.advance(TTL + 1)
    timed.delete_group("g")
    with pytest.raises(UnknownGroupError):
        timed.coordinator.group("g")
    with pytest.raises(UnknownTopicError):
        timed.log.topic(changelog_of("g"))
    assert timed.dead_letters(status=None) == []
    timed.coordinator.ensure_group(GroupSpec("g", ("in",), stateful=True))
    fresh = visible(timed, "g")
    assert fresh["outputs"] == fresh["dead letters"] == fresh["deadlines"] == fresh["requests"] == []
    assert fresh["last"] == [(None, 0)] * 3
    assert timed.coordinator.join("g", "b", 60).members == 1
    assert timed.coordinator.acquire("g", None, "b", TTL).intents == ()
    assert timed.positions("other") == {at("in", p): 0 for p in range(3)}


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_group_deleted_by_somebody_else_is_not_mistaken_for_an_empty_one(backend: Backend, made_anew: bool) -> None:
    one, two = backend.open(), backend.open()
    make_group(one, "first")
    beginning = {at("in", partition): 0 for partition in range(3)}
    uses: list[tuple[Callable[[str], object], object]] = [
        (lambda g: two.coordinator.acquire(g, None, "a", TTL).epochs, {0: 1, 1: 1, 2: 1}),
        (two.positions, beginning),
        (lambda g: two.pending(g).events, 12),
        (lambda g: [info.task for info in two.coordinator.tasks(g)], [0, 1, 2]),
        (lambda g: two.coordinator.seek(g, "earliest"), beginning),
        (lambda g: two.coordinator.join(g, "a", TTL).members, 1),
        (lambda g: two.coordinator.request(g, "cut", {}) and len(one.coordinator.requests(g)), 1),
        (two.coordinator.delete_group, None),
    ]
    for number, (use, expected) in enumerate(uses):
        spec = GroupSpec(f"g{number}", ("in",))
        one.coordinator.ensure_group(spec)
        assert two.pending(spec.name).events == 12
        one.coordinator.delete_group(spec.name)
        if made_anew:
            one.coordinator.ensure_group(spec)
            assert use(spec.name) == expected, number
        else:
            with pytest.raises(UnknownGroupError, match=spec.name):
                use(spec.name)


# Leases


def test_a_lease_is_seen_by_everybody(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", [1], "a", TTL)
    assert (lease.group, lease.owner, lease.ttl_s, lease.intents) == ("g", "a", TTL, ())
    tasks = timed.coordinator.tasks("g")
    assert [info.owner for info in tasks] == [None, "a", None]
    assert tasks[1].expires_micros == round((clock() + TTL) * 1e6)
    assert [info.worth_asking for info in tasks] == [True, False, True]
    with pytest.raises(LeaseBusyError, match="task 1 of group 'g' is leased by 'a'") as caught:
        timed.coordinator.acquire("g", [1, 2], "b", TTL)
    assert {**caught.value.facts} == {"group": "g", "task": 1, "holder": "a", "left_s": TTL}
    with pytest.raises(InvalidSettingError, match="tasks 0 to 2"):
        timed.coordinator.acquire("g", [3], "b", TTL)


def test_tasks_are_leased_all_or_none(stream: EventStream) -> None:
    make_group(stream)
    stream.coordinator.acquire("g", [2], "a", 60)
    before = stream.coordinator.tasks("g")
    for tasks in (None, [0, 2], [2]):
        with pytest.raises(LeaseBusyError):
            stream.coordinator.acquire("g", tasks, "b", 60)
    assert stream.coordinator.tasks("g") == before
    assert set(stream.coordinator.acquire("g", [0, 1], "b", 60).epochs) == {0, 1}


def test_one_of_two_wins_and_the_other_gets_nothing(backend: Backend) -> None:
    streams = [backend.open() for _ in range(3)]
    make_group(streams[0])

    def grab(number: int) -> Lease | None:
        orders: list[list[int] | None] = [None, [2, 1, 0], [0, 2]]
        try:
            return streams[number].coordinator.acquire("g", orders[number], f"owner{number}", 60)
        except LeaseBusyError:
            return None

    for _ in range(5):
        leases = [lease for lease in together(*(lambda n=n: grab(n) for n in range(3))) if lease is not None]
        assert len(leases) == 1
        owned = {info.task for info in streams[0].coordinator.tasks("g") if info.owner == leases[0].owner}
        assert owned == set(leases[0].epochs)
        streams[0].coordinator.release(leases[0])


def test_every_change_of_hands_raises_the_epoch(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    seen = {0: 0, 1: 0, 2: 0}
    for number, tasks in enumerate([[1], [1], [0, 1], None, [2], [0, 2]]):
        lease = timed.coordinator.acquire("g", tasks, f"owner{number}", TTL)
        assert len(set(lease.epochs.values())) == 1  # one fencing token for the set
        for task, epoch in lease.epochs.items():
            assert epoch > seen[task]
            seen[task] = epoch
        if number % 2:
            timed.coordinator.release(lease)
        else:
            clock.advance(TTL)
    assert {info.task: info.epoch for info in timed.coordinator.tasks("g")} == seen


def test_an_open_batch_brings_its_whole_task_set(timed: EventStream, clock: Clock) -> None:
    make_group(timed, partitions=6)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    first, second = intent_of(timed, lease, [0, 1], take=2), intent_of(timed, lease, [2, 3])
    for intent in (first, second):
        timed.coordinator.begin(lease, intent)
    clock.advance(TTL)
    lease = timed.coordinator.acquire("g", [1, 4], "b", TTL)
    assert set(lease.epochs) == {0, 1, 4}
    assert lease.intents == (first,)
    with pytest.raises(LeaseBusyError):
        timed.coordinator.acquire("g", [0], "c", TTL)
    assert timed.coordinator.acquire("g", [5], "c", TTL).intents == ()
    assert set(timed.coordinator.acquire("g", [3], "c", TTL).epochs) == {2, 3}
    assert timed.coordinator.acquire("g", [2], "c", TTL).intents == (second,)
    assert lease.part([4]).epochs == {4: lease.epochs[4]}


def test_a_task_of_a_leased_set_brings_nobody_a_part_of_it(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    timed.coordinator.begin(lease, intent_of(timed, lease, [0, 1]))
    timed.coordinator.release(lease.part([0]))  # a holder that died while giving back
    with pytest.raises(LeaseBusyError, match="task 1"):
        timed.coordinator.acquire("g", [0], "b", TTL)
    clock.advance(TTL)
    assert set(timed.coordinator.acquire("g", [0], "b", TTL).epochs) == {0, 1}


def test_a_lease_runs_out(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    timed.coordinator.acquire("g", None, "a", TTL)
    clock.advance(TTL - 0.001)
    with pytest.raises(LeaseBusyError):
        timed.coordinator.acquire("g", None, "b", TTL)
    clock.advance(0.001)
    assert all(info.worth_asking for info in timed.coordinator.tasks("g"))
    timed.coordinator.acquire("g", None, "b", TTL)


def test_a_heartbeat_prolongs_and_finds_out(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    make_group(timed, "other")
    lease = timed.coordinator.acquire("g", [0, 1], "a", TTL)
    other = timed.coordinator.acquire("other", [0], "a", TTL)
    clock.advance(TTL - 1)
    timed.coordinator.heartbeat([lease, other])
    clock.advance(TTL - 1)
    with pytest.raises(LeaseBusyError):
        timed.coordinator.acquire("g", [0], "b", TTL)
    clock.advance(10 * TTL)
    timed.coordinator.heartbeat([lease])  # it ran out, but nobody took it
    with pytest.raises(LeaseBusyError):
        timed.coordinator.acquire("g", [1], "b", TTL)
    timed.coordinator.acquire("other", None, "b", TTL)
    before = timed.coordinator.tasks("g")
    clock.advance(1)
    with pytest.raises(FencedError, match="'other'") as caught:
        timed.coordinator.heartbeat([lease, other])
    assert caught.value.facts == {"group": "other", "owner": "a"}
    assert [info.expires_micros for info in timed.coordinator.tasks("g")] == [info.expires_micros for info in before]
    timed.coordinator.heartbeat([])


def test_a_released_lease_is_free_and_void(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    stream.coordinator.release(lease.part([0]))
    assert [info.owner for info in stream.coordinator.tasks("g")] == [None, "a", "a"]
    stream.coordinator.release(lease)
    with pytest.raises(FencedError):
        stream.coordinator.heartbeat([lease])
    new = stream.coordinator.acquire("g", None, "b", 60)
    stream.coordinator.release(lease)  # somebody else's by now: no error, and no effect
    stream.coordinator.heartbeat([new])
    assert {info.owner for info in stream.coordinator.tasks("g")} == {"b"}
    stream.coordinator.release(lease.part([]))


@pytest.mark.parametrize("how", ["acquire", "seek", "delete"])
def test_a_clock_set_back_does_not_prolong_a_dead_holders_lease(timed: EventStream, clock: Clock, how: str) -> None:
    make_group(timed)
    ask: dict[str, Callable[[], object]] = {
        "acquire": lambda: timed.coordinator.acquire("g", None, "b", TTL),
        "seek": lambda: timed.coordinator.seek("g", "latest"),
        "delete": lambda: timed.coordinator.delete_group("g"),
    }
    timed.coordinator.acquire("g", None, "a", TTL)
    clock.advance(-3600)
    assert all(info.worth_asking for info in timed.coordinator.tasks("g"))
    given = clock()
    while True:
        try:
            ask[how]()
        except LeaseBusyError as busy:
            assert busy.facts["left_s"] <= TTL
        else:
            break
        assert clock() <= given + 3 * TTL, "the lease should have run out one time to live after each first question"
        clock.advance(TTL)


def test_a_clock_set_back_leaves_a_living_holder_its_lease(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    clock.advance(-3600)
    for _ in range(4):
        timed.coordinator.heartbeat([lease])
        clock.advance(TTL - 1)
        with pytest.raises(LeaseBusyError):
            timed.coordinator.acquire("g", None, "b", TTL)


def test_owners_that_want_a_share_are_counted(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    make_group(timed, "other")
    coordinator = timed.coordinator
    assert coordinator.join("g", "a", TTL).members == 1
    assert coordinator.join("g", "a", TTL).members == 1
    assert coordinator.join("g", "b", 2 * TTL).members == 2
    assert coordinator.join("other", "c", TTL).members == 1
    clock.advance(TTL)
    assert coordinator.join("g", "c", TTL).members == 2  # a is gone
    coordinator.leave("g", "b")
    coordinator.leave("g", "never there")
    assert coordinator.join("g", "c", TTL).members == 1
    assert coordinator.join("g", "d", TTL).members == 2
    clock.advance(-3600)
    assert coordinator.join("g", "c", TTL).members == 1  # what d wrote lies an hour ahead


# Intents


def test_an_open_batch_is_found_unchanged(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    intent = intent_of(
        timed,
        lease,
        [0, 2],
        take=3,
        deadlines=[Deadline(0, "ключ", 5)],
        dead_letters=(1, 2),
        requests=(3,),
        poison=(Poison("in", 0, 1, "ValueError", "bad"),),
        probe=Probe(0, 4, 2, "ValueError", "bad"),
        not_before_micros=99,
    )
    clock.advance(TTL - 1)
    timed.coordinator.begin(lease, intent)
    clock.advance(TTL - 1)
    with pytest.raises(LeaseBusyError):  # beginning prolonged the lease of its tasks, and of no other
        timed.coordinator.acquire("g", [2], "b", TTL)
    timed.coordinator.acquire("g", [1], "b", TTL)
    clock.advance(1)
    assert timed.coordinator.acquire("g", [0], "b", TTL).intents == (intent,)


def test_only_a_holder_begins_resumes_and_updates(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    old = timed.coordinator.acquire("g", None, "a", TTL)
    intent = intent_of(timed, old)
    timed.coordinator.begin(old, intent)
    clock.advance(TTL)
    new = timed.coordinator.acquire("g", None, "b", TTL)
    for use in (
        lambda: timed.coordinator.begin(old, intent_of(timed, old)),
        lambda: timed.coordinator.resume(old, intent.batch_id),
        lambda: timed.coordinator.update(old, msgspec.structs.replace(intent, failures=9)),
        lambda: timed.coordinator.finish_request(old, timed.coordinator.request("g", "cut", {}), "done"),
    ):
        with pytest.raises(FencedError):
            use()
    assert new.intents == (intent,)
    assert timed.coordinator.acquire("g", None, "b", TTL).intents == (intent,)
    with pytest.raises(FencedError):
        timed.coordinator.resume(timed.coordinator.acquire("g", None, "b", TTL), "no such batch")


def test_an_attempt_that_never_ended_is_a_death(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    intent = intent_of(stream, lease)
    stream.coordinator.begin(lease, intent)
    resumed = stream.coordinator.resume(lease, intent.batch_id)
    assert (resumed.attempt, resumed.deaths, resumed.failures, resumed.running) == (2, 1, 0, True)
    ended = msgspec.structs.replace(resumed, running=False, failures=1, not_before_micros=7)
    stream.coordinator.update(lease, ended)
    assert stream.coordinator.acquire("g", None, "a", 60).intents == (ended,)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    resumed = stream.coordinator.resume(lease, intent.batch_id)
    assert (resumed.attempt, resumed.deaths, resumed.failures, resumed.running) == (3, 1, 1, True)
    assert stream.coordinator.resume(lease, intent.batch_id).deaths == 2
    assert resumed.ranges == intent.ranges


@pytest.mark.parametrize(("running", "died"), [(True, 1), (False, 0)])
def test_a_death_during_a_probe_is_counted_there_too(stream: EventStream, running: bool, died: int) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    probe = Probe(2, 9, 5, "ValueError", "bad")
    intent = intent_of(stream, lease, probe=probe, running=running)
    stream.coordinator.begin(lease, intent)
    resumed = stream.coordinator.resume(lease, intent.batch_id)
    assert resumed.probe == msgspec.structs.replace(probe, died=died)
    assert resumed.deaths == died


# The commit


def prepared(stream: EventStream) -> tuple[Lease, dict[str, object]]:
    """A stateful group with two dead letters, a deadline and two requests; and a commit's worth of effects."""
    make_group(stream, stateful=True)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    intent = intent_of(stream, lease, [0], take=2)
    stream.coordinator.begin(lease, intent)
    stream.coordinator.commit(
        Commit(
            lease.part([0]),
            intent,
            dead_letters=(letter(0), letter(1)),
            deadlines={(0, "fires"): 10, (0, "stays"): 20, (0, "goes"): 30},
        )
    )
    first, second = stream.dead_letters("g")
    requests = [stream.coordinator.request("g", "cut", {"n": n}) for n in range(2)]
    effects: dict[str, object] = {
        "emits": (encoded("out", 1, ["o1", "o2"]), encoded("out", 0, ["o3"])),
        "changelog": ((change(), 0),),
        "output": OUTPUT,
        "dead_letters": (letter(2),),
        "redriven": (first.id,),
        "redrive_failed": ((second.id, "KeyError", "still bad"),),
        "deadlines": {(0, "new"): 40, (0, "goes"): None},
        "requests": (requests[0],),
    }
    return lease, effects


def test_a_commit_makes_everything_visible(timed: EventStream, clock: Clock) -> None:
    lease, effects = prepared(timed)
    intent = intent_of(timed, lease, [0], deadlines=[Deadline(0, "fires", 10)])
    timed.coordinator.begin(lease, intent)
    resumed = timed.coordinator.resume(lease, intent.batch_id)
    clock.advance(1)
    appended = timed.coordinator.commit(Commit(lease.part([0]), resumed, **effects))  # type: ignore[arg-type]
    assert sorted((one.topic, one.partition, one.base_offset, one.count) for one in appended) == [
        (changelog_of("g"), 0, 0, 1),
        ("out", 0, 0, 1),
        ("out", 1, 0, 2),
    ]
    assert (ids(timed, "out", 0), ids(timed, "out", 1)) == (["o3"], ["o1", "o2"])
    assert timed.positions("g") == {at("in", 0): 4, at("in", 1): 0, at("in", 2): 0}
    now = round(clock() * 1e6)
    (output,) = timed.outputs("g")
    assert (output.group, output.batch_id, output.attempt, output.payload, output.committed_micros) == (
        "g",
        intent.batch_id,
        2,
        OUTPUT,
        now,
    )
    letters = timed.dead_letters("g", status=None)
    assert [(one.offset, one.status, one.redrives, one.error) for one in letters] == [
        (0, "redriven", 1, "bad 0"),
        (1, "pending", 1, "still bad"),
        (2, "pending", 0, "bad 2"),
    ]
    new = letters[2]
    assert (new.group, new.topic, new.partition, new.append_micros, new.raw, new.error_type) == (
        "g",
        "in",
        0,
        77,
        b"\xc1raw",
        "ValueError",
    )
    assert (new.batch_id, new.created_micros) == (intent.batch_id, now)
    assert timed.coordinator.due_deadlines("g", [0], FAR, 10) == [Deadline(0, "stays", 20), Deadline(0, "new", 40)]
    assert [request.body for request in timed.coordinator.requests("g")] == [{"n": 1}]
    assert timed.coordinator.tasks("g")[0].last_batch == intent.batch_id
    assert timed.coordinator.tasks("g")[0].last_attempt == 2
    assert timed.coordinator.acquire("g", None, "a", 60).intents == ()


SPOILERS = [
    "epoch",
    "released",
    "owner",
    "seek",
    "positions",
    "changelog",
    "redriven",
    "intent gone",
    "emit topic gone",
    "emit partition",
    "deadline overtaken",
]


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_nothing_of_a_refused_commit_is_visible(timed: EventStream, clock: Clock, spoiler: str) -> None:
    lease, effects = prepared(timed)
    coordinator = timed.coordinator
    intent = intent_of(timed, lease, [0], take=1, deadlines=[Deadline(0, "fires", 10)])
    begun = intent_of(timed, lease, [0], take=2) if spoiler == "positions" else intent
    if spoiler not in ("intent gone", "seek"):
        coordinator.begin(lease, begun)
    refused: type[DjpError] = FencedError
    if spoiler == "epoch":
        clock.advance(61)
        coordinator.acquire("g", [0], "b", TTL)
    elif spoiler == "released":
        coordinator.release(lease)
    elif spoiler == "owner":
        lease = msgspec.structs.replace(lease, owner="b")
    elif spoiler == "seek":
        clock.advance(61)
        coordinator.seek("g", timed.positions("g"), reset_state=True)
    elif spoiler == "positions":
        (part,) = intent.ranges
        intent = msgspec.structs.replace(begun, ranges=(msgspec.structs.replace(part, start=part.start - 1),))
    elif spoiler == "changelog":
        effects["changelog"] = ((change(), 1),)
    elif spoiler == "redriven":
        assert timed.discard_dead_letters("g", [one.id for one in timed.dead_letters("g")]) == 2
    elif spoiler == "emit topic gone":
        refused = UnknownTopicError
        timed.delete_topic("out")
    elif spoiler == "emit partition":
        refused = InvalidSettingError
        effects["emits"] = (encoded("out", 0), encoded("out", 5))
    elif spoiler == "deadline overtaken":
        refused = DeadlineOvertakenError
        stamped = timed.log.append_time_of(intent.ranges[0].at, intent.ranges[0].end)
        assert stamped is not None
        fired = Deadline(0, "fires", stamped)
        intent = msgspec.structs.replace(intent, deadlines=(fired,))
    before = visible(timed, "g")
    with pytest.raises(refused):
        coordinator.commit(Commit(lease.part([0]), intent, **effects))  # type: ignore[arg-type]
    assert visible(timed, "g") == before
    if spoiler not in ("intent gone", "seek"):
        clock.advance(61)
        assert [one.batch_id for one in coordinator.acquire("g", [0], "z", TTL).intents] == [begun.batch_id]


def test_a_commit_is_made_once(stream: EventStream) -> None:
    lease, effects = prepared(stream)
    commit = commit_all(stream, lease, [0], **effects)
    after = visible(stream, "g")
    with pytest.raises(FencedError):
        stream.coordinator.commit(commit)
    assert visible(stream, "g") == after


def test_the_same_commit_sent_twice_at_once_is_made_once(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one)
    lease = one.coordinator.acquire("g", None, "a", 60)
    intent = intent_of(one, lease)
    one.coordinator.begin(lease, intent)
    commit = Commit(lease, intent, emits=(encoded("out"),), output=OUTPUT)

    def send(stream: EventStream) -> bool:
        try:
            stream.coordinator.commit(commit)
        except FencedError:
            return False
        return True

    assert sorted(together(lambda: send(one), lambda: send(two))) == [False, True]
    assert ids(one, "out") == ["one"]
    assert len(one.outputs("g")) == 1


def test_a_late_holder_nobody_replaced_may_commit(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    intent = intent_of(timed, lease)
    timed.coordinator.begin(lease, intent)
    clock.advance(100 * TTL)
    timed.coordinator.commit(Commit(lease, intent, emits=(encoded("out"),)))
    assert timed.pending("g").events == 0


def test_tasks_of_one_group_commit_side_by_side(backend: Backend) -> None:
    """Different tasks emit to the same partitions in different orders, with outputs: no deadlock, nothing lost."""
    streams = [backend.open() for _ in range(3)]
    make_group(streams[0], stateful=True)
    for _ in range(4):
        streams[0].log.append([encoded("in", partition, named("more", 5)) for partition in range(3)])

    def work(task: int) -> None:
        stream = streams[task]
        lease = stream.coordinator.acquire("g", [task], f"owner{task}", 60)
        shuffled = random.Random(task)
        for number in range(8):
            intent = intent_of(stream, lease, take=3)
            stream.coordinator.begin(lease, intent)
            emits = [encoded("out", partition, [f"{task}-{number}"]) for partition in (0, 1)]
            shuffled.shuffle(emits)
            stream.coordinator.commit(
                Commit(lease, intent, emits=tuple(emits), changelog=((change("g", task), number),), output=OUTPUT)
            )

    together(*(lambda task=task: work(task) for task in range(3)))
    for partition in (0, 1):
        found = ids(streams[0], "out", partition)
        for task in range(3):
            assert [one for one in found if one.startswith(f"{task}-")] == named(f"{task}-", 8)
    assert streams[0].pending("g").events == 0
    sequences = [output.sequence for output in streams[0].outputs("g")]
    assert len(set(sequences)) == 24


def test_an_emptied_batch_still_commits(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    commit_all(stream, lease)
    again = commit_all(stream, lease)  # ranges of length zero, as a deadline's batch has
    assert [part.start - part.end for part in again.intent.ranges] == [0, 0, 0]
    assert stream.positions("g") == {at("in", p): 4 for p in range(3)}


def test_a_redrive_moves_no_offset(stream: EventStream) -> None:
    lease, _ = prepared(stream)
    before = stream.positions("g")
    (first, _) = stream.dead_letters("g")
    intent = intent_of(stream, lease, [0])
    intent = msgspec.structs.replace(intent, kind="redrive", ranges=(), dead_letters=(first.id,))
    stream.coordinator.begin(lease, intent)
    stream.coordinator.commit(Commit(lease.part([0]), intent, emits=(encoded("out"),), redriven=(first.id,)))
    assert stream.positions("g") == before
    assert [one.status for one in stream.dead_letters("g", status=None)] == ["redriven", "pending"]
    assert ids(stream, "out") == ["one"]


# Settling an unclear commit


def begun_commit(stream: EventStream, tasks: list[int] | None = None) -> Commit:
    lease = stream.coordinator.acquire("g", tasks, "a", TTL)
    intent = intent_of(stream, lease)
    stream.coordinator.begin(lease, intent)
    return Commit(lease, intent, emits=(encoded("out"),))


@pytest.mark.parametrize("tasks", [[0], None])
def test_settling_tells_whether_a_commit_was_made(timed: EventStream, clock: Clock, tasks: list[int] | None) -> None:
    make_group(timed)
    commit = begun_commit(timed, tasks)
    assert timed.coordinator.settle(commit) is False
    timed.coordinator.commit(commit)
    assert timed.coordinator.settle(commit) is True
    clock.advance(TTL)
    timed.coordinator.acquire("g", tasks, "b", TTL)
    assert timed.coordinator.settle(commit) is True
    assert ids(timed, "out") == ["one"]


def test_settling_finds_a_lost_lease(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    commit = begun_commit(timed)
    clock.advance(TTL)
    lease = timed.coordinator.acquire("g", [1], "b", TTL)
    assert set(lease.epochs) == {0, 1, 2}
    with pytest.raises(FencedError):
        timed.coordinator.settle(commit)
    other = msgspec.structs.replace(commit, lease=lease, intent=timed.coordinator.resume(lease, commit.intent.batch_id))
    timed.coordinator.commit(other)
    with pytest.raises(FencedError):  # the same batch, but another attempt of it
        timed.coordinator.settle(commit)
    assert timed.coordinator.settle(other) is True


# Deadlines


def set_deadlines(stream: EventStream, lease: Lease, task: int, deadlines: dict[str, int | None]) -> None:
    commit_all(stream, lease, [task], deadlines={(task, key): due for key, due in deadlines.items()})


def test_deadlines_come_due_in_order(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    coordinator = stream.coordinator
    assert coordinator.next_deadline("g", [0, 1, 2]) is None
    set_deadlines(stream, lease, 0, {"b": 20, "a": 20, "z": 5})
    set_deadlines(stream, lease, 1, {"a": 10})
    due = [Deadline(0, "z", 5), Deadline(1, "a", 10), Deadline(0, "a", 20), Deadline(0, "b", 20)]
    assert coordinator.due_deadlines("g", [0, 1, 2], 20, 10) == due
    assert coordinator.due_deadlines("g", [0, 1, 2], 20, 3) == due[:3]
    assert coordinator.due_deadlines("g", [0, 1, 2], 19, 10) == due[:2]
    assert coordinator.due_deadlines("g", [1, 2], 20, 10) == due[1:2]
    assert [coordinator.next_deadline("g", tasks) for tasks in ([0, 1], [1], [2])] == [5, 10, None]
    set_deadlines(stream, lease, 0, {"z": None, "a": 30, "never set": None})
    assert coordinator.due_deadlines("g", [0], FAR, 10) == [Deadline(0, "b", 20), Deadline(0, "a", 30)]


def test_a_fired_deadline_is_gone_unless_set_again(stream: EventStream) -> None:
    make_group(stream)
    lease = stream.coordinator.acquire("g", None, "a", 60)
    set_deadlines(stream, lease, 0, {"a": 10, "b": 20})
    for deadlines, left in [({}, [("b", 20)]), ({(0, "b"): 50}, [("b", 50)])]:
        fired = stream.coordinator.due_deadlines("g", [0], FAR, 1)
        intent = intent_of(stream, lease, [0], deadlines=fired)
        stream.coordinator.begin(lease, intent)
        stream.coordinator.commit(Commit(lease.part([0]), intent, deadlines=deadlines))
        found = stream.coordinator.due_deadlines("g", [0], FAR, 10)
        assert [(one.key, one.due_micros) for one in found] == left


def test_a_deadline_waits_for_what_was_appended_before_it(timed: EventStream, clock: Clock) -> None:
    make_group(timed, partitions=1)
    lease = timed.coordinator.acquire("g", None, "a", 60)
    set_deadlines(timed, lease, 0, {"k": round((clock() + 10) * 1e6)})
    clock.advance(10)
    fired = timed.coordinator.due_deadlines("g", [0], round(clock() * 1e6), 10)
    intent = intent_of(timed, lease, [0], deadlines=fired)
    timed.coordinator.begin(lease, intent)
    timed.log.append([encoded("in", 0, ["slips in, stamped at the deadline"])])
    with pytest.raises(DeadlineOvertakenError, match="offset 4") as caught:
        timed.coordinator.commit(Commit(lease, intent))
    assert (caught.value.facts["topic"], caught.value.facts["offset"]) == ("in", 4)
    (part,) = intent.ranges
    longer = msgspec.structs.replace(intent, ranges=(msgspec.structs.replace(part, end=5),))
    timed.coordinator.update(lease, longer)
    clock.advance(0.001)
    timed.log.append([encoded("in", 0, ["too late"])])
    timed.coordinator.commit(Commit(lease, longer))
    assert timed.positions("g") == {at("in"): 5}
    assert timed.coordinator.next_deadline("g", [0]) is None


# Seek


def test_seek_moves_the_group(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    begun = clock()
    clock.advance(10)
    timed.log.append([encoded("in", 1, ["later"])])
    parts = [at("in", partition) for partition in range(3)]

    def moved(to: Start | dict[TopicPartition, int]) -> list[int]:
        found = timed.coordinator.seek("g", to)
        positions = timed.positions("g")
        assert all(positions[where] == offset for where, offset in found.items())
        return [positions[part] for part in parts]

    assert moved("latest") == [4, 5, 4]
    assert moved("earliest") == [0, 0, 0]
    assert moved(round((begun + 5) * 1e6)) == [4, 4, 4]
    assert moved({at("in", 1): 2}) == [4, 2, 4]
    assert moved({}) == [4, 2, 4]
    assert timed.seek("g", datetime.fromtimestamp(begun, timezone.utc) - timedelta(days=1)) == dict.fromkeys(parts, 0)
    assert timed.pending("g").events == 13


def test_seek_needs_a_free_group(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    lease = timed.coordinator.acquire("g", [1], "a", TTL)
    with pytest.raises(LeaseBusyError, match="'a'"):
        timed.coordinator.seek("g", "latest")
    with pytest.raises(LeaseBusyError, match="'a'"):
        timed.seek("g", "latest", wait=0)
    intent = intent_of(timed, lease)
    timed.coordinator.begin(lease, intent)
    timed.coordinator.release(lease)
    timed.coordinator.seek("g", "latest")
    assert set(timed.positions("g").values()) == {4}
    assert timed.coordinator.acquire("g", None, "a", TTL).intents == (), "the open batch is void"
    with pytest.raises(FencedError):
        timed.coordinator.commit(Commit(lease, intent))


def test_seek_of_a_stateful_group_empties_its_state(timed: EventStream) -> None:
    timed.create_topic(Topic("t"))
    timed.coordinator.ensure_group(GroupSpec("plain", ("t",)))
    timed.coordinator.ensure_group(GroupSpec("keeper", ("t",), stateful=True))
    with pytest.raises(InvalidSettingError, match="reset_state=True"):
        timed.seek("keeper", "earliest")
    with pytest.raises(InvalidSettingError, match="reset_state=False"):
        timed.seek("plain", "earliest", reset_state=True)
    before = timed.log.topic("__changelog.keeper")
    timed.log.append([encoded("__changelog.keeper", 0, named("old", 3))])
    timed.seek("keeper", "earliest", reset_state=True)
    after = timed.log.topic("__changelog.keeper")
    assert after.partitions == before.partitions
    assert after.identity != before.identity
    assert timed.log.spans(["__changelog.keeper"])[at("__changelog.keeper")].end == 0


def test_seek_fences_whoever_still_thinks_it_holds_the_group(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    zombie = timed.coordinator.acquire("g", None, "a", TTL)
    intent = intent_of(timed, zombie)
    epochs = [info.epoch for info in timed.coordinator.tasks("g")]
    clock.advance(TTL)
    timed.coordinator.seek("g", {})
    assert [info.epoch for info in timed.coordinator.tasks("g")] == [epoch + 1 for epoch in epochs]
    for use in (
        lambda: timed.coordinator.heartbeat([zombie]),
        lambda: timed.coordinator.begin(zombie, intent),
    ):
        with pytest.raises(FencedError):
            use()


def test_seek_stays_within_what_the_log_holds(timed: EventStream, clock: Clock) -> None:
    timed.create_topic(Topic("t", retention="10s", retention_cap="20s"))
    timed.log.append([encoded("t", 0, named("old", 3))])
    timed.coordinator.ensure_group(GroupSpec("g", ("t",)))
    clock.advance(21)
    timed.log.append([encoded("t", 0, named("new", 3))])
    timed.apply_retention()
    epochs = [info.epoch for info in timed.coordinator.tasks("g")]
    for bad in ({at("t"): 2}, {at("t"): 7}, {at("t"): -1}, {at("t", 1): 0}, {at("other"): 0}):
        with pytest.raises(OffsetOutOfRangeError, match=r"holds (3 to 6|nothing)"):
            timed.coordinator.seek("g", bad)
    assert timed.positions("g") == {at("t"): 0}
    assert [info.epoch for info in timed.coordinator.tasks("g")] == epochs
    for good in (3, 6):
        assert timed.coordinator.seek("g", {at("t"): good}) == {at("t"): good}


def test_an_open_batch_whose_records_are_gone_can_be_got_past(timed: EventStream, clock: Clock) -> None:
    timed.create_topic(Topic("t", partitions=2, retention="10s", retention_cap="20s"))
    timed.log.append([encoded("t", 0, named("old", 3))])
    timed.coordinator.ensure_group(GroupSpec("g", ("t",)))
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    lost = intent_of(timed, lease, [0])
    timed.coordinator.begin(lease, lost)
    clock.advance(21)
    timed.log.append([encoded("t", 1, named("new", 3))])
    timed.apply_retention()
    sound = intent_of(timed, lease, [1])
    timed.coordinator.begin(lease, sound)
    timed.coordinator.release(lease)
    lease = timed.coordinator.acquire("g", None, "a", TTL)
    assert {intent.batch_id for intent in lease.intents} == {lost.batch_id, sound.batch_id}
    timed.coordinator.commit(Commit(lease.part([1]), sound))
    timed.coordinator.release(lease)
    assert timed.coordinator.seek("g", "earliest") == {at("t", 0): 3, at("t", 1): 0}
    assert timed.coordinator.acquire("g", None, "a", TTL).intents == ()


def test_seek_wakes_watchers(backend: Backend) -> None:
    one, two = backend.open(), backend.open()
    make_group(one)
    watcher = one.log.watch()
    try:
        while watcher.wait(0):
            pass
        two.coordinator.seek("g", "latest")
        assert watcher.wait(30)
    finally:
        watcher.close()


# Outputs, dead letters, requests


def test_outputs_come_in_commit_order(stream: EventStream) -> None:
    make_group(stream)
    make_group(stream, "other")
    lease = stream.coordinator.acquire("g", None, "a", 60)
    other = stream.coordinator.acquire("other", None, "a", 60)
    committed: list[Intent] = []
    for number in range(6):
        stream.log.append([encoded("in", number % 3)])
        output = msgspec.structs.replace(OUTPUT, key=f"{number}")
        committed.append(commit_all(stream, lease, [number % 3], output=output).intent)
        commit_all(stream, other, [number % 3], output=OUTPUT)
    found = stream.outputs("g")
    assert [output.batch_id for output in found] == [intent.batch_id for intent in committed]
    assert [output.payload.key for output in found] == ["0", "1", "2", "3", "4", "5"]
    assert stream.outputs("g", limit=2) == found[:2]
    assert stream.outputs("g", after=found[1].sequence, limit=3) == found[2:5]
    assert stream.outputs("g", after=found[-1].sequence) == []


def test_dead_letters_are_filtered_and_discarded(stream: EventStream) -> None:
    make_group(stream)
    make_group(stream, "other")
    for group in ("g", "other"):
        lease = stream.coordinator.acquire(group, None, "a", 60)
        commit_all(stream, lease, [0], dead_letters=(letter(0), letter(1), letter(2)))
    coordinator = stream.coordinator
    everything = coordinator.dead_letters()
    assert [(one.group, one.offset) for one in everything] == [(g, n) for g in ("g", "other") for n in range(3)]
    mine = coordinator.dead_letters("g")
    assert mine == everything[:3]
    assert coordinator.discard_dead_letters("g", [mine[0].id, everything[3].id, 10_000]) == 1
    assert coordinator.discard_dead_letters("g", [mine[0].id]) == 0
    assert coordinator.discard_dead_letters("g", []) == 0
    assert [one.offset for one in stream.dead_letters("g")] == [1, 2]
    assert [one.offset for one in coordinator.dead_letters("g", status="discarded")] == [0]
    assert len(coordinator.dead_letters(status="pending")) == 5
    assert coordinator.dead_letters(after=mine[1].id, limit=2) == everything[2:4]
    by_id = coordinator.dead_letters_by_id("g", [mine[2].id, mine[0].id, everything[4].id])
    assert [one.offset for one in by_id] == [0, 2]
    with pytest.raises(InvalidSettingError, match="status='lost'"):
        coordinator.dead_letters("g", status="lost")


def test_requests_are_asked_and_done(timed: EventStream, clock: Clock) -> None:
    make_group(timed)
    make_group(timed, "other")
    coordinator = timed.coordinator
    first = coordinator.request("g", "cut", {"until": [["in", 0, 4]]})
    second = coordinator.request("g", "redrive", {"ids": [1]})
    foreign = coordinator.request("other", "cut", {})
    asked = coordinator.requests("g")
    assert [(one.id, one.group, one.kind, one.body, one.status) for one in asked] == [
        (first, "g", "cut", {"until": [["in", 0, 4]]}, "open"),
        (second, "g", "redrive", {"ids": [1]}, "open"),
    ]
    assert asked[0].created_micros == round(clock() * 1e6)
    lease = coordinator.acquire("g", None, "a", TTL)
    clock.advance(TTL - 1)
    coordinator.finish_request(lease, first, "failed: no such partition")
    clock.advance(TTL - 1)
    with pytest.raises(LeaseBusyError):  # it prolonged the lease
        coordinator.acquire("g", None, "b", TTL)
    commit_all(timed, lease, requests=(second, foreign))
    assert coordinator.request_status(first) == "failed: no such partition"
    assert (coordinator.request_status(second), coordinator.request_status(foreign)) == ("done", "open")
    assert coordinator.requests("g") == []
    assert [one.id for one in coordinator.requests("g", status="done")] == [second]
