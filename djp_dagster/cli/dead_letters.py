"""``djp dead-letters``."""

import base64
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.errors import UnknownDeadLetterError
from djp_dagster.streams.records import Origin, Undecodable, decode_one

if TYPE_CHECKING:
    from djp_dagster.streams.model import DeadLetter
    from djp_dagster.streams.stream import EventStream

_PAGE = 100
"""Dead letters carry their records, so few of them are read at a time."""
_SHOWN = 50
_LOOK_EVERY_S = 1.0


@click.group("dead-letters")
def command() -> None:
    """List, show, redrive and discard dead letters."""


@command.command("list")
@click.argument("group", required=False)
@click.option(
    "--status",
    type=click.Choice(["pending", "redriven", "discarded", "all"]),
    default="pending",
    show_default=True,
    help="Which.",
)
@click.option("-n", "--limit", type=click.IntRange(1), help=f"At most so many; {_SHOWN} unless told, all with --json.")
@output.json_option
@pass_access
def list_command(access: Access, group: str | None, status: str, limit: int | None, as_json: bool) -> None:
    """List dead letters, of GROUP or of all groups."""
    stream = access.open()
    most = limit if limit is not None or as_json else _SHOWN
    found = _letters(stream, group, None if status == "all" else status)
    if as_json:
        for number, letter in enumerate(found):
            if most is not None and number >= most:
                break
            output.print_json(_facts(letter))
        return
    assert most is not None
    now = stream.log.now_micros()
    rows = output.table("id", "group", "position", "status", "age", "tries", "error", right=("id", "age", "tries"))
    shown = 0
    for letter in found:
        if shown == most:
            output.note(f"there are more than {most}; see them with --limit or --json")
            break
        shown += 1
        rows.add_row(
            str(letter.id),
            letter.group,
            f"{letter.topic}:{letter.partition}={letter.offset}",
            letter.status,
            output.ago(letter.created_micros, now),
            str(1 + letter.redrives),
            _error_of(letter),
        )
    if shown:
        output.show(rows)
    else:
        output.note(f"no {'' if status == 'all' else status + ' '}dead letters")


def _error_of(letter: "DeadLetter") -> str:
    text = output.plain(f"{letter.error_type}: {' '.join(letter.error.split())}")
    return text if len(text) <= 200 else text[:199] + "…"


def _letters(stream: "EventStream", group: str | None, status: str | None) -> "Iterator[DeadLetter]":
    after = 0
    while page := stream.dead_letters(group, status=status, after=after, limit=_PAGE):
        yield from page
        after = page[-1].id


def _facts(letter: "DeadLetter") -> dict[str, Any]:
    return {
        "id": letter.id,
        "group": letter.group,
        "status": letter.status,
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "append_time": output.moment(letter.append_micros),
        "created": output.moment(letter.created_micros),
        "batch_id": letter.batch_id,
        "redrives": letter.redrives,
        "error_type": letter.error_type,
        "error": letter.error,
    }


@command.command("show")
@click.argument("group")
@click.argument("number", metavar="ID", type=int)
@output.json_option
@pass_access
def show_command(access: Access, group: str, number: int, as_json: bool) -> None:
    """Show one dead letter: its error, where it comes from, and the record."""
    stream = access.open()
    letters = stream.coordinator.dead_letters_by_id(group, [number])
    if not letters:
        raise _unknown(group, [number], "has no dead letter")
    letter = letters[0]
    facts, record = _facts(letter), _record_of(letter)
    if as_json:
        output.print_json(facts | record)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = str(value).splitlines() or [""]
        click.echo(f"{name:<{width}}  {output.plain(lines[0])}")
        for line in lines[1:]:
            click.echo(f"{'':<{width}}  {output.plain(line)}")
    click.echo(f"{'record':<{width}}  {output.plain(output.json_bytes(record['record'] or record).decode())}")


def _record_of(letter: "DeadLetter") -> dict[str, Any]:
    found = decode_one(letter.raw, letter.offset, Origin(letter.topic, letter.partition, letter.append_micros))
    if isinstance(found, Undecodable):
        return {"record": None, "raw_base64": base64.b64encode(letter.raw).decode()}
    return {"record": found.to_dict()}


def _unknown(group: str, ids: Sequence[int], what: str) -> UnknownDeadLetterError:
    return UnknownDeadLetterError(
        f"group {group!r} {what} {', '.join(map(str, ids))}; see: djp dead-letters list {group}", group=group, ids=ids
    )


