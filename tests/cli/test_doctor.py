"""``djp doctor``: each thing that can be wrong is made wrong, and found; what is right is not blamed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.events.log import EventLogEntry
from dagster._core.remote_origin import (
    RegisteredCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus
from dagster._core.test_utils import create_run_for_test
from dagster._daemon.types import DaemonHeartbeat
from dagster_shared.error import SerializableErrorInfo

from djp_dagster import Event, EventStream, Topic, consumer, open_stream, run_pending
from djp_dagster.doctor import Finding, examine
from djp_dagster.orchestration import doctor as dagster_side
from djp_dagster.orchestration.tags import GROUP_TAG, WORKER_TAG, owner_of
from djp_dagster.streams.model import Range
from djp_dagster.testing import Clock
from tests.cli.conftest import Djp, documents
from tests.processing.kit import FAST, begin

T = Topic("t", retention="1min", retention_cap="1h")
REPOSITORY = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__")
FOUND = tuple[str, str]


@consumer(topic=T, group="mails", retry=FAST, isolate="per_event")
def mails(record: Any) -> None:
    raise ValueError("never works")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(place: Path, clock: Clock) -> Iterator[EventStream]:
    with open_stream(place, clock=clock) as stream:
        stream.create_topic(T)
        mails.register(stream)
        yield stream


def wrong(stream: EventStream) -> set[FOUND]:
    """What is not ok: level and check."""
    return {(one.level, one.check) for one in examine(stream) if one.level != "ok"}


def some(count: int = 3) -> list[Event]:
    return [T.event(n=n) for n in range(count)]


def test_nothing_is_wrong_with_a_stream_in_use(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(T)
    mails.register(stream)
    stream.publish(T, some())
    assert {one["level"] for one in documents(djp("doctor", "--json"))} == {"ok"}
    shown = djp("doctor").stdout
    assert "reachable and writable; 1 topics, 1 groups" in shown
    assert "group mails: nothing is wrong" in shown
    assert "problems: 0, warnings: 0" in shown


def test_no_stream_is_a_problem(djp: Djp, place: Path) -> None:
    found = documents(djp("doctor", "--json", code=1))
    assert found[0]["level"] == "problem"
    assert str(place) in found[0]["what"]
    assert not place.exists()
    place.write_bytes(b"something else, not a stream at all")
    assert "is not a stream file" in djp("doctor", code=1).stdout


def test_an_empty_stream_is_fine(djp: Djp, stream: EventStream) -> None:
    assert "there are none yet" in djp("doctor").stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_stream_that_cannot_be_written(djp: Djp, place: Path) -> None:
    open_stream(place).close()
    place.chmod(0o444)
    (found,) = [one for one in documents(djp("doctor", "--json", code=1)) if one["level"] == "problem"]
    assert "readonly" in found["what"]


def test_a_lock_held_by_others_is_told(stream: EventStream, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    from djp_dagster.streams.sql import database

    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.05)
    other = sqlite3.connect(str(stream.label).removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        assert ("problem", "stream-writable") in wrong(stream)
    finally:
        other.close()


def test_an_old_backlog_that_nobody_works_on(timed: EventStream, clock: Clock) -> None:
    timed.publish(T, some())
    assert wrong(timed) == set()
    clock.advance(400)
    assert wrong(timed) == {("warning", "nobody-works")}
    timed.coordinator.acquire("mails", None, "worker", 60.0)
    assert wrong(timed) == set()


def test_a_holder_that_vanished_from_a_batch(timed: EventStream, clock: Clock) -> None:
    timed.publish(T, some())
    lease = timed.coordinator.acquire("mails", None, "worker-7", 5.0)
    from tests.processing.kit import intent_for

    intent = intent_for(mails, [Range("t", 0, 0, 3)])
    timed.coordinator.begin(lease, type(intent)(**{**_fields(intent), "now_micros": timed.log.now_micros()}))
    assert wrong(timed) == set()
    clock.advance(6)
    assert wrong(timed) == {("warning", "holder-vanished")}
    clock.advance(60)
    assert wrong(timed) == {("problem", "holder-vanished")}
    (found,) = [one for one in examine(timed) if one.check == "holder-vanished"]
    assert "worker-7 vanished 61 s ago" in found.what
    clock.advance(600)
    assert ("warning", "long-batch") in wrong(timed)


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@pytest.mark.parametrize("counts", [{"failures": 3}, {"deaths": 3}, {"failures": 1, "deaths": 2}])
def test_a_batch_that_keeps_failing(stream: EventStream, counts: dict[str, int]) -> None:
    stream.create_topic(T)
    stream.publish(T, some())
    begin(stream, mails, [Range("t", 0, 0, 3)], **counts)
    assert ("problem", "batch-fails") in wrong(stream)


def test_a_batch_that_is_open_for_long(timed: EventStream, clock: Clock) -> None:
    timed.publish(T, some())
    begin(timed, mails, [Range("t", 0, 0, 3)])
    (found,) = [one for one in examine(timed) if one.check == "long-batch"]
    assert "held by nobody" in found.what
    timed.coordinator.acquire("mails", None, "worker-7", 60.0)
    (found,) = [one for one in examine(timed) if one.check == "long-batch"]
    assert "held by worker-7" in found.what


def test_dead_letters(stream: EventStream) -> None:
    stream.create_topic(T)
    stream.publish(T, some())
    run_pending(stream, mails)
    assert wrong(stream) == {("warning", "dead-letters")}
    stream.discard_dead_letters("mails", [letter.id for letter in stream.dead_letters("mails")])
    assert wrong(stream) == set()


def test_requests_that_nobody_does(timed: EventStream, clock: Clock) -> None:
    timed.coordinator.request("mails", "redrive", {})
    assert wrong(timed) == set()
    clock.advance(200)
    assert wrong(timed) == {("warning", "open-requests")}


def test_records_lost_to_the_retention_cap(timed: EventStream, clock: Clock) -> None:
    timed.publish(T, some())
    clock.advance(4000)
    timed.apply_retention()
    assert wrong(timed) == {("problem", "below-retention")}
    (found,) = [one for one in examine(timed) if one.level == "problem"]
    assert "records 0 to 2 of topic t partition 0" in found.what
    timed.seek("mails", "earliest")
    assert wrong(timed) == set()


@pytest.mark.parametrize("width", [80, 120])
def test_findings_fit_the_terminal(djp: Djp, stream: EventStream, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stream.create_topic(T)
    stream.publish(T, some())
    begin(stream, mails, [Range("t", 0, 0, 3)], failures=5)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = djp("doctor", code=1).stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("problem"), "problems come first"


# Dagster


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """An instance with everything as it should be, and its daemon alive."""
    with dg.instance_for_test(
        temp_dir=str(tmp_path),
        overrides={
            "run_monitoring": {"enabled": True},
            "sensors": {"use_threads": True, "num_workers": 2},
            "retention": {"sensor": {"purge_after_days": {"skipped": 1, "success": 7, "failure": 30, "started": 1}}},
            "concurrency": {"runs": {"max_concurrent_runs": 4}},
            "run_coordinator": {"module": "dagster._core.run_coordinator", "class": "QueuedRunCoordinator"},
        },
        set_dagster_home=True,
    ) as instance:
        for kind in instance.get_required_daemon_types():
            beat(instance, kind, 5)
        yield instance


def beat(instance: dg.DagsterInstance, kind: str, seconds_ago: float, error: str | None = None) -> None:
    errors = [] if error is None else [SerializableErrorInfo(error, [], None)]
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - seconds_ago, kind, "id", errors))


def found_in(instance: dg.DagsterInstance, stream: EventStream | None = None) -> dict[str, Finding]:
    """What is not ok, by check."""
    return {one.check: one for one in dagster_side.examine_instance(instance, stream) if one.level != "ok"}


def test_nothing_is_wrong_with_a_good_instance(djp: Djp, stream: EventStream, instance: dg.DagsterInstance) -> None:
    assert found_in(instance, stream) == {}
    found = documents(djp("doctor", "--json"))
    assert {one["check"] for one in found} >= {"instance", "daemon", "run-monitoring", "slots"}
    assert {one["level"] for one in found} == {"ok"}


def test_a_silent_daemon(instance: dg.DagsterInstance) -> None:
    beat(instance, "SENSOR", 300)
    found = found_in(instance)
    assert found["daemon"].level == "problem"
    assert "SENSOR (300 s ago)" in found["daemon"].what
    beat(instance, "SENSOR", 1, "it broke\nand so on")
    assert found_in(instance)["daemon"].what == "its last error: it broke"
    instance.wipe_daemon_heartbeats()
    assert "SENSOR (never)" in found_in(instance)["daemon"].what


def test_settings_that_were_left_alone(tmp_path: Path) -> None:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        assert set(found_in(instance)) == {"daemon", "run-monitoring", "sensor-threads", "tick-retention"}


def test_workers_that_take_the_slots(instance: dg.DagsterInstance) -> None:
    def worker(slot: int) -> None:
        tags = {WORKER_TAG: f"shop:{slot}"}
        create_run_for_test(instance, job_name="w", status=dg.DagsterRunStatus.STARTED, tags=tags)

    worker(0)
    worker(1)
    assert "slots" not in found_in(instance)
    worker(2)
    assert found_in(instance)["slots"].what == "3 of 4 slots are taken by workers, 0 by other runs"
    assert found_in(instance)["slots"].level == "warning"
    create_run_for_test(instance, job_name="other", status=dg.DagsterRunStatus.STARTED)
    assert found_in(instance)["slots"].level == "warning"
    worker(3)
    assert found_in(instance)["slots"].level == "problem"
    assert "sqlite-storage" in found_in(instance)


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED])
def test_runs_that_wait_for_long(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, status: dg.DagsterRunStatus
) -> None:
    run, _ = (
        create_run_for_test(
            instance,
            job_name="job",
            status=status,
            tags=tags,
            remote_job_origin=RemoteJobOrigin(REPOSITORY, "job"),
        )
        for tags in ({GROUP_TAG: "mails"}, {"not": "ours"})
    )
    assert found_in(instance) == {}
    monkeypatch.setattr(dagster_side, "LONG_QUEUED_S", -1.0)
    found = found_in(instance)["waiting-run"]
    assert found.subject == f"run {run.run_id[:8]} (job)"
    assert status.value in found.what


def started(instance: dg.DagsterInstance, **tags: str) -> dg.DagsterRun:
    run = create_run_for_test(instance, job_name="job", status=dg.DagsterRunStatus.NOT_STARTED, tags=tags)
    instance.report_engine_event("starting", run)
    instance.handle_new_event(_start_of(run))
    return run


def _start_of(run: dg.DagsterRun) -> Any:
    event = DagsterEvent(DagsterEventType.RUN_START.value, run.job_name)
    return EventLogEntry(
        error_info=None,
        level=10,
        user_message="",
        run_id=run.run_id,
        timestamp=time.time() - 3600,
        job_name=run.job_name,
        dagster_event=event,
    )


def test_runs_whose_process_is_gone(instance: dg.DagsterInstance, stream: EventStream) -> None:
    stream.create_topic(T)
    mails.register(stream)
    started(instance, nothing="ours")
    assert found_in(instance, stream) == {}
    run = started(instance, **{GROUP_TAG: "mails"})
    assert found_in(instance, stream)["stuck-run"].level == "problem"
    assert run.run_id in found_in(instance, stream)["stuck-run"].remedy
    lease = stream.coordinator.acquire("mails", None, f"{owner_of(run.run_id)}-00aa", 60.0)
    assert found_in(instance, stream) == {}
    stream.coordinator.release(lease)
    stream.coordinator.acquire("mails", None, "somebody", 60.0)
    assert found_in(instance, stream)["stuck-run"].level == "warning"


def test_workers_whose_process_is_gone(instance: dg.DagsterInstance, stream: EventStream) -> None:
    stream.create_topic(T)
    mails.register(stream)
    run = started(instance, **{WORKER_TAG: "shop:0"})
    assert found_in(instance, stream)["stuck-run"].level == "problem"
    stream.coordinator.join("mails", f"{owner_of(run.run_id)}-00aa", 60.0)
    assert found_in(instance, stream) == {}, "a standby holds no lease"


def test_an_instance_that_does_not_load(
    djp: Djp, stream: EventStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_text("storage: {nonsense: true}")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    found = documents(djp("doctor", "--json", code=1))
    assert found[0]["check"] == "instance"
    assert "does not load" in found[0]["what"]


DEFINITIONS = """
import dagster as dg
import djp_dagster as djp

