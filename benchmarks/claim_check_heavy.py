"""A thousand events of one MiB, published and consumed: in the stream itself, and offloaded to a folder and to S3.

Inline they need a topic whose limit was raised. The consumer reads the data of every event.
"""

import os
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.claim_check_process import MIB, Meter, Variants, fresh_bucket, store_in
from benchmarks.harness import Row, Settings, alternate
from djp_dagster import Batch, Event, EventStream, Topic, consumer, open_payload_store, open_stream, run_pending
from tests.servers.seaweedfs import SeaweedServer

_EVENTS = 1000
_AT_ONCE = 20
"""Events per publish."""
_NUMBER_BYTES = 8
_INLINE = Topic("heavy", max_event_bytes="2MiB")
_OFFLOADED = Topic("heavy", offload_above="64KiB")
_WAYS = {"inline": "in the stream", "folder": "offloaded to a folder", "s3": "offloaded to S3"}


def publish(meter: Meter, way: str, bucket: str, folder: str, count: int) -> dict[str, Any]:
    """Publish them all; the size of the stream's files, and a checksum of the data."""
    with _open(way, bucket, folder) as stream:
        topic = _topic(way)
        stream.create_topic(topic)
        block, check = os.urandom(MIB - _NUMBER_BYTES), 0
        with meter():
            for start in range(0, count, _AT_ONCE):
                values = [number.to_bytes(_NUMBER_BYTES, "big") + block for number in range(start, start + _AT_ONCE)]
                stream.publish(topic, [Event(type="heavy", source="/bench", data=value) for value in values])
                for value in values:
                    check = zlib.crc32(value, check)
    return {"check": check, "stream_bytes": sum(path.stat().st_size for path in Path(folder).glob("stream.db*"))}


def consume(meter: Meter, way: str, bucket: str, folder: str, count: int) -> dict[str, Any]:
    """A checksum of the data."""
    check = 0

    @consumer(topic=_topic(way))
    def reader(batch: Batch) -> None:
        nonlocal check
        for record in batch:
            check = zlib.crc32(record.data, check)

    with _open(way, bucket, folder) as stream:
        reader.register(stream)
        with meter():
            report = run_pending(stream, reader)
    assert report.events == count
    return {"check": check}


def _topic(way: str) -> Topic:
    return _INLINE if way == "inline" else _OFFLOADED


def _open(way: str, bucket: str, folder: str) -> EventStream:
    store = store_in(bucket) if way == "s3" else open_payload_store(Path(folder) / "payloads")
    store.read(store.put(b"first", expires_in="1d").claim)
    return open_stream(Path(folder) / "stream.db", payloads=store)


def run(server: SeaweedServer, folder: Path, settings: Settings, _size: int) -> list[Row]:
    """Publishing and consuming, three ways."""
    count = max(_EVENTS // settings.scale // _AT_ONCE, 1) * _AT_ONCE
    variants = Variants(server, settings.rounds)

    def both(way: str) -> float:
        own = folder / way
        own.mkdir()
        with fresh_bucket(server) as bucket:
            given = {"way": way, "bucket": bucket, "folder": str(own), "count": count}
            published = variants.once(f"publish {way}", publish, **given)
            consumed = variants.once(f"consume {way}", consume, **given)
        assert published.told["check"] == consumed.told["check"]
        shutil.rmtree(own)
        return published.seconds + consumed.seconds

    alternate(settings.rounds, {way: partial(both, way) for way in _WAYS})
    return [row for did in ("publish", "consume") for row in _rows(variants, did, count)]


def _rows(variants: Variants, did: str, count: int) -> Iterator[Row]:
    inline = f"{did} inline"
    for way, what in _WAYS.items():
        name = f"{did} {way}"
        told = variants.speed(name, count * MIB / 1e6, "MB/s")
        if did == "publish":
            told += f", stream {variants.median(name, lambda one: one.told['stream_bytes']) / MIB:,.1f} MiB"
        ratio = "" if way == "inline" else f"{variants.ratio(name, inline):.2f}x"
        yield Row(f"{did} {count:,} events of 1 MiB, {what}", told, "", ratio)
        yield Row("  peak memory over idle; processor + server", variants.cost(name))
