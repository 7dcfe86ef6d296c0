"""``python -m demo``: the shop with user interface, daemon and traffic, until Ctrl-C or for a number of seconds."""

import time
from contextlib import suppress
from typing import Any

import click

from demo.books import Books
from demo.errors import DemoError
from demo.home import Home, claim, default_folder
from demo.runner import Shop, Wish
from demo.show import Show
from demo.traffic import Settings, settings_options
from demo.ui import UiAwayError
from djp_dagster import open_stream

_DRAIN_S = 180.0
_PRESS_AGAIN_S = 30.0

TOUR = """
  1. {url}/asset-groups
     The lineage: topics, the consumers between them, and what is downstream.
  2. {url}/assets/fraud
     A run per micro-batch. Plots show events, seconds and lag of each run; Materialize handles what is pending.
     A check is red: some orders have no amount, and became dead letters.
  3. {url}/assets/recommend
     Resident workers, with a summary every 30 s. Terminate one at {url}/runs and another takes its place.
  4. {url}/automation
     Turn fraud_sensor off, see below what is pending grow, turn it on again.
  5. {url}/locations/shop/jobs/publish_job/playground
     Publish an order by hand; one with an amount of 50000 makes fraud raise an alert.
  6. {url}/assets/price_history
     Materialize it: 1.75 million rows go to the payload store, a pointer says which are current. Do it again: the same
     prices have the same data version, and what is made of them stays fresh. Uploads go there too: djp claims gc
  7. {url}/assets/page_views
     MapReduce: materialize web_logs, then this: access logs counted by page; referrers and visits likewise. Damaged
     lines are kept aside, and shown. {url}/assets/sales adds up the orders in the stream.
  8. {url}/assets/create_product
     A product's text, video and images are worked on apart; this joins them. One video in twenty cannot be played: its
     product waits, then expires. {url}/locations/shop/jobs/trace_job/playground tells where one is (s2, s4, ...).
  9. {url}/assets/mailers
     Materialize it: addresses from an own table (fast, a little old) and from a service (current, and it can fail).
 10. {url}/assets/dashboard_replay
     The clicks by the day: materialize today's partition; a backfill is a replay. {url}/locations/shop/jobs/rebuild_job
     rebuilds the state of recommend beside the live one, compares, and promotes it.
"""


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
    with claim(default_folder()) as home, open_stream(home.stream_file) as stream:
        books = Books(stream)
        with Shop(home, Settings(**traffic), port, wish) as shop:
            if shop.start():
                _announce(shop, home, seconds)
                _watch(shop, books, wish, seconds)
        _tell_end(books, home, as_planned=seconds is not None and not wish.is_set())


def _announce(shop: Shop, home: Home, seconds: float | None) -> None:
    click.echo(f"\nThe shop is open: {shop.ui.url}\n\nWhere to click:{TOUR.format(url=shop.ui.url)}")
    click.echo(f"Logs: {home.logs}; the stream: {home.stream_file}")
    click.echo("Ctrl-C stops everything.\n" if seconds is None else f"It closes in {seconds:.0f} s.\n")


def _watch(shop: Shop, books: Books, wish: Wish, seconds: float | None) -> None:
    """Show where things stand, until somebody wishes to stop; or for ``seconds`` and until everything is handled."""
    closes = None if seconds is None else time.monotonic() + seconds
    with Show(books) as show:
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
    while (pending := books.pending()) and not wish.wait(0.5):
        shop.check()
        show.refresh()
        now = time.monotonic()
        if now >= give_up:
            raise DemoError(f"after {_DRAIN_S:.0f} s without traffic, events are pending still: {pending}")
        if "order_files" in pending and now >= press_at:
            with suppress(UiAwayError):  # a busy machine
                shop.ui.materialize("order_files")  # what is below the threshold waits for its age, or for a person
            press_at = now + _PRESS_AGAIN_S
    show.refresh(now=True)


def _tell_end(books: Books, home: Home, *, as_planned: bool) -> None:
    """Check the books if everything should be done; else say what waits for the next time."""
    if not as_planned:
        waiting = sum(books.pending().values())
        click.echo(f"Stopped. {waiting:,} events wait in {home.folder}; `make demo` goes on with them.")
        return
    problems = books.check()
    if problems:
        raise DemoError("the books do not balance:\n" + "\n".join(f"  {problem}" for problem in problems))
    click.echo(
        f"The books balance: {books.published():,} events published; each consumer has handled, or has as a dead"
    )
    click.echo("letter, every one of its topic, and nothing was committed twice.")


if __name__ == "__main__":
    main()
