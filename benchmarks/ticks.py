"""The tick functions of a stream sensor and of a worker sensor, with little and with much to look at.

Timed is the function of the sensor, with its resources given: what the sensor's own code costs. What Dagster adds
(`evaluate_tick`: making the resources, checking the request) and what a process does once are rows of their own.
Instance and stream are SQLite. Past runs are rows with the tags that a run of either sensor has: the group's, a digest
of their own, the worker's, and Dagster's.
"""

import shutil
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import dagster as dg
from dagster._core.definitions.sensor_definition import SensorExecutionData

from benchmarks.harness import Row, Settings, alternate
from benchmarks.pending import PARTITIONS, fill
from djp_dagster import (
    Batch,
    SqlEventStream,
    Topic,
    build_stream_sensor,
    build_worker_sensor,
    consumer,
    open_stream,
)
from djp_dagster.orchestration.tags import DIGEST_TAG, STREAM_KEY, owner_of
from djp_dagster.processing.leases import new_owner

TICKS = Topic("ticks", partitions=PARTITIONS, key="k")
_CALLS = 41
_ENOUGH_S = 10.0
_LIMIT_S = 0.02
_LONG_S = 3_600.0


@consumer(topic=TICKS)
def waiting(batch: Batch) -> None:
    """Has everything to do."""
    raise AssertionError("nobody runs it")


@consumer(topic=TICKS, start="latest")
def done(batch: Batch) -> None:
    """Has nothing to do."""
    raise AssertionError("nobody runs it")


class World(NamedTuple):
    """An instance with so many past runs, and a stream with so many events pending."""

    label: str
    instance: dg.DagsterInstance
    resource: SqlEventStream
    opened_s: float
    """What a process pays once, at its first tick."""

    def tick(self, sensor: dg.SensorDefinition) -> SensorExecutionData:
        """A tick with all that Dagster does for it in the code server."""
        with dg.build_sensor_context(instance=self.instance, resources={STREAM_KEY: self.resource}) as context:
            return sensor.evaluate_tick(context)

    def asked(self, sensor: dg.SensorDefinition) -> dict[str, str]:
        """The tags of the run that the sensor asks for."""
        (request,) = self.tick(sensor).run_requests or ()
        return dict(request.tags)


class State(NamedTuple):
    """A sensor, and whether it is to ask for a run in the state that the world is in."""

    what: str
    sensor: dg.SensorDefinition
    asks: bool


