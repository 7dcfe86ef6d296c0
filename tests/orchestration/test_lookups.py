"""Look-ups as resources: figures in the metadata of runs, secrets nowhere, settings checked in time."""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import dagster as dg
import pytest
from dagster._core.utils import make_new_run_id

import djp_dagster as djp
from djp_dagster import EventStream, SqlEventStream
from djp_dagster.errors import InvalidSettingError
from djp_dagster.orchestration.tags import owner_of
from tests.lookups.kit import Users, wait_until
from tests.orchestration.kit import COPIES, FAST, ORDERS, metadata_of, publish, records_of
from tests.processing.kit import in_thread
from tests.servers.scripted_http import Answer, ScriptedHttp

TOKEN = "t0ken-2f8e-of-the-environment"
PASSWORD = "passw0rd-61bd"


@djp.consumer(topic=ORDERS, emits=[COPIES], group="named", retry=FAST)
def named(batch: djp.Batch, users: djp.LookupResource) -> dict[str, int]:
    """Orders with the names of their users."""
    known = users.get_many(record.data["user"] for record in batch)
    for record in batch:
        batch.emit(COPIES.event(n=record.data["n"], name=known[record.data["user"]]["name"]))
    return {"users": len(known)}


@pytest.fixture
def server() -> Iterator[ScriptedHttp]:
    with ScriptedHttp(Users([f"user-{number}" for number in range(7)])) as started:
        yield started


def users_of(server: ScriptedHttp, **more: Any) -> djp.HttpLookup:
    return djp.HttpLookup(
        **{"base_url": server.url, "path": "/users/{key}", "bulk_path": "/users", "first_pause": "1ms", **more}
    )


def materialize(
    resource: SqlEventStream,
    users: Any,
    instance: dg.DagsterInstance,
    *,
    consumer: djp.Consumer = named,
    raise_on_error: bool = True,
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [djp.build_stream_asset(consumer)],
        instance=instance,
        resources={"event_stream": resource, "users": users, "io_manager": dg.mem_io_manager},
        raise_on_error=raise_on_error,
    )


def all_told(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> str:
    """Everything that Dagster keeps of a run: events with metadata and errors, logs, its configuration and tags."""
    entries = instance.all_logs(result.run_id)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    snapshot = instance.get_job_snapshot(run.job_snapshot_id or "")
    texts = [dg.serialize_value(entry) for entry in entries] + [str(entry) for entry in entries]
    return "\n".join([*texts, json.dumps(run.run_config), str(run.tags), repr(run), dg.serialize_value(snapshot)])


def names(stream: EventStream) -> list[str]:
    return sorted(record.data["name"] for record in records_of(stream, COPIES))


def test_figures_in_the_metadata(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, server: ScriptedHttp
) -> None:
    publish(stream, 50)
    server.script(Answer(503))
    result = materialize(resource, users_of(server, bulk_size=5), instance)
    (figures,) = metadata_of(result)
    told = {name: figure.value for name, figure in figures.items() if name.startswith("users_")}
    measures = {name: told.pop(name) for name in ("users_p50_seconds", "users_p99_seconds", "users_wait_seconds")}
    assert told == {
        "users_calls": 3,
        "users_keys": 50,
        "users_fetched": 12 if _first_was_full(server) else 9,
        "users_failures": 1,
        "users_retries": 1,
        "users_keys_per_call": 4.0 if _first_was_full(server) else 3.0,
        "users_breaker_open": 0.0,
    }
    assert len(server.requests) == 3
    assert all(isinstance(figures[name], dg.FloatMetadataValue) for name in measures)
    assert all(isinstance(figures[name], dg.IntMetadataValue) for name in ("users_calls", "users_keys"))
    assert names(stream) == sorted(f"user user-{n % 7}" for n in range(50))


def _first_was_full(server: ScriptedHttp) -> bool:
    """Whether the call that failed was the one with five keys, or the one with two: they begin together."""
    return Counter(len(request.query["ids"].split(",")) for request in server.requests)[5] == 2


@pytest.mark.parametrize("fails", [None, 401, 400, 503], ids=str)
def test_a_token_of_the_environment_is_used_and_not_told(
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    stream: EventStream,
    server: ScriptedHttp,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: int | None,
) -> None:
    monkeypatch.setenv("USERS_TOKEN", TOKEN)
    monkeypatch.setenv("USERS_KEY", PASSWORD)
    publish(stream, 10)
    if fails is not None:
        server.responder = lambda _: Answer(fails)
    users = users_of(server, token=dg.EnvVar("USERS_TOKEN"), headers={"X-Key": dg.EnvVar("USERS_KEY")}, attempts=1)
    with caplog.at_level(logging.DEBUG):
        result = materialize(resource, users, instance, raise_on_error=False)
    assert result.success is (fails in (None, 400)), "what is refused is dead-lettered, and no reason to fail"
    assert {request.headers["Authorization"] for request in server.requests} == {f"Bearer {TOKEN}"}
    assert {request.headers["X-Key"] for request in server.requests} == {PASSWORD}
    told = all_told(instance, result) + caplog.text + repr(stream.dead_letters("named"))
    assert "users" in told
    if fails is not None:
        assert f"answered {fails} to GET /users" in told
    assert TOKEN not in told
    assert PASSWORD not in told


def test_an_address_of_the_environment_with_a_password(
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    stream: EventStream,
    server: ScriptedHttp,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("USERS_URL", server.url.replace("http://", f"http://ada:{PASSWORD}@"))
    publish(stream, 10)
    with caplog.at_level(logging.DEBUG):
        result = materialize(resource, users_of(server, base_url=dg.EnvVar("USERS_URL")), instance)
    assert server.requests[0].headers["Authorization"].startswith("Basic ")
    assert PASSWORD not in all_told(instance, result) + caplog.text


def test_what_was_opened_is_closed_with_the_run(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, server: ScriptedHttp
) -> None:
    publish(stream, 50)
    users = users_of(server, bulk_size=1, rate_limit=10_000.0)
    materialize(resource, users, instance)
    assert users._lookup is None, "a run has a copy of its own"
    assert len(server.requests) == 7
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("djp-lookup")], "its threads")
    wait_until(lambda: server.open_connections == 0, "the end of its connections")


