"""What the tests of the command line share: a stream in a file, and `djp` in this process or in its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from djp_dagster import EventStream, open_stream
from djp_dagster.cli import main

Djp = Callable[..., Result]
SCRIPT = Path(sys.executable).with_name("djp")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No stream, no Dagster and no terminal but those of the test."""
    for name in ("DJP_STREAM_URL", "DAGSTER_HOME", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the stream of the test lies."""
    return tmp_path / "stream.db"


@pytest.fixture
def stream(place: Path) -> Iterator[EventStream]:
    """The stream, as another process has it open."""
    with open_stream(place) as stream:
        yield stream


@pytest.fixture
def djp(place: Path) -> Djp:
    """Run a command; ``code`` is the exit code it must have."""

    def run(*args: object, code: int = 0, given: bytes | str | None = None, stream: object = place) -> Result:
        try:
            runner = CliRunner(mix_stderr=False)  # click 8.1
        except TypeError:
            runner = CliRunner()
        words = [str(arg) for arg in args]
        result = runner.invoke(main, ["--stream", str(stream), *words] if stream else words, input=given)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, f"{words}: {result.exit_code}\n{result.stdout}\n{result.stderr}"
        return result

    return run


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start the installed script; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*args: object, **settings: Any) -> "subprocess.Popen[bytes]":
        piped = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"bufsize": 0} | settings
        words = [str(SCRIPT), *map(str, args)]
        process = subprocess.Popen(words, env=dict(os.environ) | {"DJP_STREAM_URL": str(place)}, **piped)
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def documents(result: Result) -> list[Any]:
    """The JSON documents on standard output, which holds nothing else."""
    return [json.loads(line) for line in result.stdout.split("\n") if line]


def document(result: Result) -> Any:
    """The only JSON document on standard output."""
    (only,) = documents(result)
    return only