def _require_choice(ids: Sequence[int], every: bool) -> None:
    if bool(ids) == every:
        raise click.UsageError("name dead letters by their IDs, or say --all")


@command.command("redrive")
@click.argument("group")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=int)
@click.option("--all", "every", is_flag=True, help="All pending ones.")
@click.option(
    "--wait", type=output.seconds, metavar="DURATION", help="Wait so long until it is done; exit code 1 if it is not."
)
@output.json_option
@pass_access
def redrive_command(
    access: Access, group: str, ids: Sequence[int], every: bool, wait: float | None, as_json: bool
) -> None:
    """Ask for dead letters of GROUP to go through its handler again.

    This only asks: the group's worker does it within a second or so, or the run its sensor starts, or the next run.
    What fails again stays pending, with its new error.
    """
    _require_choice(ids, every)
    from djp_dagster.processing.redrive import request_redrive

    stream = access.open()
    stream.coordinator.group(group)
    asked = sorted(set(ids)) if ids else [letter.id for letter in _letters(stream, group, "pending")]
    requests = request_redrive(stream, group, asked) if asked else []
    document: dict[str, Any] = {"group": group, "dead_letters": asked, "requests": requests}
    if wait is not None:
        document["done"] = wait_for_requests(stream, requests, wait)
        left = {one.id for page in _pages(asked) for one in _pending_of(stream, group, page)}
        document["redriven"] = [number for number in asked if number not in left]
        document["pending"] = sorted(left)
    if as_json:
        output.print_json(document)
    else:
        _tell(document, wait)
    if wait is not None and (not document["done"] or document["pending"]):
        raise click.exceptions.Exit(1)


def _tell(document: dict[str, Any], wait: float | None) -> None:
    number, group = len(document["dead_letters"]), document["group"]
    if not number:
        click.echo(f"group {group} has no pending dead letters")
        return
    if wait is None:
        click.echo(
            f"asked for the redrive of {number:,} dead letters of {group} (requests "
            f"{', '.join(map(str, document['requests']))}); its worker or its next run does it"
        )
        return
    click.echo(f"{len(document['redriven']):,} of {number:,} dead letters of {group} are no longer pending")
    if not document["done"]:
        output.note(f"not done within {output.duration(wait)}; it stays asked for: is a worker or the sensor on?")
    elif document["pending"]:
        output.note(f"{len(document['pending']):,} failed again and stay pending; see: djp dead-letters list {group}")


def wait_for_requests(stream: "EventStream", requests: Sequence[int], wait_s: float) -> bool:
    """Whether all requests were closed in time."""
    give_up = time.monotonic() + wait_s
    watcher = stream.log.watch()
    try:
        while any(stream.coordinator.request_status(number) == "open" for number in requests):
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                return False
            watcher.wait(min(left_s, _LOOK_EVERY_S))
    finally:
        watcher.close()
    return True


def _pages(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _PAGE):
        yield ids[start : start + _PAGE]


def _pending_of(stream: "EventStream", group: str, ids: Sequence[int]) -> "list[DeadLetter]":
    return [one for one in stream.coordinator.dead_letters_by_id(group, ids) if one.status == "pending"]


@command.command("discard")
@click.argument("group")
@click.argument("ids", metavar="[ID]...", nargs=-1, type=int)
@click.option("--all", "every", is_flag=True, help="All pending ones.")
@click.option("--yes", is_flag=True, help="Really: a discarded record is never handled.")
@output.json_option
@pass_access
def discard_command(access: Access, group: str, ids: Sequence[int], every: bool, yes: bool, as_json: bool) -> None:
    """Give dead letters of GROUP up: they stay listed as discarded, and are never handled."""
    _require_choice(ids, every)
    stream = access.open()
    stream.coordinator.group(group)
    chosen = sorted(set(ids)) if ids else [letter.id for letter in _letters(stream, group, "pending")]
    missing = set(ids).difference(*([one.id for one in _pending_of(stream, group, page)] for page in _pages(chosen)))
    if missing:
        raise _unknown(group, sorted(missing), "has no pending dead letters")
    if not yes:
        raise click.UsageError(f"this would discard {len(chosen):,} dead letters of {group}; say --yes to do it")
    done = sum(stream.discard_dead_letters(group, page) for page in _pages(chosen))
    if as_json:
        output.print_json({"group": group, "discarded": done})
    else:
        click.echo(f"discarded {done:,} dead letters of {group}")
