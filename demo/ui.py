"""`Ui`: the Dagster webserver, asked over HTTP what a person would look at, told what a person would click."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from demo.errors import DemoError

LOCATION = "shop"
_REPOSITORY = "__repository__"
_TIMEOUT_S = 15.0
_SELDOM_S = 60
_CANCELING = "CANCELING"
_UNDER_WAY = ("STARTING", "STARTED", _CANCELING)

_LOCATIONS = """
{
  workspaceOrError { ... on Workspace { locationEntries { loadStatus locationOrLoadError {
    __typename ... on PythonError { message } } } } }
}"""
_SENSORS = """
query Sensors($repository: RepositorySelector!) {
  sensorsOrError(repositorySelector: $repository) { ... on Sensors { results {
    name minIntervalSeconds sensorState { status ticks(limit: 1) { timestamp } } } } }
}"""
_RUNS = """
query Runs($statuses: [RunStatus!]) {
  runsOrError(filter: {statuses: $statuses}) { ... on Runs { results { runId jobName status } } }
}"""
_TERMINATE = """
mutation Terminate($ids: [String!]!) {
  terminateRuns(runIds: $ids, terminatePolicy: SAFE_TERMINATE) { __typename }
}"""
_LAUNCH = """
mutation Launch($parameters: ExecutionParams!) {
  launchRun(executionParams: $parameters) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}"""


class Run(NamedTuple):
    """A run; ``canceling`` if it was asked to stop."""

    id: str
    job: str
    canceling: bool


class Ui:
    """The user interface at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def answers(self) -> bool:
        """Whether it is up."""
        try:
            with urllib.request.urlopen(f"{self.url}/server_info", timeout=_TIMEOUT_S) as reply:  # noqa: S310
                return bool(reply.status == 200)
        except OSError:
            return False

    def has_loaded(self) -> bool:
        """Whether the definitions are there.

        Raises:
            DemoError: they cannot be loaded.
        """
        entries = self._ask(_LOCATIONS)["workspaceOrError"].get("locationEntries", [])
        for entry in entries:
            failure = entry["locationOrLoadError"] or {}
            if failure.get("__typename") == "PythonError":
                raise DemoError(f"definitions.py cannot be loaded: {failure['message']}")
        return bool(entries) and all(entry["loadStatus"] == "LOADED" for entry in entries)

    def silent_sensors(self, since: float) -> list[str]:
        """The sensors that are on and have not looked since, but for those that look once a minute or less often."""
        selector = {"repositoryName": _REPOSITORY, "repositoryLocationName": LOCATION}
        sensors = self._ask(_SENSORS, repository=selector)["sensorsOrError"].get("results", [])
        return [
            sensor["name"]
            for sensor in sensors
            if sensor["sensorState"]["status"] == "RUNNING"
            and sensor["minIntervalSeconds"] < _SELDOM_S
            and not any(tick["timestamp"] >= since for tick in sensor["sensorState"]["ticks"])
        ]

    def runs_under_way(self) -> list[Run]:
        """The runs that have a process, or are about to."""
        found = self._ask(_RUNS, statuses=_UNDER_WAY)["runsOrError"].get("results", [])
        return [Run(run["runId"], run["jobName"], run["status"] == _CANCELING) for run in found]

    def terminate(self, run_ids: Sequence[str]) -> None:
        """Ask runs to stop."""
        self._ask(_TERMINATE, ids=list(run_ids))

    def materialize(self, asset: str) -> None:
        """Press Materialize.

        Raises:
            DemoError: there is no such asset, or the run was refused.
        """
        selector = {
            "repositoryName": _REPOSITORY,
            "repositoryLocationName": LOCATION,
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [{"path": [asset]}],
        }
        answer = self._ask(_LAUNCH, parameters={"selector": selector, "mode": "default", "runConfigData": {}})
        if answer["launchRun"]["__typename"] != "LaunchRunSuccess":
            raise DemoError(f"{asset} cannot be materialized: {answer['launchRun']}")

    def _ask(self, query: str, **variables: Any) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/graphql",
            data=json.dumps({"query": query, "variables": variables}).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:  # noqa: S310
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise DemoError(f"{self.url} refuses: {error.read().decode(errors='replace')[:500]}") from error
        except (OSError, ValueError) as error:
            raise UiAwayError(f"{self.url} does not answer: {error}") from error
        if answer.get("errors"):
            raise DemoError(f"{self.url} refuses: {answer['errors'][0]['message']}")
        data: dict[str, Any] = answer["data"]
        return data


class UiAwayError(DemoError):
    """The user interface does not answer."""
