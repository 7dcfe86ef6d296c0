"""`Show`: the summary, a table that refreshes itself on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import click

from demo.books import Account, Books

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_REFRESH_S = 2.0
_LINE_S = 10.0
_RATE_OVER_S = 10.0


class _Sample(NamedTuple):
    at: float
    published: int
    done: dict[str, int]


class Show:
    """The summary of the books. Use it as a context manager, and call `refresh` often."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._samples: deque[_Sample] = deque()
        self._live: Live | None = None
        self._next = 0.0

    def __enter__(self) -> "Show":
        from rich.console import Console
        from rich.live import Live

        if Console().is_terminal:
            self._live = Live(auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def refresh(self, *, now: bool = False) -> None:
        """Show where things stand, if it is time to."""
        at = time.monotonic()
        if at < self._next and not now:
            return
        published, accounts = self._books.published(), self._books.accounts()
        self._samples.append(
            _Sample(at, published, {group: one.handled + one.dead_letters for group, one in accounts.items()})
        )
        while self._samples[-1].at - self._samples[0].at > _RATE_OVER_S + _REFRESH_S and len(self._samples) > 2:
            self._samples.popleft()
        if self._live is not None:
            self._live.update(self._table(published, accounts), refresh=True)
            self._next = at + _REFRESH_S
        else:
            click.echo(self._line(published, accounts))
            self._next = at + _LINE_S

    def _rates(self) -> tuple[float, dict[str, float]]:
        """Events per second lately: published, and done by each group."""
        first, last = self._samples[0], self._samples[-1]
        seconds = max(last.at - first.at, 1e-9)
        done = {group: (count - first.done[group]) / seconds for group, count in last.done.items()}
        return (last.published - first.published) / seconds, done

    def _table(self, published: int, accounts: dict[str, Account]) -> "Table":
        from rich.table import Table

        per_second, done = self._rates()
        table = Table(title=f"{published:,} events published, {per_second:,.0f} a second", title_justify="left")
        for name in ("consumer", "handled", "a second", "pending", "for", "dead letters", "made of them"):
            table.add_column(name, justify="left" if name == "consumer" else "right")
        for group, one in accounts.items():
            table.add_row(
                group,
                f"{one.handled:,}",
                f"{done[group]:,.0f}",
                f"{one.pending:,}",
                f"{one.oldest_s:,.0f} s",
                f"{one.dead_letters:,}",
                one.made,
            )
        return table

    def _line(self, published: int, accounts: dict[str, Account]) -> str:
        per_second, done = self._rates()
        parts = [f"{time.strftime('%H:%M:%S')} published {published:,} ({per_second:,.0f}/s)"]
        for group, one in accounts.items():
            parts.append(
                f"{group}: {one.handled:,} handled ({done[group]:,.0f}/s), {one.pending:,} pending, "
                f"{one.dead_letters:,} dead letters{', ' if one.made else ''}{one.made}"
            )
        return " | ".join(parts)
