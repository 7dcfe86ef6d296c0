"""A world of heavy events, whose data is in the payload store: who publishes and who handles them, and how they die."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import djp_dagster as djp
from djp_dagster.testing import kill_at
from tests.crash.world import LEASE_S, PATIENT, until_stopped

PARTITIONS = 2
UPLOADS = djp.Topic("uploads", partitions=PARTITIONS, key="user", offload_above=1000)
MADE = djp.Topic("made", partitions=PARTITIONS, key="user", offload_above=1000)


@djp.consumer(topic=UPLOADS, emits=[MADE], max_batch=djp.Threshold(events=6), retry=PATIENT)
def make(batch: djp.Batch) -> dict[str, object]:
    """A heavy event of each; what another attempt makes of it is another payload."""
    seen = []
    for record in batch:
        data = record.data
        text = data["text"][::-1]
        batch.emit(MADE.event(user=data["user"], n=data["n"], text=text, attempt=f"{batch.id}/{batch.attempt}"))
        seen.append([record.partition, record.offset])
    return {"seen": seen}


def open_world(folder: str) -> djp.EventStream:
    """The stream of a test's folder."""
    stream = djp.open_stream(Path(folder) / "stream.db")
    make.register(stream)
    return stream


def uploads_of(number: int, seed: int) -> list[djp.Event]:
    """The events of the ``number``-th publish, most of them heavy: the same whenever asked."""
    chance = random.Random(seed * 1_000_003 + number)
    return [
        UPLOADS.event(
            n=number * 1000 + index,
            user=f"user-{chance.randrange(9)}",
            text=f"{number} {index} {chance.random()} " * chance.choice([1, 100, 1000]),
        )
        for index in range(3)
    ]


def publish(folder: str, total: int, seed: int, die_at: int | None = None) -> None:
    """A named producer that dies, if told, when the payloads of a publish are stored and its events are not."""
    with open_world(folder) as stream:
        append = stream.log.append

        def append_or_die(batches: Any, stamp: Any = None) -> Any:
            if stamp is not None and stamp.sequence == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return append(batches, stamp)

        stream.log.append = append_or_die  # type: ignore[method-assign]
        producer = stream.producer("uploader")
        while producer.last_sequence < total:
            number = producer.last_sequence + 1
            producer.publish("uploads", uploads_of(number, seed), sequence=number)


def work(folder: str, point: str | None = None, hit: int = 1) -> None:
    """A worker that dies, if told, at a point of the protocol."""
    if point is not None:
        kill_at(point, hit=hit)  # type: ignore[arg-type]
    with open_world(folder) as stream:
        djp.Worker(stream, [make], lease=LEASE_S).run(until_stopped(folder))
