"""Processes of the tests of views: one moves money between accounts, others look at them in a replica they share."""

import sys
import threading
from pathlib import Path

from djp_dagster import Batch, SnapshotPolicy, Threshold, Topic, Worker, consumer, open_stream
from djp_dagster.streams.stream import EventStream

ACCOUNTS, CREDIT, TASKS = 40, 100, 2
TRANSFERS = Topic("transfers", partitions=TASKS, key="bank")
BANKS = {0: "b0", 1: "b4"}
"""A bank of each task."""


@consumer(
    topic=TRANSFERS,
    stateful=True,
    group="accounts",
    max_batch=Threshold(events=5),
    snapshots=SnapshotPolicy(changes=100, bytes="8KiB"),
)
def accounts(batch: Batch) -> None:
    """All accounts of a bank hold the same sum after every transfer."""
    for record in batch:
        bank, amount = record.data["bank"], record.data["amount"]
        for number, sign in ((record.data["from"], -1), (record.data["to"], 1)):
            key = (bank, number)
            batch.state.set(key, batch.state.get(key, CREDIT) + sign * amount)
        count = (bank, "transfers")
        batch.state.set(count, batch.state.get(count, 0) + 1)
        batch.state.set((bank, "memo"), "x" * 2000)  # so that a snapshot is due every few batches


def opened(folder: str) -> EventStream:
    return open_stream(Path(folder) / "stream.db")


def write(folder: str) -> None:
    """Work until all transfers are done."""
    stop = threading.Event()
    with opened(folder) as stream:

        def end_when_done(_: object) -> None:
            if stream.pending("accounts").events == 0:
                stop.set()

        Worker(stream, [accounts], state_folder=Path(folder) / "worker", on_report=end_when_done).run(stop)


def read(folder: str, replicas: str, until: str) -> None:
    """Look, again and again, until so many transfers are seen; tell how many different moments it was."""
    moments: set[tuple[int, ...]] = set()
    done = 0
    with opened(folder) as stream, stream.view(accounts, folder=Path(replicas)) as view:
        print("ready", flush=True)
        while done < int(until):
            view.refresh()
            with view.pinned():
                first, again = dict(view.items()), dict(view.items())
                assert first == again == view.get_many(list(first)), "not of one moment"
            seen = []
            for bank in BANKS.values():
                gained = sum(first.get((bank, number), CREDIT) - CREDIT for number in range(ACCOUNTS))
                assert gained == 0, f"the accounts of {bank} hold {gained} too much"
                seen.append(first.get((bank, "transfers"), 0))
            assert all(offset <= seen[at.partition] for at, offset in view.as_of.items()), "as_of is ahead of the state"
            moments.add(tuple(seen))
            done = sum(seen)
    print(len(moments))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
