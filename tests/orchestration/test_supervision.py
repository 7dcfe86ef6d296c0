"""`supervise`: workers in their slots, the dead replaced, the outdated relieved, the broken left alone for a while."""

import dagster as dg
import pytest
from dagster._core.events import DagsterEventType

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream, consumer
from djp_dagster.orchestration import standing, supervision
from djp_dagster.orchestration.standing import Suspects
from djp_dagster.orchestration.supervision import Crew, Launch, crew_code_version, supervise
from djp_dagster.orchestration.tags import ASKED_BY_TAG, CODE_TAG, PLACE_TAG, SLOT_TAG, WORKER_TAG, owner_of
from djp_dagster.processing.leases import new_owner
from djp_dagster.testing import Clock
from tests.orchestration.kit import ORDERS, copy, later, make_run, status_of, tell, tick

Status = dg.DagsterRunStatus
LEASE_S = 5.0


@consumer(topic=ORDERS, group="audit")
def audit(batch: djp.Batch) -> None: ...


def crew(tag: str = "shop", workers: int = 1, code: str = "v1", max_runtime_s: float | None = None) -> Crew:
    return Crew(tag, (copy, audit), workers, code, max_runtime_s)


def started(instance: dg.DagsterInstance, launch: Launch, status: Status = Status.STARTED) -> dg.DagsterRun:
    """The run that was asked for, come so far."""
    return make_run(instance, status, {**launch.tags, "dagster/run_key": launch.run_key})


def supervised(
    instance: dg.DagsterInstance, stream: EventStream, wanted: Crew, suspects: Suspects | None = None
) -> tuple[list[Launch], list[str]]:
    """One tick, with what the last one suspected."""
    return supervise(instance, stream, wanted, suspects if suspects is not None else Suspects(None))


def slots_of(launches: list[Launch]) -> list[str]:
    return [launch.tags[SLOT_TAG] for launch in launches]


def buried(
    instance: dg.DagsterInstance, stream: EventStream, wanted: Crew, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Launch], list[str]]:
    """Two ticks, far enough apart for a death to be believed; what came of the second."""
    first = Suspects(None)
    supervised(instance, stream, wanted, first)
    later(monkeypatch, standing, 5)
    found = supervised(instance, stream, wanted, Suspects(first.cursor))
    later(monkeypatch, standing, 0)
    return found


def launched(instance: dg.DagsterInstance, stream: EventStream, wanted: Crew) -> Launch:
    launches, told = supervised(instance, stream, wanted)
    assert told == []
    (launch,) = launches
    return launch


def said(instance: dg.DagsterInstance, stream: EventStream, wanted: Crew) -> str:
    launches, told = supervised(instance, stream, wanted)
    assert launches == []
    (text,) = told
    return text


def join(stream: EventStream, run: dg.DagsterRun, *, paused: bool = False) -> str:
    """What a worker run does once it is ready."""
    owner = new_owner(owner_of(run.run_id))
    for one in (copy, audit):
        stream.coordinator.join(one.group, owner, LEASE_S, paused=paused)
    return owner


@pytest.fixture
def made(timed: EventStream) -> EventStream:
    """Both groups exist."""
    copy.register(timed)
    audit.register(timed)
    return timed


