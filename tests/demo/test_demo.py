"""``python -m demo`` for real: it comes up, is stopped, goes on, its books balance, and no process survives it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from demo.home import REPOSITORY

pytestmark = [
    pytest.mark.daemon,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by their environment in /proc"),
]
PATIENCE_S = 240.0


class Demo:
    """Runs of ``python -m demo`` in one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.runs = 0

    def start(self, *options: str, **variables: str) -> subprocess.Popen[bytes]:
        self.runs += 1
        with self._output_file().open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "demo", *options],
                cwd=REPOSITORY,
                env={**os.environ, "DEMO_HOME": str(self.home), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _output_file(self) -> Path:
        return self.home.with_name(f"output-{self.runs}.txt")

    def output(self) -> str:
        return self._output_file().read_text()

    def processes(self) -> dict[int, str]:
        """Everything alive that was started for this home, whoever its parent is now."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
                if f"_HOME={self.home}\0".encode() in environment:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def wait_for(self, condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.poll() is None, f"it ended before {what}:\n{self.output()}"
            assert time.monotonic() < give_up, f"still waiting for {what}:\n{self.output()}"
            time.sleep(0.1)

    def is_open(self) -> bool:
        return "The shop is open" in self.output()

    def published(self) -> int:
        counts = re.findall(r"published ([\d,]+) \(", self.output())
        return int(counts[-1].replace(",", "")) if counts else 0


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path / "home")
    yield demo
    for pid in demo.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_it_is_stopped_by_ctrl_c_and_goes_on_where_it_stopped(demo: Demo) -> None:
    process = demo.start("--rate=100")
    demo.wait_for(lambda: demo.is_open() and demo.published() > 0, "the shop to open", process)
    before = demo.published()
    everything = demo.processes()
    assert len(everything) >= 6, everything  # itself, traffic, webserver, daemon, and a code server for both of these

    refused = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=REPOSITORY,
        env={**os.environ, "DEMO_HOME": str(demo.home)},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 1
    assert f"{demo.home} is in use by the demonstration at http://127.0.0.1:" in refused.stderr

    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0, demo.output()
    assert demo.processes() == {}
    assert "Stopped." in demo.output()

    process = demo.start("--rate=100", FOR="15")
    assert process.wait(PATIENCE_S) == 0, demo.output()
    assert demo.processes() == {}
    assert "The books balance" in demo.output()
    assert demo.published() >= before + 1_000
    assert "SIGKILL" not in demo.output()


@pytest.mark.timeout(300)
def test_a_child_that_dies_is_named_and_takes_the_others_with_it(demo: Demo) -> None:
    process = demo.start("--rate=20")
    demo.wait_for(demo.is_open, "the shop to open", process)
    (daemon,) = (pid for pid, command in demo.processes().items() if "dagster-daemon" in command)
    os.kill(daemon, signal.SIGKILL)
    assert process.wait(PATIENCE_S) == 1, demo.output()
    assert "daemon has ended by itself, exit code -9" in demo.output()
    assert str(demo.home / "process-logs" / "daemon.log") in demo.output()
    assert demo.processes() == {}
