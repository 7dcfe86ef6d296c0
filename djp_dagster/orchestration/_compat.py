"""What Dagster does not offer in public: the only place with imports from `dagster._core`."""

import os
from pathlib import Path

import dagster as dg
from dagster._core.definitions.reconstruct import repository_def_from_target_def
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.workspace.autodiscovery import (
    loadable_targets_from_python_file,
    loadable_targets_from_python_module,
)

__all__ = [
    "UnresolvedAssetJobDefinition",
    "keeps_runs_in_sqlite",
    "load_repository",
    "runs_in_process",
    "sensor_tick_retention_days",
    "states_by_name",
]


def load_repository(*, file: Path | None = None, module: str | None = None) -> dg.RepositoryDefinition:
    """The definitions of a file or a module, as Dagster itself finds and loads them.

    Raises:
        DagsterError: there are none, or more than one; and whatever the code raises.
    """
    if file is not None:
        targets = loadable_targets_from_python_file(str(file), os.getcwd())  # noqa: PTH109
    else:
        assert module is not None
        targets = loadable_targets_from_python_module(module, os.getcwd())  # noqa: PTH109
    repository = repository_def_from_target_def(targets[0].target_definition)
    if repository is None:
        raise dg.DagsterInvariantViolationError(f"{file or module} holds no Definitions")
    return repository


def runs_in_process(job: dg.JobDefinition) -> bool:
    """Whether the job's steps run in the run's own process."""
    return job.executor_def.name == dg.in_process_executor.name


def keeps_runs_in_sqlite(instance: dg.DagsterInstance) -> bool:
    """Whether the instance's runs lie in SQLite."""
    return type(instance.run_storage).__name__.startswith("Sqlite")


def sensor_tick_retention_days(instance: dg.DagsterInstance) -> dict[str, int]:
    """After how many days a sensor's ticks go, by tick status; -1: never."""
    from dagster._core.definitions.run_request import InstigatorType

    settings = instance.get_tick_retention_settings(InstigatorType.SENSOR)
    return {status.value: days for status, days in settings.items()}


def states_by_name(instance: dg.DagsterInstance) -> dict[str, set[str]]:
    """What people have set sensors and schedules to, by name: RUNNING, STOPPED, DECLARED_IN_CODE."""
    states: dict[str, set[str]] = {}
    for state in instance.all_instigator_state():
        states.setdefault(state.instigator_name, set()).add(state.status.value)
    return states
