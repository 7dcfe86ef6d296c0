"""From append to handler at 1,000 events/s, and the processor time of a worker with nothing to do.

A process of its own publishes; a worker in this one handles. Each event carries `time.monotonic_ns` of the moment
before its publish, which is one clock for all processes of a host.
"""

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

from benchmarks.harness import Row, Settings
from djp_dagster import Batch, Event, Topic, Worker, consumer, open_stream

STAMPS = Topic("stamps")
PER_SECOND = 1_000
_WARM_UP_S = 1.0


def run(settings: Settings) -> list[Row]:
    """1,000 publishes/s of 1 event, 100/s of 10, and none."""
    duration_s = max(20 / settings.scale, 4)
    rows: list[Row] = []
    for at_once in (1, 10):
        what = f"append → handler, {PER_SECOND // at_once} publishes/s of {at_once}"
        taken, achieved = _latencies(settings.folder / f"latency-{at_once}.db", at_once, duration_s)
        for name, part, target in (("p50", 0.50, 10), ("p99", 0.99, 50)):
            found = taken[int(part * len(taken))] * 1e3
            rows.append(Row(f"{what}: {name}", f"{found:.1f} ms", "", "", f"≤ {target} ms", found <= target))
        rows.append(Row("  of which", f"{achieved:,.0f} events/s, longest {taken[-1] * 1e3:.1f} ms"))
    idle = _idle_share(settings.folder / "idle.db", 10)
    return [*rows, Row("idle worker: processor time", f"{idle:.2%}", "", "", "≤ 1 %", idle <= 0.01)]


def _latencies(path: Path, at_once: int, duration_s: float) -> tuple[list[float], float]:
    """The sorted latencies in seconds after a second's warm-up, and the events handled per second."""
    taken: list[tuple[int, int]] = []

    @consumer(topic=STAMPS)
    def stamps(batch: Batch) -> None:
        for record in batch:
            taken.append((record.data, time.monotonic_ns()))

    with open_stream(path) as stream:
        stop = threading.Event()
        worker = threading.Thread(target=Worker(stream, [stamps]).run, args=(stop,))
        stream.create_topic(STAMPS)
        worker.start()
        command = [sys.executable, "-m", "benchmarks.latency", str(path), str(at_once), str(duration_s + _WARM_UP_S)]
        try:
            subprocess.run(command, check=True, timeout=duration_s + 120)
            time.sleep(1)
        finally:
            stop.set()
            worker.join()
    begin = taken[0][0] + int(_WARM_UP_S * 1e9)
    counted = [(sent, handled) for sent, handled in taken if sent >= begin]
    span_s = (counted[-1][0] - counted[0][0]) / 1e9
    return sorted((handled - sent) / 1e9 for sent, handled in counted), len(counted) / span_s


def _publish(path: Path, at_once: int, duration_s: float) -> None:
    with open_stream(path) as stream:
        pause_s = at_once / PER_SECOND
        started = time.monotonic()
        for number in range(round(duration_s / pause_s)):
            time.sleep(max(started + number * pause_s - time.monotonic(), 0))
            now = time.monotonic_ns()
            stream.publish(STAMPS, [Event(type="stamp", source="/bench", data=now) for _ in range(at_once)])


def _idle_share(path: Path, duration_s: float) -> float:
    """The share of a core that a worker with nothing to do takes."""
    command = [sys.executable, "-m", "benchmarks.latency", str(path), "idle", str(duration_s)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=duration_s + 60)
    return float(done.stdout) / duration_s


def _idle(path: Path, duration_s: float) -> float:
    """Processor seconds over that time, begun when the worker has settled."""

    @consumer(topic=STAMPS)
    def idle(batch: Batch) -> None:
        raise AssertionError("nothing was published")

    with open_stream(path) as stream:
        stop = threading.Event()
        worker = threading.Thread(target=Worker(stream, [idle]).run, args=(stop,))
        worker.start()
        time.sleep(2)
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(duration_s)
        after = resource.getrusage(resource.RUSAGE_SELF)
        stop.set()
        worker.join()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    if sys.argv[2] == "idle":
        print(_idle(Path(sys.argv[1]), float(sys.argv[3])))
    else:
        _publish(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
