"""What every comparison shares: alternating rounds, medians, rows of the table, and the events."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from djp_dagster import Event

BATCH = 1_000
"""Events per publish, per stored batch and per commit, everywhere."""
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How much is done, and where."""

    folder: Path
    scale: int
    """What all event counts are divided by."""
    rounds: int

    def events(self, full: int) -> int:
        """The number of events of a comparison, whole batches."""
        return max(full // self.scale // BATCH, 1) * BATCH


@dataclass(frozen=True)
class Row:
    """One line of the table; ``met`` is None where there is no target."""

    what: str
    ours: str
    peer: str = ""
    ratio: str = ""
    target: str = ""
    met: bool | None = None


def seconds(work: Callable[[], object]) -> float:
    """How long the work takes; what was made before, such as the events, does not burden its garbage collection."""
    gc.collect()
    gc.freeze()
    started = time.perf_counter()
    work()
    took = time.perf_counter() - started
    gc.unfreeze()
    return took


def alternate(rounds: int, loops: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Each loop's seconds, round by round; the loops take turns, every other round in reverse."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in loops if number % 2 == 0 else reversed(loops):
            found[name].append(loops[name]())
    return found


def against(what: str, events: int, ours: Sequence[float], peer: Sequence[float], target: float | None = None) -> Row:
    """The row of two loops over the same number of events; ``target`` is the least wanted ratio of their rates.

    The ratio is the median of the rounds' ratios, so that a machine that slows down half-way does not decide it.
    """
    ratio = statistics.median(theirs / mine for mine, theirs in zip(ours, peer, strict=True))
    rates = [rate(events, statistics.median(figures)) for figures in (ours, peer)]
    if target is None:
        return Row(what, *rates, f"{ratio:.2f}x")
    wanted = f"≥ {target:g}x" if target >= 1 else f"≥ {target:g}x (within {1 / target:g}x)"
    return Row(what, *rates, f"{ratio:.2f}x", wanted, ratio >= target)


def rate(events: int, duration_s: float) -> str:
    """Events per second, for people."""
    return f"{events / duration_s / 1000:,.0f} k/s"


def order(number: int) -> dict[str, object]:
    """The data of one event: an order, flat, about 200 bytes in MessagePack."""
    return {
        "order_id": f"ord-{number:012d}",
        "user_id": f"user-{number * 7919 % 10_007:06d}",
        "amount": number % 997,
        "currency": "EUR",
        "status": "placed",
        "sku": f"sku-{number % 1_009:05d}",
        "count": 1 + number % 3,
        "city": "Frankfurt am Main",
        "referrer": "https://shop.example.com/de/start?campaign=autumn",
    }


def order_event(number: int) -> Event:
    """One order as an event."""
    return Event(type="order.placed", source="/shop/orders", data=order(number))


def memory(name: str) -> int:
    """What the system says of this process, in bytes: ``VmRSS``, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
