"""The seven tests of the MapReduce lab of MIT's course 6.824 (6.5840), as our acceptance suite.

Word count, indexer, map parallelism, reduce parallelism, job count, early exit, crash; on the eight books where they
are at hand (`test_known_answers` has their known counts), else on text made up here.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp
from tests.mapreduce.kit import counted, once, text_of, until, words


@pytest.fixture
def books(tmp_path: Path, seed: random.Random) -> list[Path]:
    paths = []
    for number in range(8):
        path = tmp_path / f"book-{number}.txt"
        path.write_text("\n".join(text_of(seed, 400)) + "\n")
        paths.append(path)
    return paths


def all_lines(books: list[Path]) -> list[str]:
    return [line for book in books for line in book.read_text().splitlines()]


def running(folder: Path, name: str, *, at_least: int) -> int:
    """How many processes are in this function at once; waits until there are enough."""
    mine = folder / f"{name}-{os.getpid()}"
    mine.touch()
    until(lambda: len(list(folder.glob(f"{name}-*"))) >= at_least, within_s=30)
    return len(list(folder.glob(f"{name}-*")))


def test_1_word_count(books: list[Path]) -> None:
    result = djp.map_reduce(words, djp.TextFiles(books), reduce=lambda key, values: sum(values), engine="processes")
    assert result.to_dict() == counted(all_lines(books))


def test_2_indexer(books: list[Path]) -> None:
    def mapper(line: str, task: djp.MapTask) -> Any:
        return {(word, Path(task.source).name) for word in line.split()}

    def reducer(word: str, documents: Any) -> str:
        found = sorted(set(documents))
        return f"{len(found)} {','.join(found)}"

    result = djp.map_reduce(mapper, djp.TextFiles(books), reduce=reducer, engine="processes")
    expected: dict[str, set[str]] = defaultdict(set)
    for book in books:
        for word in book.read_text().split():
            expected[word].add(book.name)
    assert result.to_dict() == {word: f"{len(found)} {','.join(sorted(found))}" for word, found in expected.items()}


def test_3_map_parallelism(books: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "at-work"
    folder.mkdir()

    def mapper(block: bytes) -> Any:
        return [("at once", running(folder, "map", at_least=2))]

    result = djp.map_reduce(
        mapper, djp.TextFiles(books[:2]), combine=djp.Max(), batch=True, engine=djp.Processes(2), stalled_after=60
    )
    assert result.to_dict()["at once"] >= 2


def test_4_reduce_parallelism(books: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "at-work"
    folder.mkdir()

    def reducer(key: int, values: Any) -> int:
        return running(folder, "reduce", at_least=2)

    result = djp.map_reduce(
        lambda line: [(key, 1) for key in range(8)],
        djp.TextFiles(books[0]),
        reduce=reducer,
        reducers=2,
        engine=djp.Processes(2),
    )
    assert result.report.reduce_tasks == 2
    assert min(result.to_dict().values()) >= 2


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_5_job_count(books: list[Path], tmp_path: Path, engine: str) -> None:
    def mapper(block: bytes, task: djp.MapTask) -> Any:
        with (tmp_path / "calls").open("a") as file:
            file.write(f"{task.source}\n")
        return {}

    result = djp.map_reduce(mapper, djp.TextFiles(books), combine=djp.Sum(), batch=True, engine=engine)
    assert Counter((tmp_path / "calls").read_text().split()) == Counter(map(str, books))
    assert (result.report.map_tasks, result.report.lost, result.report.raised) == (8, 0, 0)


def test_6_early_exit(books: list[Path], tmp_path: Path) -> None:
    """Slow reducers: the output is complete when the call returns, and no process of it is left."""

    def reducer(key: str, values: Any) -> int:
        if once(tmp_path, f"pid-{os.getpid()}"):
            time.sleep(0.5)
        return sum(values)

    result = djp.map_reduce(words, djp.TextFiles(books), reduce=reducer, reducers=2, engine=djp.Processes(2))
    workers = [int(path.name.partition("-")[2]) for path in tmp_path.glob("pid-*")]
    assert len(workers) == 2
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), within_s=10)
    assert result.to_dict() == counted(all_lines(books))


def test_7_crash(books: list[Path], seed: random.Random, tmp_path: Path) -> None:
    """Workers die at random, in mappers and in reducers."""
    number = seed.randrange(2**32)

    def perhaps_die() -> None:
        if random.Random(number ^ time.monotonic_ns()).random() < 0.02 and any(
            once(tmp_path, f"crash-{one}") for one in range(6)
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    def mapper(line: str) -> Any:
        perhaps_die()
        return [(word, 1) for word in line.split()]

    def reducer(key: str, values: Any) -> int:
        perhaps_die()
        return sum(values)

    source = djp.TextFiles(books)
    result = djp.map_reduce(mapper, source, reduce=reducer, reducers=4, engine=djp.Processes(3), max_attempts=8)
    assert result.to_dict() == counted(all_lines(books))
    assert result.report.lost == len(list(tmp_path.glob("crash-*"))) == 6
