"""``djp``: the stream on the command line. Publish, look, seek, redrive, and ask what is wrong.

What a command answers goes to standard output, as a table or, with ``--json``, as JSON; all else to standard error. A
`DjpError` is one line there and exit code 1; Ctrl-C is exit code 130; a reader that closes the pipe ends it quietly.
"""

from importlib import import_module
from typing import Any

import click

from djp_dagster.cli.access import Access
from djp_dagster.errors import DjpError

_HOMES = {
    "buffer": "buffer",
    "claims": "claims",
    "dead-letters": "dead_letters",
    "doctor": "doctor",
    "groups": "groups",
    "lag": "lag",
    "publish": "publish",
    "seek": "seek",
    "tail": "tail",
    "topics": "topics",
    "versions": "versions",
}


class _Djp(click.Group):
    """Loads a command's module when the command is asked for, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, by name."""
        return sorted(_HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None."""
        home = _HOMES.get(cmd_name)
        if home is None:
            return None
        command = import_module(f"{__name__}.{home}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; errors of the stream are told in one line."""
        try:
            return super().invoke(ctx)
        except DjpError as error:
            raise click.ClickException(" ".join(str(error).split("\n"))) from error
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(cls=_Djp, name="djp", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--stream",
    "target",
    metavar="URL_OR_PATH",
    help="The stream: a SQLite file, or postgresql+psycopg://user@host/database. Unless given: $DJP_STREAM_URL, else "
    "djp/stream.db under $DAGSTER_HOME, else .djp/stream.db.",
)
@click.version_option(package_name="djp-dagster", prog_name="djp")
@click.pass_context
def main(ctx: click.Context, target: str | None) -> None:
    """Event streams and their consumers: publish, look, seek, redrive, diagnose."""
    ctx.obj = Access(ctx, target)
