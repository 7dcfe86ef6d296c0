"""Worker mode inside a run: one op that stays, works in milliseconds, and leaves in order.

It leaves when it is terminated (after the batch under way, which it commits), when another worker run takes over, and
when Dagster holds its run for finished although it is not (it was reported dead while its process stood still). The
handlers run in the main thread, as in run mode; a second thread watches for batches that take too long.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

import dagster as dg
from pydantic import Field

from djp_dagster.errors import DjpError
from djp_dagster.orchestration.metadata import Tally
from djp_dagster.orchestration.step import backlog_of
from djp_dagster.orchestration.tags import CODE_TAG, STREAM_KEY, owner_of
from djp_dagster.processing.consumer import Consumer
from djp_dagster.processing.reports import BatchReport
from djp_dagster.processing.stopping import SignalledEvent
from djp_dagster.processing.worker import Worker
from djp_dagster.resources.event_stream import SqlEventStream
from djp_dagster.streams.stream import EventStream
from djp_dagster.units import Duration, parse_seconds

_log = logging.getLogger(__name__)
_LOOK_AT_RUN_S = 5.0


class WorkerConfig(dg.Config):
    """How a worker run works. The worker sensor fills it in."""

    lease: str = Field(default="5s", description="How long the tasks of a dead worker stay blocked.")
    report_every: str = Field(default="30s", description="At most one materialization per consumer in this time.")
    stuck_after: str = Field(default="10min", description="A batch that takes longer is reported in the run's log.")
    replaces: list[str] = Field(default=[], description="Runs that leave once this one is ready.")


def work(
    context: dg.OpExecutionContext,
    consumers: Sequence[Consumer],
    keys: Mapping[str, dg.AssetKey],
    code_version: str,
    config: WorkerConfig,
) -> None:
    """Work until terminated or replaced.

    Args:
        context: the op's.
        consumers: what to run.
        keys: the asset of each group.
        code_version: of this process's consumers.
        config: how.

    Raises:
        DagsterExecutionInterruptedError: terminated through Dagster; the batch under way was finished first.
    """
    resource: SqlEventStream = getattr(context.resources, STREAM_KEY)
    stream = resource.open()
    context.instance.add_run_tags(context.run.run_id, {CODE_TAG: code_version})
    summaries = Summaries(context, stream, keys, parse_seconds(config.report_every, name="report_every"))
    stop = SignalledEvent()
    worker = Worker(
        stream,
        consumers,
        resources={name: getattr(context.resources, name) for one in consumers for name in one.resource_names},
        state_folder=resource.state_path(),
        lease=config.lease,
        on_report=summaries.add,
        on_failure=lambda consumer, error: _say_paused(context, consumer, error),
        on_beat=_Beat(context, summaries, stop),
        owner=owner_of(context.run.run_id),
        replaces=[owner_of(run_id) for run_id in config.replaces],
    )
    with _stopping_at_signals(stop) as signals, Watchdog(context, worker, config.stuck_after):
        try:
            worker.run(stop)
        finally:
            summaries.tell(all_of_it=True)
    if worker.replaced:
        context.log.info("another worker run has taken over")
    elif signals or stop.is_set():
        _end(context)


def _end(context: dg.OpExecutionContext) -> None:
    """End as Dagster expects it: interrupted if somebody asked Dagster to terminate the run, else in order."""
    run = context.instance.get_run_by_id(context.run.run_id)
    if run is not None and run.status == dg.DagsterRunStatus.CANCELING:
        raise dg.DagsterExecutionInterruptedError
    context.log.info("told to end; everything was given back")


class Summaries:
    """Adds up what was committed, and materializes it: at once the first time, then at most once per ``every_s``."""

    def __init__(
        self, context: dg.OpExecutionContext, stream: EventStream, keys: Mapping[str, dg.AssetKey], every_s: float
    ) -> None:
        self._context, self._stream, self._keys, self._every_s = context, stream, keys, every_s
        self._tallies: dict[str, Tally] = {}
        self._gauges: dict[str, dict[tuple[int, str], float]] = {}
        self._told_at: dict[str, float] = {}

    def add(self, report: BatchReport) -> None:
        """Count a batch."""
        tally = self._tallies.get(report.group)
        if tally is None:
            tally = self._tallies[report.group] = Tally(self._gauges.setdefault(report.group, {}))
        tally.add(report)

    def tell(self, *, all_of_it: bool = False) -> None:
        """Materialize what is due."""
        now = time.monotonic()
        for group in list(self._tallies):
            if all_of_it or now - self._told_at.get(group, -self._every_s) >= self._every_s:
                metadata = self._tallies[group].metadata(backlog_of(self._stream, group))
                self._context.log_event(dg.AssetMaterialization(self._keys[group], metadata=metadata))
                del self._tallies[group]  # now: what Dagster could not take is told later
                # It is in the event log; the op would keep a copy for as long as it lives.
                list(self._context.consume_events())
                self._told_at[group] = now


class _Beat:
    """What a worker does between batches: tell what is due, and look whether its run is still wanted.

    A signal can get lost: nobody is left to send it once the run's code server is gone.
    """

    def __init__(self, context: dg.OpExecutionContext, summaries: Summaries, stop: threading.Event) -> None:
        self._context, self._summaries, self._stop = context, summaries, stop
        self._looked_at = time.monotonic()

    def __call__(self) -> None:
        with _whether_dagster_listens_or_not():  # what could not be told is told at the next beat
            self._beat()

    def _beat(self) -> None:
        self._summaries.tell()
        if time.monotonic() - self._looked_at < _LOOK_AT_RUN_S:
            return
        self._looked_at = time.monotonic()
        run = self._context.instance.get_run_by_id(self._context.run.run_id)
        if run is None or run.is_finished:
            self._context.log.warning("Dagster holds this run for finished: the worker ends")
            self._stop.set()
        elif run.status == dg.DagsterRunStatus.CANCELING:
            self._stop.set()


class Watchdog:
    """Makes silence visible: an error in the run's log for each batch that takes longer than ``stuck_after``.

    Use it as a context manager; leaving ends its thread.
    """

    def __init__(self, context: dg.OpExecutionContext, worker: Worker, stuck_after: Duration) -> None:
        self._log, self._worker = context.log, worker
        self._stuck_after_s = parse_seconds(stuck_after, name="stuck_after")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="djp-watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        told: str | None = None
        while not self._stop.wait(min(self._stuck_after_s / 4, 5.0)):
            busy = self._worker.busy
            if busy is None or busy.batch_id == told:
                continue
            seconds = time.monotonic() - busy.since
            if seconds > self._stuck_after_s:
                with _whether_dagster_listens_or_not():
                    self._log.error(
                        "batch %s of group %s has been under way for %.0f s; its handler may hang: terminate this run "
                        "to free its tasks",
                        busy.batch_id,
                        busy.group,
                        seconds,
                    )
                    told = busy.batch_id


def _say_paused(context: dg.OpExecutionContext, consumer: Consumer, error: DjpError) -> None:
    with _whether_dagster_listens_or_not():
        context.log.error("consumer %s pauses and is tried again later: %s", consumer.group, error, exc_info=error)


@contextlib.contextmanager
def _whether_dagster_listens_or_not() -> Iterator[None]:
    """What the block tells Dagster may fail, for Dagster's storage is away or busy: the work goes on."""
    try:
        yield
    except Exception:  # noqa: BLE001
        _log.warning("a worker could not tell Dagster what it does, and goes on", exc_info=True)


@contextlib.contextmanager
def _stopping_at_signals(stop: threading.Event) -> Iterator[list[int]]:
    """While the block runs, the first signal to end sets ``stop``; a second one interrupts at once.

    Dagster terminates a run by one SIGINT, and would raise in the middle of whatever runs.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        stop.set()
        if len(seen) > 1:
            raise dg.DagsterExecutionInterruptedError

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
