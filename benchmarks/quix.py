"""Consuming with a commit every 1,000 events, against Quix Streams on a Kafka-protocol broker (not Apache Kafka).

Both add up one field of the same orders. Ours are events with id, source and type, on disk with full sync; Quix gets
the bare data as JSON, commits to a broker that does not sync, and is timed from its first message to its last, so that
joining the group and leaving it are not counted. Both share this machine's cores; the broker is written in Rust.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.append import ORDERS
from benchmarks.consume import EVENTS, by_batch, by_event, group_of
from benchmarks.harness import BATCH, Row, Settings, against, alternate, order, order_event, rate, seconds
from djp_dagster import open_stream, run_pending
from tests.servers.ports import free_port


def run(settings: Settings) -> list[Row]:
    """Both of our APIs against the one Quix has, per event."""
    if (program := broker_program()) is None:
        return [Row("consume against Quix Streams", "", "noida-db is missing: make bench installs it")]
    count = settings.events(EVENTS)
    place = settings.folder / "broker"
    with open_stream(settings.folder / "quix-ours.db") as stream, broker(program, place) as address:
        stream.create_topic(ORDERS)
        for start in range(0, count, BATCH):
            stream.publish(ORDERS, [order_event(number) for number in range(start, start + BATCH)])
        child(__name__, "produce", address, count)
        took = alternate(
            settings.rounds,
            {
                "by_batch": lambda: seconds(lambda: run_pending(stream, group_of(by_batch))),
                "quix": lambda: child(__name__, "consume", address, count),
                "by_event": lambda: seconds(lambda: run_pending(stream, group_of(by_event))),
            },
        )
    return [
        against("consume: batch API / Quix Streams", count, took["by_batch"], took["quix"], 5),
        against("consume: per-event API / Quix Streams", count, took["by_event"], took["quix"], 2),
    ]


def broker_program() -> str | None:
    beside = Path(sys.executable).with_name("noida-db")
    return str(beside) if beside.exists() else shutil.which("noida-db")


@contextmanager
def broker(program: str, folder: Path) -> Iterator[str]:
    """A running broker's address; its data lie in the folder."""
    port = free_port()
    command = [program, "start", "--data-dir", str(folder), "--host", "127.0.0.1", "--only", "kafka"]
    with folder.with_suffix(".log").open("wb") as log:
        # In a session of its own: noida-db is a script that starts the broker as its child, and both have to end.
        command += ["--kafka-port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the broker did not start: {process.args}")


def child(module: str, *arguments: object) -> float:
    """Run a role in a process of its own, free of the other side's threads; the seconds it found."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=600)
    return float(done.stdout.split()[-1])


def _produce(address: str, count: int) -> float:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": address})
    admin.create_topics([NewTopic("orders", 1, 1)])["orders"].result(30)
    producer = Producer({"bootstrap.servers": address, "linger.ms": 20, "queue.buffering.max.messages": count + 1})
    for number in range(count):
        data = order(number)
        producer.produce("orders", key=str(data["user_id"]), value=json.dumps(data).encode())
        if number % BATCH == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    return 0.0


def _consume(address: str, count: int) -> float:
    import uuid

    from quixstreams import Application

    app = Application(
        broker_address=address,
        consumer_group=f"bench-{uuid.uuid4().hex}",
        auto_offset_reset="earliest",
        commit_every=BATCH,
        commit_interval=3600,
        loglevel="WARNING",
    )
    seen = total = 0
    first = last = 0.0

    def handle(value: dict[str, int]) -> None:
        nonlocal seen, total, first, last
        if seen == 0:
            first = time.perf_counter()
        seen += 1
        total += value["amount"]
        if seen == count:
            last = time.perf_counter()

    frame = app.dataframe(app.topic("orders", value_deserializer="json"))
    frame.update(handle)
    app.run(count=count, timeout=60, collect=False)
    assert seen == count, f"{seen} of {count}"
    return last - first


if __name__ == "__main__":
    role, address, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    took = {"produce": _produce, "consume": _consume}[role](address, count)
    print(took, rate(count, took) if took else "", file=sys.stderr)
    print(took)
