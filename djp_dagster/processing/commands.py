"""What is asked of whoever holds a group: it is done by the holder between two batches, else by the one who asks."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from djp_dagster.errors import LeaseBusyError, TerminalError
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.run import run_pending
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

if TYPE_CHECKING:
    from djp_dagster.processing.consumer import Consumer
    from djp_dagster.state.table import Table

_LOOK_EVERY_S = 0.2


def carry_out(
    stream: EventStream,
    consumer: "Consumer",
    requests: Sequence[int],
    *,
    resources: Mapping[str, Any] | None = None,
    state_folder: Path | None = None,
    wait: Duration = "1min",
) -> list[BatchReport]:
    """See to it that requests are done: here if the group is free, else by whoever holds it; what was done here.

    Raises:
        LeaseBusyError: a holder did not get to it within ``wait``.
    """
    give_up = time.monotonic() + parse_seconds(wait, name="wait")
    reports: list[BatchReport] = []
    while any(stream.coordinator.request_status(number) == "open" for number in requests):
        try:
            done = run_pending(
                stream, consumer, resources=resources, state_folder=state_folder, wait=0, only_requests=True
            )
            reports.extend(done.batches)
        except LeaseBusyError:
            if time.monotonic() >= give_up:
                raise
            time.sleep(_LOOK_EVERY_S)
    return reports


def request_command(stream: EventStream, group: str, commands: Sequence[Mapping[str, object]]) -> list[int]:
    """Ask whoever holds the tasks that the commands name; the numbers of the requests."""
    return [stream.coordinator.request(group, "command", command) for command in commands]


def rebuild(
    stream: EventStream, table: "Table", *, state_folder: Path | None = None, wait: Duration = "10min"
) -> list[BatchReport]:
    """Make a table anew from the whole of its topic, and change what differs, in one commit for each task.

    Readers see the table as it was until then, and never half of one.

    Args:
        stream: where it is.
        table: which.
        state_folder: where local state lies.
        wait: how long to wait for a worker or run that holds it.

    Returns:
        What was done here, with ``keys`` and ``corrected_keys``; nothing if a worker did it.

    Raises:
        TerminalError: the topic no longer begins at its beginning.
        LeaseBusyError: the holder did not get to it in time.
    """
    info = table.register(stream)
    requests = request_command(stream, table.group, [{"kind": "rebuild", "task": task} for task in range(info.tasks)])
    reports = carry_out(stream, table, requests, state_folder=state_folder, wait=wait)
    if any(report.reason == "rebuild" and "corrected_keys" not in report.counts for report in reports):
        raise TerminalError(
            f"table {table.group!r} is kept as it is: its topic was trimmed meanwhile", group=table.group
        )
    for number in requests:
        status = stream.coordinator.request_status(number)
        if status.startswith("failed: "):
            raise TerminalError(status.removeprefix("failed: "), group=table.group)
    return reports
