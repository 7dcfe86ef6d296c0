"""``python -m demo`` for real: it comes up, is stopped, goes on, its books balance, and no process survives it."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import djp_dagster as djp
from definitions import order_files, product_uploads
from demo.home import REPOSITORY
from demo.traffic import TOPICS
from tests.servers.ports import free_port
from tests.servers.s3_server import REGION
from tests.servers.seaweedfs import SeaweedServer

pytestmark = [
    pytest.mark.daemon,
    pytest.mark.xdist_group("demo"),  # a shop takes all that two cores have
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes by their environment in /proc"),
]
PATIENCE_S = 240.0
CTRL_C = b"\x03"
ROWS, COLUMNS = 24, 80


class Demo:
    """Runs of ``python -m demo`` in one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.runs = 0

    def start(self, *options: str, **variables: str) -> subprocess.Popen[bytes]:
        self.runs += 1
        with self._output_file().open("wb") as output:
            return subprocess.Popen(
                self._command(*options),
                cwd=REPOSITORY,
                env={**self._environment(), **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_in_terminal(self, *options: str) -> "tuple[subprocess.Popen[bytes], int]":
        """Start it as the foreground process of a terminal, and return what a person types into, too."""
        self.runs += 1
        keyboard, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        # A terminal is that of the first process of a session that opens it.
        opened = f'exec "$@" <{os.ttyname(screen)} >{os.ttyname(screen)} 2>&1'
        process = subprocess.Popen(
            ["sh", "-c", opened, "sh", *self._command(*options)],
            cwd=REPOSITORY,
            env={**self._environment(), "TERM": "xterm"},
            start_new_session=True,
            pass_fds=[screen],  # so that somebody has it open from the start to the end
        )
        os.close(screen)
        threading.Thread(target=self._record, args=[keyboard, self._output_file()], daemon=True).start()
        return process, keyboard

    @staticmethod
    def _record(terminal: int, file: Path) -> None:
        with file.open("wb", buffering=0) as output:
            while True:
                try:
                    shown = os.read(terminal, 65_536)
                except OSError:  # nobody has the other end open
                    return
                output.write(shown)

    @staticmethod
    def _command(*options: str) -> list[str]:
        # Its own first choice is free until it is taken, and other tests run meanwhile.
        return [sys.executable, "-m", "demo", "--port", str(free_port()), *options]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "DEMO_HOME": str(self.home)}

    def refused(self) -> str:
        """What another one says that is started meanwhile, and gives up."""
        done = subprocess.run(
            self._command(),
            cwd=REPOSITORY,
            env=self._environment(),
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        return done.stderr

    def _output_file(self) -> Path:
        return self.home.with_name(f"output-{self.runs}.txt")

    def output(self) -> str:
        file = self._output_file()
        return file.read_text(errors="replace") if file.exists() else ""

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

    def wait_for(self, condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None) -> None:
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert process is None or process.poll() is None, f"it ended before {what}:\n{self.output()}"
            assert time.monotonic() < give_up, f"still waiting for {what}:\n{self.output()}"
            time.sleep(0.1)

    def is_open(self) -> bool:
        return "The shop is open" in self.output()

    def published(self) -> int:
        counts = re.findall(r"published ([\d,]+)", self.output())
        return int(counts[-1].replace(",", "")) if counts else 0


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path / "home")
    yield demo
    for pid in demo.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.timeout(600)
def test_it_is_stopped_by_ctrl_c_and_goes_on_where_it_stopped(demo: Demo) -> None:
    process, keyboard = demo.start_in_terminal("--rate=100")
    demo.wait_for(lambda: demo.is_open() and demo.published() > 0, "the shop to open", process)
    demo.wait_for(lambda: "Ctrl-C stops everything." in demo.output(), "the summary", process)
    before = demo.published()
    everything = demo.processes()
    assert len(everything) >= 7, (
        everything
    )  # itself, traffic, users, webserver, daemon, and a code server for these two
    assert f"{demo.home} is in use by the demonstration at http://127.0.0.1:" in demo.refused()

    os.write(keyboard, CTRL_C)
    assert process.wait(PATIENCE_S) == 0, demo.output()
    assert demo.processes() == {}
    demo.wait_for(lambda: "Stopped." in demo.output(), "the last words", None)
    os.close(keyboard)
    assert re.findall("(?i)warning|traceback|exception", demo.output()) == []

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


@pytest.mark.timeout(600)
def test_what_is_left_when_it_is_killed_is_named_with_how_to_stop_it(demo: Demo) -> None:
    process = demo.start("--rate=20")
    demo.wait_for(demo.is_open, "the shop to open", process)
    process.kill()
    process.wait(PATIENCE_S)
    assert demo.processes() != {}

    told = demo.refused()
    assert f"stop process {process.pid} with Ctrl-C or kill; if that is gone, " in told
    (remedy,) = re.findall(r"`(kill -- [-\d ]+)`", told)
    subprocess.run(["bash", "-c", remedy], check=True, timeout=60)
    demo.wait_for(lambda: demo.processes() == {}, "nothing to be left", None)

    process = demo.start("--rate=20")
    demo.wait_for(demo.is_open, "the shop to open again", process)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0, demo.output()
    assert demo.processes() == {}
    assert "Stopped." in demo.output()


@pytest.mark.timeout(600)
def test_the_stream_on_postgresql_and_the_payloads_on_s3(
    demo: Demo, postgres_url: str, s3_server: SeaweedServer, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {
        "DJP_STREAM_URL": postgres_url,
        "DJP_S3_BUCKET": s3_bucket,
        "DJP_S3_ENDPOINT_URL": s3_server.endpoint_url,
        "DJP_S3_REGION": REGION,
        "DJP_S3_ACCESS_KEY_ID": s3_server.access_key,
        "DJP_S3_SECRET_ACCESS_KEY": s3_server.secret_key,
        "DJP_S3_ADDRESSING": "path",
    }
    process = demo.start("--rate=100", FOR="10", **place)
    assert process.wait(PATIENCE_S) == 0, demo.output()
    assert demo.processes() == {}
    assert "The books balance" in demo.output()
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with djp.open_stream(postgres_url) as stream:
        ends = stream.log.spans([topic.name for topic in TOPICS]).values()
        assert sum(span.end for span in ends) == demo.published() >= 1_000
        uploads = [record for part in range(2) for record in stream.records(product_uploads, part)]
        assert uploads
        assert all(upload.claim.uri.startswith(f"s3://{s3_bucket}/") for upload in uploads)
        assert stream.outputs(order_files.group)
        assert stream.payloads.uri.startswith(f"s3://{s3_bucket}/")
    assert [*(demo.home / "djp").glob("stream*")] == []
    assert not (demo.home / "djp" / "payloads").exists()


def test_a_stream_that_is_not_there_is_named(demo: Demo) -> None:
    process = demo.start(DJP_STREAM_URL="postgresql+psycopg://shop:secret@127.0.0.1:1/shop")
    assert process.wait(PATIENCE_S) == 1
    assert demo.output().startswith("Error: stream postgresql+psycopg://")
    assert "secret" not in demo.output()
    assert "Traceback" not in demo.output()
