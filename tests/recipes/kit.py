"""The recipes of the pages: as modules, as programs, and what the tests of them share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from djp_dagster import EventStream, Record, run_pending
from tests.pages import DOCS, Block, files

PAGE = DOCS / "publishing.md"
PATIENT_S = 60.0


def block(title: str) -> Block:
    """The code under that title, as it stands on the page."""
    (found,) = [one for one in files(PAGE) if one.title == title]
    return found


def load(title: str) -> ModuleType:
    """A recipe, imported; the lines in its tracebacks are those of the page."""
    found, module = block(title), ModuleType(title.removesuffix(".py"))
    exec(compile("\n" * (found.line - 1) + found.code, str(PAGE), "exec"), module.__dict__)
    return module


@contextmanager
def running(title: str, folder: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A recipe as a program of its own, which is killed at the end of the block if it still runs."""
    program = folder / title
    program.write_text(block(title).code)
    with (folder / f"{title}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, str(program)], env={**os.environ, **environment}, stderr=log, stdout=log, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENT_S)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for a condition; the time limit only ends a test that would never end."""
    give_up = time.monotonic() + PATIENT_S
    while not holds():
        assert time.monotonic() < give_up, f"waited {PATIENT_S:.0f} s for {what}"
        time.sleep(0.02)


def records(stream: EventStream, topic: str) -> list[Record]:
    """All records of a topic."""
    partitions = stream.log.topic(topic).partitions
    return [record for partition in range(partitions) for record in stream.records(topic, partition)]


def ids(stream: EventStream, topic: str = "orders") -> list[str]:
    """The ids of a topic's records, sorted."""
    return sorted(record.id for record in records(stream, topic))


def passed_on(stream: EventStream, state: Path) -> list[str]:
    """The ids of what the page's consumer has passed on, once everything pending is done."""
    once = load("once.py").once
    once.register(stream)
    run_pending(stream, once, state_folder=state)
    assert stream.pending("once").events == 0
    assert stream.dead_letters("once") == []
    return ids(stream, "unique_orders")
