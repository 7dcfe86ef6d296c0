"""Who is told how far a job is: nobody, or somebody at a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Is told how far a job is; this one tells nobody. Derive from it."""

    def begin(self, phase: str, tasks: int, size: int) -> None:
        """A phase, ``map`` or ``reduce``, begins: so many tasks, of so many bytes or rows."""

    def tell(self, records: int, task_done: bool) -> None:
        """So many more records are done; and, perhaps, a task."""


class _Bars(Progress):
    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description:>6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tasks, {task.fields[records]:,} records"),
            TimeElapsedColumn(),
        )
        self._records = 0
        self._bar = self.bars.add_task("plan", total=None, records=0)

    def begin(self, phase: str, tasks: int, size: int) -> None:
        """See `Progress`."""
        self._records = 0
        self.bars.update(self._bar, completed=self.bars.tasks[self._bar].total or 0)
        self._bar = self.bars.add_task(phase, total=tasks, records=0)

    def tell(self, records: int, task_done: bool) -> None:
        """See `Progress`."""
        self._records += records
        self.bars.update(self._bar, advance=int(task_done), records=self._records)


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Bars, as long as the block lasts."""
    shown = _Bars()
    with shown.bars:
        yield shown
