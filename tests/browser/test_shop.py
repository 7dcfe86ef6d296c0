"""What a newcomer looks at in the shop: that it is loaded, an asset and its plots, the automation, the lineage."""

from __future__ import annotations

import random
import re
from contextlib import suppress

import pytest

import djp_dagster as djp
from tests.browser.shop import (
    materializations,
    newest_tick,
    next_tick,
    publish_orders,
    wait_for_end,
    wait_for_materialization,
    wait_for_tick,
)
from tests.browser.visitor import Visitor
from tests.servers.dagster_ui import Automation, DagsterUi

pytestmark = [pytest.mark.browser, pytest.mark.daemon, pytest.mark.xdist_group("browser")]


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
    latest = wait_for_materialization(ui, "order_files", after=0)
    assert latest["events"] == sum(span.end for span in stream.log.spans(["orders"]).values()) >= published
    # The open page shows the first materialization late, or only to who presses reload.
    visitor.page.reload()
    expect(visitor.row("events").get_by_role("cell").last).to_have_text(str(latest["events"]))
    visitor.keep("asset")
    visitor.page.get_by_role("tab", name="Events").click()
    expect(visitor.row("events").get_by_role("cell").nth(1)).to_have_text(str(latest["events"]))
    visitor.keep("asset_events")
    visitor.open(f"/runs/{latest['run']}")
    expect(visitor.page.get_by_text("Success", exact=True).first).to_be_visible()
    visitor.keep("run")
    assert visitor.errors == []


def test_a_sensor_is_switched_off_and_on(visitor: Visitor, ui: DagsterUi, stream: djp.EventStream) -> None:
    from playwright.sync_api import expect

    automations = ui.automations()
    sensor, metronome = automations["fraud_sensor"], automations["metronome"]
    publish_orders(stream, 5)
    ui.switch_on(sensor)
    ui.switch_on(metronome)
    wait_until_done(ui, stream, "fraud", sensor)
    visitor.open("/automation")
    link = visitor.page.get_by_role("link", name=sensor.name)
    expect(link).to_be_visible()
    visitor.keep("automation")
    link.click()
    switch = visitor.switch()
    expect(switch).to_be_checked()
    visitor.keep("sensor_on")

    visitor.flip(switch)
    expect(switch).not_to_be_checked()
    ui.wait_for(lambda: not ui.automations()[sensor.name].on, f"{sensor.name} to be off", patience_s=120.0)
    next_tick(ui, metronome)  # one of the sensor's may have been under way
    before = newest_tick(ui, sensor)
    publish_orders(stream, 10)
    next_tick(ui, metronome)
    next_tick(ui, metronome)
    assert newest_tick(ui, sensor) == before
    assert stream.pending("fraud").events == 10
    visitor.keep("sensor_off")

    visitor.flip(switch)
    expect(switch).to_be_checked()
    run = wait_until_done(ui, stream, "fraud", sensor, after=before)
    expect(visitor.page.get_by_role("link", name=run[:8]).first).to_be_visible()
    visitor.keep("sensor_on_again")
    visitor.open("/deployment/daemons")
    expect(visitor.row("Sensors").get_by_text("Running", exact=True)).to_be_visible()
    visitor.keep("daemons")
    visitor.open(f"/locations/shop/sensors/{sensor.name}")
    visitor.flip(visitor.switch())  # what comes next publishes orders, too
    ui.wait_for(lambda: not ui.automations()[sensor.name].on, f"{sensor.name} to be off", patience_s=120.0)
    assert visitor.errors == []


def test_the_figures_of_the_runs_are_plotted(visitor: Visitor, ui: DagsterUi, stream: djp.EventStream) -> None:
    from playwright.sync_api import expect

    visitor.page.set_viewport_size({"width": 1200, "height": 940})
    before = len(materializations(ui, "fraud"))
    published = [120, 310, 210]
    for number, count in enumerate(published):
        publish_orders(stream, count)
        visitor.open("/assets/fraud")
        visitor.button("Materialize").click()
        wait_for_materialization(ui, "fraud", after=before + number)
    events = [made["events"] for made in materializations(ui, "fraud")]
    assert events[: len(published) - 1] == published[:0:-1], "the first may have found some pending"
    visitor.page.reload()
    visitor.button("Plots").click()
    for figure in ("events", "events_per_second", "lag_age_seconds"):
        expect(visitor.plot(figure)).to_be_attached()
        visitor.plot(figure).scroll_into_view_if_needed()
        ui.wait_for(lambda figure=figure: visitor.is_plotted(figure), f"the line of {figure}")  # type: ignore[misc]
    visitor.page.get_by_text("dead_letters", exact=True).evaluate("label => label.scrollIntoView()")
    visitor.picture("asset")
    assert visitor.errors == []


