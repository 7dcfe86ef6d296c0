"""Ten thousand values of one KiB: events below the threshold, which ask S3 for nothing; forced out; a loop of boto3.

Publishing forced out means hashing, creating the object only if it is not there, and the event in the stream.
"""

import os
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.claim_check_process import Meter, Variants, s3_client, store_in
from benchmarks.harness import BATCH, Row, Settings
from djp_dagster import Event, EventStream, PayloadStore, Topic, open_payload_store, open_stream
from tests.servers.seaweedfs import SeaweedServer

_VALUES = 10_000
_VALUE_BYTES = 1024
_THREADS = 8
_TARGET = 1.5
_INLINE = Topic("inline", offload_above="256KiB")
_FORCED = Topic("forced", offload_above=0)


def _values(count: int) -> list[bytes]:
    return [os.urandom(_VALUE_BYTES) for _ in range(count)]


def inline(meter: Meter, folder: str, count: int, **_bucket: str) -> dict[str, Any]:
    """Where the store would be, a socket waits for connections, and none may come."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        _publish(
            meter, folder, count, _INLINE, open_payload_store("s3://none", endpoint_url=f"http://127.0.0.1:{port}")
        )
        nobody.setblocking(False)
        try:
            nobody.accept()
        except BlockingIOError:
            return {"requests": 0}
    raise AssertionError("small values asked the store for something")


def forced(meter: Meter, bucket: str, folder: str, count: int) -> dict[str, Any]:
    store = store_in(bucket)
    _publish(meter, folder, count, _FORCED, store)
    assert sum(found.bytes == _VALUE_BYTES for found in store.objects.list()) == count
    return {}


def _publish(meter: Meter, folder: str, count: int, topic: Topic, store: PayloadStore) -> None:
    values = _values(count)
    with tempfile.TemporaryDirectory(dir=folder) as own, open_stream(Path(own) / "s.db", payloads=store) as stream:
        stream.create_topic(topic)
        _append(stream, topic, [b"first", b"second"])
        with meter():
            for start in range(0, count, BATCH):
                _append(stream, topic, values[start : start + BATCH])
        stored = {record.data for record in stream.records(topic, 0, start=2, end=2 + min(count, BATCH))}
        assert stored == set(values[:BATCH])


def _append(stream: EventStream, topic: Topic, values: list[bytes]) -> None:
    stream.publish(topic, [Event(type="value", source="/bench", data=value) for value in values])


def loop(meter: Meter, bucket: str, folder: str, count: int) -> dict[str, Any]:
    client, values = s3_client(), _values(count)
    client.put_object(Bucket=bucket, Key="first", Body=b"first")
    with meter():
        for number, value in enumerate(values):
            client.put_object(Bucket=bucket, Key=f"{number:05d}", Body=value)
    return {}


def threads(meter: Meter, bucket: str, folder: str, count: int) -> dict[str, Any]:
    """As the loop, by as many threads as an `EventStream` uses."""
    client, values = s3_client(), _values(count)
    client.put_object(Bucket=bucket, Key="first", Body=b"first")
    with meter(), ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(
            lambda at: client.put_object(Bucket=bucket, Key=f"{at:05d}", Body=values[at]), range(len(values))
        ):
            pass
    return {}


def run(server: SeaweedServer, folder: Path, settings: Settings, _size: int) -> list[Row]:
    """All four in turns."""
    count = settings.events(_VALUES)
    variants = Variants(server, settings.rounds)
    ways = {"inline": inline, "forced": forced, "loop": loop, "threads": threads}
    variants.run(ways, folder=str(folder), count=count)
    speeds = {name: variants.speed(name, count, "/s") for name in ways}
    costs = {name: variants.cost(name) for name in ways}
    ratio = variants.ratio("forced", "loop")
    met = ratio >= _TARGET
    return [
        Row(
            f"{count:,} events of 1 KiB, below the threshold",
            f"{speeds['inline']}, no request",
            "",
            "",
            "no request",
            True,
        ),
        Row(
            "the same forced out / loop of put_object",
            speeds["forced"],
            speeds["loop"],
            f"{ratio:.2f}x",
            f"≥ {_TARGET}x",
            met,
        ),
        Row("  peak memory over idle; processor + server", costs["forced"], costs["loop"]),
        Row(
            f"  / put_object in {_THREADS} threads",
            "",
            speeds["threads"],
            f"{variants.ratio('forced', 'threads'):.2f}x",
        ),
        Row("  peak memory over idle; processor + server", "", costs["threads"]),
    ]
