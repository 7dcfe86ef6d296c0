"""A Dask cluster of two processes on this machine."""

from __future__ import annotations

import logging
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster.errors import InvalidSettingError, MapReduceFailedError, WorkerDiedError
from tests.mapreduce.kit import counted, killing, once, text_of, words

distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    import dask

    dask.config.set({"distributed.scheduler.allowed-failures": 3, "distributed.comm.timeouts.connect": "60s"})
    quiet = logging.CRITICAL
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", silence_logs=quiet
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def lines(seed: random.Random) -> list[str]:
    return text_of(seed, 3000)


@pytest.fixture
def source(tmp_path: Path, lines: list[str]) -> djp.TextFiles:
    (tmp_path / "input.txt").write_text("\n".join(lines))
    return djp.TextFiles(tmp_path / "input.txt", split_bytes=20_000)


def test_equal_to_the_others(client: Any, source: djp.TextFiles, lines: list[str], tmp_path: Path) -> None:
    def mapper(line: str, task: djp.MapTask) -> Any:
        task.count("lines")
        return [(word, 1) for word in line.split()]

    result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Dask(client), work=tmp_path / "work")
    assert result.to_dict() == counted(lines)
    assert (result.report.engine, result.report.workers, result.report.reduce_tasks) == ("dask", 2, 2)
    assert result.report.counters == {"lines": result.report.records}
    again = djp.map_reduce(words, source, combine=djp.Sum(), engine=djp.Dask(client), work=tmp_path / "work")
    assert again.to_dict() == counted(lines)


def test_one_engine_for_two_jobs(client: Any, tmp_path: Path) -> None:
    engine = djp.Dask(client)
    for name in ("first", "second"):
        result = djp.map_reduce(
            lambda item, name=name: [(name, item)],
            djp.Items(range(10)),
            combine=djp.Sum(),
            engine=engine,
            work=tmp_path / "work",
        )
        assert result.to_dict() == {name: 45}


def test_by_its_address(client: Any, source: djp.TextFiles, lines: list[str], tmp_path: Path) -> None:
    engine = djp.Dask(client.scheduler.address)
    result = djp.map_reduce(
        words, source, reduce=lambda key, values: sum(values), engine=engine, work=tmp_path / "work", reducers=3
    )
    assert result.to_dict() == counted(lines)


def test_a_worker_is_killed(client: Any, source: djp.TextFiles, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "marks").mkdir()
    target = next(line for line in lines if line)
    mapper = killing(tmp_path / "marks", lambda line: line == target)
    result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Dask(client), work=tmp_path / "work")
    assert list((tmp_path / "marks").iterdir()) != []
    assert result.to_dict() == counted(lines)


def test_a_mapper_that_kills_all_of_them(client: Any, source: djp.TextFiles, tmp_path: Path) -> None:
    def mapper(line: str) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerDiedError, match="workers of Dask"):
        djp.map_reduce(
            mapper, source, combine=djp.Sum(), engine=djp.Dask(client), work=tmp_path / "work", max_attempts=1
        )


def test_an_exception_must_repeat(client: Any, source: djp.TextFiles, lines: list[str], tmp_path: Path) -> None:
    def mapper(line: str) -> Any:
        if once(tmp_path, "raised"):
            raise KeyError("only once")
        return [(word, 1) for word in line.split()]

    result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=djp.Dask(client), work=tmp_path / "work")
    assert result.to_dict() == counted(lines)
    assert result.report.raised == 1

    def reducer(key: str, values: Any) -> Any:
        raise LookupError("always")

    with pytest.raises(MapReduceFailedError, match="LookupError each of 2 times: always"):
        djp.map_reduce(words, source, reduce=reducer, engine=djp.Dask(client), work=tmp_path / "work")


def test_it_needs_a_place_that_all_workers_reach(client: Any, source: djp.TextFiles) -> None:
    with pytest.raises(InvalidSettingError, match="give work="):
        djp.map_reduce(words, source, combine=djp.Sum(), engine=djp.Dask(client))
