"""Streaming end to end with a real dagster-daemon: how soon an event's effect is committed, and what a worker costs.

An effect is the event that the consumer emits; it counts when a reader in this process sees it in the stream. Stamps
are `time.monotonic_ns` of the moment before the publish, which is one clock for all processes of a host. Every stamp
must come back once, whoever was killed meanwhile.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import dagster as dg

from benchmarks import shop
from benchmarks.daemon import Daemon, Memory, age_s, children_of, memory_of, processor_s, running_daemon
from benchmarks.harness import BATCH, Row, Settings, order_event, rate
from djp_dagster import Event, EventStream, open_stream

_PATIENCE_S = 180.0
_WARM_UP_S = 1.0
_LONG_LIFE_S = 75.0
_STANDBY_LIMIT_S, _RELAUNCH_LIMIT_S = 8.0, 25.0


class Bench:
    """One daemon, the stream it works on, and what is seen of its effects."""

    def __init__(self, daemon: Daemon, stream: EventStream, path: Path) -> None:
        self.daemon, self.stream, self.path = daemon, stream, path
        self._watcher = stream.log.watch()
        self._offset = 0
        self._publishing = threading.Lock()
        self.published: Counter[int] = Counter()
        self.seen: dict[int, int] = {}
        """When the effect of each stamp was seen."""
        self.pid = 0
        """Who made the last effect."""
        self.counted = 0
        """Events that are no stamps, of which an effect was seen."""

    def publish(self) -> int:
        """A stamp into the stream."""
        with self._publishing:
            stamp = time.monotonic_ns()
            self.stream.publish(shop.WORK, [stamp_event(stamp)])
            self.published[stamp] += 1
        return stamp

    def look(self) -> None:
        """Wait a little for effects, and take note of them."""
        self._watcher.wait(0.1, eager=True)
        for record in self.stream.records(shop.EFFECTS, 0, start=self._offset):
            now = time.monotonic_ns()
            self._offset = record.offset + 1
            self.pid = record.data["pid"]
            self.counted += record.data.get("count", 0)
            stamp = record.data.get("stamp")
            if stamp is not None:
                assert stamp not in self.seen, f"the effect of stamp {stamp} was committed twice"
                self.seen[stamp] = now

    def effect_of(self, stamp: int) -> float:
        """Seconds from a stamp to its effect; waits for it."""
        self._wait_for(lambda: stamp in self.seen, "an effect")
        return (self.seen[stamp] - stamp) / 1e9

    def effect_of_another(self, pid: int) -> float:
        """Wait for an effect of another process than this; when it was seen, by ``time.monotonic``."""
        self._wait_for(lambda: self.pid != pid, f"an effect of another process than {pid}")
        return time.monotonic()

    def everything(self) -> None:
        """Wait until every stamp has its effect."""
        self._wait_for(lambda: len(self.seen) >= len(self.published), "the effect of every stamp")
        assert self.seen.keys() == self.published.keys()

    def count_to(self, count: int) -> None:
        """Wait for the effects of that many other events."""
        self._wait_for(lambda: self.counted >= count, f"{count} events")
        assert self.counted == count

    def members(self, count: int) -> None:
        """Wait until so many workers are there."""

        def there() -> bool:
            found = self.stream.coordinator.members(shop.echo.group)
            return sum(member.live and not member.paused for member in found) >= count

        self._wait_for(there, f"{count} workers")

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        def looked() -> bool:
            self.look()
            return condition()

        self.daemon.wait_for(looked, what, _PATIENCE_S, every_s=0)

    def kill(self) -> tuple[int, float]:
        """SIGKILL whoever made the last effect; its process id, and when, by ``time.monotonic``."""
        victim = self.pid
        assert self.daemon.owns(victim), f"{victim} is no process of the daemon"
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        return victim, killed_at

    @contextmanager
    def publishing(self, every_s: float) -> Iterator[None]:
        """Stamps at that pace during the block; at its end every one has come back."""
        stop = threading.Event()

        def publish_on() -> None:
            while not stop.wait(every_s):
                self.publish()

        thread = threading.Thread(target=publish_on)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        self.everything()

    def close(self) -> None:
        """Let the reader go."""
        self._watcher.close()


def run(settings: Settings) -> list[Row]:
    """Run mode; one worker; two workers, of which one stands by."""
    # Pauses are at random, so that nothing falls in step with the daemon's five seconds; the same in each run of this.
    chance = random.Random(20)
    with _bench(settings, "runs", workers=0) as bench:
        rows = _sensor_rows(bench, max(10 // settings.scale, 3), chance)
    with _bench(settings, "worker", workers=1) as bench:
        rows += _idle_rows(bench, max(20 / settings.scale, 5))
        rows += _latency_rows(bench, max(100 // settings.scale, 30), max(10 / settings.scale, 3), chance)
        rows += _memory_rows(bench, settings.events(500_000))
        rows += _kill_rows(bench, settings, chance, "relaunch, no standby", _RELAUNCH_LIMIT_S)
    with _bench(settings, "standby", workers=2) as bench:
        rows += _kill_rows(bench, settings, chance, "standby takes over, lease 5 s", _STANDBY_LIMIT_S, workers=2)
    return rows


@contextmanager
def _bench(settings: Settings, name: str, *, workers: int) -> Iterator[Bench]:
    """A daemon with so many workers (0: run mode), which has made its first effect."""
    home = settings.folder / name
    path = settings.folder / f"{name}.db"
    environment = {"BENCH_STREAM": str(path), "BENCH_WORKERS": str(workers)}
    with open_stream(path) as stream:
        stream.create_topic(shop.WORK)
        stream.create_topic(shop.EFFECTS)
        definitions = Path(shop.__file__)
        with running_daemon(home, definitions, environment) as daemon, closing(Bench(daemon, stream, path)) as bench:
            bench.effect_of(bench.publish())
            if workers:
                bench.members(workers)
            yield bench


def _sensor_rows(bench: Bench, count: int, chance: random.Random) -> list[Row]:
    """A run per micro-batch; and what of it passes until Dagster has the run, and until the run works."""
    took, asked, begun = [], [], []
    with dg.DagsterInstance.from_config(str(bench.daemon.home)) as instance:
        for _ in range(count):
            time.sleep(chance.uniform(0, 5))
            published_at = time.time()
            took.append(bench.effect_of(bench.publish()))
            last = instance.get_run_records(limit=1)[0]
            asked.append(last.create_timestamp.timestamp() - published_at)
            begun.append((last.start_time or 0.0) - published_at)
    bench.everything()
    return [
        Row(f"sensor → effect, run mode, {count} publishes", _seconds(took)),
        Row("  of which until the tick has asked for the run", _seconds(asked)),
        Row("  until Dagster says that the run has started", _seconds(begun)),
    ]


def _seconds(took: Sequence[float]) -> str:
    return f"p50 {statistics.median(took):.1f} s, max {max(took):.1f} s"


def _idle_rows(bench: Bench, duration_s: float) -> list[Row]:
    """Memory soon after the start, and processor time while nothing is published."""
    time.sleep(3)
    worker, bare = memory_of(bench.pid), _bare_memory()
    helpers = children_of(bench.pid)
    before, helpers_before = processor_s(bench.pid), sum(map(processor_s, helpers))
    time.sleep(duration_s)
    share = (processor_s(bench.pid) - before) / duration_s
    beside = (sum(map(processor_s, helpers)) - helpers_before) / duration_s
    return [
        Row("worker run: memory after its start", str(worker), str(bare)),
        Row("  the peer is `import dagster` and nothing else", ""),
        Row("worker run, idle: processor time", f"{share:.2%}", "", "", "≤ 1 %", share <= 0.01),
        Row(f"  of the {len(helpers)} processes Dagster starts beside it", f"{beside:.2%}"),
    ]


def _bare_memory() -> Memory:
    program = "import dagster; from benchmarks.daemon import memory_of; print(*memory_of('self'))"
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, timeout=120)
    return Memory(*map(float, done.stdout.split()))


def _latency_rows(bench: Bench, count: int, duration_s: float, chance: random.Random) -> list[Row]:
    """One publish at a time, then 100 a second from another process."""
    alone = []
    for _ in range(count):
        time.sleep(chance.uniform(0, 0.2))
        alone.append(bench.effect_of(bench.publish()))
    before = len(bench.seen)
    publishes = round((duration_s + _WARM_UP_S) * 100)
    command = [sys.executable, "-m", "benchmarks.workers", str(bench.path), str(publishes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publisher:
        try:
            bench.daemon.wait_for(lambda: _seen(bench) >= before + publishes, "effects", _PATIENCE_S, every_s=0)
            stamps = [int(line) for line in publisher.stdout or ()]
        finally:
            publisher.kill()
    bench.published.update(stamps)
    bench.everything()
    begin = stamps[0] + int(_WARM_UP_S * 1e9)
    steady = [(bench.seen[stamp] - stamp) / 1e9 for stamp in stamps if stamp >= begin]
    return [
        _latency_row(f"worker → effect, {count} publishes one by one", alone),
        _latency_row("worker → effect, 100 publishes/s", steady),
    ]


def _seen(bench: Bench) -> int:
    bench.look()
    return len(bench.seen)


def _latency_row(what: str, took: Sequence[float]) -> Row:
    ordered = [duration_s * 1e3 for duration_s in sorted(took)]
    p50, p99 = (ordered[int(part * len(ordered))] for part in (0.50, 0.99))
    return Row(what, f"p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {ordered[-1]:.1f} ms")


def _memory_rows(bench: Bench, count: int) -> list[Row]:
    """Memory after many more events, published as fast as it goes."""
    started = time.monotonic()
    for start in range(0, count, BATCH):
        bench.stream.publish(shop.WORK, [order_event(number) for number in range(start, start + BATCH)])
    bench.count_to(count)
    took = time.monotonic() - started
    return [
        Row(f"worker run: memory after {count:,} events", str(memory_of(bench.pid))),
        Row("  publishing and handling them, on the same cores", rate(count, took)),
    ]


def _kill_rows(
    bench: Bench, settings: Settings, chance: random.Random, what: str, limit_s: float, workers: int = 1
) -> list[Row]:
    """SIGKILL the worker that holds the task while stamps arrive, again and again; until another commits.

    Two short lives in a row would make the sensor pause before it launches the next, so every other one is long.
    """
    took = []
    rounds = max(settings.rounds // settings.scale, 1)
    for number in range(rounds):
        bench.members(workers)
        if number % 2:
            time.sleep(max(_LONG_LIFE_S - age_s(bench.pid), 0))
        with bench.publishing(every_s=0.05):
            bench.effect_of(bench.publish())
            time.sleep(chance.uniform(0, 2))
            bench.look()
            victim, killed_at = bench.kill()
            took.append(bench.effect_of_another(victim) - killed_at)
    target = f"max ≤ {limit_s:.0f} s"
    return [Row(f"SIGKILL → next effect: {what}, {rounds} times", _seconds(took), "", "", target, max(took) <= limit_s)]


def stamp_event(stamp: int) -> Event:
    """A stamp as an event."""
    return Event(type="stamp", source="/bench", data=stamp)


def _publish(path: Path, count: int) -> None:
    """100 stamps a second, printed at the end: printing may wait for whoever reads."""
    stamps = []
    with open_stream(path) as stream:
        started = time.monotonic()
        for number in range(count):
            time.sleep(max(started + number / 100 - time.monotonic(), 0))
            stamps.append(time.monotonic_ns())
            stream.publish(shop.WORK, [stamp_event(stamps[-1])])
    print(*stamps, sep="\n")


if __name__ == "__main__":
    _publish(Path(sys.argv[1]), int(sys.argv[2]))
