"""One variant of a claim check comparison, in a process of its own: its memory and processor time are its own.

``python -m benchmarks.claim_check_process MODULE:FUNCTION ARGUMENTS`` calls the function with a `Meter` and what the
JSON object says. The function makes everything ready, does once with little what it will do with much, and then does it
within the meter's block. What it returns, and what was measured, is printed as JSON. The server is found by the AWS
variables of the environment, by boto3's clients and by our stores alike.
"""

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.harness import MIB, alternate, memory
from djp_dagster import PayloadStore, open_payload_store
from tests.servers.seaweedfs import SeaweedServer

_REPOSITORY = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 3600.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Measured(msgspec.Struct, kw_only=True):
    """One run of one variant.

    Attributes:
        processor_s: of the process itself, while it was measured.
        server_s: processor time of the server during the whole process.
        risen_bytes: the peak of the resident memory over what it was before.
        told: what the variant returned.
    """

    seconds: float
    processor_s: float
    risen_bytes: int
    server_s: float = 0.0
    told: dict[str, Any] = {}


class Meter:
    """Measures the one block that it is entered for."""

    def __init__(self) -> None:
        self.measured: Measured | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        idle = memory("VmRSS")
        started, used = time.perf_counter(), time.process_time()
        yield
        took, used = time.perf_counter() - started, time.process_time() - used
        self.measured = Measured(seconds=took, processor_s=used, risen_bytes=memory("VmHWM") - idle)


@dataclass
class Variants:
    """The variants of a comparison, which use one server, and what was measured of each."""

    server: SeaweedServer
    rounds: int
    found: dict[str, list[Measured]] = field(default_factory=dict)

    def once(self, name: str, function: Callable[..., dict[str, Any]], **given: Any) -> Measured:
        """One run of one variant."""
        measured = process(self.server, function, given)
        self.found.setdefault(name, []).append(measured)
        return measured

    def run(self, functions: dict[str, Callable[..., dict[str, Any]]], **given: Any) -> None:
        """All of them in turns, every other round in reverse; each with a bucket of its own, unless one is given."""

        def timed(name: str) -> float:
            with fresh_bucket(self.server) as bucket:
                return self.once(name, functions[name], **{"bucket": bucket, **given}).seconds

        alternate(self.rounds, {name: partial(timed, name) for name in functions})

    def median(self, name: str, figure: Callable[[Measured], float]) -> float:
        """Of a figure of the variant."""
        return statistics.median(map(figure, self.found[name]))

    def ratio(self, ours: str, peer: str, figure: Callable[[Measured], float] = lambda one: one.seconds) -> float:
        """How many times as much the peer takes: the median of the rounds' ratios."""
        pairs = zip(self.found[ours], self.found[peer], strict=True)
        return statistics.median(figure(theirs) / figure(mine) for mine, theirs in pairs)

    def speed(self, name: str, amount: float, unit: str) -> str:
        """How much a second, for people."""
        return f"{amount / self.median(name, lambda one: one.seconds):,.0f} {unit}"

    def cost(self, name: str) -> str:
        """Peak memory, and processor time of the process and of the server, for people."""
        risen = self.median(name, lambda one: one.risen_bytes) / MIB
        used, server = (self.median(name, get) for get in (lambda one: one.processor_s, lambda one: one.server_s))
        return f"{risen:,.0f} MiB; {used:.1f} s + {server:.1f} s"


@contextmanager
def fresh_bucket(server: SeaweedServer) -> Iterator[str]:
    """An empty bucket, which is dropped at the end."""
    bucket = server.new_bucket()
    try:
        yield bucket
    finally:
        server.drop_bucket(bucket)


def process(server: SeaweedServer, function: Callable[..., dict[str, Any]], given: dict[str, Any]) -> Measured:
    """Call the function in a new process; what was measured there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DJP_"))}
    before = _processor_s(server.pid)
    done = subprocess.run(
        [sys.executable, "-m", __name__, f"{function.__module__}:{function.__name__}", json.dumps(given)],
        cwd=_REPOSITORY,
        env={**kept, **server.environment, "AWS_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"},
        check=True,
        stdout=subprocess.PIPE,
        timeout=_TIMEOUT_S,
    )
    measured = msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)
    measured.server_s = _processor_s(server.pid) - before
    return measured


def _processor_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / _TICKS_PER_S


def store_in(bucket: str) -> PayloadStore:
    """Our store, as it is by default."""
    return open_payload_store(f"s3://{bucket}/claims")


def s3_client() -> Any:
    """A client of boto3, as it is by default."""
    import boto3

    return boto3.client("s3")


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    module, _, name = arguments[0].partition(":")
    meter = Meter()
    told = getattr(importlib.import_module(module), name)(meter, **json.loads(arguments[1]))
    assert meter.measured is not None
    meter.measured.told = told
    print(msgspec.json.encode(meter.measured).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
