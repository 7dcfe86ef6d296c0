"""``djp versions``: another version of a group's state, beside the live one."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.cli.groups import holders, short_holders

if TYPE_CHECKING:
    from djp_dagster.streams.stream import EventStream
    from djp_dagster.versions.comparison import Comparison
    from djp_dagster.versions.promotion import Role

_previous = click.option("--previous", is_flag=True, help="The version that was live before, in place of the next one.")


def _role(previous: bool) -> "Role":
    return "previous" if previous else "next"


@click.group("versions")
def command() -> None:
    """Compare, promote, abandon versions of state.

    The next version is made by djp.follow, by a run of the rebuild job, and kept up to date by these or by a worker.
    """


@command.command("status")
@click.argument("group")
@output.json_option
@pass_access
def status_command(access: Access, group: str, as_json: bool) -> None:
    """Show which versions of GROUP there are, what code has made them, and how far they are behind."""
    found = _look(access.open(), group)
    if as_json:
        for facts in found:
            output.print_json(facts)
        return
    rows = output.table("version", "group", "made by", "behind", "dead", "held by", right=("behind", "dead"))
    for facts in found:
        rows.add_row(
            facts["version"],
            facts["group"],
            output.plain(facts["code_version"] or "-"),
            output.count(facts["behind"]),
            output.count(facts["dead_letters_pending"]),
            short_holders(facts["holders"]),
        )
    output.show(rows)
    if len(found) == 1:
        output.note(f"{group} has no other version")


def _look(stream: "EventStream", group: str) -> list[dict[str, Any]]:
    from djp_dagster.versions.promotion import versions

    found = versions(stream, group)
    now = stream.log.now_micros()
    names = {"live": group} | {role: f"{group}.{role}" for role, behind in found.behind.items() if behind is not None}
    return [
        {
            "version": version,
            "group": name,
            "code_version": found.code_versions.get(version),
            "behind": found.behind.get(version),
            "dead_letters_pending": stream.coordinator.count_dead_letters(name, "pending"),
            "holders": holders(stream.coordinator.tasks(name), now),
        }
        for version, name in names.items()
    ]


@command.command("compare")
@click.argument("group")
@_previous
@output.json_option
@pass_access
def compare_command(access: Access, group: str, previous: bool, as_json: bool) -> None:
    """Show what differs between the live state of GROUP and the next one; exit code 1 if anything does.

    Values are compared as they are stored. Under traffic the one that follows lacks what has just been handled.
    """
    from djp_dagster.versions.comparison import compare

    stream = access.open()
    with tempfile.TemporaryDirectory(prefix="djp-versions-") as folder:
        found = compare(stream, group, role=_role(previous), folder=Path(folder))
    if as_json:
        output.print_json(_facts(found))
    else:
        _show(found, _role(previous))
    if not found.equal:
        raise click.exceptions.Exit(1)


def _facts(found: "Comparison") -> dict[str, Any]:
    return {
        "equal": found.equal,
        "keys": found.keys,
        "other_keys": found.other_keys,
        "only_live": found.only_here,
        "only_other": found.only_there,
        "differing": found.differing,
        "records_behind": found.behind,
        "examples": found.examples,
    }


def _show(found: "Comparison", role: str) -> None:
    if found.examples:
        rows = output.table("key", "live", role)
        for example in found.examples:
            rows.add_row(*(output.plain(output.json_bytes(one).decode()) for one in example))
        output.show(rows)
    click.echo(
        f"{found.keys:,} keys live, {found.other_keys:,} {role}: {found.only_here:,} only live, {found.only_there:,} "
        f"only {role}, {found.differing:,} differ; {role} is {found.behind:,} records behind"
    )


@command.command("promote")
@click.argument("group")
@_previous
@click.option(
    "--wait",
    type=output.seconds,
    metavar="DURATION",
    default="30s",
    show_default=True,
    help="How long to wait until it has caught up with the live one.",
)
@output.json_option
@pass_access
def promote_command(access: Access, group: str, previous: bool, wait: float, as_json: bool) -> None:
    """Make the next version of GROUP the live one, in one step; with --previous, go back to the one before.

    It must have been followed: somebody keeps it up to date, or nothing is left to do. The live version is frozen for
    the moment that takes, and goes on if it was in vain. Then run GROUP with the code that made what is live now.
    """
    from djp_dagster.versions.promotion import promote_followed, versions

    stream = access.open()
    promote_followed(stream, group, role=_role(previous), wait=wait)
    code = versions(stream, group).code_versions["live"]
    if as_json:
        output.print_json({"group": group, "promoted": _role(previous), "code_version": code})
    else:
        click.echo(
            f"{group} is of code {output.plain(code or 'unknown')} now; go back with: "
            f"djp versions promote {group} --previous"
        )


@command.command("abandon")
@click.argument("group")
@_previous
@output.json_option
@pass_access
def abandon_command(access: Access, group: str, previous: bool, as_json: bool) -> None:
    """Delete the next version of GROUP, or the previous one: its state, and its hold on retention."""
    from djp_dagster.versions.promotion import abandon

    abandon(access.open(), group, role=_role(previous))
    if as_json:
        output.print_json({"group": group, "abandoned": _role(previous)})
    else:
        click.echo(f"{group}.{_role(previous)} is deleted")