class TestSlots:
    """So many runs, each in its place."""

    def test_each_slot_is_asked_for_by_its_own_key(self, instance: dg.DagsterInstance, timed: EventStream) -> None:
        launches, told = supervised(instance, timed, crew(workers=3))
        assert told == []
        assert slots_of(launches) == ["0", "1", "2"]
        assert len({launch.run_key for launch in launches}) == 3
        assert [launch.tags for launch in launches] == [
            {
                WORKER_TAG: "shop",
                SLOT_TAG: str(slot),
                PLACE_TAG: f"shop#{slot}",
                ASKED_BY_TAG: "v1",
                "dagster/max_runtime": "0",
                "dagster/max_retries": "0",
            }
            for slot in range(3)
        ]
        assert all(launch.replaces == [] for launch in launches)
        assert timed.groups() == [], "a tick writes nothing"

    def test_a_tick_evaluated_again_asks_for_the_same(self, instance: dg.DagsterInstance, timed: EventStream) -> None:
        wanted = crew(workers=2)
        assert supervised(instance, timed, wanted) == supervised(instance, timed, wanted)
        started(instance, supervised(instance, timed, wanted)[0][0], Status.NOT_STARTED)
        assert len({tuple(one.run_key for one in supervised(instance, timed, wanted)[0]) for _ in range(3)}) == 1

    def test_only_the_empty_slot_is_filled(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        wanted = crew(workers=2)
        first, _ = supervised(instance, made, wanted)[0]
        run = started(instance, first)
        join(made, run)
        launches, told = supervised(instance, made, wanted)
        assert slots_of(launches) == ["1"]
        assert told == [f"worker 0: run {run.run_id[:8]} is at work"]

    def test_the_states_are_told(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        wanted = crew()
        run = started(instance, launched(instance, made, wanted), Status.QUEUED)
        name = f"worker 0: run {run.run_id[:8]}"
        assert said(instance, made, wanted) == f"{name} is in the queue"
        tell(instance, run.run_id, DagsterEventType.RUN_STARTING)
        assert said(instance, made, wanted) == f"{name} is starting"
        tell(instance, run.run_id, DagsterEventType.RUN_START)
        assert said(instance, made, wanted) == f"{name} is starting"
        owner = join(made, run)
        assert said(instance, made, wanted) == f"{name} is at work"
        for one in (copy, audit):
            made.coordinator.join(one.group, owner, LEASE_S, paused=True)
        assert said(instance, made, wanted) == f"{name} is at work", "it is there, and tries again"

    def test_crews_do_not_see_each_other(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        one, two = crew("one"), crew("two")
        run = started(instance, launched(instance, made, one))
        join(made, run)
        launch = launched(instance, made, two)
        assert launch.tags[WORKER_TAG] == "two"
        other = started(instance, launch)
        join(made, other)
        assert run.run_id[:8] in said(instance, made, one)
        assert other.run_id[:8] in said(instance, made, two)
        tell(instance, run.run_id, DagsterEventType.RUN_SUCCESS)
        launched(instance, made, one)
        assert other.run_id[:8] in said(instance, made, two)


class TestDead:
    """Runs whose process is gone: it must show twice."""

    def test_one_that_was_there_and_is_not_is_replaced_in_the_tick_that_reports_it(
        self, instance: dg.DagsterInstance, made: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = crew()
        first = launched(instance, made, wanted)
        run = started(instance, first)
        owner = join(made, run)
        lease = made.coordinator.acquire("copy", None, owner, LEASE_S)
        clock.advance(LEASE_S - 0.1)
        assert "is at work" in said(instance, made, wanted)
        clock.advance(0.1)
        for _ in range(3):
            assert "has not been heard of for longer than a lease" in said(instance, made, wanted)
        assert status_of(instance, run) == Status.STARTED
        (second,), told = buried(instance, made, wanted, monkeypatch)
        assert told == []
        assert status_of(instance, run) == Status.FAILURE
        assert second.run_key != first.run_key
        assert second.replaces == [], "there is nobody left to ask"
        assert all(task.epoch > lease.epochs[task.task] for task in made.coordinator.tasks("copy"))
        with pytest.raises(djp.errors.FencedError):
            made.coordinator.heartbeat([lease])

    def test_one_whose_leases_somebody_else_has_taken_over(
        self, instance: dg.DagsterInstance, made: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = crew()
        run = started(instance, launched(instance, made, wanted))
        owner = join(made, run)
        made.coordinator.acquire("audit", None, owner, LEASE_S)
        clock.advance(LEASE_S)
        for one in (copy, audit):
            made.coordinator.join(one.group, "somebody", LEASE_S)
            made.coordinator.acquire(one.group, None, "somebody", LEASE_S)
        buried(instance, made, wanted, monkeypatch)
        assert status_of(instance, run) == Status.FAILURE
        assert {task.owner for task in made.coordinator.tasks("audit")} == {"somebody"}

    @pytest.mark.parametrize("status", [Status.STARTING, Status.STARTED])
    def test_one_that_never_came_is_not_waited_for_for_ever(
        self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch, status: Status
    ) -> None:
        wanted = crew()
        first = launched(instance, made, wanted)
        run = started(instance, first, status)
        patience_s = 180 if status == Status.STARTING else 600
        later(monkeypatch, standing, patience_s - 10)
        assert "is starting" in said(instance, made, wanted)
        later(monkeypatch, standing, patience_s + 10)
        assert launched(instance, made, wanted).run_key != first.run_key, "Dagster would take it for the same"
        assert status_of(instance, run) == status, "nothing proves that it is dead"

    def test_one_in_the_queue_is_waited_for(
        self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = crew()
        run = started(instance, launched(instance, made, wanted), Status.QUEUED)
        later(monkeypatch, standing, 1e6)
        assert "is in the queue" in said(instance, made, wanted)
        assert status_of(instance, run) == Status.QUEUED

    def test_one_live_membership_is_enough(
        self, instance: dg.DagsterInstance, made: EventStream, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = crew()
        run = started(instance, launched(instance, made, wanted))
        owner = join(made, run)
        clock.advance(LEASE_S - 1)
        made.coordinator.join("copy", owner, LEASE_S, paused=True)
        clock.advance(LEASE_S - 1)
        _, told = buried(instance, made, wanted, monkeypatch)
        assert "is at work" in told[0]
        assert status_of(instance, run) == Status.STARTED


class TestOutdated:
    """Runs that go on until another is ready."""

    def relieved(self, instance: dg.DagsterInstance, made: EventStream, run: dg.DagsterRun, wanted: Crew) -> Launch:
        launch = launched(instance, made, wanted)
        assert launch.replaces == [run.run_id]
        assert status_of(instance, run) == Status.STARTED
        assert not any(member.asked_to_leave for member in made.coordinator.members("copy"))
        return launch

    def test_by_other_code(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        run = started(instance, launched(instance, made, crew()))
        join(made, run)
        newer = crew(code="v2")
        launch = self.relieved(instance, made, run, newer)
        assert launch.tags[ASKED_BY_TAG] == "v2"
        assert launched(instance, made, newer) == launch
        replacement = started(instance, launch)
        join(made, replacement)
        assert said(instance, made, newer) == f"worker 0: run {replacement.run_id[:8]} is at work"

    def test_a_worker_ahead_of_its_sensor_is_not(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        run = started(instance, launched(instance, made, crew(code="v1")))
        instance.add_run_tags(run.run_id, {CODE_TAG: "v2"})  # what it found in the files when it started
        join(made, run)
        assert "is at work" in said(instance, made, crew(code="v1"))
        assert "is at work" in said(instance, made, crew(code="v2")), "once the sensor has caught up"
        self.relieved(instance, made, run, crew(code="v3"))

    def test_by_its_age(self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = crew(max_runtime_s=3600.0)
        run = started(instance, launched(instance, made, wanted))
        join(made, run)
        later(monkeypatch, supervision, 3590)
        assert "is at work" in said(instance, made, wanted)
        later(monkeypatch, supervision, 3610)
        self.relieved(instance, made, run, wanted)

    def test_a_run_being_canceled_is_relieved(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        run = started(instance, launched(instance, made, crew()))
        join(made, run)
        tell(instance, run.run_id, DagsterEventType.RUN_CANCELING)
        assert launched(instance, made, crew()).replaces == [run.run_id]

    def test_a_replacement_stuck_in_the_queue_gets_the_place(
        self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = started(instance, launched(instance, made, crew()))
        join(made, run)
        made.coordinator.join("copy", new_owner("host-5"), LEASE_S)
        newer = crew(code="v2")
        waiting = started(instance, launched(instance, made, newer), Status.QUEUED)
        assert "is in the queue" in said(instance, made, newer)
        assert not any(member.asked_to_leave for member in made.coordinator.members("copy"))
        later(monkeypatch, supervision, 65)
        assert waiting.run_id[:8] in said(instance, made, newer)
        for group in ("copy", "audit"):
            asked = {member.owner: member.asked_to_leave for member in made.coordinator.members(group)}
            assert all(leaves == owner.startswith(owner_of(run.run_id)) for owner, leaves in asked.items())
            assert any(asked.values())

    def test_a_replacement_that_ends_is_asked_for_again(
        self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = started(instance, launched(instance, made, crew()))
        owner = join(made, run)
        newer = crew(code="v2")
        keys = set()
        for pause_s in (0, 10, 30, 60, 300, 300):
            launch = self.relieved(instance, made, run, newer)
            keys.add(launch.run_key)
            started(instance, launch, Status.FAILURE)
            if pause_s:
                later(monkeypatch, supervision, 0)
                assert "ended soon after its start" in said(instance, made, newer)
            later(monkeypatch, supervision, pause_s + 1)
            made.coordinator.join("copy", owner, LEASE_S)
        assert len(keys) == 6


class TestKeys:
    """New after each end, whatever is deleted."""

    @pytest.mark.parametrize("how", ["all", "oldest", "newest", "all but the oldest"])
    def test_no_key_comes_again_while_its_run_is_there(
        self, instance: dg.DagsterInstance, made: EventStream, how: str
    ) -> None:
        wanted = crew()
        ended: list[tuple[str, str]] = []
        for _ in range(3):
            launch = launched(instance, made, wanted)
            run = started(instance, launch, Status.SUCCESS)
            assert launch.run_key not in {key for key, _ in ended}
            ended.append((launch.run_key, run.run_id))
        gone = {"all": ended, "oldest": ended[:1], "newest": ended[-1:], "all but the oldest": ended[1:]}[how]
        for _, run_id in gone:
            instance.delete_run(run_id)
        left = {key for key, run_id in ended if instance.get_run_by_id(run_id) is not None}
        for _ in range(3):
            launch = launched(instance, made, wanted)
            assert launch.run_key not in left
            started(instance, launch, Status.SUCCESS)
            left.add(launch.run_key)

    def test_deleting_the_run_of_a_live_worker_brings_a_second_one_that_shares(
        self, instance: dg.DagsterInstance, made: EventStream
    ) -> None:
        wanted = crew()
        run = started(instance, launched(instance, made, wanted))
        owner = join(made, run)
        instance.delete_run(run.run_id)
        launched(instance, made, wanted)
        assert [member.owner for member in made.coordinator.members("copy")] == [owner]
        assert not made.coordinator.members("copy")[0].asked_to_leave


class TestCrashLoop:
    """Runs that end soon after their start."""

    def test_the_pauses_grow(
        self, instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = crew()
        keys = set()
        for pause_s in (0, 10, 30, 60, 300, 300):
            later(monkeypatch, supervision, 1e6)
            launch = launched(instance, made, wanted)
            keys.add(launch.run_key)
            started(instance, launch, Status.FAILURE)
            if pause_s:
                for passed_s in (0, pause_s - 5):
                    later(monkeypatch, supervision, passed_s)
                    text = said(instance, made, wanted)
                    assert text.startswith("worker 0 ended soon after its start; trying again in "), text
                later(monkeypatch, supervision, pause_s)
            launched(instance, made, wanted)
        assert len(keys) == 6

    def test_a_run_that_ended_in_order_ends_the_row(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        wanted = crew()
        for status in (Status.FAILURE, Status.CANCELED):
            started(instance, launched(instance, made, wanted), status)
        started(instance, launched(instance, made, wanted), Status.FAILURE)
        launched(instance, made, wanted)

    def test_other_slots_go_on(self, instance: dg.DagsterInstance, made: EventStream) -> None:
        wanted = crew(workers=2)
        for _ in range(2):
            for launch in supervised(instance, made, wanted)[0]:
                if launch.tags[SLOT_TAG] == "0":
                    started(instance, launch, Status.FAILURE)
        launches, told = supervised(instance, made, wanted)
        assert slots_of(launches) == ["1"]
        assert "ended soon after its start" in told[0]


def test_the_code_version_is_that_of_all_consumers() -> None:
    @consumer(topic=ORDERS, group="audit", code_version="other")
    def changed(batch: djp.Batch) -> None: ...

    assert crew_code_version([copy, audit], {}) == crew_code_version([audit, copy], {})
    assert crew_code_version([copy, audit], {}) != crew_code_version([copy, changed], {})
    assert crew_code_version([copy, audit], {"lease": "5s"}) != crew_code_version([copy, audit], {"lease": "9s"})


def test_a_slot_that_crash_loops_hides_no_other_slots_last_run(
    instance: dg.DagsterInstance, made: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the other slot would be asked for by the key of its first run, which Dagster has seen."""
    wanted = crew(workers=2)
    first, second = supervised(instance, made, wanted)[0]
    keys = {first.run_key, second.run_key}
    long_lived = started(instance, first)
    owner = join(made, long_lived)
    started(instance, second, Status.FAILURE)
    later(monkeypatch, supervision, 1e6)
    for _ in range(20):
        (launch,), _ = supervised(instance, made, wanted)
        keys.add(launch.run_key)
        started(instance, launch, Status.FAILURE)
    for one in (copy, audit):
        made.coordinator.leave(one.group, owner)
    tell(instance, long_lived.run_id, DagsterEventType.RUN_SUCCESS)
    for _ in range(20):
        (launch,) = [one for one in supervised(instance, made, wanted)[0] if one.tags[SLOT_TAG] == "1"]
        started(instance, launch, Status.FAILURE)
    (launch,) = [one for one in supervised(instance, made, wanted)[0] if one.tags[SLOT_TAG] == "0"]
    assert launch.run_key not in keys


def test_slots_no_longer_wanted_are_emptied(instance: dg.DagsterInstance, made: EventStream) -> None:
    runs = [started(instance, launch) for launch in supervised(instance, made, crew(workers=3))[0]]
    for run in runs:
        join(made, run)
    launches, told = supervised(instance, made, crew(workers=1))
    assert launches == []
    assert told == [f"worker 0: run {runs[0].run_id[:8]} is at work"]
    for group in ("copy", "audit"):
        asked = {member.owner[4:40]: member.asked_to_leave for member in made.coordinator.members(group)}
        assert asked == {runs[0].run_id: False, runs[1].run_id: True, runs[2].run_id: True}


def test_two_in_one_slot_become_one(instance: dg.DagsterInstance, made: EventStream) -> None:
    wanted = crew()
    launch = launched(instance, made, wanted)
    runs = [started(instance, launch) for _ in range(2)]
    for run in runs:
        join(made, run)
    text = said(instance, made, wanted)
    asked = {member.owner[4:40] for member in made.coordinator.members("copy") if member.asked_to_leave}
    assert len(asked) == 1
    (stays,) = {run.run_id for run in runs} - asked
    assert stays[:8] in text


def test_the_sensor_turns_it_into_run_requests(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    sensor = djp.build_worker_sensor([copy, audit], name="shop", workers=2, lease="2s", report_every=1, stuck_after=9)
    requests = tick(sensor, instance, resource).run_requests or []
    assert [request.tags[SLOT_TAG] for request in requests] == ["0", "1"]
    assert {request.tags[WORKER_TAG] for request in requests} == {f"shop@/{stream.incarnation[:8]}"}
    assert requests[0].run_config == {
        "ops": {"shop": {"config": {"lease": "2.0s", "report_every": "1.0s", "stuck_after": "9.0s", "replaces": []}}}
    }
    for request in requests:
        assert request.run_key is not None
        make_run(instance, Status.QUEUED, {**request.tags, "dagster/run_key": request.run_key})
    data = tick(sensor, instance, resource)
    assert not data.run_requests
    assert (data.skip_message or "").count("is in the queue") == 2
