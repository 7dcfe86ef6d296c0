"""``djp lag``."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.cli.groups import batch_facts, holders, short_holders
from djp_dagster.errors import UnknownGroupError

if TYPE_CHECKING:
    from djp_dagster.streams.stream import EventStream


@click.command("lag")
@click.argument("groups", nargs=-1, metavar="[GROUP]...")
@click.option("-w", "--watch", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--every", type=output.seconds, metavar="DURATION", default="1s", show_default=True, help="With --watch: how often."
)
@output.json_option
@pass_access
def command(access: Access, groups: Sequence[str], watch: bool, every: float, as_json: bool) -> None:
    """Show what each GROUP has yet to do.

    All groups unless named. Age and idle are the times since the oldest and the newest pending record were appended;
    ~ marks an estimate.
    """
    if watch and not as_json and not sys.stdout.isatty():
        raise click.UsageError("--watch redraws a terminal; into a file or a pipe, add --json")
    stream = access.open()
    if watch and not as_json:
        _watch(stream, groups, every)
    while True:
        found = _look(stream, groups)
        if as_json:
            for facts in found:
                output.print_json(facts)
        else:
            output.show(_table(found))
        if not watch:
            break
        sys.stdout.flush()
        time.sleep(every)


def _watch(stream: "EventStream", groups: Sequence[str], every_s: float) -> None:
    from rich.live import Live

    with Live(_table(_look(stream, groups)), console=output.console(), auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(_table(_look(stream, groups)), refresh=True)


def _look(stream: "EventStream", groups: Sequence[str]) -> list[dict[str, Any]]:
    if groups:
        return [_facts(stream, stream.coordinator.group(name).name) for name in groups]
    found = []
    for info in stream.groups():
        try:
            found.append(_facts(stream, info.name))
        except UnknownGroupError:
            continue  # deleted since it was listed
    return found


def _facts(stream: "EventStream", group: str) -> dict[str, Any]:
    backlog = stream.pending(group)
    now = backlog.now_micros
    return {
        "group": group,
        "time": output.moment(now),
        "events": backlog.events,
        "bytes": backlog.bytes,
        "bytes_estimated": backlog.estimated,
        "age_s": backlog.age_s if backlog.events else None,
        "idle_s": backlog.idle_s if backlog.events else None,
        "holders": holders(stream.coordinator.tasks(group), now),
        "open_batches": [batch_facts(intent, now) for intent in stream.coordinator.intents(group)],
        "dead_letters_pending": stream.coordinator.count_dead_letters(group, "pending"),
    }


def _table(found: Sequence[dict[str, Any]]) -> Any:
    if not found:
        return "no groups; a consumer's first run makes its group"
    rows = output.table(
        "group", "events", "bytes", "age", "idle", "dead", "held by", "open batch",
        right=("events", "bytes", "age", "idle", "dead"),
    )  # fmt: skip
    for facts in found:
        rows.add_row(
            facts["group"],
            output.count(facts["events"]),
            output.size(facts["bytes"], estimated=facts["bytes_estimated"]),
            output.duration(facts["age_s"]),
            output.duration(facts["idle_s"]),
            output.count(facts["dead_letters_pending"]),
            short_holders(facts["holders"]),
            ", ".join(map(_batch, facts["open_batches"])) or "-",
        )
    return rows


def _batch(batch: dict[str, Any]) -> str:
    troubles = f", {batch['failures'] + batch['deaths']} failed" if batch["failures"] + batch["deaths"] else ""
    return (
        f"{batch['batch_id'][:8]} {output.count(batch['events'])} events, {output.duration(batch['age_s'])}{troubles}"
    )
