"""Edits of Wikipedia with known answers, computed by others: counted live in state, and replayed by the hour."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, Event, EventStream, Topic, consumer, replay, run_pending
from djp_dagster.processing.threshold import Threshold
from djp_dagster.replaying.plan import plan_window
from djp_dagster.testing import Clock, memory_stream

EDITS = Topic("edits", partitions=3, key="channel")
Key = tuple[str, str]
Counts = Mapping[Key, tuple[int, int, int]]


def keys_of(edit: Event) -> Iterator[Key]:
    assert edit.time is not None
    yield "hour", edit.time.isoformat()[:13]
    yield "channel", edit.data["channel"]


def add(known: tuple[int, int, int], edit: Event) -> tuple[int, int, int]:
    return known[0] + 1, known[1] + edit.data["added"], known[2] + edit.data["deleted"]


@consumer(topic=EDITS, stateful=True, max_batch=Threshold(events=5000))
def live(batch: Batch) -> None:
    """Edits, added and deleted, in state: by hour (each task its own) and by channel."""
    state = batch.state
    for edit in batch:
        for key in keys_of(edit):
            state.set(key, add(tuple(state.get(key, (0, 0, 0))), edit))


@consumer(topic=EDITS)
def window(batch: Batch) -> dict[Key, tuple[int, int, int]]:
    """The same for what there is."""
    counts: dict[Key, tuple[int, int, int]] = {}
    for edit in batch:
        for key in keys_of(edit):
            counts[key] = add(counts.get(key, (0, 0, 0)), edit)
    return counts


@consumer(topic=EDITS)
def framed(batch: Batch) -> dict[Key, tuple[int, int, int]]:
    """The same in pandas."""
    frame = batch.to_pandas().assign(hour=lambda edits: edits["event_time"].dt.strftime("%Y-%m-%dT%H"), edits=1)
    counts = {}
    for by in ("hour", "channel"):
        sums = frame.groupby(by)[["edits", "added", "deleted"]].sum()
        counts.update(
            {(by, str(key)): tuple(map(int, row)) for key, row in zip(sums.index, sums.to_numpy(), strict=True)}
        )
    return counts  # type: ignore[return-value]


def answers(data: Path) -> Counts:
    found: dict[Key, tuple[int, int, int]] = {}
    for by in ("hour", "channel"):
        _, *lines = (data / "answers" / f"wikiticker.per_{by}.tsv").read_text().splitlines()
        for line in lines:
            key, *numbers = line.split("\t")
            edits, added, deleted = map(int, numbers)
            found[by, key.strip('"')] = (edits, added, deleted)
    return found


@pytest.fixture(scope="module")
def stream(shared_data: Path) -> Iterator[EventStream]:
    """All edits, in the order of the file: not quite that of time, and 45 of other days."""
    lines = gzip.decompress((shared_data / "wikiticker-2015-09-12-sampled.json.gz").read_bytes()).splitlines()
    edits = [json.loads(line) for line in lines]
    events = [
        EDITS.event(**edit).replace(time=datetime.fromisoformat(edit["time"].replace("Z", "+00:00"))) for edit in edits
    ]
    with memory_stream(clock=Clock(datetime.fromisoformat("2015-09-12T00:00+00:00").timestamp())) as opened:
        opened.create_topic(EDITS)
        for start in range(0, len(events), 1000):
            opened.publish(EDITS, events[start : start + 1000])
        yield opened


def merged(parts: list[Counts]) -> Counts:
    total: dict[Key, Counter[int]] = {}
    for part in parts:
        for key, numbers in part.items():
            total.setdefault(key, Counter()).update(dict(enumerate(numbers)))
    return {key: (counts[0], counts[1], counts[2]) for key, counts in total.items()}


def test_live(shared_data: Path, stream: EventStream, tmp_path: Path) -> None:
    run_pending(stream, live, wait=0, state_folder=tmp_path / "state")
    with stream.view(live, folder=tmp_path / "view") as view:
        per_task: list[Counts] = []
        for task in range(EDITS.partitions):
            per_task.append(dict(view.items_of(task)))  # type: ignore[arg-type]
    assert merged(per_task) == answers(shared_data)


@pytest.mark.parametrize("which", [window, framed])
def test_replayed_by_the_hour(shared_data: Path, stream: EventStream, which: Any, seed: random.Random) -> None:
    expected = answers(shared_data)
    told = {datetime.fromisoformat(f"{hour}:00+00:00") for by, hour in expected if by == "hour"}
    quiet = {min(told) + timedelta(hours=number) for number in range(15 * 24)} - told
    hours = [*told, *seed.sample(sorted(quiet), 5)]
    seed.shuffle(hours)
    found: list[Counts] = []
    for start in hours:
        plan = plan_window(stream.log, ["edits"], start, start + timedelta(hours=1), by="event_time")
        report = replay(stream, which, plan)
        hour = ("hour", start.isoformat()[:13])
        assert (report.value or {}).get(hour, (0, 0, 0)) == expected.get(hour, (0, 0, 0))
        found.append(report.value or {})
    assert merged(found) == expected
    assert sum(edits for (by, _), (edits, _, _) in expected.items() if by == "hour") == 39_244
