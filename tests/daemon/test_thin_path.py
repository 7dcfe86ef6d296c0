"""Publish → sensor → a run of the real daemon → intent → handler → commit → apply, killed between the steps.

The run process kills itself at each crash point in turn; Dagster's run monitoring notices, the sensor asks for another
run, and that run takes the open batch over. The books are checked from outside.
"""

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from djp_dagster.testing import CRASH_POINTS
from tests.crash.conftest import wait_for
from tests.crash.oracle import DATA, Books

pytestmark = pytest.mark.daemon

DEFINITIONS = Path(__file__).with_name("shop.py")
DAGSTER_YAML = """
telemetry: {enabled: false}
run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}
run_monitoring: {enabled: true, poll_interval_seconds: 1, start_timeout_seconds: 60}
"""


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "dagster.yaml").write_text(DAGSTER_YAML)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("DJP_TEST_FOLDER", str(tmp_path))
    command = [str(Path(sys.executable).with_name("dagster-daemon")), "run", "-f", str(DEFINITIONS)]
    with (tmp_path / "daemon.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
        yield process
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


SOME_POINTS = ("2.intent", "4.handling", "5.stored", "6.committed", "7.applied")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "points", [pytest.param(SOME_POINTS, id="some"), pytest.param(CRASH_POINTS, id="all", marks=pytest.mark.soak)]
)
def test_real_runs_are_killed_between_the_steps(
    daemon: subprocess.Popen[bytes], tmp_path: Path, seed: random.Random, points: tuple[str, ...]
) -> None:
    import djp_dagster as djp

    orders = djp.Topic("orders", partitions=2, key="user")
    published = 0
    with djp.open_stream(tmp_path / "stream.db") as stream:
        stream.create_topic(orders)
        books = Books(tmp_path)
        for point in points:
            (tmp_path / "kill").write_text(point)
            events = [
                orders.event(user=f"user-{seed.randrange(7)}", n=published + index)
                for index in range(seed.randint(1, 150))
            ]
            stream.publish(orders, events)
            published += len(events)

            def recovered() -> bool:
                assert daemon.poll() is None, (tmp_path / "daemon.log").read_text()[-2000:]
                return (tmp_path / "killed").exists() and books.everything_done()

            wait_for(recovered, f"the kill at {point}, and recovery", patience_s=180.0)
            (tmp_path / "killed").unlink()
    _check(books, published)
    books.close()


def _check(books: Books, published: int) -> None:
    per_user: dict[str, list[int]] = defaultdict(list)
    for _, _, event in books.topic("orders"):
        per_user[event[DATA]["user"]].append(event[DATA]["n"])
    emitted: dict[str, list[int]] = defaultdict(list)
    for _, _, event in books.topic("counts"):
        emitted[event[DATA]["user"]].append(event[DATA]["n"])
        assert event[DATA]["count"] == len(emitted[event[DATA]["user"]])
    assert emitted == per_user
    assert sum(map(len, per_user.values())) == published
    seen = Counter(tuple(position) for output in books.outputs("counts") for position in output["seen"])
    assert len(seen) == published
    assert set(seen.values()) == {1}
    assert books.changelog("counts") == {user: len(numbers) for user, numbers in per_user.items()}
    assert books.deadlines("counts") == dict.fromkeys(per_user, 1)
    assert books.dead_letters("counts") == []
