"""Appending events made before, 1,000 per publish, and reading them back decoded."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.bare import BareEvent, BareLog
from benchmarks.harness import BATCH, Row, Settings, against, alternate, order_event, seconds
from djp_dagster import Event, EventStream, Topic, open_stream
from djp_dagster.streams.records import TopicPartition, decode_records

ORDERS = Topic("orders", key="user_id")
READ_BYTES = 4 << 20


def run(settings: Settings) -> list[Row]:
    """Append and read against the bare loop; every round begins with new files."""
    count = settings.events(200_000)
    events = [order_event(number) for number in range(count)]
    pieces = [events[start : start + BATCH] for start in range(0, count, BATCH)]
    bare_pieces = [[BareEvent(**msgspec.structs.asdict(event)) for event in piece] for piece in pieces]
    reads: dict[str, list[float]] = {"ours": [], "bare": []}  # timed within the rounds of append

    def ours() -> float:
        with open_stream(_new(settings.folder, "append-ours")) as stream:
            stream.create_topic(ORDERS)
            took = seconds(lambda: _publish(stream, pieces))
            reads["ours"].append(seconds(lambda: read_all(stream, count)))
        return took

    def bare() -> float:
        log = BareLog(_new(settings.folder, "append-bare"))
        took = seconds(lambda: [log.append(piece) for piece in bare_pieces])
        reads["bare"].append(seconds(log.read_all))
        log.close()
        return took

    took = alternate(settings.rounds, {"ours": ours, "bare": bare})
    return [
        against("append: publish of 1,000 events / bare encode + INSERT", count, took["ours"], took["bare"], 0.5),
        against("read: log.read + decode_records / bare SELECT + decode", count, reads["ours"], reads["bare"], 0.5),
    ]


def _publish(stream: EventStream, pieces: Sequence[Sequence[Event]]) -> None:
    for piece in pieces:
        stream.publish(ORDERS, piece)


def read_all(stream: EventStream, count: int) -> int:
    """Every record of the topic, read and decoded as a batch does it."""
    at, offset = TopicPartition(ORDERS.name, 0), 0
    while offset < count:
        for stored in stream.log.read(at, offset, end=count, max_bytes=READ_BYTES):
            records, _bad = decode_records(stored, offset, count)
            offset += len(records)
    return offset


def _new(folder: Path, name: str) -> Path:
    """A path where nothing lies yet."""
    for number in range(10_000):
        path = folder / f"{name}-{number}.db"
        if not path.exists():
            return path
    raise AssertionError("too many rounds")
