"""`Worker`: one replaces another, and nothing is done twice. Without Dagster."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster import BatchReport, EventStream, Threshold, Topic, Worker, consumer, open_stream
from djp_dagster.errors import RetriesExhaustedError
from djp_dagster.processing.worker import Busy
from djp_dagster.streams.model import Membership
from tests.orchestration.kit import FAST
from tests.processing.kit import PATIENT_S, in_thread, wait_until

WIDE = Topic("wide", partitions=4)
DONE = Topic("done")


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[EventStream]:
    """By the store's own clock: workers wait for real."""
    with open_stream(tmp_path / "stream.db") as opened:
        opened.create_topic(WIDE)
        yield opened


@consumer(topic=WIDE, emits=[DONE], group="move")
def move(batch: djp.Batch) -> None:
    for record in batch:
        batch.emit(DONE.event(n=record.data["n"]))


@consumer(topic=WIDE, emits=[DONE], group="move", retry=FAST)
def broken(batch: djp.Batch) -> None:
    raise djp.TransientError("away")


@consumer(topic=WIDE, group="watch")
def watch(batch: djp.Batch) -> None: ...


def publish(stream: EventStream, count: int, start: int = 0) -> None:
    stream.publish(WIDE, [WIDE.event(n=n) for n in range(start, start + count)])


def done(stream: EventStream) -> list[int]:
    if DONE.name not in {info.name for info in stream.topics()}:
        return []
    return sorted(record.data["n"] for record in stream.records(DONE, 0))


def owners(stream: EventStream, group: str = "move") -> set[str | None]:
    return {task.owner for task in stream.coordinator.tasks(group)}