def run(settings: Settings) -> list[Row]:
    """10 thousand events and no past run against 10 million events and 5,000 past runs; the worlds take turns."""
    streaming, idle, worker = build_stream_sensor(waiting), build_stream_sensor(done), build_worker_sensor([waiting])
    due = State("stream sensor, a run is due", streaming, True)
    launch = State("worker sensor, a worker is missing", worker, True)
    free = [State("stream sensor, nothing is pending", idle, False), due, launch]
    busy = [
        State("stream sensor, its run is at work", streaming, False),
        State("worker sensor, its worker is at work", worker, False),
    ]
    few, many = (10_000, 0), (settings.events(10_000_000), 5_000 // settings.scale)
    with ExitStack() as stack:
        worlds = [stack.enter_context(_world(settings, *size)) for size in (few, many)]
        for world, (_, past_runs) in zip(worlds, (few, many), strict=True):
            tags = {**world.asked(streaming), **world.asked(worker)}
            for number in range(past_runs):
                world.instance.add_run(_past_run(number, tags))
        rows = _rows(worlds, free, settings.rounds)
        around = _rows(worlds, [due, launch], settings.rounds, whole=True)
        for world in worlds:
            for tags in (world.asked(streaming), world.asked(worker)):
                _put_to_work(world, tags)
        rows += _rows(worlds, busy, settings.rounds)
        opened_s = statistics.median(world.opened_s for world in worlds)
    return [*rows, *around, Row("  once per process: opening the stream", _ms(opened_s))]


@contextmanager
def _world(settings: Settings, events: int, past_runs: int) -> Iterator[World]:
    """Made for the block; the files are removed afterwards. The runs are still to be added."""
    folder = settings.folder / f"ticks-{events}"
    folder.mkdir()
    path = folder / "stream.db"
    with open_stream(path) as stream:
        waiting.register(stream)
        filled = fill(stream, TICKS, events)
        done.register(stream)
    started = time.perf_counter()
    with open_stream(path):
        opened_s = time.perf_counter() - started
    resource = SqlEventStream(url=f"sqlite:///{path}")
    with dg.instance_for_test(temp_dir=str(folder)) as instance:
        try:
            yield World(f"{filled:,} events, {past_runs:,} past runs", instance, resource, opened_s)
        finally:
            resource.open().close()
    shutil.rmtree(folder)


def _past_run(number: int, tags: dict[str, str]) -> dg.DagsterRun:
    digest = f"{number:016x}"
    mine = {
        **tags,
        DIGEST_TAG: digest,
        "djp/batch_id": f"{waiting.group}-{number}",
        "dagster/run_key": f"{waiting.group}:{digest}:first",
        "dagster/sensor_name": "waiting_sensor",
        "dagster/code_location": "shop.py",
        ".dagster/repository": "__repository__@shop.py",
    }
    status = dg.DagsterRunStatus.FAILURE if number % 50 == 0 else dg.DagsterRunStatus.SUCCESS
    return dg.DagsterRun(job_name="waiting_job", run_id=str(uuid.uuid4()), status=status, tags=mine)


def _put_to_work(world: World, tags: dict[str, str]) -> None:
    """A run under way that is there, and holds every task of the group if nobody does."""
    run = dg.DagsterRun(job_name="waiting_job", run_id=str(uuid.uuid4()), status=dg.DagsterRunStatus.STARTED, tags=tags)
    world.instance.add_run(run)
    coordinator, owner = world.resource.open().coordinator, new_owner(owner_of(run.run_id))
    coordinator.join(waiting.group, owner, _LONG_S)
    if all(task.worth_asking for task in coordinator.tasks(waiting.group)):
        coordinator.acquire(waiting.group, None, owner, _LONG_S)


def _rows(worlds: Sequence[World], states: Sequence[State], rounds: int, *, whole: bool = False) -> list[Row]:
    timed = _whole_s if whole else _function_s
    rows = []
    for state in states:
        loops = {world.label: partial(timed, world, state) for world in worlds}
        title = f"  with Dagster's part of it: {state.what}" if whole else f"tick: {state.what}"
        for label, took in alternate(rounds, loops).items():
            found = statistics.median(took)
            target, met = ("", None) if whole else (f"≤ {_LIMIT_S * 1e3:.0f} ms", found <= _LIMIT_S)
            rows.append(Row(f"{title}; {label}", _ms(found), "", "", target, met))
    return rows


def _function_s(world: World, state: State) -> float:
    """The function alone, in a context whose resources were made before; the median of many calls."""
    told = world.tick(state.sensor)
    assert bool(told.run_requests) == state.asks, f"{state.what}: {told.skip_message or told.run_requests}"
    took = []
    with dg.build_sensor_context(instance=world.instance, resources={STREAM_KEY: world.resource}) as context:
        for _ in range(_CALLS):
            started = time.perf_counter()
            state.sensor(context)
            took.append(time.perf_counter() - started)
            if sum(took) > _ENOUGH_S:
                break
    return statistics.median(took)


def _whole_s(world: World, state: State) -> float:
    """The same with the context, the resources, and what Dagster checks of the answer."""
    took = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        world.tick(state.sensor)
        took.append(time.perf_counter() - started)
        if sum(took) > _ENOUGH_S:
            break
    return statistics.median(took)


def _ms(duration_s: float) -> str:
    return f"{duration_s * 1e3:.1f} ms"
