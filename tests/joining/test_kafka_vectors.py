"""Joins of tables, by the numbers of Kafka Streams' own tests.

Inputs and expected results are the facts of `AbstractJoinIntegrationTest.input` and of the twelve tests of two tables
in `TableTableJoinIntegrationTest` (apache/kafka at 1eb7644349cb07139d6a3c1ad1986979647cac99, Apache-2.0, folder
streams/src/test/java/org/apache/kafka/streams/integration), as they are without caching: with caching, Kafka checks the
last result only. All records are of one key. Times are milliseconds, some of them out of order. Left out: joins of
three tables (what they emit twice, and in between, is KAFKA-6443's doing), and the times of results, which are Kafka's.

A table without a sequence is what Kafka calls unversioned: what is appended last wins. With the record's time as
sequence it is versioned: what is older than what is there changes nothing.
"""

from pathlib import Path
from typing import Any

import pytest

from djp_dagster import Batch, Consumer, Event, EventStream, Table, Topic, consumer, run_pending
from djp_dagster.testing import Clock
from tests.processing.kit import all_records

KEY = 0
LEFT, RIGHT = Topic("left", key="k"), Topic("right", key="k")
RESULTS = Topic("results", key="k")
INPUT: list[tuple[Topic, str | None, int]] = [
    (LEFT, None, 1),
    (RIGHT, None, 2),
    (LEFT, "A", 3),
    (RIGHT, "a", 4),
    (LEFT, "B", 5),
    (RIGHT, "b", 6),
    (LEFT, None, 7),
    (RIGHT, None, 8),
    (LEFT, "C", 9),
    (RIGHT, "c", 10),
    (RIGHT, None, 11),
    (LEFT, None, 12),
    (RIGHT, None, 13),
    (RIGHT, "d", 7),  # out of order, nothing is latest
    (LEFT, "D", 6),
    (LEFT, None, 2),
    (RIGHT, None, 3),
    (RIGHT, "e", 14),
    (LEFT, "E", 15),
    (LEFT, None, 10),  # out of order, something is latest
    (RIGHT, None, 9),
    (LEFT, "F", 4),
    (RIGHT, "f", 3),
]
# What each input changes the result to; "-": no result, "X": the result is gone.
VECTORS = {
    ("inner", ""): "- - - A-a B-a B-b X - - C-c X - - - D-d X - - E-e X - - F-f",
    ("left", ""): "- - A-null A-a B-a B-b X - C-null C-c C-null X - - D-d X - - E-e X - F-null F-f",
    ("outer", ""): (
        "- - A-null A-a B-a B-b null-b X C-null C-c C-null X - null-d D-d null-d X null-e E-e null-e X F-null F-f"
    ),
    ("inner", "left right"): "- - - A-a B-a B-b X - - C-c X - - - - - - - E-e - - - -",
    ("left", "left right"): "- - A-null A-a B-a B-b X - C-null C-c C-null X - - - - - - E-e - - - -",
    ("outer", "left right"): "- - A-null A-a B-a B-b null-b X C-null C-c C-null X - - - - - null-e E-e - - - -",
    ("inner", "left"): "- - - A-a B-a B-b X - - C-c X - - - - - - - E-e - X - E-f",
    ("left", "left"): "- - A-null A-a B-a B-b X - C-null C-c C-null X - - - - - - E-e - E-null - E-f",
    ("outer", "left"): ("- - A-null A-a B-a B-b null-b X C-null C-c C-null X - null-d - - X null-e E-e - E-null - E-f"),
    ("inner", "right"): "- - - A-a B-a B-b X - - C-c X - - - - - - - E-e X - F-e -",
    ("left", "right"): "- - A-null A-a B-a B-b X - C-null C-c C-null X - - D-null X - - E-e X - F-e -",
    ("outer", "right"): (
        "- - A-null A-a B-a B-b null-b X C-null C-c C-null X - - D-null X - null-e E-e null-e - F-e -"
    ),
}


def update(topic: Topic, value: str | None, time: int) -> Event:
    return topic.event(k=KEY, value=value, version=time)


def joining(how: str, versioned: set[str]) -> Consumer:
    """Two tables and their join: twenty lines of a stateful consumer."""

    @consumer(topics=[LEFT, RIGHT], emits=[RESULTS], stateful=True)
    def tables(batch: Batch) -> None:
        for record in batch:
            key, side = record.data["k"], record.topic
            known = {name: batch.state.get((name, key), [0, None]) for name in ("left", "right")}
            if side in versioned and record.data["version"] < known[side][0]:
                continue
            before = result_of(how, known["left"][1], known["right"][1])
            known[side] = [record.data["version"], record.data["value"]]
            batch.state.set((side, key), known[side])
            after = result_of(how, known["left"][1], known["right"][1])
            if before is not None or after is not None:
                batch.emit(RESULTS.event(k=key, value=after))

    return tables


def result_of(how: str, left: str | None, right: str | None) -> str | None:
    needs = {"inner": (left, right), "left": (left,), "outer": (left or right,)}[how]
    return None if None in needs else f"{left or 'null'}-{right or 'null'}"


@pytest.mark.parametrize(("how", "versioned"), VECTORS, ids=lambda value: value or "none")
def test_a_join_of_tables_says_what_kafka_says(
    stream: EventStream, clock: Clock, tmp_path: Path, how: str, versioned: str
) -> None:
    join = joining(how, set(versioned.split()))
    join.register(stream)
    said: list[str] = []
    for topic, value, time in INPUT:
        before = len(all_records(stream, RESULTS))
        stream.publish(topic, [update(topic, value, time)])
        run_pending(stream, join, state_folder=tmp_path)
        results = [record.data["value"] for record in all_records(stream, RESULTS)[before:]]
        said.append(" ".join("X" if result is None else result for result in results) or "-")
    assert said == VECTORS[how, versioned].split()
    assert len(said) == len(INPUT) == 23


@pytest.mark.parametrize("versioned", ["", "left", "right", "left right"])
def test_tables_hold_what_kafkas_tables_hold(stream: EventStream, clock: Clock, tmp_path: Path, versioned: str) -> None:
    """The same vectors, read off two tables after each input: `Table` decides what is older, and what is gone."""
    tables = [
        Table(topic.name, topic=topic, value="value", sequence="version" if topic.name in versioned.split() else None)
        for topic in (LEFT, RIGHT)
    ]
    for table in tables:
        table.register(stream)
    views: list[Any] = [stream.view(table, folder=tmp_path / "views") for table in tables]
    try:
        held: dict[str, list[str | None]] = {how: [] for how in ("inner", "left", "outer")}
        for topic, value, time in INPUT:
            stream.publish(topic, [update(topic, value, time)])
            for table in tables:
                run_pending(stream, table, state_folder=tmp_path)
            left, right = (view.refresh().get(KEY) for view in views)
            for how, results in held.items():
                results.append(result_of(how, left, right))
    finally:
        for view in views:
            view.close()
    for how, results in held.items():
        latest: str | None = None
        for number, said in enumerate(VECTORS[how, versioned].split()):
            latest = latest if said == "-" else None if said == "X" else said
            assert results[number] == latest, f"{how}, input {number}: {INPUT[number]}"
