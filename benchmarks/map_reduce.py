"""Page frequency over an access log, and word count with many keys: against loops, pools, and other engines.

``python -m benchmarks.map_reduce [--size 2GB] [--rounds 1] [page ...]`` does some of it, over files of that size. The
start of interpreters and clusters is not counted: our processes are timed with a job of a line for each, too, and that
is taken off; the pool, Dask and Spark are warm. mrjob and PySpark are left out where they are not installed.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import djp_dagster as djp
from benchmarks.harness import Row, Settings, alternate
from benchmarks.map_reduce_peers import clusters, mrjob, peers
from djp_dagster.units import parse_bytes

_PARTS = ("page", "words", "overhead")
_BYTES = 300_000_000
_WORDS = 3_000_000
_SPLIT = 16 << 20
_DYNAMIC = 50


def run(settings: Settings) -> list[Row]:
    """All parts."""
    return _run(settings, _PARTS, _BYTES // settings.scale)


def _run(settings: Settings, parts: tuple[str, ...], size: int) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        rows += {"page": _page, "words": _words, "overhead": _overhead}[part](settings, size)
    return rows


# Page frequency


def page(line: str) -> Iterator[tuple[str, int]]:
    yield line.split(" ", 7)[6], 1


def pages(block: bytes) -> Counter[bytes]:
    return Counter([line.split(b" ", 7)[6] for line in BytesIO(block)])


def _loop(path: str) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    with open(path, "rb") as file:  # noqa: PTH123
        for line in file:
            key = line.split(b" ", 7)[6]
            found[key] = found.get(key, 0) + 1
    return found


def _share(path: str, start: int, end: int) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    with open(path, "rb") as file:  # noqa: PTH123
        if start:
            file.seek(start - 1)
            file.readline()
        at = file.tell()
        for line in file:
            if at >= end:
                break
            at += len(line)
            key = line.split(b" ", 7)[6]
            found[key] = found.get(key, 0) + 1
    return found


def _pool(pool: ProcessPoolExecutor, path: str, workers: int) -> Counter[bytes]:
    size, total = Path(path).stat().st_size, Counter[bytes]()
    edges = [size * number // workers for number in range(workers + 1)]
    for found in pool.map(_share, [path] * workers, edges, edges[1:]):
        total.update(found)
    return total


def _ours(path: str, *, batch: bool, engine: Any) -> djp.MapReduceResult:
    source = djp.TextFiles(path, split_bytes=_SPLIT)
    return djp.map_reduce(pages if batch else page, source, combine=djp.Sum(), batch=batch, engine=engine())


def _lines(settings: Settings, count: int) -> Path:
    path = settings.folder / f"{count}-lines.log"
    path.write_text(f"{' '.join('abcdefgh')}\n" * count)
    return path


def _start(lines: Path, workers: int) -> djp.MapReduceResult:
    """A job with a line for each process: all of them start, and import what they need."""
    source = djp.TextFiles(lines, split_bytes=lines.stat().st_size // workers)
    return djp.map_reduce(pages, source, combine=djp.Sum(), batch=True, engine=djp.Processes(workers))


def _page(settings: Settings, size: int) -> list[Row]:
    path = _log(settings.folder / "access.log", size)
    expected = {key.decode(): count for key, count in _loop(path).items()}
    workers = len(os.sched_getaffinity(0))
    processes: Callable[[], Any] = lambda: djp.Processes(workers)  # noqa: E731
    inline: Callable[[], Any] = lambda: "inline"  # noqa: E731
    lines = _lines(settings, workers)
    with ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(workers))
        _pool(pool, path, workers)
        loops: dict[str, Callable[[], Mapping[Any, int] | int]] = {
            "ours, records, inline": lambda: _ours(path, batch=False, engine=inline).to_dict(),
            "ours, blocks, inline": lambda: _ours(path, batch=True, engine=inline).to_dict(),
            "ours, records, processes": lambda: _ours(path, batch=False, engine=processes).to_dict(),
            "ours, blocks, processes": lambda: _ours(path, batch=True, engine=processes).to_dict(),
            "ours, a line each, processes": lambda: len(_start(lines, workers)),
            "a loop": lambda: _loop(path),
            f"a pool of {workers}": lambda: _pool(pool, path, workers),
            **peers(path),
        }
        for name, loop in loops.items():
            _require_equal(name, loop(), expected)
        took = alternate(settings.rounds, {name: _timed(loop) for name, loop in loops.items()})
    for name, count in clusters(path):
        _require_equal(name, count(), expected)
        took[name] = [_timed(count)() for _ in range(settings.rounds)]
    return _page_rows(took, size, workers) + _mrjob_rows(settings, size // 20)


def _require_equal(name: str, found: Mapping[Any, int] | int, expected: Mapping[str, int]) -> None:
    if not isinstance(found, int):
        told = {key.decode() if isinstance(key, bytes) else key: count for key, count in found.items()}
        assert told == expected, f"{name} counts otherwise"


def _mrjob_rows(settings: Settings, size: int) -> list[Row]:
    """Once, over a small file, with the start of its interpreter: it takes a second for some megabytes."""
    path = _log(settings.folder / "small.log", size)
    with ExitStack() as stack:
        try:
            theirs = mrjob(path, stack)
        except ImportError:
            print("  mrjob is not installed: left out", file=sys.stderr)
            return []
        peer = [_timed(theirs)()]
    ours = [_timed(lambda: _ours(path, batch=False, engine=lambda: "inline").to_dict())()]
    return [_ratio(f"page frequency, {size / 1e6:.0f} MB, records, inline / mrjob inline", size, ours, peer, 10.0)]


def _page_rows(took: Mapping[str, list[float]], size: int, workers: int) -> list[Row]:
    start = took["ours, a line each, processes"]
    ours = {
        "records, inline": took["ours, records, inline"],
        "blocks, inline": took["ours, blocks, inline"],
        f"records, {workers} processes": _less(took["ours, records, processes"], start),
        f"blocks, {workers} processes": _less(took["ours, blocks, processes"], start),
    }
    what = f"page frequency, {size / 1e6:,.0f} MB"
    rows = [Row(f"{what}: start of {workers} processes, taken off below", f"{_middle(start):.2f} s")]
    for name, mine in ours.items():
        blocks = name.startswith("blocks")
        for peer, figures in took.items():
            if peer.startswith("ours"):
                continue
            wanted = _wanted(peer, blocks=blocks, inline="inline" in name)
            ratio = sorted(theirs / own for own, theirs in zip(mine, figures, strict=True))[len(mine) // 2]
            target = "" if wanted is None else f"≥ {wanted:g}x"
            met = None if wanted is None else ratio >= wanted
            rows.append(
                Row(f"{what}, {name} / {peer}", _mb(size, mine), _mb(size, figures), f"{ratio:.2f}x", target, met)
            )
    return rows


def _wanted(peer: str, *, blocks: bool, inline: bool) -> float | None:
    if peer == "a loop":
        return (0.91 if blocks else 0.5) if inline else None
    if inline:
        return None
    if peer.startswith("a pool"):
        return 0.83 if blocks else 0.5
    if peer in ("DuckDB", "Polars"):
        return 1.0 if blocks else None
    return 3.0 if peer.startswith("Dask") else 10.0


# Word count with many keys


def words(line: str) -> Iterator[tuple[str, int]]:
    for word in line.split():
        yield word, 1


def _words(settings: Settings, size: int) -> list[Row]:
    count = _WORDS // settings.scale
    path = settings.folder / "words.txt"
    chance = random.Random(1)
    with path.open("w") as file:
        for _ in range(count // 10):
            file.write(" ".join(f"user-{chance.randrange(count)}" for _ in range(10)) + "\n")

    def ours(workers: int) -> int:
        source = djp.TextFiles(path, split_bytes=path.stat().st_size // 8)
        with djp.map_reduce(words, source, combine=djp.Sum(), engine=djp.Processes(workers), memory="512MiB") as result:
            return len(result)

    def loop() -> int:
        found: dict[str, int] = {}
        with path.open() as file:
            for line in file:
                for word in line.split():
                    found[word] = found.get(word, 0) + 1
        return len(found)

    assert ours(1) == ours(2) == loop()
    one_line, two_lines = _lines(settings, 1), _lines(settings, 2)
    loops = {
        "1": _timed(lambda: ours(1)),
        "2": _timed(lambda: ours(2)),
        "loop": _timed(loop),
        "start 1": _timed(lambda: _start(one_line, 1)),
        "start 2": _timed(lambda: _start(two_lines, 2)),
    }
    took = alternate(settings.rounds, loops)
    one, two = (_less(took[f"{workers}"], took[f"start {workers}"]) for workers in (1, 2))
    what = f"word count, {count / 1e6:.1f} M words, most of them different"
    return [
        _ratio(f"{what}: 2 processes / 1", count, two, one, 1.6),
        _ratio(f"{what}: 2 processes / a dictionary in a loop", count, two, took["loop"], None),
    ]


# What a job of nothing costs


def _overhead(settings: Settings, size: int) -> list[Row]:
    line = _lines(settings, 1)
    took = alternate(
        settings.rounds,
        {
            "inline": _timed(lambda: _ours(str(line), batch=False, engine=lambda: "inline").to_dict()),
            "processes": _timed(lambda: _ours(str(line), batch=False, engine=lambda: djp.Processes(2)).to_dict()),
            "dynamic": _timed(_dynamic),
            "one asset": _timed(_one_asset),
        },
    )
    inline, processes = _middle(took["inline"]), _middle(took["processes"])
    mine, theirs = _middle(took["one asset"]), _middle(took["dynamic"])
    return [
        Row("a job of one line, inline", f"{inline * 1000:.1f} ms", target="≤ 10 ms", met=inline <= 0.01),
        Row("a job of one line, 2 processes", f"{processes:.2f} s", target="≤ 1 s", met=processes <= 1),
        Row(
            f"{_DYNAMIC} items in Dagster: one asset / dynamic outputs, in process",
            f"{mine * 1000:.0f} ms",
            f"{theirs * 1000:.0f} ms",
            f"{theirs / mine:.1f}x",
        ),
    ]


def _one_asset() -> None:
    import dagster as dg

    made = djp.map_reduce_asset(source=djp.Items(range(_DYNAMIC)), combine=djp.Sum(), key="total")(_by_rest)
    with dg.DagsterInstance.ephemeral() as instance:
        dg.materialize([made], instance=instance, resources={"io_manager": dg.mem_io_manager})


def _by_rest(item: int) -> list[tuple[int, int]]:
    return [(item % 3, item)]


def _dynamic() -> None:
    import dagster as dg

    @dg.op(out=dg.DynamicOut(int))
    def items() -> Iterator[Any]:
        for number in range(_DYNAMIC):
            yield dg.DynamicOutput(number, mapping_key=str(number))

    @dg.op
    def mapped(item: int) -> tuple[int, int]:
        return item % 3, item

    @dg.op
    def reduced(pairs: list[Any]) -> dict[int, int]:
        found: dict[int, int] = {}
        for key, value in pairs:
            found[key] = found.get(key, 0) + value
        return found

    @dg.job(executor_def=dg.in_process_executor, resource_defs={"io_manager": dg.mem_io_manager})
    def count() -> None:
        reduced(items().map(mapped).collect())

    with dg.DagsterInstance.ephemeral() as instance:
        assert count.execute_in_process(instance=instance).success


def _log(path: Path, size: int) -> str:
    """An access log of that size: 10,000 different lines, again and again."""
    chance = random.Random(7)
    lines = []
    for _ in range(10_000):
        blog, image = chance.randrange(1500), int(chance.paretovariate(1))
        page = f"/blog/{blog}" if chance.random() < 0.5 else f"/images/{image}.png"
        lines.append(
            f"66.249.{chance.randrange(256)}.{chance.randrange(256)} - - [17/May/2015:10:05:07 +0000] "
            f'"GET {page} HTTP/1.1" 200 {chance.randrange(99_999)} "http://example.com/talks/{chance.randrange(999)}" '
            '"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_9_1) AppleWebKit/537.36 (KHTML, like Gecko) Safari/537.36"\n'
        )
    block = "".join(lines).encode()
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(block)
    return str(path)


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def _less(figures: list[float], start: list[float]) -> list[float]:
    return [max(0.001, one - _middle(start)) for one in figures]


def _middle(figures: list[float]) -> float:
    return sorted(figures)[len(figures) // 2]


def _mb(size: int, figures: list[float]) -> str:
    return f"{size / 1e6 / _middle(figures):,.0f} MB/s"


def _ratio(what: str, count: int, ours: list[float], peer: list[float], target: float | None) -> Row:
    ratio = sorted(theirs / mine for mine, theirs in zip(ours, peer, strict=True))[len(ours) // 2]
    rates = [f"{count / _middle(figures) / 1000:,.0f} k/s" for figures in (ours, peer)]
    return Row(
        what,
        *rates,
        f"{ratio:.2f}x",
        "" if target is None else f"≥ {target:g}x",
        None if target is None else ratio >= target,
    )


def main() -> None:
    """Some parts, or a file of another size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.map_reduce", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(_PARTS)}; all unless given")
    parser.add_argument("--size", default=str(_BYTES), help="of the access log, e.g. 2GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    from rich.console import Console

    from benchmarks.__main__ import table

    with tempfile.TemporaryDirectory(prefix="djp-bench-", dir=arguments.folder) as folder:
        settings = Settings(Path(folder), 1, arguments.rounds)
        Console(width=None if sys.stdout.isatty() else 200).print(
            table(_run(settings, tuple(arguments.parts) or _PARTS, parse_bytes(arguments.size)))
        )


if __name__ == "__main__":
    main()
