"""``djp seek``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access

if TYPE_CHECKING:
    from djp_dagster.streams.seeking import Move


@click.command("seek")
@click.argument("group")
@click.option(
    "--to",
    required=True,
    metavar="earliest|latest|TIME|TOPIC:PARTITION=OFFSET[,...]",
    help="TIME: 2026-11-03T14:05:00Z, or 2h for two hours ago, by append time. Partitions not named stay.",
)
@click.option("--reset-state", is_flag=True, help="A stateful group's state begins empty; required for one.")
@click.option("--execute", is_flag=True, help="Do it; without it, only show what would happen.")
@click.option(
    "--wait",
    type=output.seconds,
    metavar="DURATION",
    default="30s",
    show_default=True,
    help="How long to wait until nobody works on the group.",
)
@output.json_option
@pass_access
def command(access: Access, group: str, to: str, reset_state: bool, execute: bool, wait: float, as_json: bool) -> None:
    """Move the committed offsets of GROUP.

    What lies after them is handled (again), what lies before is not. Shows what would happen; does it with --execute.
    An open batch is void then; dead letters and outputs stay.
    """
    from djp_dagster.streams.seeking import parse_target, plan_seek

    stream = access.open()
    stateful = stream.coordinator.group(group).stateful
    target = parse_target(to, stream.log.now_micros())
    moves = plan_seek(stream, group, target)
    voided = [intent.batch_id for intent in stream.coordinator.intents(group)]
    if execute:
        moved = stream.seek(group, target, reset_state=reset_state, wait=wait)
        moves = [move._replace(new=moved.get(move.at, move.old)) for move in moves]
    if as_json:
        output.print_json(
            {
                "group": group,
                "executed": execute,
                "partitions": [_facts(move) for move in moves],
                "again": sum(move.again for move in moves),
                "skipped": sum(move.skipped for move in moves),
                "open_batches_voided": voided,
                "reset_state": reset_state,
                "needs_reset_state": stateful,
            }
        )
        return
    _show(moves, execute)
    if voided:
        output.note(f"open batches {'voided' if execute else 'that would be void'}: {', '.join(voided)}")
    if not execute:
        if stateful != reset_state:
            hint = "add --reset-state: its state would begin empty" if stateful else "leave --reset-state out"
            output.note(f"group {group} {'has' if stateful else 'has no'} state; {hint}")
        output.note("nothing was changed; add --execute to do it")


def _facts(move: "Move") -> dict[str, object]:
    return {
        "topic": move.at.topic,
        "partition": move.at.partition,
        "old": move.old,
        "new": move.new,
        "again": move.again,
        "skipped": move.skipped,
    }


def _show(moves: "Sequence[Move]", executed: bool) -> None:
    figures = ("partition", "old", "new", "again", "skipped")
    shown = output.table("topic", *figures, right=figures)
    for move in moves:
        shown.add_row(move.at.topic, *map(output.count, (move.at.partition, *move[1:])))
    again, skipped = sum(move.again for move in moves), sum(move.skipped for move in moves)
    verb = "are" if executed else "would be"
    output.show(shown, f"{again:,} records {verb} handled again, {skipped:,} {verb} skipped")
