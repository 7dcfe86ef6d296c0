"""`DemoError`: why the demonstration ends; its message is for the person in front of it."""

import click


class DemoError(click.ClickException):
    """The demonstration cannot go on; shown as a message, exit code 1."""
