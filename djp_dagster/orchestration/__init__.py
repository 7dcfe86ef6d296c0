"""Orchestration: how Dagster runs, watches and shows consumers. The patterns are thin faces over this room."""

import warnings

import dagster as dg
from dagster_shared.libraries import DagsterLibraryRegistry

from djp_dagster._version import __version__

DagsterLibraryRegistry.register("djp-dagster", __version__, is_dagster_package=False)

# Dagster 1.13 warns of its own argument whenever it binds resources to the job of any sensor. Nobody can act on it.
warnings.filterwarnings(
    "ignore", message="Parameter `owners` of initializer `SensorDefinition", category=dg.BetaWarning
)
