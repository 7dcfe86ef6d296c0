"""Collection from Dagster: op, job, asset, schedule; dry unless told."""

import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream
from djp_dagster.claim_check.condemned import Condemned, Sentence
from djp_dagster.claim_check.pointers import values_of


@pytest.fixture
def values(tmp_path: Path) -> djp.LocalPayloadStore:
    return djp.LocalPayloadStore(folder=str(tmp_path / "values"))


def outdate(store: djp.PayloadStore) -> None:
    """Make every payload, and every entry of the list of the condemned, three days older."""
    folder = Path(store.objects.folder)  # type: ignore[attr-defined]
    old = time.time() - 3 * 86_400
    for path in folder.rglob("*"):
        if path.is_file() and "sha256" in path.parts:
            os.utime(path, (old, old))

    def earlier(sentences: dict[str, Sentence]) -> bool:
        for key, found in sentences.items():
            since = None if found.since is None else found.since - 3 * 86_400
            sentences[key] = Sentence(since, found.deleting, found.confirmed, found.by)
        return True

    Condemned(store.objects).change(earlier)


def keys(store: djp.PayloadStore) -> set[str]:
    return {found.key for found in store.objects.list() if "sha256/" in found.key}


def run(job: dg.JobDefinition, resource: SqlEventStream, config: dict[str, Any]) -> dict[str, Any]:
    done = job.execute_in_process(
        run_config={"ops": {f"{job.name}_op": {"config": config}}}, resources={"event_stream": resource}
    )
    (event,) = [e for e in done.all_events if e.event_type_value == "STEP_OUTPUT"]
    return dict(event.step_output_data.metadata)


def test_garbage_is_gone_after_some_runs_and_nothing_else(
    stream: EventStream, resource: SqlEventStream, values: djp.LocalPayloadStore
) -> None:
    uploads = djp.Topic("uploads", offload_above=100)
    stream.create_topic(uploads)
    stream.publish(uploads, [uploads.event(x="x" * 1000)])
    garbage = stream.payloads.put(b"nothing refers to this").ref.key

    @dg.asset
    def numbers() -> bytes:
        return os.urandom(300_000)

    manager = djp.ClaimCheckIOManager(store=values)
    for _ in range(2):
        assert dg.materialize([numbers], resources={"io_manager": manager}).success
    kept = values_of(values.open())
    everything = keys(stream.payloads), keys(kept)
    assert (len(everything[0]), len(everything[1])) == (2, 2)
    job = djp.build_claim_gc_job(values=values)
    for store in (stream.payloads, kept):
        outdate(store)
    shown = run(job, resource, {})
    assert shown["condemned"].value == 2
    assert shown["in use"].value == 2
    assert len(shown["garbage"].records) == 2
    assert (keys(stream.payloads), keys(kept)) == everything
    for _ in range(6):
        run(job, resource, {"dry_run": False})
        for store in (stream.payloads, kept):
            outdate(store)
    assert keys(stream.payloads) == everything[0] - {garbage}
    assert len(keys(kept)) == 1
    (record,) = stream.records(uploads, 0)
    assert record.data == {"x": "x" * 1000}


def test_the_asset_plots_and_the_schedule_is_off(stream: EventStream, resource: SqlEventStream) -> None:
    stream.payloads.put(b"x")
    asset = djp.build_claim_gc_asset(with_values=False, group_name="shop")
    done = dg.materialize([asset], resources={"event_stream": resource})
    (made,) = done.asset_materializations_for_node("claim_gc")
    assert made.metadata["payloads"].value == 1
    assert made.metadata["dry run"].value is True
    schedule = djp.build_claim_gc_schedule()
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    context = dg.build_schedule_context()
    (request,) = schedule.evaluate_tick(context).run_requests or ()
    assert request.run_config == {"ops": {"claim_gc_job_op": {"config": {"dry_run": False, "grace": "1d"}}}}


def test_the_launchpad_is_filled_with_a_dry_run_and_with_nothing_else(
    stream: EventStream, resource: SqlEventStream
) -> None:
    stream.payloads.put(b"x")
    job = djp.build_claim_gc_job(with_values=False)
    assert job.run_config == {"ops": {"claim_gc_job_op": {"config": {"dry_run": True, "grace": "1d"}}}}
    done = job.execute_in_process(resources={"event_stream": resource})
    (event,) = [e for e in done.all_events if e.event_type_value == "STEP_OUTPUT"]
    assert event.step_output_data.metadata["dry run"].value is True
