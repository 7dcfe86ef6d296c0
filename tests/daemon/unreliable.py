"""A run coordinator and launcher that fail where the test says so; named in the ``dagster.yaml`` of `test_kills`.

A file in the home orders it, once: ``refuse`` (the submission fails), ``kill.created`` (the daemon dies when the run
has been created and not submitted), ``kill.starting`` (it dies when the run is STARTING, and nobody starts it),
``kill.launched`` (it dies when the run has been launched and nobody has noted it); each followed by the group's name.
"""

import os
import signal
from pathlib import Path

from dagster import DagsterRun, DefaultRunLauncher
from dagster._core.launcher import LaunchRunContext
from dagster._core.run_coordinator import DefaultRunCoordinator, SubmitRunContext

from djp_dagster.orchestration.tags import GROUP_TAG

SETTINGS = """
run_coordinator: {module: tests.daemon.unreliable, class: UnreliableRunCoordinator}
run_launcher: {module: tests.daemon.unreliable, class: UnreliableRunLauncher}
"""


class UnreliableRunCoordinator(DefaultRunCoordinator):
    """Sends runs to the launcher at once, unless told otherwise."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        group = context.dagster_run.tags.get(GROUP_TAG, "")
        if _ordered(f"refuse.{group}"):
            raise ConnectionError("the run coordinator is away")
        if _ordered(f"kill.created.{group}"):
            os.kill(os.getpid(), signal.SIGKILL)
        run = super().submit_run(context)
        if _ordered(f"kill.launched.{group}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return run


class UnreliableRunLauncher(DefaultRunLauncher):
    """Asks the code server to start runs, unless told otherwise."""

    def launch_run(self, context: LaunchRunContext) -> None:
        if _ordered(f"kill.starting.{context.dagster_run.tags.get(GROUP_TAG, '')}"):
            os.kill(os.getpid(), signal.SIGKILL)
        super().launch_run(context)


def _ordered(order: str) -> bool:
    file = Path(os.environ["DAGSTER_HOME"]) / order
    if file.exists():
        file.rename(file.with_name(f"{order}.done"))
        return True
    return False
