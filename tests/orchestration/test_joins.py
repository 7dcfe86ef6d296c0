"""Joins and event DAGs in Dagster: lineage, plots, checks, and the jobs of whoever looks after them."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream
from djp_dagster.orchestration.ticks import look
from djp_dagster.testing import Clock
from tests.orchestration.kit import metadata_of, records_of
from tests.orchestration.test_operator_jobs import error_of, run

UPLOADS = djp.Topic("uploads", partitions=2, key="product")
VIDEO = djp.Topic("video", partitions=2, key="product")
IMAGES = djp.Topic("images", partitions=3, key="image")
PRODUCTS = djp.Topic("products", partitions=2, key="product")


@djp.consumer(topic=UPLOADS, emits=[VIDEO])
def transcode(batch: djp.Batch) -> None:
    """Videos in other sizes."""
    for upload in batch:
        batch.emit(VIDEO.event(product=upload.data["product"], seconds=3))


@djp.consumer(topic=UPLOADS, emits=[IMAGES])
def resize(batch: djp.Batch) -> None:
    """Thumbnails."""
    for upload in batch:
        if upload.data.get("images", 1):
            batch.emit(IMAGES.event(product=upload.data["product"], image=upload.id))


@djp.join(inputs={"video": VIDEO, "images": IMAGES}, key="product", deadline="1h", repartition=True, emits=[PRODUCTS])
def create(parts: djp.Joined) -> None:
    """The product's record."""
    parts.emit(PRODUCTS.event(product=parts.key))


CATALOG = djp.EventDag([transcode, resize, create], name="catalog")


def upload(stream: EventStream, *products: Any, **more: Any) -> None:
    for consumer in CATALOG.consumers:
        consumer.register(stream)
    stream.publish(UPLOADS, [UPLOADS.event(product=product, **more) for product in products])


def do_all(stream: EventStream, folder: Path) -> None:
    for consumer in CATALOG.in_order():
        djp.run_pending(stream, consumer, state_folder=folder)


def test_the_lineage_is_whole_and_the_diagram_is_in_the_metadata() -> None:
    assets = djp.build_event_dag_assets(CATALOG, group_name="catalog", owners=["team:catalog"])
    specs = {
        spec.key.to_user_string(): spec
        for asset in assets
        for spec in (asset.specs if isinstance(asset, dg.AssetsDefinition) else [asset])
    }
    moved = "images-by-product-for-create"
    edges = {(dep.asset_key.to_user_string(), key) for key, spec in specs.items() for dep in spec.deps}
    assert edges == {
        ("topics/uploads", "transcode"),
        ("topics/uploads", "resize"),
        ("transcode", "topics/video"),
        ("resize", "topics/images"),
        ("topics/images", "create-repartition-images"),
        ("create-repartition-images", f"topics/{moved}"),
        (f"topics/{moved}", "create"),
        ("topics/video", "create"),
        ("create", "topics/products"),
    }
    assert specs["create"].kinds == {"python", "join"}
    diagram = specs["create"].metadata["event_dag"].value
    assert diagram == f"```\n{CATALOG.outline()}\n```\n\n```mermaid\n{CATALOG.mermaid()}\n```"
    assert "c_create{{create}}" in diagram
    defs = dg.Definitions(assets=assets, resources={"event_stream": djp.SqlEventStream()})
    dg.Definitions.validate_loadable(defs)


def test_helpers_are_run_by_whoever_runs_the_join() -> None:
    names = [asset.key.to_user_string() for asset in djp.build_join_assets(create, description="d", group_name="g")]
    assert names == ["create-repartition-images", "create"]
    sensor = djp.build_worker_sensor([create], name="catalog")
    assert "create-repartition-images, create" in (sensor.description or "")
    defs = djp.build_defs(create, transcode)
    assert {sensor.name for sensor in defs.sensors or ()} == {
        "create_repartition_images_sensor",
        "create_sensor",
        "transcode_sensor",
        "stream_checks_sensor",
    }


