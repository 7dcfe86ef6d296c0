"""Run mode: one run that drains a million events, against one run per event.

Both run in this process on one SQLite instance, so neither pays for a sensor, a queue or a process. For the peer, whose
runs are many, this is the best case; it is timed over a few events and extrapolated.
"""

import shutil
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import dagster as dg

from benchmarks.append import ORDERS
from benchmarks.harness import BATCH, Row, Settings, alternate, order, order_event, rate, seconds
from djp_dagster import Batch, SqlEventStream, build_stream_asset, consumer

EVENTS = 1_000_000
_PEER_EVENTS = 60
_QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}


@consumer(topic=ORDERS)
def total(batch: Batch) -> None:
    """Add up one field, in batches of the default size."""
    amount = 0
    for records in batch.chunks():
        for record in records:
            amount += record.data["amount"]


class OneOrder(dg.Config):
    """The event, as a sensor would hand it to a run."""

    data: dict[str, Any]


@dg.asset
def one_event(context: dg.AssetExecutionContext, config: OneOrder) -> None:
    """Take one field, as the batch's handler does, and say which."""
    context.add_output_metadata({"amount": config.data["amount"]})


def run(settings: Settings) -> list[Row]:
    """One run for all of them; the peer takes turns with it, on the same instance."""
    count, peer_count = settings.events(EVENTS), max(_PEER_EVENTS // settings.scale, 10)
    folder = settings.folder / "drain"
    folder.mkdir()
    resource = SqlEventStream(url=f"sqlite:///{folder / 'stream.db'}", state_folder=str(folder / "state"))
    stream = resource.open()
    try:
        stream.create_topic(ORDERS)
        for start in range(0, count, BATCH):
            stream.publish(ORDERS, [order_event(number) for number in range(start, start + BATCH)])
        total.register(stream)
        with dg.instance_for_test(temp_dir=str(folder)) as instance:
            drain = _Drain(instance, resource, count)
            loops: dict[str, Callable[[], float]] = {
                "ours": drain.once,
                "peer": partial(_one_by_one, instance, peer_count),
            }
            took = alternate(settings.rounds, loops)
        return _rows(took["ours"], took["peer"], count, peer_count, drain)
    finally:
        stream.close()
        shutil.rmtree(folder)


class _Drain:
    """Our side: the asset of the consumer, materialized with everything pending; and what it wrote."""

    def __init__(self, instance: dg.DagsterInstance, resource: SqlEventStream, count: int) -> None:
        self._instance, self._resource, self._count = instance, resource, count
        self._asset = build_stream_asset(total)
        self.materializations: list[dg.AssetMaterialization] = []

    def once(self) -> float:
        """Seconds of one run."""
        self._resource.open().seek(total.group, "earliest")
        results: list[dg.ExecuteInProcessResult] = []
        took = seconds(lambda: results.append(self._materialize()))
        written = [event.materialization for event in results[0].get_asset_materialization_events()]
        assert len(written) == 1
        assert self.figure(written[0], "events") == self._count
        self.materializations += written
        return took

    def _materialize(self) -> dg.ExecuteInProcessResult:
        resources = {"event_stream": self._resource}
        return dg.materialize([self._asset], instance=self._instance, resources=resources, run_config=_QUIET)

    @staticmethod
    def figure(materialization: dg.AssetMaterialization, name: str) -> float:
        """A number of its metadata."""
        value = materialization.metadata[name].value
        assert isinstance(value, int | float)
        return value


def _one_by_one(instance: dg.DagsterInstance, count: int) -> float:
    """Seconds for one run per event, each materializing its asset; the job is made once."""
    job = dg.Definitions(
        assets=[one_event], jobs=[dg.define_asset_job("one_event_job", [one_event])], executor=dg.in_process_executor
    ).resolve_job_def("one_event_job")
    configs = [{**_QUIET, "ops": {"one_event": {"config": {"data": order(number)}}}} for number in range(count)]

    def all_of_them() -> None:
        for config in configs:
            assert job.execute_in_process(run_config=config, instance=instance).success

    return seconds(all_of_them)


def _rows(ours: list[float], peer: list[float], count: int, peer_count: int, drain: _Drain) -> list[Row]:
    mine_s = statistics.median(ours)
    each_s = statistics.median(peer) / peer_count
    ratio = statistics.median(count / mine / (peer_count / theirs) for mine, theirs in zip(ours, peer, strict=True))
    last = drain.materializations[-1]
    batches, batches_s = drain.figure(last, "batches"), drain.figure(last, "seconds")
    core = (
        f"{batches:.0f} batches, {rate(count, batches_s)} ({batches_s:.1f} s); Dagster's run {mine_s - batches_s:.2f} s"
    )
    return [
        Row(
            f"drain {count:,} events: one run / one run per event",
            f"{rate(count, mine_s)} ({mine_s:.1f} s)",
            f"{1 / each_s:.1f} /s ({each_s * count / 3600:.1f} h)",
            f"{ratio:,.0f}x",
        ),
        Row("  the peer's time is extrapolated from", "", f"{peer_count} runs of {each_s * 1e3:.0f} ms"),
        Row("  its one materialization says", core),
    ]
