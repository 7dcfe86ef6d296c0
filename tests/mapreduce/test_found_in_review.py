"""What readers of the code found, each with what it did."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import djp_dagster as djp
from djp_dagster.claim_check.foreign import _shape
from djp_dagster.errors import BadRecordsError
from djp_dagster.mapreduce import buffers
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.mapreduce.merging import accumulators, keeping_accumulators, merge_accumulators
from djp_dagster.mapreduce.sources.files import Window
from djp_dagster.mapreduce.sources.topics import TopicSplit
from djp_dagster.testing import memory_stream
from tests.mapreduce.kit import records_of


def itself(pair: Any) -> Any:
    return (pair,)


@pytest.mark.parametrize("last", [False, True])
def test_a_mapper_that_raises_stop_iteration_drops_nothing(last: bool) -> None:
    def mapper(line: str) -> Any:
        return [(next(part for part in line.split() if part.startswith("k")), 1)]

    lines = ["k1", "k2", "k3", "nope"] if last else ["k1", "nope", "k2", "k3"]
    with pytest.raises(BadRecordsError, match="StopIteration"):
        djp.map_reduce(mapper, djp.Items(lines), combine=djp.Sum())
    result = djp.map_reduce(mapper, djp.Items(lines), combine=djp.Sum(), max_bad_fraction=0.5)
    assert result.to_dict() == {"k1": 1, "k2": 1, "k3": 1}


def test_values_are_not_changed_in_place() -> None:
    def mapper(line: str) -> Iterator[Any]:
        count = Counter([line])
        yield "all", count
        yield f"by {line[0]}", count

    result = djp.map_reduce(mapper, djp.Items(["ax", "by", "az"]), combine=djp.Sum())
    assert result.to_dict()["by a"] == {"ax": 1, "az": 1}


@pytest.mark.parametrize("combine", [djp.Mean(), djp.Max(), djp.Collect()])
def test_windows_whose_keys_are_of_fewer_kinds_than_their_runs(
    combine: djp.CombineFn[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("djp_dagster.mapreduce.job.LEAST_BYTES", 20_000)
    monkeypatch.setattr("djp_dagster.mapreduce.job.BASE_BYTES", 1 << 60)
    monkeypatch.setattr(buffers, "_MOST_SPILLS", 3)
    pairs = [(None if n % 100 == 0 else f"user-{n % 900:06}", n) for n in range(20_000)]
    found = djp.map_reduce(itself, djp.Items(pairs, split_items=250), combine=combine).to_dict()
    alone = {}
    for key in {key for key, _ in pairs}:
        (alone[key],) = MapReduce(itself, combine=combine).run_local([p for p in pairs if p[0] == key]).values()
    assert found == alone


def test_sums_that_pass_64_bits_on_the_way() -> None:
    pairs = [(f"k{n % 5000}", 2**61) for n in range(50_000)]
    found = djp.map_reduce(itself, djp.Items(pairs, split_items=5000), combine=djp.Sum()).to_dict()
    assert set(found.values()) == {10 * 2**61}


def test_numbers_are_sorted_by_size() -> None:
    values = [2, 1.5, 1, 0.5, 2**60 + 1, 2**60, -3, -2.5, 10**30]
    result = djp.map_reduce(
        itself, djp.Items([("k", value) for value in values]), reduce=lambda key, some: list(some), sort_values=True
    )
    assert result.to_dict()["k"] == sorted(values)


class TestBlocks:
    def test_a_series_whose_index_repeats(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("page,ms\n/a,1\n/a,2\n/b,3\n")
        result = djp.map_reduce(
            lambda frame: frame.set_index("page")["ms"],
            djp.CsvFiles(tmp_path / "a.csv"),
            combine=djp.Sum(),
            batch="pandas",
        )
        assert result.to_dict() == {"/a": 3, "/b": 3}

    @pytest.mark.parametrize("reducers", [1, 3])
    def test_numpys_keys(self, tmp_path: Path, reducers: int) -> None:
        (tmp_path / "a").write_bytes(b"abcab")

        def mapper(block: bytes) -> Any:
            return dict(zip(*np.unique(np.frombuffer(block, np.uint8), return_counts=True), strict=True))

        source = djp.TextFiles(tmp_path / "a")
        result = djp.map_reduce(mapper, source, combine=djp.Sum(), batch=True, reducers=reducers)
        assert result.to_dict() == {97: 2, 98: 2, 99: 1}


class TestSources:
    def test_files_with_nothing_but_a_header(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a,b\n")
        (tmp_path / "b.csv").write_text("a,b\n1,2\n\n3,4\n")
        assert records_of(djp.CsvFiles(tmp_path / "a.csv")) == []
        for split_bytes in (1, 3, 100):
            source = djp.CsvFiles(tmp_path / "*.csv", split_bytes=split_bytes)
            result = djp.map_reduce(lambda row: [(row["a"], 1)], source, combine=djp.Sum())
            assert (result.to_dict(), result.report.records) == ({"1": 1, "3": 1}, 2)

    def test_byte_order_marks(self, tmp_path: Path) -> None:
        for name, text in (("a.txt", "x\ny\n"), ("a.jsonl", '{"x": 1}\n'), ("a.csv", "a,b\n1,2\n")):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert records_of(djp.TextFiles(tmp_path / "a.txt", split_bytes=2)) == ["x", "y"]
        assert records_of(djp.JsonLines(tmp_path / "a.jsonl")) == [{"x": 1}]
        assert records_of(djp.CsvFiles(tmp_path / "a.csv")) == [{"a": "1", "b": "2"}]
        assert records_of(djp.CsvFiles(tmp_path / "a.csv", columns=["p", "q"]))[0] == {"p": "a", "q": "b"}

    def test_delimiters_in_the_middle_of_themselves(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("a\n\n\nb")
        assert records_of(djp.TextFiles(tmp_path / "a", delimiter="\n\n")) == ["a", "\nb"]

    def test_how_records_are_read_makes_another_job(self, tmp_path: Path) -> None:
        import pyarrow as pa

        (tmp_path / "a").write_text("1,2\n")
        path = tmp_path / "a"
        sources = [
            djp.CsvFiles(path, columns=["a", "b"]),
            djp.CsvFiles(path, columns=["b", "a"]),
            djp.CsvFiles(path, columns=["a", "b"], delimiter=";"),
            djp.CsvFiles(path, columns=["a", "b"], types={"a": pa.string()}),
            djp.JsonLines(path),
            djp.JsonLines(path, schema=pa.schema([("a", pa.int64())])),
        ]
        assert len({source.plan()[0].identity() for source in sources}) == len(sources)

    @pytest.mark.parametrize(
        ("pattern", "matches", "others"),
        [
            ("logs/**/*.gz", ["logs/a.gz", "logs/x/a.gz", "logs/x/y/a.gz"], ["a.gz", "logs/a.txt"]),
            ("logs/*/?.gz", ["logs/x/a.gz"], ["logs/a.gz", "logs/x/ab.gz", "logs/x//.gz", "logs/x/y/a.gz"]),
            ("[ab].[!x]", ["a.y", "b.z"], ["c.y", "a.x", "a./"]),
            ("a+(b).c", ["a+(b).c"], ["aab.c"]),
        ],
    )
    def test_globs_of_buckets(self, pattern: str, matches: list[str], others: list[str]) -> None:
        import re

        assert [key for key in [*matches, *others] if re.fullmatch(_shape(pattern), key)] == matches

    def test_a_read_across_the_border_of_a_part(self) -> None:
        class Bytes:
            content = bytes(range(256)) * 40

            def read_at(self, start: int, end: int) -> bytes:
                return self.content[start:end]

            def close(self) -> None: ...

        window = Window(Bytes(), len(Bytes.content), part_bytes=1000, end=len(Bytes.content))
        for start, size in ((0, 10), (900, 500), (990, 900), (10_200, 500), (5, 3000), (6, 999)):
            window.seek(start)
            assert window.read(size) == Bytes.content[start : start + size]

    def test_a_split_does_not_show_what_opens_its_stream(self) -> None:
        split = TopicSplit(partial(djp.open_stream, "postgresql://u:secret@h/db"), "i", "orders", 0, 0, 5)
        assert repr(split) == "TopicSplit(topic:orders/0, 0 to 5)"
        assert "secret" not in split.identity()


def test_events_are_published_once_whatever_the_partitions() -> None:
    counts = djp.Topic("counts", key="word")
    pairs = [(f"k{number:04}", number) for number in range(2500)]

    def event(key: str, value: int) -> dict[str, Any]:
        return {"word": key, "count": value}

    def breaking(key: str, value: int) -> dict[str, Any]:
        if value == 1500:
            raise KeyboardInterrupt
        return event(key, value)

    with memory_stream() as stream:
        with pytest.raises(KeyboardInterrupt):
            one = djp.map_reduce(itself, djp.Items(pairs), combine=djp.Sum(), reducers=1)
            one.publish(stream, counts, breaking, producer="p")
        three = djp.map_reduce(itself, djp.Items(pairs), combine=djp.Sum(), reducers=3)
        three.publish(stream, counts, event, producer="p")
        found = [record.data["word"] for record in stream.records(counts, 0)]
    assert sorted(found) == [key for key, _ in pairs]


class TestAccumulators:
    def test_of_what_is_no_number(self) -> None:
        pairs = [("a", dt.timedelta(seconds=n)) for n in range(4)]
        job = keeping_accumulators(MapReduce(itself, combine=djp.Sum()))
        tables = [
            (f"{start}", accumulators(djp.map_reduce(job, djp.Items(pairs[start : start + 2])))) for start in (0, 2)
        ]
        assert merge_accumulators(tables, djp.Sum()).to_dict() == {"a": dt.timedelta(seconds=6)}

    def test_the_job_is_the_same_each_time(self) -> None:
        one, other = (keeping_accumulators(MapReduce(itself, combine=djp.TopK(3))) for _ in range(2))
        assert (one.identity(), one.code_version) == (other.identity(), other.code_version)
        third = keeping_accumulators(MapReduce(itself, combine=djp.TopK(4)))
        assert third.identity() != one.identity()
        assert third.code_version != one.code_version


def test_large_values_that_wait_are_weighed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Long before there are many of them, they are packed and spilled."""
    buffer = buffers.GroupingBuffer(None, tmp_path, 1, None, 1 << 20)
    for number in range(100):
        buffer.fold([(number, "x" * 20_000)])
        buffer.relieve()
        assert len(buffer._keys) < 20
    assert buffer.spilled_bytes > 0
    buffer.close()