print("importing")
T = djp.Topic("t")

@djp.consumer(topic=T)
def mails(batch):
    pass

@dg.asset
def other():
    pass

@dg.sensor(asset_selection=[other])
def others():
    pass

@dg.job(executor_def=dg.multiprocess_executor)
def elsewhere():
    @dg.op(required_resource_keys={"event_stream"})
    def publishes():
        pass
    publishes()

defs = dg.Definitions(
    assets=[djp.build_stream_asset(mails), other],
    jobs=[elsewhere],
    sensors=[djp.build_stream_sensor(mails), others],
    schedules=[djp.build_batch_schedule(mails, cron_schedule="0 3 * * *")],
    resources={"event_stream": djp.SqlEventStream()},
)
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "some_definitions.py"
    file.write_text(DEFINITIONS)
    return file


def test_what_definitions_leave_off(djp: Djp, stream: EventStream, code: Path, instance: dg.DagsterInstance) -> None:
    found = documents(djp("doctor", "--json", "-f", code))
    assert {(one["check"], one["subject"]) for one in found if one["level"] == "warning"} == {
        ("executor", "Materialize (the job of all assets)"),
        ("executor", "job elsewhere"),
        ("sensor-off", "sensor mails_sensor"),
        ("schedule-off", "schedule mails_schedule"),
    }


