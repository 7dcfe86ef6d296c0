"""What importing the package adds to ``import dagster``, in processes that have just started."""

import statistics
import subprocess
import sys
from functools import partial
from typing import NamedTuple

from benchmarks.harness import Row, Settings, alternate

_DAGSTER = "import dagster"
_STATEMENTS = {
    "none": "pass",
    "package": "import djp_dagster",
    "builders": "from djp_dagster import build_stream_asset, build_worker_sensor",
}
_NAMED = {"package": _STATEMENTS["package"], "builders": "from djp_dagster import build_..."}
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
print(ended - started, ended - between, time.process_time() - used, collecting[1] - collecting[0])
"""


class Took(NamedTuple):
    """Seconds of one process."""

    both: float
    second: float
    second_processor: float
    second_collecting: float
    """Processor time in the garbage collector, which goes through all that Dagster has made."""


def run(settings: Settings) -> list[Row]:
    """``import djp_dagster``; then the import of its builders, which loads its Dagster layer."""
    rounds = settings.rounds * 3
    for name in _STATEMENTS:
        _import(name)  # writes the bytecode, and brings the files into memory
    took: dict[str, list[Took]] = {name: [] for name in _STATEMENTS}

    def timed(name: str) -> float:
        took[name].append(_import(name))
        return took[name][-1].both

    both = alternate(rounds, {name: partial(timed, name) for name in _STATEMENTS})
    rows = [Row(f"{_DAGSTER}, {rounds} processes", f"{statistics.median(both['none']) * 1e3:,.0f} ms")]
    for name in ("package", "builders"):
        more_s = statistics.median(mine - theirs for mine, theirs in zip(both[name], both["none"], strict=True))
        what = f"{_NAMED[name]}: over {_DAGSTER}"
        rows += [_row(what, more_s), _split_row(took[name])]
    return rows


def _row(what: str, more_s: float) -> Row:
    return Row(what, f"{more_s * 1e3:.0f} ms", "", "", f"≤ {_LIMIT_S * 1e3:.0f} ms", more_s <= _LIMIT_S)


def _split_row(took: list[Took]) -> Row:
    """The statement alone, in processes that have Dagster: less noise than a difference of processes."""
    second, processor, collecting = (
        f"{statistics.median(figures) * 1e3:.1f} ms" for figures in list(zip(*took, strict=True))[1:]
    )
    return Row("  the statement alone", f"{second}; processor {processor}, of which garbage collector {collecting}")


def _import(name: str) -> Took:
    program = _PROGRAM.format(first=_DAGSTER, then=_STATEMENTS[name])
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, timeout=120)
    return Took(*map(float, done.stdout.split()))
