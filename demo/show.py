"""`Show`: the summary, a table that refreshes itself on a terminal, a plain line every ten seconds elsewhere."""

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import click

from demo.figures import Account, Figures
from demo.patterns import PATTERNS, STATEFUL_WORKER, STATELESS_WORKER
from djp_dagster import TransientError

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table

_REFRESH_S = 2.0
_LINE_S = 10.0
_RATE_OVER_S = 10.0
_HINT_S = 20.0
_ALL = "All together"


class Moment(NamedTuple):
    """The figures of a moment.

    Attributes:
        at: seconds, by a clock that does not jump.
        published: events, ever.
        accounts: by pattern; None for one that consumes nothing.
        made: what has come of it, by pattern.
    """

    at: float
    published: int
    accounts: dict[str, Account | None]
    made: dict[str, dict[str, int]]

    @property
    def total(self) -> Account:
        """All patterns together."""
        together = Account()
        for account in self.accounts.values():
            together = together.plus(account or Account())
        return together

    @property
    def mails(self) -> int:
        """Those of both mailers."""
        return sum(sum(self.made[pattern].values()) for pattern in (STATELESS_WORKER, STATEFUL_WORKER))


class Show:
    """The summary of the figures. Use it as a context manager, and call `refresh` often.

    Args:
        figures: what is shown.
        url: of the user interface, to say what to click.
        console: the terminal, if it is one; the standard output unless given.
    """

    def __init__(self, figures: Figures, url: str, console: "Console | None" = None) -> None:
        self._figures, self._url, self._console = figures, url, console
        self._moments: deque[Moment] = deque()
        self._live: Live | None = None
        self._began = time.monotonic()
        self._next = 0.0

    def __enter__(self) -> "Show":
        from rich.console import Console
        from rich.live import Live

        console = self._console or Console()
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def refresh(self, *, now: bool = False) -> None:
        """Show where things stand, if it is time to; an outage of the stream is said, and waited for."""
        at = time.monotonic()
        if at < self._next and not now:
            return
        self._next = at + (_LINE_S if self._live is None else _REFRESH_S)
        try:
            moment = Moment(at, self._figures.published(), self._figures.by_pattern(), self._figures.made())
        except TransientError as error:
            click.echo(f"waiting for the stream: {error}")
            return
        self._moments.append(moment)
        while moment.at - self._moments[0].at > _RATE_OVER_S + _REFRESH_S and len(self._moments) > 2:
            self._moments.popleft()
        if self._live is None:
            click.echo(self._line())
        else:
            self._live.update(self._screen(), refresh=True)

    def _rates(self) -> tuple[float, dict[str, float]]:
        """Events per second lately: published, and done for each pattern."""
        first, last = self._moments[0], self._moments[-1]
        seconds = max(last.at - first.at, 1e-9)
        done = {
            name: (account.done - before.done) / seconds
            for name, account in last.accounts.items()
            if account is not None and (before := first.accounts[name]) is not None
        }
        return (last.published - first.published) / seconds, done

    def _screen(self) -> "Group":
        """The table, and what to click, one pattern after the other."""
        from rich.console import Group
        from rich.text import Text

        pattern = PATTERNS[int((time.monotonic() - self._began) / _HINT_S) % len(PATTERNS)]
        first, *_ = pattern.click.format(url=self._url).splitlines()
        hint = f"Click {self._url}{pattern.path} ({pattern.name})\n  {first}\nCtrl-C stops everything."
        return Group(self._table(), Text(hint))

    def _table(self) -> "Table":
        from rich import box
        from rich.table import Table

        moment, (per_second, done) = self._moments[-1], self._rates()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in ("pattern", "events/s", "lag:\nevents", "lag:\nage", "dead\nletters", "so far"):
            side = name in ("pattern", "so far")
            table.add_column(name, justify="left" if side else "right", no_wrap=name == "pattern")
        for pattern in PATTERNS:
            account = moment.accounts[pattern.name]
            made = [f"{name} {count:,}" for name, count in moment.made[pattern.name].items()]
            numbers = [""] * 4 if account is None else _numbers(account, done[pattern.name])
            table.add_row(pattern.name, *numbers, "\n".join(made), end_section=pattern is PATTERNS[-1])
        made = [f"published {moment.published:,}", f"mails {moment.mails:,}"]
        table.add_row(_ALL, *_numbers(moment.total, per_second), "\n".join(made))
        return table

    def _line(self) -> str:
        moment, (per_second, _) = self._moments[-1], self._rates()
        total = moment.total
        slowest = max(moment.accounts, key=lambda name: (moment.accounts[name] or Account()).oldest_s)
        waits = f" (the oldest {total.oldest_s:,.0f} s, {slowest})" if total.pending else ""
        made = "; ".join(
            ", ".join(f"{name} {count:,}" for name, count in moment.made[pattern.name].items())
            for pattern in PATTERNS
            if pattern.consumers
        )
        return (
            f"{time.strftime('%H:%M:%S')} published {moment.published:,} ({per_second:,.0f}/s), "
            f"lag {total.pending:,} events{waits}, dead letters {total.dead_letters:,} | {made}"
        )


def _numbers(account: Account, per_second: float) -> list[str]:
    rate = f"{per_second:,.0f}" if per_second >= 10 or not per_second else f"{per_second:.1f}"
    return [rate, f"{account.pending:,}", f"{account.oldest_s:,.0f} s", f"{account.dead_letters:,}"]
