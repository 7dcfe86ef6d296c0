"""The world of the crash tests: three chained consumers, and the processes that run them and die.

``orders`` → **counts** (stateful, emits, output, deadline, poison, refused records) → ``counted`` → **relay** (per
event) → ``final``; and **files** (stateless, one output a batch, run mode) reads ``orders`` too.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import djp_dagster as djp
from djp_dagster.processing import crash_points
from djp_dagster.testing import kill_at

LEASE_S = 0.6
REMEMBERED = 10
PARTITIONS = 3
ORDERS = djp.Topic("orders", partitions=PARTITIONS, key="user")
COUNTED = djp.Topic("counted", partitions=2, key="user")
FINAL = djp.Topic("final", partitions=1)
# Kills from outside say nothing about the data, and these tests kill the same batch many times over.
PATIENT = djp.RetryPolicy(max_attempts=10_000, first=0.001, longest=0.01)


def counting(snapshots: djp.SnapshotPolicy) -> Callable[[Callable[[djp.Batch], object]], djp.Consumer]:
    """What makes a consumer of `count`."""
    return djp.consumer(
        topic=ORDERS,
        emits=[COUNTED],
        group="counts",
        stateful=True,
        max_batch=djp.Threshold(events=25),
        retry=PATIENT,
        max_poison=25,
        snapshots=snapshots,
    )


def count(batch: djp.Batch) -> dict[str, object]:
    """Count orders per user, and remember the last of them; refuse some, fail on others."""
    seen = []
    for record in batch:
        data = record.data
        if data["kind"] == "poison":
            raise ValueError(f"order {data['n']} is poison")
        if data["kind"] == "refused":
            batch.fail(record, "refused")
            continue
        user, n = data["user"], data["n"]
        number = batch.state.get(user, 0) + 1
        batch.state.set(user, number)
        batch.state.set((user, number), {"n": n, "note": f"order {n} of {user}" * 3})
        if number > REMEMBERED:
            batch.state.delete((user, number - REMEMBERED))
        batch.set_deadline(user, record.append_time + timedelta(days=1))
        batch.emit(COUNTED.event(user=user, n=n, count=number))
        seen.append([record.partition, record.offset])
    return {"seen": seen}


counts = counting(djp.SnapshotPolicy(changes=30, bytes="1MiB", keep=2))(count)
counts_kept = counting(djp.SnapshotPolicy(changes=1, keep=2))(count)
"""The same group; its first batch is followed by a snapshot."""


@djp.consumer(topic=ORDERS, max_batch=djp.Threshold(events=60), retry=PATIENT)
def files(batch: djp.Batch) -> dict[str, object]:
    """One output per batch."""
    return {"seen": [[record.partition, record.offset] for record in batch]}


@djp.consumer(topic=COUNTED, emits=[FINAL], isolate="per_event", max_batch=djp.Threshold(events=40), retry=PATIENT)
def relay(record: djp.Record, batch: djp.Batch) -> None:
    """Pass every count on."""
    batch.emit(FINAL.event(user=record.data["user"], n=record.data["n"]))


CONSUMERS = {"counts": counts, "files": files, "relay": relay, "counts, each batch kept": counts_kept}


def open_world(folder: str) -> djp.EventStream:
    """The stream of a test's folder, with all topics and groups."""
    stream = djp.open_stream(Path(folder) / "stream.db")
    for consumer in CONSUMERS.values():
        consumer.register(stream)
    return stream


STOP = "stop"
"""The file that ends all processes of a folder; an event shared between processes would not survive their deaths."""


def until_stopped(folder: str) -> threading.Event:
    """An event that is set when the stop file appears."""
    local = threading.Event()

    def follow() -> None:
        while not (Path(folder) / STOP).exists():
            time.sleep(0.02)
        local.set()

    threading.Thread(target=follow, daemon=True).start()
    return local


def _stop_at(folder: str, point: str) -> None:
    wake = Path(folder) / f"wake-{os.getpid()}"

    def hook(reached: str) -> None:
        while reached == point and not wake.exists():
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.005)  # continued, but not to go on: another thread of this process holds what all need

    crash_points.set_hook(hook)


def arm(folder: str, point: str | None, hit: int, how: str) -> None:
    """Have this process killed, or stopped until it is woken, when it comes to a point of the protocol."""
    if point is None:
        return
    if how == "stop":
        _stop_at(folder, point)
    else:
        kill_at(point, hit=hit)  # type: ignore[arg-type]


def announce(folder: str) -> None:
    """Tell the test that this process is about to do its work."""
    (Path(folder) / f"alive-{os.getpid()}").touch()


def work(folder: str, names: list[str], point: str | None = None, hit: int = 1, how: str = "kill") -> None:
    """A worker process."""
    arm(folder, point, hit, how)
    with open_world(folder) as stream:
        worker = djp.Worker(
            stream, [CONSUMERS[name] for name in names], lease=LEASE_S, state_folder=Path(folder) / "state"
        )
        announce(folder)
        worker.run(until_stopped(folder))


def run(folder: str, names: list[str], point: str | None = None, hit: int = 1, how: str = "kill") -> None:
    """A process that runs what is pending, again and again."""
    arm(folder, point, hit, how)
    with open_world(folder) as stream:
        local = until_stopped(folder)
        watcher = stream.log.watch()
        announce(folder)
        while not local.is_set():
            for name in names:
                try:
                    djp.run_pending(
                        stream, CONSUMERS[name], lease=LEASE_S, wait=5, stop=local, state_folder=Path(folder) / "state"
                    )
                except (djp.errors.LeaseBusyError, djp.errors.FencedError):
                    continue  # somebody else has it
            watcher.wait(0.2)


def publish(folder: str, total: int, seed: int) -> None:
    """A named producer that goes on where the stream says its predecessor got to."""
    with open_world(folder) as stream:
        producer = stream.producer("shop")
        announce(folder)
        while producer.last_sequence < total:
            number = producer.last_sequence + 1
            producer.publish("orders", orders_of(number, seed), sequence=number)


def orders_of(number: int, seed: int) -> list[djp.Event]:
    """The events of the ``number``-th publish: the same whenever asked."""
    import random

    chance = random.Random(seed * 1_000_003 + number)
    return [
        ORDERS.event(
            n=number * 1000 + index,
            user=f"user-{chance.randrange(12)}",
            kind=chance.choices(["good", "poison", "refused"], [0.96, 0.015, 0.025])[0],
        )
        for index in range(chance.randint(1, 9))
    ]
