"""What the instance and the stream of the shop say: what the tests compare the pages with."""

from __future__ import annotations

from typing import Any

import djp_dagster as djp
from tests.servers.dagster_ui import Automation, DagsterUi

MADE = """query ($key: AssetKeyInput!, $partitions: [String!]) { assetOrError(assetKey: $key) {
  __typename ... on Asset { assetMaterializations(limit: 50, partitions: $partitions) { runId
    metadataEntries { __typename label ... on IntMetadataEntry { intValue } } } } } }"""
RUN = """query ($run: ID!) { runOrError(runId: $run) { __typename ... on Run { status } } }"""
RUNS = """{ runsOrError { __typename ... on Runs { results { runId status } } } }"""
PARTITIONS = """query ($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) {
  __typename ... on AssetNode { partitionKeys } } }"""
BACKFILLS = """{ partitionBackfillsOrError { __typename ... on PartitionBackfills { results { id status } } } }"""


def materializations(ui: DagsterUi, asset: str, partition: str | None = None) -> list[dict[str, Any]]:
    """The run and the whole numbers of each, the newest first."""
    answer = ui.graphql(MADE, key={"path": [asset]}, partitions=None if partition is None else [partition])
    return [
        {
            "run": made["runId"],
            **{one["label"]: one["intValue"] for one in made["metadataEntries"] if "intValue" in one},
        }
        for made in answer["assetOrError"].get("assetMaterializations", ())
    ]


def status_of(ui: DagsterUi, run: str) -> str:
    """How the run stands."""
    status: str = ui.graphql(RUN, run=run)["runOrError"]["status"]
    return status


def wait_for_end(ui: DagsterUi, run: str, *, fails: bool = False) -> None:
    """Wait until the run has ended; as it should."""
    ended = ("SUCCESS", "FAILURE", "CANCELED")
    ui.wait_for(lambda: status_of(ui, run) in ended, f"the end of run {run}", patience_s=120.0)
    assert status_of(ui, run) == ("FAILURE" if fails else "SUCCESS"), ui.log_end("daemon")


def wait_for_materialization(ui: DagsterUi, asset: str, *, after: int) -> dict[str, Any]:
    """Wait until there is one more than ``after``, and for the end of its run; no run may fail meanwhile."""
    failed = {run for run, status in runs(ui).items() if status == "FAILURE"}

    def materialized() -> bool:
        assert {run for run, status in runs(ui).items() if status == "FAILURE"} <= failed, ui.log_end("webserver")
        return len(materializations(ui, asset)) > after

    ui.wait_for(materialized, f"the materialization of {asset}", patience_s=120.0)
    latest = materializations(ui, asset)[0]
    wait_for_end(ui, latest["run"])
    return latest


def runs(ui: DagsterUi) -> dict[str, str]:
    """The status of each run."""
    return {run["runId"]: run["status"] for run in ui.graphql(RUNS)["runsOrError"]["results"]}


def partitions(ui: DagsterUi, asset: str) -> list[str]:
    """The partitions that there are now."""
    found: list[str] = ui.graphql(PARTITIONS, key={"path": [asset]})["assetNodeOrError"]["partitionKeys"]
    return found


def backfills(ui: DagsterUi) -> dict[str, str]:
    """The status of each backfill."""
    found = ui.graphql(BACKFILLS)["partitionBackfillsOrError"]["results"]
    return {backfill["id"]: backfill["status"] for backfill in found}


def wait_for_tick(ui: DagsterUi, automation: Automation, *, after: int) -> None:
    """Wait for the end of a tick that is newer than ``after``."""
    ui.wait_for(
        lambda: any(tick.id > after and tick.status != "STARTED" for tick in ui.ticks(automation)),
        f"a tick of {automation.name}",
        patience_s=120.0,
    )


def newest_tick(ui: DagsterUi, automation: Automation) -> int:
    """Its number; 0 if there was none."""
    return max((tick.id for tick in ui.ticks(automation)), default=0)


def next_tick(ui: DagsterUi, automation: Automation) -> None:
    """Wait for the end of a tick that begins from now on."""
    wait_for_tick(ui, automation, after=newest_tick(ui, automation))


def publish_orders(stream: djp.EventStream, count: int) -> None:
    """Publish orders that nobody complains about."""
    from definitions import orders

    stream.create_topic(orders)
    events = [
        orders.event(user_id=f"user-{number % 7}", product_id=f"p{number}", quantity=1, amount=9.5 + number % 50)
        for number in range(count)
    ]
    stream.publish(orders, events)


def events_of(stream: djp.EventStream, topic: djp.Topic) -> list[dict[str, Any]]:
    """The data of all events of a topic."""
    return [record.data for partition in range(topic.partitions) for record in stream.records(topic, partition)]
