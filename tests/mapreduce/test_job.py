"""What a job may be, what a result gives, who does it and why."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import djp_dagster as djp
from djp_dagster.errors import BadRecordsError, InvalidSettingError, SourceError, TableSchemaError
from djp_dagster.mapreduce import running
from djp_dagster.mapreduce.progress import Progress
from djp_dagster.testing import memory_stream
from tests.mapreduce.kit import counted, text_of, words


def itself(pair: Any) -> Any:
    return (pair,)


def results(pairs: list[Any], **how: Any) -> djp.MapReduceResult:
    return djp.map_reduce(itself, djp.Items(pairs), **how or {"combine": djp.Sum()})


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({}, "combine"),
            ({"combine": djp.Sum(), "reduce": sum}, "combine"),
            ({"combine": djp.Sum}, "combine"),
            ({"reduce": 5}, "reduce"),
            ({"combine": djp.Sum(), "sort_values": True}, "sort_values"),
            ({"combine": djp.Sum(), "reducers": 0}, "reducers"),
            ({"combine": djp.Sum(), "reducers": True}, "reducers"),
            ({"combine": djp.Sum(), "max_bad_fraction": 1.0}, "max_bad_fraction"),
            ({"combine": djp.Sum(), "max_bad_fraction": -0.1}, "max_bad_fraction"),
            ({"combine": djp.Sum(), "max_attempts": 0}, "max_attempts"),
            ({"combine": djp.Sum(), "batch": 3}, "batch"),
            ({"combine": djp.Sum(), "memory": "much"}, "memory"),
            ({"combine": djp.Sum(), "stalled_after": "soon"}, "stalled_after"),
        ],
    )
    def test_are_checked(self, settings: dict[str, Any], named: str) -> None:
        with pytest.raises(InvalidSettingError, match=rf"{named}=") as caught:
            djp.MapReduce(words, **settings)
        assert caught.value.facts["setting"] == named

    def test_a_mapper_is_a_function(self) -> None:
        async def mapper(line: str) -> None: ...

        for wrong in (5, mapper):
            with pytest.raises(InvalidSettingError, match="mapper="):
                djp.MapReduce(wrong, combine=djp.Sum())  # type: ignore[arg-type]

    def test_settings_beside_a_job_are_refused(self) -> None:
        with pytest.raises(InvalidSettingError, match=r"\['combine'\] belong to the MapReduce"):
            djp.map_reduce(djp.MapReduce(words, combine=djp.Sum()), djp.Items([]), combine=djp.Sum())

    @pytest.mark.parametrize("batch", ["arrow", "pandas", "nothing"])
    def test_forms_that_a_source_has_not(self, tmp_path: Path, batch: str) -> None:
        (tmp_path / "a").touch()
        with pytest.raises(InvalidSettingError, match=r"TextFiles has no blocks of batch=.*\[True, 'bytes'\]"):
            djp.map_reduce(words, djp.TextFiles(tmp_path / "a"), combine=djp.Sum(), batch=batch)
        with pytest.raises(InvalidSettingError, match="Items has no blocks"):
            djp.map_reduce(words, djp.Items([]), combine=djp.Sum(), batch=True)

    @pytest.mark.parametrize("engine", ["dask", "spark", ""])
    def test_engines_that_there_are_not(self, engine: str) -> None:
        with pytest.raises(InvalidSettingError, match="must be 'auto', 'inline', 'processes'"):
            djp.map_reduce(words, djp.Items([]), combine=djp.Sum(), engine=engine)
        with pytest.raises(InvalidSettingError, match="workers=0"):
            djp.Processes(0)

    def test_top_of_nothing(self) -> None:
        with pytest.raises(InvalidSettingError, match=r"TopK\(k=0\)"):
            djp.TopK(0)

    def test_a_unit_test_of_a_job(self) -> None:
        job = djp.MapReduce(words, combine=djp.Sum())
        assert job.run_local(["b a", "a"]) == {"a": 2, "b": 1}
        assert list(job("b a")) == [("b", 1), ("a", 1)]
        with pytest.raises(BadRecordsError, match="memory, record at 1: AttributeError"):
            job.run_local(["a", 5])

    def test_the_code_version_changes_with_the_settings_that_decide(self) -> None:
        one, other = (djp.MapReduce(words, combine=djp.TopK(k)).code_version for k in (1, 2))
        assert one != other
        assert one == djp.MapReduce(words, combine=djp.TopK(1), memory="1GiB", max_attempts=9).code_version


class TestIdentity:
    """What an earlier run has left is used by the same job only."""

    @staticmethod
    def numbered(number: int) -> Any:
        def mapper(item: Any, more: int = 0) -> Any:
            return [(number, item)]

        return mapper

    def test_equal_jobs(self) -> None:
        one, other = (djp.MapReduce(self.numbered(7), combine=djp.Sum()).identity() for _ in range(2))
        assert one == other

    def test_in_another_process(self) -> None:
        code = (
            "import djp_dagster as djp; from tests.mapreduce.kit import words; "
            "job = djp.MapReduce(words, combine=djp.TopK(3), max_bad_fraction=0.1); "
            "print(job.identity(), job.code_version)"
        )
        told = {
            subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(__file__).resolve().parents[2],
                env={**os.environ, "PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for seed in ("1", "2")
        }
        assert len(told) == 1

    def test_others(self) -> None:
        def mapper(item: Any) -> Any:
            return [(item, 1)]

        def another(item: Any) -> Any:
            return [(item, 1)]

        class Twice(djp.Sum):
            def add(self, accumulator: Any, value: Any) -> Any:
                return accumulator + 2 * value

        jobs = [
            djp.MapReduce(mapper, combine=djp.Sum()),
            djp.MapReduce(another, combine=djp.Sum()),
            djp.MapReduce(mapper, combine=djp.Count()),
            djp.MapReduce(mapper, combine=Twice()),
            djp.MapReduce(mapper, combine=djp.TopK(1)),
            djp.MapReduce(mapper, combine=djp.TopK(2)),
            djp.MapReduce(mapper, combine=djp.Sum(), max_bad_fraction=0.1),
            djp.MapReduce(mapper, combine=djp.Sum(), partition_by=str),
            djp.MapReduce(mapper, combine=djp.Sum(), batch=True),
            djp.MapReduce(mapper, reduce=lambda key, values: 1),
            djp.MapReduce(mapper, reduce=lambda key, values: 2),
            djp.MapReduce(mapper, reduce=lambda key, values: 1, sort_values=True),
            djp.MapReduce(self.numbered(1), combine=djp.Sum()),
            djp.MapReduce(self.numbered(2), combine=djp.Sum()),
        ]
        assert len({job.identity() for job in jobs}) == len(jobs)

    def test_what_cannot_be_compared(self) -> None:
        import threading

        lock = threading.Lock()
        jobs = [djp.MapReduce(lambda item: [(item, lock)], combine=djp.Sum()) for _ in range(2)]
        assert jobs[0].identity() != jobs[1].identity()


class TestEngineChoice:
    def test_little_is_done_here(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x\n" * 100)
        report = djp.map_reduce(words, djp.TextFiles(tmp_path / "a", split_bytes=10), combine=djp.Sum()).report
        assert (report.engine, report.engine_why) == (
            "inline",
            "200 bytes are done before other processes have started",
        )

    def test_much_is_shared_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running, "_SMALL_BYTES", 100)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        (tmp_path / "a").write_text("x\n" * 100)
        report = djp.map_reduce(words, djp.TextFiles(tmp_path / "a", split_bytes=50), combine=djp.Sum()).report
        assert (report.engine, report.workers) == ("processes", 2)
        assert report.engine_why == "200 bytes in 4 splits, and 2 processors"
        report = djp.map_reduce(words, djp.TextFiles(tmp_path / "a"), combine=djp.Sum()).report
        assert report.engine_why == "one split, such as one compressed file"
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
        report = djp.map_reduce(words, djp.TextFiles(tmp_path / "a", split_bytes=50), combine=djp.Sum()).report
        assert report.engine_why == "one processor"


class TestBadRecords:
    def test_nothing_of_a_bad_record_counts(self) -> None:
        """Neither the pairs it gave before it raised, nor what it counted; and everything of the others, once."""

        def mapper(number: int, task: djp.MapTask) -> Any:
            task.count("seen")
            yield "all", 1
            if number % 10 == 3:
                raise ValueError(f"no {number}")
            yield "good", 1

        result = djp.map_reduce(mapper, djp.Items(range(100), split_items=7), combine=djp.Sum(), max_bad_fraction=0.1)
        assert result.to_dict() == {"all": 90, "good": 90}
        assert result.report.counters == {"seen": 90}
        assert (result.report.records, result.report.pairs, result.report.bad_records) == (100, 180, 10)
        assert [(one.position, one.reason) for one in result.bad_records] == [
            (number, f"ValueError: no {number}") for number in range(3, 100, 10)
        ]

    def test_one_too_many(self) -> None:
        def mapper(number: int) -> Any:
            return [(1 // (number % 10), 1)]

        assert len(djp.map_reduce(mapper, djp.Items(range(1, 101)), combine=djp.Sum(), max_bad_fraction=0.1)) == 2
        with pytest.raises(BadRecordsError, match=r"10 of 100 records .*=0.09; the first: memory, record"):
            djp.map_reduce(mapper, djp.Items(range(1, 101)), combine=djp.Sum(), max_bad_fraction=0.09)

    def test_far_too_many_end_it_early(self, tmp_path: Path) -> None:
        calls = []

        def mapper(number: int) -> Any:
            calls.append(number)
            raise ValueError

        with pytest.raises(BadRecordsError):
            djp.map_reduce(
                mapper, djp.Items(range(100_000), split_items=1000), combine=djp.Sum(), max_bad_fraction=0.01
            )
        assert len(calls) < 10_000


class TestCounters:
    def test_of_mapper_and_reducer(self) -> None:
        def mapper(number: int, task: djp.MapTask) -> Any:
            task.count("mapped")
            task.count("sum", number)
            return [(number % 3, number)]

        def reducer(key: int, values: Any, task: djp.MapTask) -> int:
            task.count("reduced")
            return len(list(values))

        result = djp.map_reduce(mapper, djp.Items(range(10)), reduce=reducer, reducers=2)
        assert result.report.counters == {"mapped": 10, "reduced": 3, "sum": 45}
        assert result.to_dict() == {0: 4, 1: 3, 2: 3}


class TestResults:
    def test_as_tables(self) -> None:
        result = results([("a", 1), ("b", 2), ("a", 3)])
        assert result.to_pandas(("word", "count")).to_dict("list") == {"word": ["a", "b"], "count": [4, 2]}
        assert result.to_arrow().schema == pa.schema({"key": pa.string(), "value": pa.int64()})
        assert isinstance(result.batches(), pa.RecordBatchReader)
        assert (len(result), repr(result)) == (2, "MapReduceResult('itself', 2 results)")
        assert list(result.items()) == list(result)

    def test_tuples_become_columns(self) -> None:
        result = results([(("a", 1), 2), (("b", 2), 4)], combine=djp.Mean())
        assert result.to_pandas(("host", "code", "mean")).to_dict("list") == {
            "host": ["a", "b"],
            "code": [1, 2],
            "mean": [2.0, 4.0],
        }
        several = results([("a", 1)], reduce=lambda key, values: (1, "x"))
        assert several.to_pandas(("key", "n", "text")).values.tolist() == [["a", 1, "x"]]
        with pytest.raises(InvalidSettingError, match="give as many names, or two"):
            result.to_pandas(("a", "b", "c", "d", "e"))

    def test_none(self) -> None:
        result = results([])
        assert (result.to_dict(), len(result), result.top(3)) == ({}, 0, [])
        assert list(result.to_pandas(("a", "b")).columns) == ["a", "b"]
        assert result.to_arrow().num_rows == 0

    def test_of_several_types(self) -> None:
        result = results([("a", 1), (2, "x")], reduce=lambda key, values: next(values), reducers=1)
        assert set(result) == {("a", 1), (2, "x")}
        with pytest.raises(TableSchemaError, match="cannot become columns"):
            result.to_pandas()

    def test_sets_and_lists(self) -> None:
        result = results([("a", 2), ("a", 1)], reduce=lambda key, values: set(values))
        assert result.to_dict() == {"a": {1, 2}}
        assert result.to_arrow().to_pylist() == [{"key": "a", "value": [1, 2]}]

    def test_the_top(self) -> None:
        result = results([(f"k{n}", n) for n in range(100)], combine=djp.Sum(), reducers=3)
        assert result.top(2) == [("k99", 99), ("k98", 98)]

    def test_closed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("djp_dagster.mapreduce.place._INLINE_BYTES", 0)
        with djp.map_reduce(itself, djp.Items([("a", 1)]), combine=djp.Sum(), temp_folder=tmp_path) as result:
            assert list(tmp_path.iterdir()) != []
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(SourceError, match="were removed when it was closed"):
            result.to_dict()
        forgotten = djp.map_reduce(itself, djp.Items([("a", 1)]), combine=djp.Sum(), temp_folder=tmp_path)
        assert list(tmp_path.iterdir()) != []
        del forgotten
        assert list(tmp_path.iterdir()) == []

    def test_parquet_parts_and_their_manifest(self, tmp_path: Path, seed: random.Random) -> None:
        lines = text_of(seed, 500)
        result = djp.map_reduce(words, djp.Items(lines), combine=djp.Sum(), reducers=3)
        parts = result.write_parquet(tmp_path / "out", ("word", "count"))
        manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
        assert [f"file://{tmp_path}/out/{one['file']}" for one in manifest["parts"]] == parts
        assert (manifest["columns"], len(parts)) == (["word", "count"], 3)
        found = pd.concat([pq.read_table(tmp_path / "out" / one["file"]).to_pandas() for one in manifest["parts"]])
        assert dict(zip(found["word"], found["count"], strict=True)) == counted(lines)
        assert [one["rows"] for one in manifest["parts"]] == [len(list(one)) for one in result.partitions()]
        second = results([("z", 1)]).write_parquet(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["parts"][0]["file"] in second[0]
        assert all(Path(part.removeprefix("file://")).exists() for part in parts)

    def test_events(self, seed: random.Random) -> None:
        pairs = [(f"k{number % 2500}", number) for number in range(5000)]
        counts = djp.Topic("counts", partitions=2, key="word")
        with memory_stream() as stream:
            for _ in range(2):  # repeated, they are there once
                result = results(pairs)
                published = result.publish(
                    stream, counts, lambda key, value: {"word": key, "count": value}, producer="counts-2026-11-28"
                )
                assert published == 2500
            found = [record.data for partition in range(2) for record in stream.records(counts, partition)]
        assert len(found) == 2500
        assert {one["word"]: one["count"] for one in found} == result.to_dict()


class TestProgress:
    def test_whoever_wants_to_know(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("x y\n" * 1000)
        told: list[Any] = []

        class Mine(Progress):
            def begin(self, phase: str, tasks: int, size: int) -> None:
                told.append((phase, tasks))

            def tell(self, records: int, task_done: bool) -> None:
                told.append((records, task_done))

        djp.map_reduce(words, djp.TextFiles(tmp_path / "a", split_bytes=1000), combine=djp.Sum(), progress=Mine())
        done = Counter(one for one in told if one[1] is True)
        assert [one for one in told if isinstance(one[0], str)] == [("map", 4), ("reduce", 1)]
        assert sum(done.values()) == 5
        assert sum(one[0] for one in told if one[1] is False) == 1000

    def test_in_the_terminal(self, tmp_path: Path) -> None:
        code = (
            "import djp_dagster as djp\nfrom tests.mapreduce.kit import words\n"
            "djp.map_reduce(words, djp.Items(['a b'] * 5), combine=djp.Sum(), progress=True)\n"
        )
        root = Path(__file__).resolve().parents[2]
        told = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True).stdout
        assert "map" in told
        assert "1/1 tasks, 5 records" in told


def test_a_mapper_of_a_script_without_a_guard(tmp_path: Path) -> None:
    """Workers do not run the program that started them."""
    (tmp_path / "input").write_text("a b a\n" * 10)
    script = tmp_path / "script.py"
    script.write_text(
        "import djp_dagster as djp\nprint('started')\nHELP = 1\n"
        "def helper(line):\n    return line.split()\n"
        "def mapper(line):\n    for word in helper(line):\n        yield word, HELP\n"
        "source = djp.TextFiles('input', split_bytes=20)\n"
        "result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine='processes')\n"
        "print(result.to_dict())\n"
    )
    told = subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert told == "started\n{'a': 20, 'b': 10}\n"
