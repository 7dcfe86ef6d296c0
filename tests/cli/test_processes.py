"""The installed ``djp`` in a process of its own: pipes, signals, terminals."""

import json
import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from djp_dagster import EventStream, Topic
from tests.cli.conftest import SCRIPT
from tests.processing.kit import PATIENT_S, wait_until

Start = Callable[..., "subprocess.Popen[bytes]"]
T = Topic("t")


def end_of(stream: EventStream) -> int:
    """How many records the topic ever had; 0 before it is there."""
    if not any(info.name == "t" for info in stream.topics()):
        return 0
    return sum(span.end for span in stream.log.spans(["t"]).values())


def line_of(pipe: "IO[bytes] | None") -> bytes:
    """The next line, which must come in time."""
    assert pipe is not None
    assert select.select([pipe], [], [], PATIENT_S)[0], "nothing came"
    return pipe.readline()


def test_a_hundred_thousand_lines_through_a_pipe(start: Start, stream: EventStream) -> None:
    publishing = start("publish", "t", "--create", "--partitions", 4, "--key", "user", "--json")
    text = b"".join(b'{"user": "u%d", "n": %d}\n' % (n % 97, n) for n in range(100_000))
    out, err = publishing.communicate(text, timeout=60)
    assert (publishing.returncode, err) == (0, b"")
    assert json.loads(out)["events"] == 100_000
    found = sorted(record.data["n"] for partition in range(4) for record in stream.records("t", partition))
    assert found == list(range(100_000))


def test_a_reader_that_goes_away_ends_it_quietly(start: Start, stream: EventStream) -> None:
    stream.create_topic(T)
    stream.publish(T, [T.event(n=n, pad="x" * 100) for n in range(20_000)])
    for form in ((), ("--json",)):
        tail = start("tail", "t", "--from", "earliest", *form)
        head = subprocess.run(["head", "-2"], stdin=tail.stdout, capture_output=True, timeout=60, check=True)
        assert tail.stdout is not None
        tail.stdout.close()
        assert len(head.stdout.splitlines()) == 2
        assert tail.wait(30) == 1
        assert tail.stderr is not None
        assert tail.stderr.read() == b""


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["lines", "json"])
def test_follow_shows_what_comes_until_ctrl_c(start: Start, stream: EventStream, form: tuple[str, ...]) -> None:
    stream.create_topic(T)
    stream.publish(T, [T.event(n=0)])
    tail = start("tail", "t", "-f", *form)
    for n in range(1, 5):
        assert b'"n":%d' % (n - 1) in line_of(tail.stdout)
        stream.publish(T, [T.event(n=n)])
    assert b'"n":4' in line_of(tail.stdout)
    tail.send_signal(signal.SIGINT)
    out, err = tail.communicate(timeout=30)
    assert (tail.returncode, out, err) == (130, b"", b"")


def test_follow_from_a_place_and_up_to_a_number(start: Start, stream: EventStream) -> None:
    stream.create_topic(T)
    stream.publish(T, [T.event(n=n) for n in range(3)])
    tail = start("tail", "t", "-f", "--json", "--from", "1", "-n", 5)
    assert [json.loads(line_of(tail.stdout))["data"]["n"] for _ in range(2)] == [1, 2]
    stream.publish(T, [T.event(n=n) for n in range(3, 10)])
    out, _ = tail.communicate(timeout=30)
    assert [json.loads(line)["data"]["n"] for line in out.splitlines()] == [3, 4, 5]
    assert tail.returncode == 0


def test_follow_tells_what_retention_took(start: Start, stream: EventStream) -> None:
    topic = Topic("t", retention="1us")
    stream.create_topic(topic)
    stream.publish(topic, [topic.event(n=0)])
    tail = start("tail", "t", "-f", "--json", "--from", "earliest")
    line_of(tail.stdout)
    tail.send_signal(signal.SIGSTOP)
    stream.publish(topic, [topic.event(n=1)])
    stream.log.trim(stream.log.now_micros() + 10**9)
    stream.publish(topic, [topic.event(n=2)])
    tail.send_signal(signal.SIGCONT)
    assert json.loads(line_of(tail.stdout))["data"]["n"] == 2
    assert b"retention removed records 1 to 1 unseen" in line_of(tail.stderr)


def test_follow_ends_when_the_topic_does(start: Start, stream: EventStream) -> None:
    stream.create_topic(T)
    stream.publish(T, [T.event(n=0)])
    tail = start("tail", "t", "-f")
    line_of(tail.stdout)
    stream.delete_topic("t")
    _, err = tail.communicate(timeout=30)
    assert tail.returncode == 1
    assert err == b"Error: topic 't' was deleted meanwhile\n"


def test_what_waits_in_a_pipe_is_published_when_no_more_comes(start: Start, stream: EventStream) -> None:
    publishing = start("publish", "t", "--create")
    assert publishing.stdin is not None
    for n in range(3):
        publishing.stdin.write(b'{"n": %d}\n' % n)
        publishing.stdin.flush()
        wait_until(lambda n=n: end_of(stream) == n + 1, "the line to be published")  # type: ignore[misc]
    assert publishing.communicate(b"3\n", timeout=30)[0].startswith(b"published 4 events")