def test_a_remedy_is_a_command_that_works(
    djp: Djp, stream: EventStream, code: Path, instance: dg.DagsterInstance
) -> None:
    found = {one["check"]: one["remedy"] for one in documents(djp("doctor", "--json", "-f", code))}
    assert found["sensor-off"].endswith(f"dagster sensor start mails_sensor -f {code}")


def test_topics_that_are_declared_otherwise(djp: Djp, stream: EventStream, tmp_path: Path) -> None:
    code = tmp_path / "declares.py"
    topics = 'djp.Topic("t"), djp.Topic("new"), djp.Topic("other", partitions=3, key="user")'
    code.write_text(
        "import dagster as dg\nimport djp_dagster as djp\n"
        f"defs = dg.Definitions(assets=djp.build_topic_assets({topics}))\n"
    )
    stream.create_topic(Topic("other", partitions=3))
    found = [one for one in documents(djp("doctor", "--json", "-f", code, code=1)) if one["check"] == "topic-differs"]
    assert [(one["level"], one["subject"]) for one in found] == [("problem", "topic other")]
    assert "partitions=3, key=user, and the stream has it with partitions=3, key=(event id)" in found[0]["what"]


def test_a_home_that_is_misspelt_comes_first(djp: Djp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "hmoe"))
    found = documents(djp("doctor", "--json", code=1))
    assert (found[0]["check"], found[0]["what"]) == ("instance", "DAGSTER_HOME names no folder")
    assert not (tmp_path / "hmoe").exists()


