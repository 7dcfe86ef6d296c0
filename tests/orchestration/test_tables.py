"""Tables as assets: kept up to date by runs, made anew by a person, loaded by other assets, and watched by a check."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import pandas as pd
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream
from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.step import asked_by_hand
from djp_dagster.state.keys import encode_key
from djp_dagster.streams.records import CODEC_CHANGES, EncodedBatch, encode_changes, encode_value
from djp_dagster.testing import Clock
from tests.orchestration.kit import COPIES, FAST, ORDERS, metadata_of, orders, records_of, tick

UPDATES = djp.Topic("updates", partitions=2, key="user")
EMAILS = djp.Table("emails", topic=UPDATES, value="email", sequence="version")


def update(user: str, email: str | None, version: int) -> djp.Event:
    return UPDATES.event(user=user, email=email, version=version)


def publish(stream: EventStream, *updates: djp.Event) -> None:
    stream.create_topic(UPDATES)
    stream.publish(UPDATES, updates)


def materialize(
    *assets: dg.AssetsDefinition,
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    tags: Mapping[str, str] | None = None,
    selection: list[dg.AssetsDefinition] | None = None,
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        list(assets),
        instance=instance,
        resources={"event_stream": resource, "io_manager": dg.InMemoryIOManager()},
        tags=tags,
        selection=selection,
    )


def contents(stream: EventStream, resource: SqlEventStream) -> dict[Any, Any]:
    with stream.view(EMAILS, folder=resource.state_path()) as view:
        return dict(view.items())


def test_its_place_in_the_lineage() -> None:
    asset = djp.build_table_asset(EMAILS, group_name="shop", owners=["team:mail"])
    (spec,) = asset.specs
    assert spec.key == dg.AssetKey("emails")
    assert {dep.asset_key for dep in spec.deps} == {dg.AssetKey(["topics", "updates"])}
    assert spec.kinds == {"python", "table"}
    assert spec.description == "The latest email of each user, from updates."

    @djp.consumer(topic=ORDERS, tables=[EMAILS])
    def mailer(batch: djp.Batch) -> None: ...

    (mails,) = djp.build_stream_asset(mailer).specs
    assert dg.AssetKey("emails") in {dep.asset_key for dep in mails.deps}
    with pytest.raises(InvalidSettingError, match="build_stream_asset"):
        djp.build_table_asset(mailer)  # type: ignore[arg-type]


def test_a_run_of_a_sensor_applies_what_is_pending_and_no_more(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    publish(stream, update("ada", "a@x", 2), update("ada", "old@x", 1), update("bob", "b@x", 1))
    asset = djp.build_table_asset(EMAILS)
    sensor = djp.build_stream_sensor(EMAILS)
    (request,) = tick(sensor, instance, resource).run_requests or []
    assert not asked_by_hand(request.tags)
    result = materialize(asset, instance=instance, resource=resource, tags=request.tags)
    (figures,) = metadata_of(result)
    assert figures["updates"].value == 3
    assert "corrected_keys" not in figures
    assert contents(stream, resource) == {"ada": "a@x", "bob": "b@x"}


def test_materialize_makes_it_anew_and_corrects_what_is_wrong(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    publish(stream, update("ada", "a@x", 1), update("bob", "b@x", 1), update("bob", None, 2))
    asset = djp.build_table_asset(EMAILS)
    (figures,) = metadata_of(materialize(asset, instance=instance, resource=resource))
    assert figures["corrected_keys"].value == 0
    assert figures["keys"].value == 2, "a deleted one stays, as nothing"
    # Somebody has tampered with the changelog.
    task = UPDATES.partition_of(update("ada", "", 0))
    wrong = [(encode_key("ada"), encode_value([9, "evil@x"])), (encode_key("ghost"), encode_value([1, "g@x"]))]
    stream.log.append([EncodedBatch("__changelog.emails", task, 2, encode_changes(wrong), CODEC_CHANGES)])
    assert contents(stream, resource) == {"ada": "evil@x", "ghost": "g@x"}
    (figures,) = metadata_of(materialize(asset, instance=instance, resource=resource))
    assert figures["corrected_keys"].value == 2
    assert contents(stream, resource) == {"ada": "a@x"}


def test_other_assets_load_it_as_a_frame_or_a_dict(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    publish(stream, update("ada", "a@x", 1), update("bob", "b@x", 1))
    seen: dict[str, Any] = {}

    @dg.asset(ins={"table": dg.AssetIn("emails")})
    def frame(table: pd.DataFrame) -> None:
        seen["frame"] = dict(zip(table["key"], table["value"], strict=True))

    @dg.asset(ins={"table": dg.AssetIn("emails")})
    def mapping(table: dict[str, str]) -> None:
        seen["mapping"] = table

    @dg.asset(ins={"table": dg.AssetIn("emails")})
    def wrong(table: list[str]) -> None: ...

    asset = djp.build_table_asset(EMAILS)
    materialize(asset, frame, mapping, instance=instance, resource=resource)
    assert seen == {key: {"ada": "a@x", "bob": "b@x"} for key in ("frame", "mapping")}
    publish(stream, update("ada", "new@x", 2))
    djp.run_pending(stream, EMAILS, state_folder=resource.state_path())
    materialize(asset, frame, mapping, instance=instance, resource=resource, selection=[frame])
    assert seen["frame"] == {"ada": "new@x", "bob": "b@x"}, "as it is when it is loaded"
    with pytest.raises(InvalidSettingError, match=r"pd\.DataFrame or dict"):
        materialize(asset, wrong, instance=instance, resource=resource, selection=[wrong])


def test_a_handler_in_a_run_reads_it(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream
) -> None:
    @djp.consumer(topic=ORDERS, emits=[COPIES], tables=[EMAILS], retry=FAST)
    def mailer(batch: djp.Batch) -> None:
        view = batch.table(EMAILS)
        for order in batch:
            batch.emit(COPIES.event(to=view.get(order.data["user"])))
        batch.gauge("staleness_seconds", round(view.staleness_s, 3))

    publish(stream, update("user-1", "one@x", 1))
    djp.run_pending(stream, EMAILS, state_folder=resource.state_path())
    stream.create_topic(ORDERS)
    stream.publish(ORDERS, orders(3))
    result = materialize(djp.build_stream_asset(mailer), instance=instance, resource=resource)
    (figures,) = metadata_of(result)
    assert figures["staleness_seconds"].value == 0
    assert sorted(str(record.data["to"]) for record in records_of(stream, COPIES)) == ["None", "None", "one@x"]


def test_the_check_says_whether_it_is_fresh(timed: EventStream, clock: Clock) -> None:
    from djp_dagster.orchestration.checks import evaluate

    checks = djp.build_stream_checks(EMAILS, fresh_within="10s")
    (spec,) = (spec for spec in checks.check_specs if spec.name == "fresh")
    assert evaluate(timed, spec).passed, "nothing has run yet"
    EMAILS.register(timed)
    timed.publish(UPDATES, [update("ada", "a@x", 1)])
    clock.advance(9)
    assert evaluate(timed, spec).passed
    clock.advance(2)
    verdict = evaluate(timed, spec)
    assert not verdict.passed
    assert verdict.description == "it lacks events up to 11 s old"
    assert verdict.metadata["staleness_seconds"] == 11.0


def test_who_asked() -> None:
    assert asked_by_hand({})
    assert asked_by_hand({"dagster/partition": "x"})
    for tag in ("djp/reason", "dagster/sensor_name", "dagster/schedule_name", "dagster/from_automation_condition"):
        assert not asked_by_hand({tag: "x"})