@pytest.mark.parametrize("named", [(), ("--producer", "p")], ids=["", "named"])
def test_ctrl_c_says_exactly_how_far_it_got(start: Start, stream: EventStream, named: tuple[str, ...]) -> None:
    publishing = start("publish", "t", "--create", "--batch", 10, *named)
    assert publishing.stdin is not None
    text = [b'{"n": %d}\n' % n for n in range(30)]
    publishing.stdin.write(b"".join(text[:25]))
    publishing.stdin.flush()
    wait_until(lambda: end_of(stream) == 25, "what was sent to be published")
    publishing.send_signal(signal.SIGINT)
    out, err = publishing.communicate(timeout=30)
    assert (publishing.returncode, out) == (130, b"")
    assert err.startswith(b"published 25 events up to line 25; stopped.")
    rest = named or ("--skip-lines", 25)
    assert start("publish", "t", *rest).communicate(b"".join(text), timeout=30)[0].startswith(b"published 5 events")
    assert [record.data["n"] for record in stream.records("t", 0)] == list(range(30))


def test_kills_and_retries_of_a_named_producer_append_once(
    start: Start, stream: EventStream, tmp_path: Path, seed: Any
) -> None:
    file = tmp_path / "many.jsonl"
    file.write_bytes(b"".join(b'{"n": %d}\n' % n for n in range(10_000)))
    stream.create_topic(T)
    command = ("publish", "t", file, "--producer", "p", "--batch", 100)
    for _ in range(4):
        process = start(*command)
        goal = end_of(stream) + seed.randint(1, 2000)
        wait_until(lambda goal=goal, p=process: end_of(stream) >= goal or p.poll() is not None, "some")  # type: ignore[misc]
        process.kill()
        process.wait(30)
    last = start(*command)
    assert last.wait(60) == 0
    assert [record.data["n"] for record in stream.records("t", 0)] == list(range(10_000))


class Terminal:
    """A pseudo-terminal of 100 columns, and what came out of it."""

    def __init__(self, place: Path, *args: object, stdin: Any = subprocess.DEVNULL) -> None:
        self._ours, theirs = pty.openpty()
        env = dict(os.environ) | {"DJP_STREAM_URL": str(place), "COLUMNS": "100", "TERM": "xterm"}
        words = [str(SCRIPT), *map(str, args)]
        self.process = subprocess.Popen(words, stdin=stdin, stdout=theirs, stderr=theirs, env=env)
        os.close(theirs)
        self.seen = b""

    def wait_for(self, text: bytes) -> None:
        """Read until it has come."""
        give_up = time.monotonic() + PATIENT_S
        while text not in self.seen:
            assert time.monotonic() < give_up, self.seen
            if not self._read():
                raise AssertionError(f"ended without {text!r}: {self.seen!r}")

    def _read(self) -> bool:
        if not select.select([self._ours], [], [], 0.1)[0]:
            return True
        try:
            piece = os.read(self._ours, 65536)
        except OSError:
            return False  # Linux says so when the other side has closed
        self.seen += piece
        return bool(piece)

    def close(self) -> int:
        """Read to the end; the exit code."""
        while self._read() and self.process.poll() is None:
            pass
        code = self.process.wait(30)
        while select.select([self._ours], [], [], 0)[0] and self._read():
            pass
        os.close(self._ours)
        return code


def test_watch_redraws_until_ctrl_c(stream: EventStream, place: Path) -> None:
    from djp_dagster import consumer

    consumer(topic=T, group="mails")(lambda batch: None).register(stream)
    terminal = Terminal(place, "lag", "--watch", "--every", "50ms")
    try:
        terminal.wait_for(b"mails")
        stream.publish(T, [T.event(n=n) for n in range(1234)])
        terminal.wait_for(b"1,234")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.close() == 130
        assert b"Traceback" not in terminal.seen
        assert b"Aborted" not in terminal.seen
    finally:
        terminal.process.kill()


def test_watch_as_json_goes_on_too(start: Start, stream: EventStream) -> None:
    from djp_dagster import consumer

    consumer(topic=T, group="mails")(lambda batch: None).register(stream)
    watching = start("lag", "--watch", "--json", "--every", "10ms")
    for _ in range(3):
        assert json.loads(line_of(watching.stdout))["group"] == "mails"
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130


def test_progress_is_shown_on_a_terminal_only(stream: EventStream, place: Path, tmp_path: Path) -> None:
    stream.create_topic(T)
    file = tmp_path / "t.jsonl"
    file.write_bytes(b"".join(b'{"n": %d}\n' % n for n in range(20_000)))
    terminal = Terminal(place, "publish", "t", file, "--batch", 500)
    assert terminal.close() == 0
    assert b"published 20,000 events to t in" in terminal.seen
    assert b" events" in terminal.seen
    assert b"kB" in terminal.seen, "of a file the size is known"


def test_a_line_on_a_terminal_fits_it(stream: EventStream, place: Path) -> None:
    stream.create_topic(T)
    stream.publish(T, [T.event(text="x" * 500)])
    terminal = Terminal(place, "tail", "t")
    assert terminal.close() == 0
    assert max(map(len, terminal.seen.decode().splitlines())) == 100