def test_without_a_home_definitions_are_looked_at(djp: Djp, stream: EventStream, code: Path) -> None:
    levels = {one["check"]: one["level"] for one in documents(djp("doctor", "--json"))}
    assert (levels["dagster"], levels["definitions"]) == ("ok", "ok")
    levels = {one["check"]: one["level"] for one in documents(djp("doctor", "--json", "-f", code))}
    assert levels["dagster"] == "warning"


def test_what_is_turned_on_is_not_off(instance: dg.DagsterInstance, code: Path) -> None:
    def off() -> set[str]:
        found = dagster_side.examine_definitions(instance, file=code)
        return {one.subject for one in found if one.check.endswith("-off")}

    origin = RemoteInstigatorOrigin(REPOSITORY, "mails_sensor")
    assert off() == {"sensor mails_sensor", "schedule mails_schedule"}
    instance.add_instigator_state(InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.RUNNING))
    assert off() == {"schedule mails_schedule"}
    instance.update_instigator_state(InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.STOPPED))
    assert off() == {"sensor mails_sensor", "schedule mails_schedule"}
    assert dagster_side._is_on(None, declared=True)
    assert not dagster_side._is_on({"STOPPED"}, declared=True)
    assert dagster_side._is_on({"STOPPED", "RUNNING"}, declared=False)
    assert dagster_side._is_on({"DECLARED_IN_CODE"}, declared=True)
    assert not dagster_side._is_on({"DECLARED_IN_CODE"}, declared=False)


def test_definitions_by_module_and_without_an_instance(djp: Djp, stream: EventStream, code: Path) -> None:
    found = documents(djp("doctor", "--json", "-m", "some_definitions"))
    assert {one["check"] for one in found if one["level"] == "warning"} == {"executor", "dagster"}
    assert "not both" in djp("doctor", "-m", "a", "-f", code, code=2).stderr


@pytest.mark.parametrize("text", ["1/0", "x = 1", "import nothing_of_that_name", "def"])
def test_definitions_that_do_not_load(djp: Djp, stream: EventStream, tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    found = documents(djp("doctor", "--json", "-f", file, code=1))
    assert (found[0]["level"], found[0]["check"]) == ("problem", "definitions")
