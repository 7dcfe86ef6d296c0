"""What a newcomer does in the shop: replay days, expire keys, redrive dead letters, ask where a product is."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest

import djp_dagster as djp
from tests.browser.conftest import stream_url
from tests.browser.shop import backfills, events_of, materializations, partitions, wait_for_end
from tests.browser.visitor import Visitor
from tests.servers.dagster_ui import DagsterUi

pytestmark = [pytest.mark.browser, pytest.mark.daemon, pytest.mark.xdist_group("browser")]


def test_a_backfill_replays_each_day(
    visitor: Visitor,
    ui: DagsterUi,
    stream: djp.EventStream,
    seed: random.Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from playwright.sync_api import expect

    days = partitions(ui, "dashboard_replay")
    assert len(days) >= 2, "yesterday and today"
    views = {day: publish_clicks(stream, day, seed) for day in days}
    visitor.open("/assets/dashboard_replay")
    visitor.button("Materialize...").or_(visitor.button("Materialize…")).click()
    visitor.button("Confirm").click()  # that the records of each day are an asset, too
    dialog = visitor.page.get_by_role("dialog")
    dialog.get_by_role("button", name="All", exact=True).click()
    expect(dialog.get_by_text(f"{len(days)} partitions", exact=True)).to_be_visible()
    visitor.keep("backfill_dialog")
    launch = dialog.get_by_role("button", name="Launch backfill")
    expect(launch).to_be_enabled()
    launch.click()

    def made() -> bool:
        assert not [status for status in backfills(ui).values() if "FAIL" in status], ui.log_end("daemon")
        return all(materializations(ui, "dashboard_replay", day) for day in days)

    ui.wait_for(made, "a materialization of each day", patience_s=150.0)
    assert len(backfills(ui)) == 1
    for day in days:
        (latest,) = materializations(ui, "dashboard_replay", day)
        wait_for_end(ui, latest["run"])
        assert latest["events"] == views[day].total()
        assert dashboard_of(ui.home, day, monkeypatch) == views[day]
    visitor.open("/assets/dashboard_replay?view=partitions")
    expect(visitor.page.get_by_text(f"Materialized ({len(days)})")).to_be_visible()
    visitor.keep("backfill")
    assert visitor.errors == []


def publish_clicks(stream: djp.EventStream, day: str, seed: random.Random) -> Counter[str]:
    """Publish clicks of a day, at noon and at both of its ends; how often each product was looked at."""
    from definitions import clicks

    begin = datetime.fromisoformat(day).replace(tzinfo=timezone.utc)
    moments = [begin, begin + timedelta(hours=12), begin + timedelta(days=1) - timedelta(microseconds=1)]
    views = Counter(f"p{seed.randrange(20)}" for _ in range(seed.randint(50, 200)))
    stream.create_topic(clicks)
    stream.publish(
        clicks,
        [
            djp.Event(
                type=clicks.name,
                source="/tests",
                data={"user_id": f"user-{number % 7}", "product_id": product},
                time=moments[number % len(moments)],
            )
            for number, product in enumerate(views.elements())
        ],
    )
    return views


def dashboard_of(home: Path, day: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The value of a partition, as whatever is downstream of it would load it."""
    from definitions import defs

    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.from_config(str(home)) as instance:
        frame = defs.load_asset_value("dashboard_replay", instance=instance, partition_key=day)
    return Counter(dict(zip(frame["product_id"], frame["views"].tolist(), strict=True)))


def test_a_product_whose_video_came_too_late_is_expired_and_redriven_and_is_complete(
    visitor: Visitor, ui: DagsterUi, stream: djp.EventStream, seed: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    from definitions import products, submissions
    from demo.catalog import submission

    monkeypatch.setenv("DAGSTER_HOME", str(ui.home))
    monkeypatch.setenv("DJP_STREAM_URL", stream_url(ui.home))
    key = f"late-{seed.randrange(1000)}"
    stream.create_topic(submissions)
    stream.publish(submissions, [submissions.event(submission(seed, key, playable=True))])
    materialize(ui.home, "extract_facts", "resize_images", "create_product")  # and nobody transcodes
    visitor.type_config("buffer_job", f"ops: {{buffer_job_op: {{config: {{group: create_product, expire: [{key}]}}}}}}")
    wait_for_end(ui, visitor.launch())
    assert topics_of(stream, "create_product") == ["product_facts", "product_images"]
    materialize(ui.home, "transcode_video", "create_product")
    assert topics_of(stream, "create_product") == ["product_facts", "product_images", "product_videos"]
    assert events_of(stream, products) == []

    visitor.type_config("redrive_job", "ops: {redrive_job_op: {config: {group: create_product}}}")
    visitor.keep("launchpad")
    wait_for_end(ui, visitor.launch())
    assert topics_of(stream, "create_product") == []
    assert [product["product_id"] for product in events_of(stream, products)] == [key]

    visitor.page.set_viewport_size({"width": 1200, "height": 1000})
    visitor.type_config("trace_job", f"ops: {{trace_job_op: {{config: {{key: {key}}}}}}}")
    wait_for_end(ui, visitor.launch())
    expect(visitor.page.get_by_text("create_product").first).to_be_visible()
    visitor.page.get_by_text("View full message").first.click()
    answer = visitor.page.get_by_role("dialog")
    for group in ("extract_facts", "resize_images", "transcode_video", "create_product"):
        expect(answer.get_by_role("row").filter(has_text=group).last.get_by_text("done", exact=True)).to_be_visible()
    visitor.picture("trace", around=answer, margin=0)
    assert visitor.errors == []


def test_a_dead_letter_that_fails_again_stays_pending_and_the_run_says_so(
    visitor: Visitor, ui: DagsterUi, stream: djp.EventStream
) -> None:
    from playwright.sync_api import expect

    from definitions import fraud, orders

    stream.create_topic(orders)
    stream.publish(orders, [orders.event(user_id="user-1", product_id="p1", quantity=1, amount=None)])
    djp.run_pending(stream, fraud)
    (letter,) = stream.dead_letters("fraud")
    visitor.type_config("redrive_job", f"ops: {{redrive_job_op: {{config: {{group: fraud, ids: [{letter.id}]}}}}}}")
    wait_for_end(ui, visitor.launch(), fails=True)
    expect(visitor.page.get_by_text("failed again and stay pending").first).to_be_visible()
    visitor.keep("redrive_failed")
    (still,) = stream.dead_letters("fraud")
    assert (still.id, still.redrives) == (letter.id, letter.redrives + 1)
    stream.discard_dead_letters("fraud", [letter.id])
    assert visitor.errors == []


def materialize(home: Path, *assets: str) -> None:
    """Materialize one after the other, in runs of this process; without checks, which miss the workers."""
    from definitions import defs

    job = defs.resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.from_config(str(home)) as instance, ThreadPoolExecutor(1) as thread:
        for asset in assets:
            alone = job.get_subset(asset_selection={dg.AssetKey(asset)}, asset_check_selection=set())
            # Each run has an event loop of its own, and in this thread is the browser's.
            assert thread.submit(alone.execute_in_process, instance=instance).result().success


def topics_of(stream: djp.EventStream, group: str) -> list[str]:
    """Which topics the group's pending dead letters are of."""
    return sorted(letter.topic for letter in stream.dead_letters(group))