def test_the_figures_of_the_buffer_are_plotted(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    upload(stream, "p1", "p2", "p3")
    upload(stream, "p4", images=0)
    for consumer in CATALOG.in_order()[:-1]:
        djp.run_pending(stream, consumer, state_folder=resource.state_path())
    result = dg.materialize(djp.build_join_assets(create), instance=instance, resources={"event_stream": resource})
    (figures,) = metadata_of(result)
    assert figures["completed_keys"].value == 3
    assert figures["pending_keys"].value == 1
    buffered = figures["buffered_bytes"].value
    assert isinstance(buffered, int)
    assert buffered > 50
    assert len(records_of(stream, PRODUCTS)) == 3


def test_a_deadline_makes_the_sensor_ask_for_a_run(timed: EventStream, clock: Clock, tmp_path: Path) -> None:
    upload(timed, "p4", images=0)
    do_all(timed, tmp_path)
    assert look(timed, create).reason is None
    clock.advance(3599)
    assert look(timed, create).reason is None
    clock.advance(2)
    assert look(timed, create).reason == "a deadline is due"
    do_all(timed, tmp_path)
    assert look(timed, create).reason is None
    assert [letter.error_type for letter in timed.dead_letters("create")] == ["JoinIncompleteError"]


class TestBufferJob:
    """What a person sees of the buffer, and does to it."""

    def test_it_lists_what_waits(
        self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
    ) -> None:
        upload(stream, "p1")
        upload(stream, "p2", "p3", images=0)
        do_all(stream, resource.state_path())
        result = run(djp.build_buffer_job(create), instance, resource, group="create")
        seen = observations(result)["create"]
        assert seen["keys"].value == 2
        rows = seen["buffer"].value.records
        assert {(row.data["key"], row.data["status"], row.data["parts"]) for row in rows} == {
            ("p2", "pending", "video (1)"),
            ("p3", "pending", "video (1)"),
        }
        result = run(djp.build_buffer_job(create), instance, resource, group="create", status="completed")
        (row,) = observations(result)["create"]["buffer"].value.records
        assert row.data["key"] == "p1"

    def test_it_expires_keys(self, instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream) -> None:
        upload(stream, "p2", "p3", 4, images=0)
        do_all(stream, resource.state_path())
        job = djp.build_buffer_job(create)
        run(job, instance, resource, group="create", expire=["p2", "4"])
        assert {letter.error for letter in stream.dead_letters("create")} == {
            "key 'p2': images missing when its deadline passed",
            "key 4: images missing when its deadline passed",
        }
        run(job, instance, resource, group="create", expire_all=True)
        assert len(stream.dead_letters("create")) == 3

    def test_another_group_is_refused(self, instance: dg.DagsterInstance, resource: SqlEventStream) -> None:
        result = run(djp.build_buffer_job(create), instance, resource, fails=True, group="transcode")
        assert "is none of ['create']" in error_of(result)
        with pytest.raises(djp.errors.InvalidSettingError, match="needs joins"):
            djp.build_buffer_job()


def test_the_trace_job_tells_where_an_entity_is(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    upload(stream, "p1", 7)
    upload(stream, "p2", images=0)
    do_all(stream, resource.state_path())
    job = djp.build_trace_job(CATALOG)

    def traced(**config: Any) -> dict[str, Any]:
        result = run(job, instance, resource, **config)
        answer: dict[str, Any] = result.output_for_node("trace_job_op")
        assert answer["complete"] == (not observations(result)), "who keeps it is told"
        return answer

    launched_as_it_is = djp.build_trace_job(CATALOG, example="p1").execute_in_process(
        instance=instance, resources={"event_stream": resource}
    )
    assert launched_as_it_is.output_for_node("trace_job_op")["key"] == "p1"
    assert traced(key="p1")["complete"]
    assert traced(key="7", as_number=True)["complete"]
    found = traced(key="p2")
    assert {step["consumer"]: step["status"] for step in found["steps"]} == {
        "transcode": "done",
        "resize": "done",
        "create-repartition-images": "nothing yet",
        "create": "buffered (images missing)",
    }


def observations(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """The metadata of the run's observations, by asset."""
    return {
        event.asset_observation_data.asset_observation.asset_key.to_user_string(): (
            event.asset_observation_data.asset_observation.metadata
        )
        for event in result.all_events
        if event.event_type_value == "ASSET_OBSERVATION"
    }
