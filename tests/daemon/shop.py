"""Definitions for the thin path: for each crash point a stateful consumer, its asset and its sensor.

A file ``kill.<group>`` beside the stream names the crash point at which a run of the group kills itself, once.
"""

import os
import signal
from datetime import timedelta

import dagster as dg

import djp_dagster as djp
from djp_dagster.processing import crash_points
from djp_dagster.testing import CRASH_POINTS
from tests.daemon.at_work import RUNNING, folder


def group_of(point: str) -> str:
    """The group that is killed there."""
    return f"counts_{point.replace('.', '_')}"


def orders_of(point: str) -> djp.Topic:
    """What the group reads."""
    return djp.Topic(f"orders_{point}", partitions=2, key="user")


def counts_of(point: str) -> djp.Topic:
    """Where the group emits to."""
    return djp.Topic(f"counts_{point}", partitions=2, key="user")


def _kill_when_told(point: str) -> None:
    order = folder() / f"kill.{dg.AssetExecutionContext.get().run.job_name.removesuffix('_job')}"
    if order.exists() and order.read_text() == point:
        order.rename(order.with_name(f"{order.name}.done"))
        os.kill(os.getpid(), signal.SIGKILL)


if "DJP_TEST_FOLDER" in os.environ:  # else a test imports this for its names
    crash_points.set_hook(_kill_when_told)


def _consumer(point: str) -> djp.Consumer:
    emitted = counts_of(point)

    @djp.consumer(
        topic=orders_of(point),
        emits=[emitted],
        group=group_of(point),
        stateful=True,
        max_batch=djp.Threshold(events=40),
    )
    def counts(batch: djp.Batch) -> dict[str, object]:
        """Count orders per user; remember the last one with a deadline an hour later."""
        seen = []
        for record in batch:
            count = batch.state.get(record.data["user"], 0) + 1
            batch.state.set(record.data["user"], count)
            batch.emit(emitted.event(user=record.data["user"], count=count, n=record.data["n"]))
            batch.set_deadline(record.data["user"], record.append_time + timedelta(hours=1))
            seen.append([record.topic, record.partition, record.offset])
        return {"batch": batch.id, "seen": seen}

    return counts


_consumers = [_consumer(point) for point in CRASH_POINTS]

defs = dg.Definitions(
    assets=[djp.build_stream_asset(consumer) for consumer in _consumers],
    sensors=[djp.build_stream_sensor(consumer, default_status=RUNNING) for consumer in _consumers],
    resources={"event_stream": djp.SqlEventStream()},
)
