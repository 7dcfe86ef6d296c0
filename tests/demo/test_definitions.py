"""The definitions load, and their handlers do what the tour says."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pandas as pd

import djp_dagster as djp
from definitions import (
    catalog,
    cheapest_hours,
    clicks,
    defs,
    describe_media,
    fraud,
    fraud_alerts,
    order_files,
    orders,
    page_views,
    price_history,
    products,
    recommend,
    referrers,
    sales,
    send_receipts,
    submissions,
    user_emails,
    user_updates,
    visits,
    web_logs,
)
from demo import access_logs
from demo.home import REPOSITORY
from demo.media import IMAGES, MP4, PNG, medium
from djp_dagster.testing import run_consumer


def test_they_load() -> None:
    dg.Definitions.validate_loadable(defs)


def test_dagster_finds_nothing_wrong_with_the_workspace(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / "dagster.yaml").write_bytes((REPOSITORY / "demo" / "dagster.yaml").read_bytes())
    command = [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shop" in done.stdout + done.stderr


def test_dagster_accepts_every_setting_of_the_instance(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_bytes((REPOSITORY / "demo" / "dagster.yaml").read_bytes())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert not instance.telemetry_enabled
        assert instance.run_monitoring_enabled
        assert instance.get_settings("sensors")["use_threads"]
        assert instance.get_concurrency_config().run_queue_config.max_concurrent_runs == 20


def test_sensors_and_schedules_are_on() -> None:
    repository = defs.get_repository_def()
    assert repository.sensor_defs
    assert all(sensor.default_status is dg.DefaultSensorStatus.RUNNING for sensor in repository.sensor_defs)
    assert all(schedule.default_status is dg.DefaultScheduleStatus.RUNNING for schedule in repository.schedule_defs)


def test_recommend_suggests_what_was_seen_before() -> None:
    seen = [("ada", "p1"), ("ada", "p2"), ("bob", "p9"), ("ada", "p1"), ("ada", "p3")]
    done = run_consumer(recommend, [clicks.event(user_id=user, product_id=product) for user, product in seen])
    made = [(r.data["user_id"], r.data["views"], r.data["products"]) for r in done.emitted["suggestions"]]
    assert [one for one in made if one[0] == "ada"] == [
        ("ada", 1, []),
        ("ada", 2, ["p1"]),
        ("ada", 3, ["p2"]),
        ("ada", 4, ["p1", "p2"]),
    ]
    assert ("bob", 1, []) in made
    assert done.state["ada"]["products"] == ["p3", "p1", "p2"]


def test_recommend_handles_a_click_that_was_published_twice_once() -> None:
    click = clicks.event(user_id="ada", product_id="p1")
    done = run_consumer(recommend, [click, click, clicks.event(user_id="ada", product_id="p2")])
    assert [record.data["views"] for record in done.emitted["suggestions"]] == [1, 2]


def test_recommend_goes_on_without_a_malformed_click() -> None:
    events = [clicks.event(user_id="ada", product_id="p1"), clicks.event(user_id="ada", page="/")]
    done = run_consumer(recommend, [*events, clicks.event(user_id="ada", product_id="p2")])
    assert [letter.error_type for letter in done.dead_letters] == ["KeyError"]
    assert [record.data["products"] for record in done.emitted["suggestions"]] == [[], ["p1"]]


def order(user_id: str = "ada", **data: object) -> djp.Event:
    return orders.event(user_id=user_id, **data)


def test_fraud_flags_absurd_amounts_and_many_orders_at_once() -> None:
    absurd = order("eve", amount=50_000)
    placed = [order("bot", amount=10) for _ in range(26)]
    done = run_consumer(fraud, [order(amount=12.5), absurd, *placed, *[order("carl", amount=1) for _ in range(25)]])
    alerts = {record.data["user_id"]: record.data for record in done.emitted["fraud_alerts"]}
    assert alerts == {
        "eve": {"user_id": "eve", "order": absurd.id, "reason": "an amount of 50000"},
        "bot": {"user_id": "bot", "order": placed[-1].id, "reason": "26 orders at once"},
    }
    assert fraud_alerts.name in done.emitted
    assert done.dead_letters == []


def test_fraud_sends_orders_without_an_amount_to_the_dead_letters() -> None:
    bad = [order(amount=None), order(amount="12"), order()]
    done = run_consumer(fraud, [order(amount=1), *bad, order(amount=20_000)])
    assert len(done.dead_letters) == 3
    assert {letter.error for letter in done.dead_letters} == {"an order needs an amount"}
    assert len(done.emitted["fraud_alerts"]) == 1


def test_order_files_hold_each_sound_order_once() -> None:
    twice = order(amount=2.5, product_id="p2", quantity=1)
    done = run_consumer(
        order_files, [order(amount=1.5, product_id="p1", quantity=1), twice, twice, order(amount=None), order()]
    )
    (frame,) = done.outputs
    assert isinstance(frame, pd.DataFrame)
    assert sorted(frame["amount"]) == [1.5, 2.5]
    assert {"event_id", "user_id", "product_id", "append_time"} <= set(frame.columns)
    assert done.dead_letters == []


def test_revenue_adds_up_each_file_once(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        event_stream = djp.SqlEventStream(url=f"sqlite:///{tmp_path / 'stream.db'}")
        stream = event_stream.open()
        stream.create_topic(orders)
        amounts = []
        for placed in ([10, 2.5], [], [7]):
            if placed:
                stream.publish(orders, [order(amount=amount) for amount in placed])
                djp.run_pending(stream, order_files)
            done = dg.materialize(
                [*(asset for asset in defs.assets if isinstance(asset, dg.AssetsDefinition))],
                selection="revenue",
                resources={"event_stream": event_stream, "users": djp.HttpLookup(base_url="http://127.0.0.1:1")},
                instance=instance,
            )
            amounts.append(done.output_for_node("revenue"))
        stream.close()
    assert amounts == [12.5, 0.0, 7.0]


def test_media_are_described_and_what_is_none_is_a_dead_letter() -> None:
    image, video = medium(0, 1), medium(IMAGES, 1)
    uploads = [
        djp.Event(type="product_uploads", source="/s", subject="p1", data=data, datacontenttype=kind)
        for kind, data in ((PNG, image.content), (MP4, video.content), (PNG, b"a tax return" * 9_000))
    ]
    done = run_consumer(describe_media, uploads)
    by_type = {record.data["media_type"]: record.data for record in done.emitted["product_media"]}
    assert by_type[PNG]["width"] > 600
    assert by_type[MP4]["seconds"] >= 5
    assert by_type[MP4]["claim"]["size"] == len(video.content)
    assert len(done.dead_letters) == 1


def test_the_cheapest_hours_follow_from_the_prices_and_stay_fresh(tmp_path: Path) -> None:
    manager = djp.ClaimCheckIOManager(store=djp.LocalPayloadStore(folder=str(tmp_path)))
    with dg.DagsterInstance.ephemeral() as instance:
        versions = []
        for _ in range(2):
            done = dg.materialize([price_history, cheapest_hours], instance=instance, resources={"io_manager": manager})
            made = {event.asset_key.to_user_string(): event for event in done.get_asset_materialization_events()}
            versions.append(made["price_history"].materialization.tags["dagster/data_version"])
        assert made["price_history"].materialization.metadata["dagster/row_count"].value == 1_752_000
        assert made["price_history"].materialization.metadata["djp/inline"].value is False
        assert made["cheapest_hours"].materialization.metadata["djp/inline"].value is True
    assert versions[0] == versions[1]
    assert set(done.output_for_node("cheapest_hours").columns) == {"product_id", "hour"}


def test_the_logs_are_counted(tmp_path: Path, monkeypatch) -> None:
    """Against pandas, on the lines that are not damaged."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr(access_logs, "_LINES", 500)
    monkeypatch.setattr(access_logs, "_DAMAGED", 0.005)
    monkeypatch.chdir(tmp_path)
    asked = djp.TextFiles(access_logs.pattern())
    monkeypatch.setattr("definitions.logs.paths", asked.paths)
    with dg.DagsterInstance.ephemeral() as instance:
        done = dg.materialize(
            [web_logs, page_views, referrers, visits],
            instance=instance,
            resources={"io_manager": djp.ClaimCheckIOManager(store=djp.LocalPayloadStore(folder=str(tmp_path / "p")))},
        )
    lines = [line for path in sorted(tmp_path.glob("access_logs/*.gz")) for line in gzip_lines(path)]
    hits = pd.DataFrame([access_logs.hit(line) for line in lines if line.endswith('"Mozilla/5.0"')])
    assert 1400 < len(hits) < len(lines) == 1500

    views = done.output_for_node("page_views").set_index("page")["views"]
    assert views.to_dict() == hits["page"].value_counts().to_dict()
    assert "?" not in "".join(views.index)
    sites = done.output_for_node("referrers").set_index("site")["visits"]
    expected = hits["referrer"].str.extract(r"https://([^/]+)/")[0].dropna().value_counts()
    assert sites.to_dict() == expected.to_dict()
    (shown,) = done.asset_materializations_for_node("page_views")
    assert shown.metadata["bad_records"].value == len(lines) - len(hits)

    hits = hits.sort_values(["visitor", "at"])
    begins = hits.groupby("visitor")["at"].diff().fillna(float("inf")) > 1800
    found = done.output_for_node("visits").set_index("visitor")
    assert found["sessions"].to_dict() == begins.groupby(hits["visitor"]).sum().to_dict()
    assert found["pages"].to_dict() == hits["visitor"].value_counts().to_dict()


