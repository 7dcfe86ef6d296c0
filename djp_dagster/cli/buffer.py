"""``djp buffer``: what waits in the event buffer of a join."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.cli.dead_letters import wait_for_requests

if TYPE_CHECKING:
    from djp_dagster.joining.inspection import BufferedKey, EventBuffer
    from djp_dagster.streams.stream import EventStream

_STATUSES = ("pending", "completed", "expired", "failed", "all")


@click.group("buffer")
def command() -> None:
    """Look at the event buffer of a join; expire keys."""


@contextmanager
def _buffer(stream: "EventStream", group: str) -> "Iterator[EventBuffer]":
    from djp_dagster.joining.inspection import EventBuffer

    # A replica of its own: looking leaves nothing behind.
    with (
        tempfile.TemporaryDirectory(prefix="djp-buffer-") as folder,
        EventBuffer(stream, group, folder=Path(folder)) as buffer,
    ):
        yield buffer


@command.command("list")
@click.argument("group")
@click.option("--status", type=click.Choice(_STATUSES), default="pending", show_default=True, help="Only such keys.")
@click.option("-n", "limit", type=click.IntRange(min=1), default=50, show_default=True, help="At most so many.")
@output.json_option
@pass_access
def list_command(access: Access, group: str, status: str, limit: int, as_json: bool) -> None:
    """List the keys in the event buffer of GROUP: what waits, since when parts are missing, when it expires."""
    stream = access.open()
    now = stream.log.now_micros()
    with _buffer(stream, group) as buffer:
        found = [one for one in buffer if status in ("all", one.status)]
    shown = list(islice(sorted(found, key=_by_time), limit))
    if as_json:
        for one in shown:
            output.print_json(_facts(one))
        return
    rows = output.table("key", "status", "parts", "expires in", "done since", "bytes", right=("expires in", "bytes"))
    for one in shown:
        rows.add_row(
            output.plain(one.key),
            one.status,
            output.plain(
                ", ".join(name if many == 1 else f"{name} x{many}" for name, many in one.parts.items()) or "-"
            ),
            "-" if one.due_micros is None else output.duration((one.due_micros - now) / 1e6),
            output.ago(one.since_micros, now),
            output.size(one.bytes),
        )
    if shown:
        output.show(rows)
    if len(found) > len(shown):
        output.note(f"{len(found) - len(shown):,} more; -n {len(found)} shows all")
    if not found:
        output.note(f"no {'' if status == 'all' else status + ' '}keys in the event buffer of {group}")


def _by_time(one: "BufferedKey") -> tuple[int, str]:
    return one.due_micros or one.since_micros or 0, str(one.key)


def _facts(one: "BufferedKey") -> dict[str, Any]:
    return {
        "key": one.key,
        "status": one.status,
        "parts": one.parts,
        "due": output.moment(one.due_micros),
        "since": output.moment(one.since_micros),
        "bytes": one.bytes,
    }


@command.command("show")
@click.argument("group")
@click.argument("key")
@output.json_option
@pass_access
def show_command(access: Access, group: str, key: str, as_json: bool) -> None:
    """Show what the event buffer of GROUP holds of KEY: its status, and the events that wait."""
    stream = access.open()
    with _buffer(stream, group) as buffer:
        for candidate in _keys(key):
            found = buffer.find(candidate)
            if found is not None:
                break
        else:
            raise click.ClickException(f"group {group!r} knows nothing of key {key!r}; see: djp buffer list {group}")
        events = {name: [one.to_dict() for one in records] for name, records in buffer.records(found.key).items()}
    if as_json:
        output.print_json(_facts(found) | {"events": events})
        return
    for name, value in _facts(found).items():
        click.echo(f"{name:<6}  {output.plain('-' if value is None else value)}")
    for name, records in events.items():
        for record in records:
            click.echo(f"{name}: {output.plain(output.json_bytes(record).decode())}")


@command.command("expire")
@click.argument("group")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that wait.")
@click.option(
    "--wait", type=output.seconds, metavar="DURATION", help="Wait so long until it is done; exit code 1 if not."
)
@output.json_option
@pass_access
def expire_command(
    access: Access, group: str, keys: Sequence[str], every: bool, wait: float | None, as_json: bool
) -> None:
    """Expire keys of GROUP now, as if their deadline had passed.

    This only asks: the group's worker does it within a second or so, or the run its sensor starts, or the next run.
    """
    from djp_dagster.joining.inspection import request_expiry

    if bool(keys) == every:
        raise click.UsageError("name keys, or say --all")
    stream = access.open()
    with _buffer(stream, group) as buffer:
        waiting = {one.key for one in buffer if one.status == "pending"}
    wanted = [candidate for key in keys for candidate in _keys(key) if candidate in waiting]
    if keys and not wanted:
        raise click.ClickException(f"none of {list(keys)} waits in {group!r}; see: djp buffer list {group}")
    requests = request_expiry(stream, group, waiting if every else wanted)
    done = None if wait is None else wait_for_requests(stream, requests, wait)
    number = len(waiting) if every else len(wanted)
    if as_json:
        output.print_json({"group": group, "keys": number, "requests": requests, "done": done})
    else:
        click.echo(
            f"asked for {number:,} keys of {group} to expire" + ("" if done is None else "; done" if done else "")
        )
    if done is False:
        output.note(f"not done within {output.duration(wait)}; it stays asked for: is a worker or the sensor on?")
        raise click.exceptions.Exit(1)


def _keys(text: str) -> list[str | int]:
    """What a key on the command line may mean."""
    try:
        return [text, int(text)]
    except ValueError:
        return [text]
