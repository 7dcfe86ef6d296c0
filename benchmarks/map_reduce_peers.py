"""Page frequency by other engines: DuckDB, Polars, a Dask bag, a Spark RDD, mrjob."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

Count = Callable[[], Mapping[str, int]]
_QUERY = """
select split_part(line, ' ', 7), count(*)
from read_csv(?, columns={'line': 'VARCHAR'}, delim=chr(1), quote='', escape='', header=false, auto_detect=false,
    strict_mode=false)
group by 1
"""


def peers(path: str) -> dict[str, Count]:
    """Those that work in this process."""
    return {"DuckDB": _duckdb(path), "Polars": _polars(path)}


def clusters(path: str) -> Iterator[tuple[str, Count]]:
    """Those that start processes of their own, which take processor time even when idle: one after the other."""
    for name, make in (("Dask bag", _dask), ("PySpark RDD", _spark)):
        with ExitStack() as stack:
            try:
                count = make(path, stack)
            except ImportError:
                print(f"  {name} is not installed: left out", file=sys.stderr)
                continue
            yield name, count


def _duckdb(path: str) -> Count:
    import duckdb

    return lambda: dict(duckdb.execute(_QUERY, [path]).fetchall())


def _polars(path: str) -> Count:
    import polars as pl

    def count() -> Mapping[str, int]:
        lines = pl.scan_csv(path, has_header=False, separator="\x01", quote_char=None, new_columns=["line"])
        column = pl.col("line").str.splitn(" ", 8).struct.field("field_6").alias("page")
        return dict(lines.select(column).group_by("page").len().collect().iter_rows())

    return count


def _dask(path: str, stack: ExitStack) -> Count:
    import dask.bag as db
    from distributed import Client

    stack.enter_context(
        Client(n_workers=len(os.sched_getaffinity(0)), threads_per_worker=1, dashboard_address="127.0.0.1:0")
    )
    return lambda: dict(
        db.read_text(path, blocksize=32 << 20).map(lambda line: line.split(" ", 7)[6]).frequencies().compute()
    )


def _spark(path: str, stack: ExitStack) -> Count:
    from pyspark import SparkConf, SparkContext

    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")

    context = SparkContext(
        conf=SparkConf().setMaster(f"local[{len(os.sched_getaffinity(0))}]").set("spark.ui.enabled", "false")
    )
    stack.callback(context.stop)
    context.setLogLevel("ERROR")
    return lambda: (
        context.textFile(path)
        .map(lambda line: (line.split(" ", 7)[6], 1))
        .reduceByKey(lambda one, other: one + other)
        .collectAsMap()
    )


_MRJOB = """
import sys
from mrjob.job import MRJob
class Pages(MRJob):
    def mapper(self, _, line):
        yield line.split(" ", 7)[6], 1
    def combiner(self, page, counts):
        yield page, sum(counts)
    def reducer(self, page, counts):
        yield page, sum(counts)
if __name__ == "__main__":
    Pages.run()
"""


def mrjob(path: str, stack: ExitStack) -> Count:
    """mrjob, in its own process: it is slow, so give it a small file."""
    import mrjob.job  # noqa: F401

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "pages.py").write_text(_MRJOB)
    command = [sys.executable, str(folder / "pages.py"), "-r", "inline", "-q", path]

    def count() -> Mapping[str, int]:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return {json.loads(key): int(count) for key, _, count in (line.partition("\t") for line in told.splitlines())}

    return count