def gzip_lines(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


def test_sales_count_an_order_once(tmp_path: Path) -> None:
    event_stream = djp.SqlEventStream(url=f"sqlite:///{tmp_path / 'stream.db'}")
    twice = order(product_id="p1", amount=5)
    with event_stream.open() as stream, dg.DagsterInstance.ephemeral() as instance:
        stream.create_topic(orders)
        many = [order(product_id=f"p{n % 3}", amount=n) for n in range(60)]
        stream.publish(orders, [*many, twice, twice, order(product_id="p1", amount=None)])
        manager = djp.ClaimCheckIOManager(store=djp.LocalPayloadStore(folder=str(tmp_path / "p")))
        done = dg.materialize(
            [sales], instance=instance, resources={"event_stream": event_stream, "io_manager": manager}
        )
    table = done.output_for_node("sales").set_index("product_id")["amount"]
    expected = {f"p{rest}": float(sum(range(rest, 60, 3))) for rest in range(3)}
    assert table.to_dict() == {**expected, "p1": expected["p1"] + 5}


def test_a_product_is_created_when_all_its_branches_are_done(tmp_path: Path) -> None:
    data = {"product_id": "p1", "seller": "s1", "title": "red lamp", "price": 9, "images": ["a.png"]}
    submitted = submissions.event(data, video={"format": "mp4", "height": 480})
    with djp.testing.memory_stream() as stream:
        for consumer in catalog.in_order():
            consumer.register(stream)
        stream.publish(submissions, [submitted])
        for consumer in catalog.in_order():
            djp.run_pending(stream, consumer, state_folder=tmp_path)
        (made,) = (record for part in range(2) for record in stream.records(products, part))
        found = djp.trace(stream, catalog, "p1")
    assert made.data == {
        "product_id": "p1",
        "title": "red lamp",
        "seller": "s1",
        "price": 9,
        "tags": ["red", "lamp"],
        "renditions": ["480p", "240p"],
        "thumbnails": ["a@64.png", "a@256.png", "a@1024.png"],
    }
    assert found.complete
    assert [step.status for step in found.steps] == ["done"] * 4


def test_receipts_go_to_the_address_that_is_known(outbox: Path) -> None:
    updates = [
        user_updates.event(user_id="ada", email="new@example.com", version=2),
        user_updates.event(user_id="ada", email="old@example.com", version=1),
        user_updates.event(user_id="bob", email=None, version=1),
    ]
    placed = [order("ada", amount=3.5), order("bob", amount=1), order("eve", amount=1), order("ada")]
    done = run_consumer(send_receipts, placed, tables={user_emails: updates})
    mails = [json.loads(line) for file in outbox.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert mails == [{"to": "new@example.com", "about": f"order {placed[0].id}", "text": "You owe us 3.5."}]
    assert sum(batch.counts["mails"] for batch in done.batches) == 1
    assert sum(batch.counts["users_without_address"] for batch in done.batches) == 2
    assert done.dead_letters == []