def test_the_old_one_finishes_its_batch_and_the_new_one_goes_on(
    stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []
    join = stream.coordinator.join

    def listen(group: str, owner: str, ttl_s: float, *, paused: bool = False) -> Membership:
        answer = join(group, owner, ttl_s, paused=paused)
        told.append((owner, answer.asked_to_leave))
        return answer

    monkeypatch.setattr(stream.coordinator, "join", listen)
    inside, go_on = threading.Event(), threading.Event()

    @consumer(topic=WIDE, emits=[DONE], group="move", max_batch=Threshold(events=1000))
    def slowly(batch: djp.Batch) -> None:
        inside.set()
        assert go_on.wait(PATIENT_S)
        for record in batch:
            batch.emit(DONE.event(n=record.data["n"]))

    old_reports: list[BatchReport] = []
    new_reports: list[BatchReport] = []
    old = Worker(stream, [slowly], owner="run-old", lease=3.0, on_report=old_reports.append)
    new = Worker(stream, [move], owner="run-new", lease=3.0, on_report=new_reports.append, replaces=["run-old"])
    publish(stream, 40)
    stop_old, stop_new = threading.Event(), threading.Event()
    with in_thread(lambda: old.run(stop_old), go_on) as first:
        assert inside.wait(PATIENT_S)
        with in_thread(lambda: new.run(stop_new), stop_new) as second:
            wait_until(
                lambda: any(
                    member.asked_to_leave and member.owner == old.owner for member in stream.coordinator.members("move")
                ),
                "the new one to ask the old one to leave",
            )
            # At its second answer it has surely taken the first one in.
            wait_until(lambda: told.count((old.owner, True)) >= 2, "the old one to hear of it")
            assert old_reports == []
            assert first == [], "it has a batch under way"
            (under_way,) = [intent for intent in stream.coordinator.intents("move") if intent.running]
            go_on.set()
            wait_until(lambda: first == [None], "the old one to leave")
            assert not new.replaced
            assert [report.batch_id for report in old_reports] == [under_way.batch_id], "and not one batch more"
            assert not any(owner == old.owner for owner in owners(stream))
            assert [member.owner for member in stream.coordinator.members("move")] == [new.owner]
            wait_until(lambda: owners(stream) == {new.owner}, "the new one to hold all")
            publish(stream, 20, start=40)
            wait_until(lambda: sum(report.events for report in new_reports) >= 20, "the new one to go on")
            wait_until(lambda: stream.pending("move").events == 0, "all the work")
    assert second == [None]
    assert done(stream) == list(range(60))
    ids = [report.batch_id for report in (*old_reports, *new_reports)]
    assert len(set(ids)) == len(ids)
    assert all(report.attempt == 1 for report in (*old_reports, *new_reports)), "nothing was taken over half done"


def test_it_is_asked_in_every_group_and_leaves_them_all(stream: EventStream) -> None:
    old = Worker(stream, [move, watch], owner="run-old", lease=3.0)
    new = Worker(stream, [watch, move], owner="run-new", lease=3.0, replaces=["run-old"])
    stop_old, stop_new = threading.Event(), threading.Event()
    with in_thread(lambda: old.run(stop_old), stop_old) as first:
        wait_until(lambda: _made(stream) and owners(stream, "watch") == {old.owner}, "the old one to work")
        with in_thread(lambda: new.run(stop_new), stop_new) as second:
            for group in ("move", "watch"):
                wait_until(lambda group=group: owners(stream, group) == {new.owner}, f"{group} to change hands")  # type: ignore[misc]
            wait_until(lambda: first == [None], "the old one to leave")
    assert second == [None]
    assert old.replaced
    for group in ("move", "watch"):
        assert stream.coordinator.members(group) == []
        assert owners(stream, group) == {None}


def _made(stream: EventStream) -> bool:
    return {"move", "watch"} <= {info.name for info in stream.groups()}


def test_one_that_replaces_nobody_works_all_the_same(stream: EventStream) -> None:
    stop = threading.Event()
    publish(stream, 10)
    worker = Worker(stream, [move], lease=3.0, replaces=["run-never-there"])
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        wait_until(lambda: done(stream) == list(range(10)), "the work")
    assert outcome == [None]
    assert not worker.replaced


def test_a_bystander_stays(stream: EventStream) -> None:
    old = Worker(stream, [move], owner="run-old", lease=3.0)
    bystander = Worker(stream, [move], owner="run-bystander", lease=3.0)
    new = Worker(stream, [move], owner="run-new", lease=3.0, replaces=["run-old"])
    stops = [threading.Event() for _ in range(3)]
    publish(stream, 30)
    with (
        in_thread(lambda: old.run(stops[0]), stops[0]) as first,
        in_thread(lambda: bystander.run(stops[1]), stops[1]) as second,
    ):
        wait_until(lambda: _made_one(stream) and owners(stream) == {old.owner, bystander.owner}, "two to share")
        with in_thread(lambda: new.run(stops[2]), stops[2]) as third:
            wait_until(lambda: owners(stream) == {bystander.owner, new.owner}, "the new one to share")
            wait_until(lambda: first == [None], "the old one to leave")
            publish(stream, 30, start=30)
            wait_until(lambda: done(stream) == list(range(60)), "the work")
            assert second == []
    assert second == third == [None]
    assert [worker.replaced for worker in (old, bystander, new)] == [True, False, False]


def _made_one(stream: EventStream) -> bool:
    return "move" in {info.name for info in stream.groups()}


def test_a_paused_one_stays_a_member_and_wants_no_share(stream: EventStream) -> None:
    failures: list[djp.DjpError] = []
    publish(stream, 8)
    one = Worker(stream, [broken], owner="run-broken", lease=3.0, on_failure=lambda _, error: failures.append(error))
    stop_one, stop_two = threading.Event(), threading.Event()
    with in_thread(lambda: one.run(stop_one), stop_one) as first:
        wait_until(lambda: bool(failures), "it to give up")
        assert isinstance(failures[0], RetriesExhaustedError)
        members = stream.coordinator.members("move")
        assert [(member.owner, member.live, member.paused) for member in members] == [(one.owner, True, True)]
        assert owners(stream) == {None}
        with in_thread(lambda: Worker(stream, [move], owner="run-whole", lease=3.0).run(stop_two), stop_two) as second:
            wait_until(lambda: done(stream) == list(range(8)), "the other to do the work")
            beats = [member for member in stream.coordinator.members("move") if member.owner == one.owner]
            assert [(member.live, member.paused) for member in beats] == [(True, True)]
            held = owners(stream)
            assert one.owner not in held
    assert first == second == [None]
    assert stream.coordinator.members("move") == []


def test_a_paused_one_leaves_when_asked(stream: EventStream) -> None:
    paused = threading.Event()
    publish(stream, 4)
    worker = Worker(stream, [broken], owner="run-broken", lease=3.0, on_failure=lambda *_: paused.set())
    stop = threading.Event()
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        assert paused.wait(PATIENT_S)
        assert stream.coordinator.ask_to_leave("move", "run-broken") == 1
        wait_until(lambda: outcome == [None], "it to leave")
    assert worker.replaced
    assert stream.coordinator.members("move") == []


def test_busy_is_the_batch_under_way(stream: EventStream) -> None:
    seen: list[Busy | None] = []
    ids: list[str] = []

    @consumer(topic=WIDE, group="move")
    def look(batch: djp.Batch) -> None:
        seen.append(worker.busy)
        ids.append(batch.id)

    publish(stream, 12)
    worker = Worker(stream, [look], lease=3.0, on_beat=lambda: idle.append(worker.busy))
    idle: list[Busy | None] = []
    stop = threading.Event()
    assert worker.busy is None
    with in_thread(lambda: worker.run(stop), stop) as outcome:
        wait_until(lambda: len(stream.groups()) == 1 and stream.pending("move").events == 0, "the work")
        wait_until(lambda: worker.busy is None, "it to be idle")
    assert outcome == [None]
    assert len(ids) >= 1
    assert [busy and (busy.group, busy.batch_id) for busy in seen] == [("move", batch_id) for batch_id in ids]
    assert all(busy is not None and busy.since > 0 for busy in seen)
    assert idle
    assert set(idle) == {None}


def test_busy_is_cleared_after_a_failure(stream: EventStream) -> None:
    paused = threading.Event()
    publish(stream, 1)
    worker = Worker(stream, [broken], lease=3.0, on_failure=lambda *_: paused.set())
    stop = threading.Event()
    with in_thread(lambda: worker.run(stop), stop):
        assert paused.wait(PATIENT_S)
        wait_until(lambda: worker.busy is None, "it to be idle")
