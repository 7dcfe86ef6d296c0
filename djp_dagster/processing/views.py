"""`Views`: the tables that a handler reads, each opened once and brought up to date once a batch."""

import threading
from pathlib import Path

from djp_dagster.errors import InvalidSettingError
from djp_dagster.processing.consumer import Consumer
from djp_dagster.state.view import StateView
from djp_dagster.streams.stream import EventStream


class Views:
    """The tables that the handlers of one consumer read. Handlers that run concurrently may share it.

    Args:
        stream: where the tables are.
        consumer: whose ``tables`` may be read.
        folder: where their replicas lie.
    """

    def __init__(self, stream: EventStream, consumer: Consumer, folder: Path | None) -> None:
        self._stream, self._consumer, self._folder = stream, consumer, folder
        self._lock = threading.Lock()
        self._open: dict[str, StateView] = {}
        self._fresh: set[str] = set()

    def table(self, table: Consumer) -> StateView:
        """The table as of this batch.

        Raises:
            InvalidSettingError: the consumer does not declare it.
            StateLostError, StreamUnavailableError: the replica cannot be brought up to date.
        """
        if all(known.group != table.group for known in self._consumer.tables):
            raise InvalidSettingError(
                f"consumer {self._consumer.group!r} reads the table {table.group!r}; declare it with "
                f"@consumer(tables=[{table.group}])",
                setting="tables",
                value=table.group,
            )
        with self._lock:
            view = self._open.get(table.group)
            if view is None:
                view = self._open[table.group] = StateView(self._stream, table, folder=self._folder)
            elif table.group not in self._fresh:
                view.refresh()
            self._fresh.add(table.group)
            return view

    def begin_batch(self) -> None:
        """From here on a table is brought up to date before it is read."""
        with self._lock:
            self._fresh.clear()

    def close(self) -> None:
        """Release the replicas; their files stay."""
        with self._lock:
            for view in self._open.values():
                view.close()
            self._open.clear()
            self._fresh.clear()
