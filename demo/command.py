"""`main`: the shop with user interface, daemon and traffic, until Ctrl-C or for a number of seconds."""

import time
from contextlib import suppress
from typing import Any

import click

from demo.books import Books
from demo.errors import DemoError
from demo.figures import Figures
from demo.home import Home, claim, default_folder
from demo.patterns import tour
from demo.runner import Shop, Wish
from demo.show import Show
from demo.traffic import Settings, settings_options
from demo.ui import UiAwayError
from djp_dagster import DjpError, EventStream, TransientError

_DRAIN_S = 180.0
_PRESS_AGAIN_S = 30.0


@click.command(help="Run the shop: user interface, daemon and traffic.")
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    envvar="FOR",
    help="Run for that many seconds, handle what is pending, check the books, and exit 0 if they balance.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Of the user interface; the first free one from 3000 on.")
@settings_options
def main(seconds: float | None, port: int | None, **traffic: Any) -> None:
    """Run the demonstration."""
    wish = Wish()
    wish.listen()
    try:
        with claim(default_folder()) as home, home.open_stream() as stream:
            _run(home, stream, Settings(**traffic), port, seconds, wish)
    except DjpError as error:
        raise DemoError(str(error)) from error


def _run(
    home: Home, stream: EventStream, traffic: Settings, port: int | None, seconds: float | None, wish: Wish
) -> None:
    books = Books(stream, home.outbox)
    with Shop(home, traffic, port, wish) as shop:
        if shop.start():
            _announce(shop, home, stream, seconds)
            _watch(shop, books, Show(Figures(stream, home.outbox), shop.ui.url), wish, seconds)
    if wish.is_set():
        _tell_stopped(books, stream, checked=seconds is not None)
    else:
        _tell_balance(books)


def _announce(shop: Shop, home: Home, stream: EventStream, seconds: float | None) -> None:
    click.echo(f"\nThe shop is open: {shop.ui.url}\n\nWhere to click:\n{tour(shop.ui.url)}\n")
    click.echo(f"Logs: {home.logs}\nStream: {stream.label}\nPayloads: {stream.payloads.uri}\nMails: {home.outbox}")
    click.echo("Ctrl-C stops everything.\n" if seconds is None else f"It closes in {seconds:.0f} s.\n")


def _watch(shop: Shop, books: Books, show: Show, wish: Wish, seconds: float | None) -> None:
    """Show where things stand, until somebody wishes to stop; or for ``seconds`` and until everything is handled."""
    closes = None if seconds is None else time.monotonic() + seconds
    with show:
        while not wish.wait(0.5):
            shop.check()
            show.refresh()
            if closes is not None and time.monotonic() >= closes:
                shop.stop_traffic()
                _drain(shop, books, show, wish)
                return


def _drain(shop: Shop, books: Books, show: Show, wish: Wish) -> None:
    give_up = time.monotonic() + _DRAIN_S
    press_at = 0.0
    pending: dict[str, int] | None = None
    while pending != {} and not wish.wait(0.5):
        shop.check()
        show.refresh()
        with suppress(TransientError):  # then what was pending before is
            pending = books.pending()
        now = time.monotonic()
        if pending != {} and now >= give_up:
            raise DemoError(f"after {_DRAIN_S:.0f} s without traffic, events are pending still: {pending}")
        if pending and "order_files" in pending and now >= press_at:
            with suppress(UiAwayError):  # a busy machine
                shop.ui.materialize("order_files")  # what is below the threshold waits for its age, or for a person
            press_at = now + _PRESS_AGAIN_S
    show.refresh(now=True)


def _tell_stopped(books: Books, stream: EventStream, *, checked: bool) -> None:
    """Say what waits for the next time; whoever wanted the books checked has not got that."""
    waiting = sum(books.pending().values())
    text = f"{waiting:,} events wait in {stream.label}; `make demo` goes on with them."
    if checked:
        raise DemoError(f"stopped before the books could be checked. {text}")
    click.echo(f"Stopped. {text}")


def _tell_balance(books: Books) -> None:
    problems = books.check()
    if problems:
        raise DemoError("the books do not balance:\n" + "\n".join(f"  {problem}" for problem in problems))
    click.echo(
        f"The books balance: {books.published():,} events published; each consumer has handled, or has as a dead"
    )
    click.echo("letter, every one of its topic; no committed effect is there twice, and no mail.")
