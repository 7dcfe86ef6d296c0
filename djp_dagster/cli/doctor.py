"""``djp doctor``."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.doctor import Finding, Level, examine
from djp_dagster.errors import DjpError

if TYPE_CHECKING:
    from djp_dagster.streams.stream import EventStream

_ORDER = ("problem", "warning", "ok")
_STYLES = {"problem": "bold red", "warning": "yellow", "ok": "green"}


@click.command("doctor")
@click.option(
    "-f",
    "--python-file",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Definitions to look at: sensors and schedules that are off, executors.",
)
@click.option("-m", "--module-name", "module", help="The same, of an importable module.")
@output.json_option
@pass_access
def command(access: Access, file: Path | None, module: str | None, as_json: bool) -> None:
    """Say what is wrong, and what to do.

    Looks at the stream, its groups and, where DAGSTER_HOME is set, Dagster's daemon, runs and settings. Changes
    nothing. Exit code 1 if there is a problem; warnings do not count.
    """
    if file is not None and module is not None:
        raise click.UsageError("give -f or -m, not both")
    found = sorted(_examine(access, file, module), key=lambda one: _ORDER.index(one.level))
    if as_json:
        for one in found:
            output.print_json(one)
    else:
        _show(found)
    if any(one.level == "problem" for one in found):
        raise click.exceptions.Exit(1)


def _examine(access: Access, file: Path | None, module: str | None) -> Iterator[Finding]:
    stream: EventStream | None = None
    home = os.environ.get("DAGSTER_HOME")
    if home and not Path(home).is_dir():
        # First, for it may be why there is no stream.
        yield Finding("problem", "instance", home, "DAGSTER_HOME names no folder", "correct it, or make the folder")
        home = None
    try:
        stream = access.open()
    except click.ClickException as error:
        yield Finding("problem", "stream-reachable", access.named_by, error.message, "the message says it")
    except DjpError as error:
        yield Finding("problem", "stream-reachable", access.named_by, str(error), "the message says it")
    if stream is not None:
        yield from examine(stream)
    named = file is not None or module is not None
    if not os.environ.get("DAGSTER_HOME"):
        # Without definitions this may be a machine that only publishes.
        level: Level = "warning" if named else "ok"
        what = "DAGSTER_HOME is not set: no instance was looked at, and what Dagster starts begins anew each time"
        yield Finding(level, "dagster", "Dagster", what, "set it, for djp, the webserver and the daemon alike")
    if not named:
        what = "were not looked at; djp doctor -f definitions.py does: sensors that are off, topics that differ"
        yield Finding("ok", "definitions", "definitions", what)
    if home or named:
        # Loaded here only: the rest works where Dagster is not configured, and without its import time.
        dagster_side = import_module("djp_dagster.orchestration.doctor")
        yield from dagster_side.examine(stream, home=home, file=file, module=module)


def _show(found: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for one in found:
        text = Text.assemble((output.plain(one.subject), "bold"), ": ", output.plain(one.what))
        if one.remedy and one.level != "ok":
            text.append(f"\n→ {output.plain(one.remedy)}")
        rows.add_row(Text(one.level, style=_STYLES[one.level]), text)
    counts = [sum(one.level == level for one in found) for level in _ORDER]
    output.show(rows, f"problems: {counts[0]}, warnings: {counts[1]}, ok: {counts[2]}")