def test_it_loads_in_definitions_and_runs_in_a_job(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, server: ScriptedHttp
) -> None:
    publish(stream, 10)
    asset = djp.build_stream_asset(named)
    defs = dg.Definitions(
        assets=[asset],
        sensors=[djp.build_stream_sensor(named)],
        resources={"event_stream": resource, "users": users_of(server, token=dg.EnvVar("USERS_TOKEN"))},
        jobs=[dg.define_asset_job("naming", [asset])],
    )
    dg.Definitions.validate_loadable(defs)
    assert defs.resolve_job_def("naming").resource_defs.keys() >= {"event_stream", "users"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERS_TOKEN", TOKEN)
        assert defs.resolve_job_def("naming").execute_in_process(instance=instance).success
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
    built = djp.build_defs(named, stream=resource, resources={"users": users_of(server)}, mode="worker")
    dg.Definitions.validate_loadable(built)


class Names(djp.LookupResource):
    """A look-up of something else than HTTP."""

    greeting: str

    def fetch_many(self, keys: Sequence[str | int]) -> Mapping[str | int, Any]:
        return {key: {"name": f"{self.greeting} {key}"} for key in keys}


def test_a_subclass_with_a_fetch_of_its_own(
    instance: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GREETING", "dear")
    publish(stream, 20)
    result = materialize(resource, Names(greeting=dg.EnvVar("GREETING"), bulk_size=3), instance)
    assert names(stream) == sorted(f"dear user-{n % 7}" for n in range(20))
    (figures,) = metadata_of(result)
    assert figures["users_calls"].value == 3
    with pytest.raises(NotImplementedError, match="LookupResource needs a method fetch_many"):
        djp.LookupResource().get(1)


@pytest.mark.parametrize(
    "wrong",
    [{"base_url": "users.internal"}, {"path": "/users"}, {"bulk_size": 0}, {"give_up_after": "soon"}, {"token": "a\n"}],
)
def test_wrong_settings_fail_before_anything_is_leased(
    instance: dg.DagsterInstance,
    resource: SqlEventStream,
    stream: EventStream,
    server: ScriptedHttp,
    wrong: dict[str, Any],
) -> None:
    publish(stream, 3)
    with pytest.raises(dg.DagsterResourceFunctionError) as caught:
        materialize(resource, users_of(server, **wrong), instance)
    assert isinstance(caught.value.__cause__, InvalidSettingError)
    assert "named" not in {group.name for group in stream.groups()}


def test_a_worker_run_asks_it_too(
    lasting: dg.DagsterInstance, resource: SqlEventStream, stream: EventStream, server: ScriptedHttp
) -> None:
    job = djp.build_worker_sensor([named], name="shop").job
    assert isinstance(job, dg.JobDefinition)
    run_id = make_new_run_id()

    def work() -> bool:
        resources = {"event_stream": resource, "users": users_of(server)}
        return job.execute_in_process(instance=lasting, resources=resources, run_id=run_id).success

    with in_thread(work) as outcome:
        for round_of in range(2):
            publish(stream, 10, start=10 * round_of)
            so_far = 10 * (round_of + 1)
            wait_until(partial(_are_named, stream, so_far), f"{so_far} orders")
        stream.coordinator.ask_to_leave("named", owner_of(run_id))
    assert outcome == [True]
    figures = [event.materialization.metadata for event in materializations(lasting, run_id)]
    assert sum(one["users_calls"].value for one in figures) == len(server.requests) >= 2
    assert sum(one["users_keys"].value for one in figures) == 20


def _are_named(stream: EventStream, number: int) -> bool:
    return len(names(stream)) == number


def materializations(instance: dg.DagsterInstance, run_id: str) -> list[Any]:
    events = [entry.dagster_event for entry in instance.all_logs(run_id, dg.DagsterEventType.ASSET_MATERIALIZATION)]
    return [event.step_materialization_data for event in events if event is not None]