def test_a_schedule_is_switched_on_and_off(visitor: Visitor, ui: DagsterUi) -> None:
    from playwright.sync_api import expect

    automations = ui.automations()
    schedule, hand = automations["dashboard_replay_schedule"], automations["minute_hand"]
    wait_for_tick(ui, hand, after=0)
    assert not schedule.on
    assert ui.ticks(schedule) == [], "a full minute has passed, and it was off"
    visitor.open("/automation")
    visitor.page.get_by_role("link", name=schedule.name).click()
    switch = visitor.switch()
    expect(switch).not_to_be_checked()
    visitor.flip(switch)
    expect(switch).to_be_checked()
    wait_for_tick(ui, schedule, after=0)
    (tick,) = ui.ticks(schedule)
    for run in tick.runs:  # yesterday, unless somebody has replayed it
        wait_for_end(ui, run)
        assert [made["run"] for made in materializations(ui, "dashboard_replay")][:1] == [run]
    expect(visitor.page.get_by_text(re.compile(rf"^{len(tick.runs)} runs? requested$")).first).to_be_visible()
    visitor.keep("schedule_on")
    visitor.flip(switch)
    expect(switch).not_to_be_checked()
    ui.wait_for(lambda: not ui.automations()[schedule.name].on, f"{schedule.name} to be off", patience_s=120.0)
    assert visitor.errors == []


def test_the_lineage_leads_from_group_to_group_and_from_topic_to_consumer_to_topic(
    visitor: Visitor, ui: DagsterUi
) -> None:
    groups = set(groups_of_assets().values())
    assert len(groups) == 9, "a group for each pattern"
    visitor.page.set_viewport_size({"width": 2200, "height": 1600})
    visitor.open("/asset-groups")
    visitor.wait_for_lineage()
    wait_for_edges(visitor, ui, edges_of_groups())
    assert visitor.drawn_names() == groups
    assert visitor.drawn_edges() == edges_of_groups()
    visitor.keep("lineage_at_first")
    visitor.picture("lineage", around=visitor.nodes)

    for group in ("dag", "event_buffering"):
        visitor.expand_group(group)
    names = {key[-1] for key, group in groups_of_assets().items() if group in ("dag", "event_buffering")}
    of_dag = {edge for edge in edges_of_consumers() if names.issuperset(edge)}
    assert len(of_dag) == 10
    wait_for_edges(visitor, ui, of_dag)
    assert of_dag <= visitor.drawn_edges()
    visitor.picture("dag", around=visitor.nodes_of({*names, "dag", "event_buffering"}))

    visitor.page.set_viewport_size({"width": 3200, "height": 5200})  # what is out of sight is not drawn
    visitor.open("/asset-groups")
    visitor.wait_for_lineage()
    visitor.expand_groups()
    expected = edges_of_consumers()
    assert len(expected) >= 20
    wait_for_edges(visitor, ui, expected)
    visitor.keep("lineage")
    drawn = visitor.drawn_edges()
    assert expected - drawn == set()
    assert not [edge for edge in drawn if edge[::-1] in drawn]
    assert visitor.errors == []


def wait_for_edges(visitor: Visitor, ui: DagsterUi, expected: set[tuple[str, str]]) -> None:
    with suppress(AssertionError):  # what is missing says more
        ui.wait_for(lambda: expected <= visitor.drawn_edges(), "the lines of the lineage", patience_s=120.0)


def groups_of_assets() -> dict[tuple[str, ...], str]:
    from definitions import defs

    return {tuple(spec.key.path): spec.group_name or "" for spec in defs.resolve_all_asset_specs()}


def edges_of_groups() -> set[tuple[str, str]]:
    from definitions import defs

    groups = groups_of_assets()
    edges = {
        (groups[tuple(dep.asset_key.path)], groups[tuple(spec.key.path)])
        for spec in defs.resolve_all_asset_specs()
        for dep in spec.deps
    }
    return {edge for edge in edges if edge[0] != edge[1]}


def edges_of_consumers() -> set[tuple[str, str]]:
    from definitions import everybody, user_emails

    return {
        edge
        for consumer in (*everybody, user_emails)
        for edge in (
            *((topic.name, consumer.group) for topic in consumer.topics),
            *((consumer.group, topic.name) for topic in consumer.emits),
        )
    }


def wait_until_done(ui: DagsterUi, stream: djp.EventStream, group: str, sensor: Automation, *, after: int = 0) -> str:
    """Wait for the run that the sensor asks for in a tick after ``after``; nothing is pending then. The run's id."""

    def asked() -> list[str]:
        return [run for tick in ui.ticks(sensor) if tick.id > after for run in tick.runs]

    ui.wait_for(lambda: bool(asked()), f"{sensor.name} to ask for a run", patience_s=60.0)
    run = asked()[-1]
    wait_for_end(ui, run)
    assert stream.pending(group).events == 0
    return run
