"""Replay of a window into a daily aggregate, against pandas on the same events in Parquet.

Ours reads the events from the stream, where they are MessagePack in SQLite, decodes them, keeps those of the window,
and gives them to the handler one by one, as Arrow, or as one frame. Pandas reads the three columns it needs, which
somebody has extracted into Parquet before, beside the stream; that work is not counted. Both then sum by user.

``python -m benchmarks.replay profile`` says where our time goes.
"""

import cProfile
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import djp_dagster as djp
from benchmarks.harness import Row, Settings, against, alternate, memory, order, seconds
from djp_dagster.replaying.plan import plan_window
from djp_dagster.streams.records import encode_batches

EVENTS = 5_000_000
ORDERS = djp.Topic("orders")
DAY = datetime(2026, 11, 20, tzinfo=timezone.utc)
_PER_APPEND = 5_000
_COLUMNS = ("user_id", "amount")


@djp.consumer(topic=ORDERS, group="by_arrow")
def by_arrow(batch: djp.Batch) -> Any:
    """Piece by piece: bounded memory."""
    import pyarrow as pa

    schema = pa.schema([("user_id", pa.string()), ("amount", pa.int64())])
    pieces = batch.arrow_batches(schema=schema)
    sums = [pa.Table.from_batches([piece]).group_by("user_id").aggregate([("amount", "sum")]) for piece in pieces]
    total = pa.concat_tables(sums).group_by("user_id").aggregate([("amount_sum", "sum")])
    return total.rename_columns(["user_id", "amount"]).to_pandas().set_index("user_id")["amount"].sort_index()


@djp.consumer(topic=ORDERS, group="by_pandas")
def by_pandas(batch: djp.Batch) -> Any:
    """All at once: the frame holds the window."""
    return batch.to_pandas().groupby("user_id")["amount"].sum()


@djp.consumer(topic=ORDERS, group="by_record")
def by_record(batch: djp.Batch) -> Any:
    """One by one, in a dictionary."""
    import pandas as pd

    sums: dict[str, int] = {}
    for record in batch:
        data = record.data
        sums[data["user_id"]] = sums.get(data["user_id"], 0) + data["amount"]
    return pd.Series(sums).sort_index()


WAYS = {"arrow_batches": by_arrow, "records": by_record, "to_pandas": by_pandas}
SHARES = {"arrow_batches": 1.0, "records": 1.0, "to_pandas": 0.2}
"""Of the day: a frame of all of it, with every field, takes gigabytes."""


def peer(path: Path, share: float) -> Any:
    """What the other side does."""
    import pandas as pd

    frame = pd.read_parquet(path, columns=["event_time", *_COLUMNS])
    frame = frame[(frame["event_time"] >= DAY) & (frame["event_time"] < DAY + share * timedelta(days=1))]
    return frame.groupby("user_id")["amount"].sum()


def ours(stream: djp.EventStream, name: str) -> Any:
    """Plan and replay."""
    plan = plan_window(stream.log, ["orders"], DAY, DAY + SHARES[name] * timedelta(days=1), by="event_time")
    return djp.replay(stream, WAYS[name], plan).value


def run(settings: Settings) -> list[Row]:
    """Three ways on our side; the peaks of processes of their own."""
    count, file, parquet = settings.events(EVENTS), settings.folder / "replay.db", settings.folder / "replay.parquet"
    loops: dict[str, Callable[[], float]] = {}
    with djp.open_stream(file) as stream:
        fill(stream, parquet, count)
        for name, share in SHARES.items():
            assert ours(stream, name).equals(peer(parquet, share)), f"{name} sums otherwise"
            loops[name] = partial(seconds, partial(ours, stream, name))
            loops[f"pandas {name}"] = partial(seconds, partial(peer, parquet, share))
        took = alternate(min(settings.rounds, 3), loops)
    rows = []
    for name, share in SHARES.items():
        what = f"replay, {share * count / 1e6:.1f} M events, sums by user: {name} / pandas on extracted Parquet"
        rows.append(against(what, round(share * count), took[name], took[f"pandas {name}"]))
        peaks = [_child(file, parquet, name, side) for side in ("ours", "pandas")]
        rows.append(Row(f"{what}: peak memory", *(f"{peak / 1e6:,.0f} MB" for peak in peaks)))
    return rows


def fill(stream: djp.EventStream, parquet: Path, count: int) -> None:
    """The same events into the stream and, in part, into Parquet: a day of them, in order of time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream.create_topic(ORDERS)
    schema = pa.schema([("event_time", pa.timestamp("us", tz="UTC")), ("user_id", pa.string()), ("amount", pa.int64())])
    with pq.ParquetWriter(parquet, schema) as writer:
        for first in range(0, count, _PER_APPEND):
            events = list(_events(first, min(_PER_APPEND, count - first), timedelta(days=1) / count))
            stream.log.append(list(encode_batches("orders", 0, events, max_event_bytes=1 << 20)))
            columns = {name: [event.data[name] for event in events] for name in _COLUMNS}
            writer.write_table(pa.table({"event_time": [event.time for event in events], **columns}, schema=schema))


def _events(first: int, count: int, step: timedelta) -> Iterator[djp.Event]:
    for number in range(first, first + count):
        yield djp.Event(type="orders", source="/shop", time=DAY + step * number, data=order(number))


def _child(file: Path, parquet: Path, name: str, side: str) -> int:
    command = [sys.executable, "-m", "benchmarks.replay", "peak", str(file), str(parquet), name, side]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak(file: Path, parquet: Path, name: str, side: str) -> int:
    if side == "pandas":
        peer(parquet, SHARES[name])
    else:
        with djp.open_stream(file) as stream:
            ours(stream, name)
    return memory("VmHWM")


def _profile(count: int) -> None:
    with tempfile.TemporaryDirectory() as folder, djp.open_stream(Path(folder) / "replay.db") as stream:
        fill(stream, Path(folder) / "replay.parquet", count)
        for name in WAYS:
            profile = cProfile.Profile()
            profile.runcall(ours, stream, name)
            print(f"--- {name}, {count} events")
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    if sys.argv[1] == "peak":
        print(_peak(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]))
    else:
        _profile(int(sys.argv[2]) if len(sys.argv) > 2 else 500_000)
