"""What a SIGKILL at each crash point leaves behind, and what the next holder makes of it: observed, not claimed.

``python -m tests.crash.table`` writes ``docs/crash-table.md``; a test compares the file with a fresh observation.
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

from djp_dagster.testing import CRASH_POINTS
from tests.crash import world
from tests.crash.conftest import Arena, wait_for
from tests.crash.oracle import Books, check

DOCUMENT = Path(__file__).parents[2] / "docs" / "crash-table.md"
HEADER = """# What a crash leaves behind

Made by `python -m tests.crash.table`; do not edit. A worker of a stateful consumer that emits, returns an output and
sets deadlines is killed (SIGKILL) the first time it comes to each point of the protocol (`djp_dagster.processing`);
then a second worker takes over, and the books are checked from outside. At the points whose number is 9, a snapshot of
the state is taken after the first batch (`djp_dagster.state.snapshots`). A test keeps this page true.

| killed after | open batch | stored output | committed effects | local state | the next holder | books |
|---|---|---|---|---|---|---|
"""


def observe(folder: Path, point: str, context: multiprocessing.context.ForkServerContext) -> str:
    """One row of the table."""
    arena = Arena(folder, context)
    try:
        with world.open_world(str(folder)) as stream:
            events = [world.ORDERS.event(n=n, user="user-1", kind="good") for n in range(10)]
            stream.publish("orders", events)
        # For the points of snapshots, the same consumer with a policy that makes its first batch be followed by one.
        counts = "counts, each batch kept" if point.startswith("9.") else "counts"
        victim = arena.start(world.work, [counts], point=point)
        wait_for(lambda: victim.exitcode is not None, f"the death at {point}")
        left = _left_behind(arena.books, folder)
        arena.start(world.work, ["counts", "relay", "files"])
        arena.settle()
        check(arena.books, set(range(10)))
        attempt = arena.books.db.execute(
            "SELECT max(attempt) FROM djp_outputs JOIN djp_groups USING (group_id) WHERE name = 'counts'"
        )
        verb = {1: "cuts the batch", 2: "does it again, as attempt 2"}[attempt.fetchone()[0]]
        if left[2] != "none":
            verb = "goes on"
        return f"| `{point}` | {' | '.join(left)} | {verb} | right |\n"
    finally:
        arena.close()


def _left_behind(books: Books, folder: Path) -> tuple[str, str, str, str]:
    intents = books.open_intents()
    files = list((folder / "stream-payloads").rglob("output*"))
    referenced = len(books.outputs("counts")) if files else 0
    effects = "all" if books.topic("counted") and referenced else "none"
    states = list((folder / "state").rglob("*.db"))
    output = "none" if not files else "referenced" if referenced else "unreferenced"
    return (
        f"attempt {intents[0][1]}" if intents else "none",
        output + _snapshot(books, folder),
        effects,
        _state(books, states) if effects == "all" else "not concerned",
    )


def _snapshot(books: Books, folder: Path) -> str:
    """What there is of snapshots: copies in the payload store, and those that the stream knows."""
    copies = {path for path in (folder / "stream-payloads").rglob("sha256/*/*") if path.is_file()}
    known = {one.path for task in books.tasks("counts") for one in books.snapshots("counts", task)}
    assert known <= copies
    if not copies:
        return ""
    return "; a known snapshot" if known == copies else "; a snapshot nothing refers to"


def _state(books: Books, states: list[Path]) -> str:
    import sqlite3

    ends = books.db.execute(
        "SELECT sum(end_offset) FROM djp_partitions JOIN djp_topics USING (topic_id) WHERE name = '__changelog.counts'"
    ).fetchone()[0]
    applied = 0
    for path in states:
        with sqlite3.connect(path) as db:
            applied += db.execute("SELECT changelog_offset FROM lineage").fetchone()[0]
        db.close()
    return "applied" if applied == ends else "behind"


def table() -> str:
    """The whole page."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crash.world"])
    rows = []
    for point in CRASH_POINTS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(observe(Path(folder), point, context))
    return HEADER + "".join(rows)


if __name__ == "__main__":
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(table())
    sys.stdout.write(DOCUMENT.read_text())
