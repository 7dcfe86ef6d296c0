"""What importing the package adds to ``import dagster``, in processes that have just started."""

import statistics
import subprocess
import sys
from functools import partial
from typing import NamedTuple

from benchmarks.harness import Row, Settings, alternate

_DAGSTER = "import dagster"
_STATEMENTS = {
    "package": "import djp_dagster",
    "builders": "from djp_dagster import build_stream_asset, build_worker_sensor",
}
_BUILDERS = "from djp_dagster import build_..."
_LIMIT_S = 0.05
_PROGRAM = """
import gc, time
started = time.perf_counter()
{first}
collecting = [0.0, 0.0]
def collected(phase, info):
    collecting[phase == "stop"] += time.process_time()
gc.callbacks.append(collected)
between, used = time.perf_counter(), time.process_time()
{then}
ended = time.perf_counter()
print(between - started, ended - between, time.process_time() - used, collecting[1] - collecting[0])
"""


class Took(NamedTuple):
    """Seconds of one process."""

    dagster: float
    second: float
    processor: float
    collecting: float
    """Processor time in the garbage collector, which goes through all that Dagster has made."""


def run(settings: Settings) -> list[Row]:
    """``import djp_dagster`` where Dagster is loaded; then the import of its builders, which loads its Dagster layer.

    Timed inside one process, after ``import dagster``: the difference between two processes is lost in noise.
    """
    rounds = settings.rounds * 3
    for name in _STATEMENTS:
        _import(name)  # writes the bytecode, and brings the files into memory
    took: dict[str, list[Took]] = {name: [] for name in _STATEMENTS}

    def timed(name: str) -> float:
        took[name].append(_import(name))
        return took[name][-1].second

    alternate(rounds, {name: partial(timed, name) for name in _STATEMENTS})
    dagster_s = statistics.median(one.dagster for members in took.values() for one in members)
    rows = [Row(f"{_DAGSTER}, {rounds * len(_STATEMENTS)} processes", f"{dagster_s * 1e3:,.0f} ms")]
    package_s = statistics.median(one.second for one in took["package"])
    limit = f"≤ {_LIMIT_S * 1e3:.0f} ms"
    rows.append(Row(f"  then {_STATEMENTS['package']}", _told(took["package"]), "", "", limit, package_s <= _LIMIT_S))
    rows.append(Row(f"  or then {_BUILDERS}", _told(took["builders"])))
    return rows


def _told(took: list[Took]) -> str:
    second, processor, collecting = (
        f"{statistics.median(figures) * 1e3:.1f} ms" for figures in list(zip(*took, strict=True))[1:]
    )
    return f"{second}; processor {processor}, of which garbage collector {collecting}"


def _import(name: str) -> Took:
    program = _PROGRAM.format(first=_DAGSTER, then=_STATEMENTS[name])
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, timeout=120)
    return Took(*map(float, done.stdout.split()))
