"""Real inputs with known answers, computed by others with coreutils, awk and DuckDB: byte for byte."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import djp_dagster as djp

WORD = re.compile("[A-Za-z]+")


def field(number: int) -> Any:
    def mapper(line: str) -> Iterator[tuple[str, int]]:
        yield line.split(" ")[number], 1

    return mapper


def day(line: str) -> Iterator[tuple[str, int]]:
    yield line.split("[", 1)[1].split(":", 1)[0], 1


def pages_of_a_block(block: bytes) -> Counter[bytes]:
    return Counter([line.split(b" ", 7)[6] for line in BytesIO(block)])


def book_words(line: str) -> Iterator[tuple[str, int]]:
    for word in WORD.findall(line):
        yield word, 1


def table(path: Path) -> dict[str, int]:
    """Lines of count, tab, key."""
    lines = path.read_text().splitlines()
    return {key: int(count) for count, _, key in (line.partition("\t") for line in lines)}


@pytest.mark.parametrize("engine", ["inline", "processes"])
@pytest.mark.parametrize(("answer", "mapper"), [("page_freq", field(6)), ("ip_freq", field(0)), ("day_freq", day)])
def test_the_apache_log(shared_data: Path, answer: str, mapper: Any, engine: str) -> None:
    source = djp.TextFiles(shared_data / "apache_access_10k.log", split_bytes="300kB")
    result = djp.map_reduce(mapper, source, combine=djp.Sum(), engine=engine)
    assert result.to_dict() == table(shared_data / "answers" / f"apache_access_10k.{answer}.tsv")
    assert result.report.records == 10_000


def test_the_apache_log_in_blocks(shared_data: Path) -> None:
    source = djp.TextFiles(shared_data / "apache_access_10k.log", split_bytes="300kB")
    result = djp.map_reduce(pages_of_a_block, source, combine=djp.Sum(), batch=True)
    expected = table(shared_data / "answers" / "apache_access_10k.page_freq.tsv")
    assert {key.decode(): count for key, count in result} == expected


@pytest.mark.parametrize("engine", ["inline", "processes"])
@pytest.mark.parametrize("reduced", [False, True])
def test_the_eight_books(shared_data: Path, engine: str, reduced: bool) -> None:
    how: dict[str, Any] = {"reduce": lambda word, counts: sum(counts)} if reduced else {"combine": djp.Sum()}
    source = djp.TextFiles(
        shared_data / "gutenberg" / "pg-*.txt", split_bytes="200kB", encoding="utf-8", errors="replace"
    )
    result = djp.map_reduce(book_words, source, engine=engine, reducers=3, **how)
    found = "".join(f"{word} {count}\n" for word, count in sorted(result.to_dict().items()))
    assert found == (shared_data / "answers" / "gutenberg.word_count.txt").read_text()
    assert (result.report.pairs, len(result)) == (623_948, 22_107)
