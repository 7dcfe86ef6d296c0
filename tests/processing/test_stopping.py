"""An event that a signal handler sets in the middle of the wait for it."""

import signal
import subprocess
import sys
import threading
import time

from djp_dagster.processing.stopping import SignalledEvent

# The signal comes at the k-th line that Python runs within wait(), for every k.
AT_EVERY_LINE = """
import signal, sys
from djp_dagster.processing.stopping import SignalledEvent

came_at = 0
while True:
    came_at += 1
    event = SignalledEvent()
    lines = 0

    def trace(frame, kind, _):
        global lines
        lines += kind == "line"
        if kind == "line" and lines == came_at:
            signal.raise_signal(signal.SIGUSR1)
        return trace

    signal.signal(signal.SIGUSR1, lambda *_: event.set())
    sys.settrace(trace)
    event.wait(0.01)
    sys.settrace(None)
    if lines < came_at:
        break
    assert event.wait(10)
print(came_at - 1)
"""


def test_it_may_be_set_in_the_middle_of_a_wait() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EVERY_LINE], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_a_signal_ends_a_wait_without_end() -> None:
    event = SignalledEvent()
    before = signal.signal(signal.SIGUSR1, lambda *_: event.set())
    try:
        threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1]).start()
        assert event.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_it_wakes_all_who_wait() -> None:
    event = SignalledEvent()
    woken: list[bool] = []
    waiting = [threading.Thread(target=lambda: woken.append(event.wait(30))) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert not event.wait(0.0)
    event.set()
    for thread in waiting:
        thread.join(30)
    assert woken == [True] * 3
    assert event.is_set()
    assert event.wait()


def test_it_waits_no_longer_than_told() -> None:
    event = SignalledEvent()
    began = time.monotonic()
    assert not event.wait(0.05)
    assert not event.wait(-1)
    assert 0.05 <= time.monotonic() - began < 10
    assert not event.is_set()
