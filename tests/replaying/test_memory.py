"""A window larger than memory: what a replay needs does not grow with the events, in whatever it passes on."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from djp_dagster import EventStream, Topic, TopicPartition, open_stream
from djp_dagster.events import Event
from djp_dagster.streams.records import encode_batches
from tests.replaying.kit import DAY

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
EVENTS = 1_000_000
PER_APPEND = 10_000
WINDOW = Topic("clicks", key="user")

REPLAY = """
import json, re, sys
from datetime import timedelta
import djp_dagster as djp
from djp_dagster.replaying.plan import plan_window
from tests.replaying.kit import DAY
from tests.replaying.test_memory import WINDOW

copies, shadows = djp.Topic("copies", key="user"), djp.Topic("shadows", key="user")

def arrow(batch):
    return sum(sum(piece.column("n").to_pylist()) for piece in batch.arrow_batches(rows=8192))

def shadow(batch):
    total = 0
    for record in batch:
        total += record.data["n"]
        batch.emit(copies.event(user=record.data["user"]))
    return total

def each(record, batch):
    batch.count("total", record.data["n"])
    batch.emit(copies.event(user=record.data["user"]))

path, how, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
isolate = "per_event" if how == "each" else "batch"
handler = {"arrow": arrow, "shadow": shadow, "each": each}[how]
consumer = djp.consumer(topic=WINDOW, emits=[copies], isolate=isolate)(handler)
emit_to = {copies: shadows} if how == "shadow" else None

def run(stream, hours):
    plan = plan_window(stream.log, ["clicks"], DAY, DAY + timedelta(hours=hours), by="event_time")
    report = djp.replay(stream, consumer, plan, emit_to=emit_to)
    total = report.counts["total"] if how == "each" else report.value
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    return {"events": report.events, "total": total, "emitted": report.emitted, "peak": peak}

with djp.open_stream(path) as stream:
    print(json.dumps([run(stream, 1), run(stream, most)]))
"""


def publish_window(stream: EventStream) -> None:
    """Events of ten hours, so many every six minutes."""
    stream.create_topic(WINDOW)
    for number in range(EVENTS // PER_APPEND):
        moment = DAY + timedelta(minutes=6 * number)
        events = [
            Event(id=f"{n}", source="/s", type="clicks", time=moment, data={"user": f"u{n % 97}", "n": n})
            for n in range(PER_APPEND)
        ]
        stream.log.append(list(encode_batches("clicks", 0, events, max_event_bytes=MIB)))


@pytest.fixture(scope="module")
def stream_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "stream.db"
    with open_stream(path) as stream:
        publish_window(stream)
        assert stream.log.spans(["clicks"])[TopicPartition("clicks", 0)].end == EVENTS
    return path


@pytest.mark.parametrize(("how", "hours"), [("arrow", 10), ("shadow", 4), ("each", 4)])
def test_bounded(stream_file: Path, how: str, hours: int) -> None:
    command = [sys.executable, "-c", REPLAY, str(stream_file), how, str(hours)]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    short, long = json.loads(done.stdout)
    per_hour, total = EVENTS // 10, EVENTS // 10 // PER_APPEND * sum(range(PER_APPEND))
    assert (short["events"], short["total"]) == (per_hour, total)
    assert (long["events"], long["total"]) == (hours * per_hour, hours * total)
    assert long["emitted"] == (hours * per_hour if how == "shadow" else 0)
    # Hundreds of thousands of events more, of which each takes more than half a kilobyte as an object.
    assert long["peak"] - short["peak"] < 24 * MIB
