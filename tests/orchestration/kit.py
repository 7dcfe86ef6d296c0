"""What the tests of the Dagster layer share: a topic, consumers, runs in any state, and time that passes."""

import time
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.test_utils import create_run_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from djp_dagster import Batch, Consumer, Event, EventStream, RetryPolicy, SqlEventStream, Topic, consumer, run_pending
from djp_dagster.streams.records import Record

ORDERS = Topic("orders", partitions=2, key="user")
COPIES = Topic("copies")
FAST = RetryPolicy(max_attempts=2, first=0.001, longest=0.01)


@consumer(topic=ORDERS, emits=[COPIES], group="copy")
def copy(batch: Batch) -> None:
    """Copy each order."""
    for record in batch:
        batch.emit(COPIES.event(n=record.data["n"]))


def orders(count: int, start: int = 0, **more: Any) -> list[Event]:
    """Events ``n = start, start + 1, ...`` of users who share the partitions."""
    return [ORDERS.event(user=f"user-{n % 7}", n=n, **more) for n in range(start, start + count)]


def publish(stream: EventStream, count: int, start: int = 0, **more: Any) -> None:
    """Orders into their topic, which is made if it is not there."""
    stream.create_topic(ORDERS)
    stream.publish(ORDERS, orders(count, start, **more))


def drain(stream: EventStream, which: Consumer = copy) -> None:
    """Do everything pending, without Dagster."""
    run_pending(stream, which, wait=0)


def records_of(stream: EventStream, topic: Topic) -> list[Record]:
    """Everything in a topic; nothing if it was never made."""
    if topic.name not in {info.name for info in stream.topics()}:
        return []
    return [record for partition in range(topic.partitions) for record in stream.records(topic, partition)]


def copied(stream: EventStream) -> list[int]:
    """What `copy` has emitted, sorted."""
    return sorted(record.data["n"] for record in records_of(stream, COPIES))


_TARGET = LoadableTargetOrigin(python_file="nowhere.py")
_LOCATION = ManagedGrpcPythonEnvCodeLocationOrigin(loadable_target_origin=_TARGET, location_name="nowhere")
_ORIGIN = RemoteJobOrigin(RemoteRepositoryOrigin(_LOCATION, "__repository__"), "some_job")
_WAY: dict[dg.DagsterRunStatus, Sequence[DagsterEventType]] = {
    dg.DagsterRunStatus.NOT_STARTED: [],
    dg.DagsterRunStatus.QUEUED: [DagsterEventType.RUN_ENQUEUED],
    dg.DagsterRunStatus.STARTING: [DagsterEventType.RUN_STARTING],
    dg.DagsterRunStatus.STARTED: [DagsterEventType.RUN_STARTING, DagsterEventType.RUN_START],
    dg.DagsterRunStatus.CANCELING: [
        DagsterEventType.RUN_STARTING,
        DagsterEventType.RUN_START,
        DagsterEventType.RUN_CANCELING,
    ],
    dg.DagsterRunStatus.SUCCESS: [
        DagsterEventType.RUN_STARTING,
        DagsterEventType.RUN_START,
        DagsterEventType.RUN_SUCCESS,
    ],
    dg.DagsterRunStatus.CANCELED: [
        DagsterEventType.RUN_STARTING,
        DagsterEventType.RUN_START,
        DagsterEventType.RUN_CANCELED,
    ],
    dg.DagsterRunStatus.FAILURE: [
        DagsterEventType.RUN_STARTING,
        DagsterEventType.RUN_START,
        DagsterEventType.RUN_FAILURE,
    ],
}


def make_run(
    instance: dg.DagsterInstance,
    status: dg.DagsterRunStatus,
    tags: Mapping[str, str],
    *,
    job_name: str = "some_job",
    run_id: str | None = None,
) -> dg.DagsterRun:
    """A run that has come to ``status`` the way Dagster's own runs do, by events."""
    run = create_run_for_test(
        instance,
        job_name=job_name,
        run_id=run_id,
        tags=dict(tags),
        status=dg.DagsterRunStatus.NOT_STARTED,
        remote_job_origin=_ORIGIN._replace(job_name=job_name),
    )
    tell(instance, run.run_id, *_WAY[status])
    return found(instance, run.run_id)


def tell(instance: dg.DagsterInstance, run_id: str, *kinds: DagsterEventType) -> None:
    """Report that this happened to a run."""
    for kind in kinds:
        event = DagsterEvent(event_type_value=kind.value, job_name="some_job", message="as told by a test")
        instance.report_dagster_event(event, run_id)


def found(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRun:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run


def status_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    return found(instance, run.run_id).status


def later(monkeypatch: pytest.MonkeyPatch, module: ModuleType, seconds: float) -> None:
    """Let ``seconds`` have passed, for one module's look at the clock."""
    monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + seconds))


def tick(
    sensor: dg.SensorDefinition,
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    cursor: str | None = None,
) -> SensorExecutionData:
    """What comes of a tick of the sensor."""
    resources = {"event_stream": resource}
    with dg.build_sensor_context(instance=instance, cursor=cursor, resources=resources) as context:
        return sensor.evaluate_tick(context)


def metadata_of(result: dg.ExecuteInProcessResult) -> list[Mapping[str, dg.MetadataValue[Any]]]:
    """The metadata of each materialization of a run."""
    return [event.materialization.metadata for event in result.get_asset_materialization_events()]
