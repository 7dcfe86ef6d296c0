"""Definitions for the thin path: one stateful consumer, its asset and its sensor, run by the real daemon.

A file ``kill`` beside the stream names the crash point at which the next run process kills itself, once.
"""

import os
import signal
from datetime import timedelta
from pathlib import Path

import dagster as dg

import djp_dagster as djp
from djp_dagster.processing import crash_points

FOLDER = Path(os.environ["DJP_TEST_FOLDER"])
ORDERS = djp.Topic("orders", partitions=2, key="user")
COUNTS = djp.Topic("counts", partitions=2, key="user")


def _kill_when_told(point: str) -> None:
    order = FOLDER / "kill"
    if order.exists() and order.read_text() == point:
        order.rename(FOLDER / "killed")
        os.kill(os.getpid(), signal.SIGKILL)


crash_points.set_hook(_kill_when_told)


@djp.consumer(topic=ORDERS, emits=[COUNTS], stateful=True, max_batch=djp.Threshold(events=40))
def counts(batch: djp.Batch) -> dict[str, object]:
    """Count orders per user; remember the last one with a deadline an hour later."""
    seen = []
    for record in batch:
        count = batch.state.get(record.data["user"], 0) + 1
        batch.state.set(record.data["user"], count)
        batch.emit(COUNTS.event(user=record.data["user"], count=count, n=record.data["n"]))
        batch.set_deadline(record.data["user"], record.append_time + timedelta(hours=1))
        seen.append([record.topic, record.partition, record.offset])
    return {"batch": batch.id, "seen": seen}


defs = dg.Definitions(
    assets=[djp.build_stream_asset(counts)],
    sensors=[djp.build_stream_sensor(counts, default_status=dg.DefaultSensorStatus.RUNNING)],
    resources={
        "event_stream": djp.SqlEventStream(url=f"sqlite:///{FOLDER / 'stream.db'}", state_folder=str(FOLDER / "state"))
    },
)
