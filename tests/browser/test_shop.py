"""What a newcomer does with the shop: find it loaded, look at its lineage, Materialize, switch a sensor off and on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

import djp_dagster as djp
from tests.browser.conftest import stream_url
from tests.browser.visitor import Visitor
from tests.servers.dagster_ui import Automation, DagsterUi

if TYPE_CHECKING:
    from playwright.sync_api import Locator

pytestmark = [pytest.mark.browser, pytest.mark.daemon]

LATEST = """query ($key: AssetKeyInput!) { assetOrError(assetKey: $key) { __typename ... on Asset {
  assetMaterializations(limit: 1) { runId
    metadataEntries { __typename label ... on IntMetadataEntry { intValue } } } } } }"""
RUNS = """{ runsOrError { __typename ... on Runs { results { runId status } } } }"""


@pytest.fixture(scope="module")
def stream(ui: DagsterUi) -> Iterator[djp.EventStream]:
    with djp.open_stream(stream_url(ui.home)) as stream:
        yield stream


def publish_orders(stream: djp.EventStream, count: int) -> None:
    from definitions import orders

    stream.create_topic(orders)
    events = [
        orders.event(user_id=f"user-{number % 7}", product_id=f"p{number}", quantity=1, amount=9.5 + number % 50)
        for number in range(count)
    ]
    stream.publish(orders, events)


def latest_materialization(ui: DagsterUi, asset: str) -> dict[str, Any] | None:
    found = ui.graphql(LATEST, key={"path": [asset]})["assetOrError"].get("assetMaterializations")
    if not found:
        return None
    numbers = {entry["label"]: entry["intValue"] for entry in found[0]["metadataEntries"] if "intValue" in entry}
    return {"run": found[0]["runId"], **numbers}


def runs(ui: DagsterUi) -> dict[str, str]:
    found = {run["runId"]: run["status"] for run in ui.graphql(RUNS)["runsOrError"]["results"]}
    assert "FAILURE" not in found.values(), found
    return found


def tick_ids(ui: DagsterUi, sensor: Automation) -> list[int]:
    return [tick.id for tick in ui.ticks(sensor)]


def test_the_shop_is_loaded(visitor: Visitor) -> None:
    from playwright.sync_api import expect

    visitor.open("/overview")
    visitor.page.get_by_role("link", name="Deployment").click()
    expect(visitor.page.locator('a[href="/locations/shop/"]')).to_be_visible()
    expect(visitor.page.get_by_text("2 code locations", exact=True)).to_be_visible()
    expect(visitor.page.get_by_text("Loaded", exact=True)).to_have_count(2)
    expect(visitor.page.get_by_text(re.compile("Failed|Error"))).to_have_count(0)
    visitor.keep("locations")
    for name, path in (("catalog", "/assets"), ("jobs", "/jobs")):
        visitor.open(path)
        expect(visitor.page.get_by_role("link", name=re.compile("recommend")).first).to_be_visible()
        visitor.keep(name)
    assert visitor.errors == []


def test_the_lineage_leads_from_topic_to_consumer_to_topic(visitor: Visitor, ui: DagsterUi) -> None:
    from definitions import fraud, order_files, recommend

    expected = {
        edge
        for consumer in (recommend, fraud, order_files)
        for edge in (
            *((topic.name, consumer.group) for topic in consumer.topics),
            *((consumer.group, topic.name) for topic in consumer.emits),
        )
    }
    assert len(expected) == 5
    visitor.page.set_viewport_size({"width": 3200, "height": 5200})  # what is out of sight is not drawn
    visitor.open("/asset-groups")
    visitor.wait_for_lineage()
    visitor.keep("lineage_at_first")
    visitor.expand_groups()
    with suppress(AssertionError):  # what is missing says more
        ui.wait_for(lambda: expected <= visitor.drawn_edges(), "the lines of the lineage", patience_s=30.0)
    visitor.keep("lineage")
    drawn = visitor.drawn_edges()
    assert expected - drawn == set()
    assert not [edge for edge in drawn if edge[::-1] in drawn]
    assert visitor.errors == []


def test_materialize_processes_what_is_pending(
    visitor: Visitor, ui: DagsterUi, stream: djp.EventStream, seed: random.Random
) -> None:
    from playwright.sync_api import expect

    published = seed.randint(50, 500)
    publish_orders(stream, published)
    visitor.open("/assets/order_files")
    expect(visitor.page.get_by_text("Never materialized")).to_be_visible()
    visitor.keep("asset_before")
    visitor.button("Materialize").click()

    def materialized() -> bool:
        runs(ui)
        return latest_materialization(ui, "order_files") is not None

    ui.wait_for(materialized, "the materialization of order_files", patience_s=120.0)
    latest = latest_materialization(ui, "order_files")
    assert latest is not None
    assert latest["events"] == published
    ui.wait_for(lambda: runs(ui)[latest["run"]] == "SUCCESS", "the end of the run", patience_s=60.0)
    # The open page shows the first materialization late, or only to who presses reload.
    visitor.page.reload()
    expect(visitor.row("events").get_by_role("cell").last).to_have_text(str(published))
    visitor.keep("asset")
    visitor.page.get_by_role("tab", name="Events").click()
    expect(visitor.row("events").get_by_role("cell").nth(1)).to_have_text(str(published))
    visitor.keep("asset_events")
    visitor.open(f"/runs/{latest['run']}")
    expect(visitor.page.get_by_text("Success", exact=True).first).to_be_visible()
    visitor.keep("run")
    assert visitor.errors == []


def test_a_sensor_is_switched_off_and_on(visitor: Visitor, ui: DagsterUi, stream: djp.EventStream) -> None:
    from playwright.sync_api import expect

    sensors = ui.automations()
    sensor, metronome = sensors["fraud_sensor"], sensors["metronome"]
    publish_orders(stream, 5)
    ui.switch_on(sensor)
    ui.switch_on(metronome)
    wait_until_done(ui, stream, "fraud", sensor)
    visitor.open("/automation")
    link = visitor.page.get_by_role("link", name=sensor.name)
    expect(link).to_be_visible()
    visitor.keep("automation")
    link.click()
    switch = visitor.row("Running").get_by_role("checkbox")
    expect(switch).to_be_checked()
    visitor.keep("sensor_on")

    flip(switch)
    expect(switch).not_to_be_checked()
    ui.wait_for(lambda: not ui.automations()[sensor.name].on, f"{sensor.name} to be off", patience_s=30.0)
    next_tick(ui, metronome)  # one of the sensor's may have been under way
    before = tick_ids(ui, sensor)
    publish_orders(stream, 10)
    next_tick(ui, metronome)
    next_tick(ui, metronome)
    assert tick_ids(ui, sensor) == before
    assert stream.coordinator.pending("fraud").events == 10
    visitor.keep("sensor_off")

    flip(switch)
    expect(switch).to_be_checked()
    run = wait_until_done(ui, stream, "fraud", sensor, after=before[0])
    expect(visitor.page.get_by_role("link", name=run[:8]).first).to_be_visible()
    visitor.keep("sensor_on_again")
    visitor.open("/deployment/daemons")
    expect(visitor.row("Sensors").get_by_text("Running", exact=True)).to_be_visible()
    visitor.keep("daemons")
    assert visitor.errors == []


def wait_until_done(ui: DagsterUi, stream: djp.EventStream, group: str, sensor: Automation, *, after: int = 0) -> str:
    """Wait for the run that the sensor asks for in a tick after ``after``; nothing is pending then. The run's id."""

    def asked() -> list[str]:
        return [run for tick in ui.ticks(sensor) if tick.id > after for run in tick.runs]

    ui.wait_for(lambda: bool(asked()), f"{sensor.name} to ask for a run", patience_s=60.0)
    run = asked()[-1]
    ui.wait_for(lambda: runs(ui).get(run) == "SUCCESS", "the end of the sensor's run", patience_s=120.0)
    assert stream.coordinator.pending(group).events == 0
    return run


def flip(switch: Locator) -> None:
    """Click the switch. The checkbox itself is invisible; its label is what a visitor sees."""
    switch.locator("xpath=..").click()


def next_tick(ui: DagsterUi, sensor: Automation) -> None:
    """Wait for the end of a tick that begins from now on."""
    newest = max(tick_ids(ui, sensor), default=0)
    ui.wait_for(
        lambda: any(tick.id > newest and tick.status != "STARTED" for tick in ui.ticks(sensor)),
        f"a tick of {sensor.name}",
        patience_s=60.0,
    )
