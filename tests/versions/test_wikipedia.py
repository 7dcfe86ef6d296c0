"""The Wikipedia edits, counted per channel and hour, with a mistake; rebuilt and promoted: equal to the answers."""

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path

import djp_dagster as djp
from djp_dagster.versions.comparison import compare

EDITS = djp.Topic("edits", partitions=2, key="channel")
Totals = dict[str, list[int]]


def counting(code: str, *, mistaken: bool) -> djp.Consumer:
    """Edits, added and deleted, per channel and hour; mistaken, it leaves out what robots did."""

    @djp.consumer(topic=EDITS, stateful=True, group="totals", code_version=code, max_batch=djp.Threshold(events=4000))
    def totals(batch: djp.Batch) -> None:
        for record in batch:
            edit = record.data
            if mistaken and edit["robot"]:
                continue
            key = (edit["channel"], edit["hour"])
            edits, added, deleted = batch.state.get(key, (0, 0, 0))
            batch.state.set(key, (edits + 1, added + edit["added"], deleted + edit["deleted"]))

    return totals


def edits_of(path: Path) -> list[djp.Event]:
    with gzip.open(path / "wikiticker-2015-09-12-sampled.json.gz", "rt") as lines:
        found = map(json.loads, lines)
        return [
            EDITS.event(
                channel=one["channel"],
                hour=one["time"][:13],
                robot=one["isRobot"],
                added=one["added"],
                deleted=one["deleted"],
            )
            for one in found
        ]


def answers(path: Path) -> Totals:
    with path.open(newline="") as file:
        return {name: [int(one) for one in values] for name, *values in list(csv.reader(file, delimiter="\t"))[1:]}


def summed(stream: djp.EventStream, consumer: djp.Consumer, folder: Path) -> tuple[Totals, Totals]:
    """Per hour, and per channel."""
    sums: tuple[Totals, Totals] = (defaultdict(lambda: [0, 0, 0]), defaultdict(lambda: [0, 0, 0]))
    with stream.view(consumer, folder=folder) as view:
        for key, values in view.items():
            assert isinstance(key, tuple)
            channel, hour = map(str, key)
            for names, name in zip(sums, (hour, channel), strict=True):
                names[name] = [old + new for old, new in zip(names[name], values, strict=True)]
    return dict(sums[0]), dict(sums[1])


def test_wikipedia_edits_rebuilt_and_promoted(tmp_path: Path, shared_data: Path) -> None:
    expected = tuple(answers(shared_data / "answers" / f"wikiticker.per_{kind}.tsv") for kind in ("hour", "channel"))
    events = edits_of(shared_data)
    old, new = counting("1", mistaken=True), counting("2", mistaken=False)
    with djp.open_stream(tmp_path / "stream.db") as stream:
        old.register(stream)

        def publish(some: list[djp.Event]) -> None:
            for start in range(0, len(some), 2000):
                stream.publish(EDITS, some[start : start + 2000])

        publish(events[:30_000])
        djp.run_pending(stream, old, state_folder=tmp_path / "old")
        djp.follow(stream, new, state_folder=tmp_path / "new")
        found = compare(stream, new, folder=tmp_path / "compared")
        assert found.differing + found.only_there > 100
        assert found.only_here == 0
        publish(events[30_000:35_000])
        djp.run_pending(stream, old, state_folder=tmp_path / "old")
        djp.promote(stream, new, state_folder=tmp_path / "new")
        publish(events[35_000:])
        djp.run_pending(stream, new, state_folder=tmp_path / "new")
        assert summed(stream, new, tmp_path / "views") == expected
        assert len(events) == 39_244
        djp.rollback(stream, old, state_folder=tmp_path / "old")
        hours, _ = summed(stream, old, tmp_path / "views")
        robots = sum(event.data["robot"] for event in events)
        assert sum(values[0] for values in hours.values()) == 39_244 - robots
        assert robots > 10_000
