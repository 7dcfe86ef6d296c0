"""Jobs of the tests: their functions are found by worker processes as a user's would be."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import djp_dagster as djp
from djp_dagster.mapreduce.sources.base import Block


def page(line: str) -> Iterator[tuple[str, int]]:
    yield line.split(" ", 7)[6], 1


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


def counted(records: Iterable[str]) -> dict[str, int]:
    """What `words` must come to."""
    return dict(Counter(word for record in records for word in record.split()))


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """What any job must make of its pairs, before it reduces them."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return dict(found)


def text_of(chance: random.Random, lines: int, *, vocabulary: int = 200) -> list[str]:
    """Lines of words, some far more frequent than others; empty ones, long ones, and all kinds of letters."""
    letters = "abcdefgäß€𝄞"
    known = ["".join(chance.choice(letters) for _ in range(chance.randint(1, 8))) for _ in range(vocabulary)]
    weights = [1 / (number + 1) for number in range(vocabulary)]
    return [" ".join(chance.choices(known, weights, k=chance.choice([0, 1, 5, 30]))) for _ in range(lines)]


def once(folder: Path, name: str) -> bool:
    """Whether this is the first call with that name, in whatever process."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def killing(folder: Path, at: Callable[[str], bool], how_often: int = 1) -> Callable[[str], Any]:
    """`words`, whose process is killed at certain lines, so often."""

    def mapper(line: str) -> list[tuple[str, int]]:
        if at(line) and any(once(folder, f"kill-{number}") for number in range(how_often)):
            os.kill(os.getpid(), signal.SIGKILL)
        return [(word, 1) for word in line.split()]

    return mapper


def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    """Wait until the condition holds; fail if it never does."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"still not so after {within_s} s"
        time.sleep(0.01)


def records_of(source: Any, form: str = "records") -> list[Any]:
    """All records of a source, split by split."""
    return [record for block in blocks_of(source, form) for record in block.records]


def blocks_of(source: Any, form: str = "records") -> list[Block]:
    return [block for split in source.plan() for block in split.blocks(form)]


def sums(**more: Any) -> dict[str, Any]:
    return {"combine": djp.Sum(), **more}
