"""``python -m benchmarks [--quick] [name ...]``."""

import argparse
import importlib
import os
import platform
import sqlite3
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, Settings

NAMES = (
    "append",
    "consume",
    "quix",
    "latency",
    "pending",
    "ticks",
    "drain",
    "workers",
    "imports",
    "claim_check",
    "map_reduce",
    "stateful",
    "join",
    "state_reads",
    "replay",
    "lookups",
)
_PACKAGES = (
    "djp-dagster",
    "dagster",
    "msgspec",
    "sqlalchemy",
    "quixstreams",
    "confluent-kafka",
    "noida-db",
    "rocksdict",
    "duckdb",
    "polars",
    "dask",
    "pyspark",
    "mrjob",
    "httpx",
)


def main() -> None:
    """Run the comparisons named, print one table. Timings never decide the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side by side with peers, one table.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="a tenth of the events")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; the median counts (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile: the disk under test")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="djp-bench-", dir=arguments.folder) as folder:
        settings = Settings(Path(folder), 10 if arguments.quick else 1, arguments.rounds)
        for name in arguments.names or NAMES:
            console.print(f"{name} ...", style="dim")
            rows += importlib.import_module(f"benchmarks.{name}").run(settings)
    console.print(table(rows))
    console.print(f"{_machine()}. {_versions()}. SQLite: WAL, synchronous=FULL, on both sides.", highlight=False)
    console.print(f"Medians of {arguments.rounds} alternating rounds; ratio = ours / peer, more is better.")


def table(rows: list[Row]) -> Table:
    table = Table()
    table.add_column("what is timed")
    for title in ("ours", "peer", "ratio", "target", "met"):
        table.add_column(title, justify="right")
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "NO"
        table.add_row(row.what, row.ours, row.peer, row.ratio, row.target, met, style="red" if row.met is False else "")
    return table


def _machine() -> str:
    processor = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    load = " ".join(f"{figure:.1f}" for figure in os.getloadavg())
    return f"{os.cpu_count()} x {processor}, {platform.system()} {platform.release()}, load {load}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _versions() -> str:
    found = [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
