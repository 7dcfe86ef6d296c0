"""Building blocks of the fault tests."""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from djp_dagster.claim_check.location import open_payload_store
from djp_dagster.events import Event
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.worker import Worker
from djp_dagster.streams.stream import EventStream, open_stream

REPOSITORY = Path(__file__).resolve().parents[2]


def numbered(numbers: Sequence[int], **data: object) -> list[Event]:
    """Events whose id is their number."""
    return [Event(id=f"{n}", source="/t", type="t", data={"n": n, "key": f"k{n % 7}", **data}) for n in numbers]


def ids(stream: EventStream, topic: str) -> list[str]:
    """The ids of all records of a topic, partition by partition."""
    return [one.id for p in range(stream.log.topic(topic).partitions) for one in stream.records(topic, p)]


def sources(stream: EventStream, topic: str) -> list[int]:
    """The numbers in the data of all records of a topic, partition by partition."""
    return [one.data["n"] for p in range(stream.log.topic(topic).partitions) for one in stream.records(topic, p)]


def eventually(condition: Callable[[], bool], *, within_s: float = 60.0, every_s: float = 0.02) -> None:
    """Wait until the condition holds; fail if it never does."""
    give_up = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up, f"still not so after {within_s} s"
        time.sleep(every_s)


@contextmanager
def working(open_here: Callable[[], EventStream], *consumers: Consumer, folder: Path) -> Iterator[None]:
    """A worker in a thread, drained at the end; what it raised is raised."""
    stop = threading.Event()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            with open_here() as stream:
                Worker(stream, consumers, state_folder=folder, lease=2.0).run(stop)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="worker")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def opened(target: str | Path, folder: Path) -> EventStream:
    """The stream with a payload store in the folder."""
    return open_stream(target, payloads=open_payload_store(folder / "payloads"))


def python(code: str, *arguments: object, prefix: Sequence[str] = (), timeout_s: float = 60.0) -> str:
    """What the code prints in a process of its own, started with the prefix; fails if it fails."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def mounting() -> Sequence[str]:
    """What to start a command with so that it can mount for itself; empty where that is impossible."""
    for prefix in (["unshare", "-m"], ["unshare", "-rm"]):
        with tempfile.TemporaryDirectory() as folder:
            command = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "djp", folder]
            try:
                if subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0:
                    return prefix
            except OSError:
                continue
    return []
