"""`Dask`: the workers of a Dask cluster. Needs the extra ``dask``.

Functions and answers travel through Dask; what is shuffled goes through the work place, which every worker must reach.
Dask starts a task again by itself if its worker dies, and gives it up if that happens too often.
"""

import queue
import time
import traceback
import uuid
from collections.abc import Sequence
from typing import Any

from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.engines.base import Alive, Attempt, Died, Done, News, Raised, Setup, perform, place_of
from djp_dagster.mapreduce.engines.processes import dumps_by_value
from djp_dagster.mapreduce.place import WorkPlace

_BEAT_S = 1.0
_setups: dict[str, tuple[Setup, WorkPlace]] = {}


class Dask:
    """Tasks run on the workers of a Dask cluster. Give ``work=`` a place that all of them reach.

    See `Engine`.

    Args:
        cluster: the scheduler's address, or a ``distributed.Client``, which stays open.

    Raises:
        InvalidSettingError: ``distributed`` is not installed.
    """

    name = "dask"
    can_kill = True
    shares_disks = False

    def __init__(self, cluster: Any) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise InvalidSettingError(
                "engine Dask needs Dask: pip install 'djp-dagster[dask]'", setting="engine", value="dask"
            ) from error
        self._own = isinstance(cluster, str)
        self._client: Any = Client(cluster) if isinstance(cluster, str) else cluster
        self.slots = max(1, sum(self._client.nthreads().values()))
        self._job = ""
        self._setup = b""
        self._running: dict[str, tuple[Attempt, Any]] = {}
        self._inbox: queue.SimpleQueue[str | tuple[str, int]] = queue.SimpleQueue()

    def start(self, setup: Setup) -> None:
        """See `Engine`."""
        # With each task, not scattered: what is scattered is lost if all workers die at once.
        self._setup = dumps_by_value(setup)
        self._job = uuid.uuid4().hex
        self._client.subscribe_topic(self._job, lambda event: self._inbox.put(event[1]))

    def submit(self, attempt: Attempt) -> None:
        """See `Engine`."""
        key = f"{self._job}-{attempt.id}"
        future = self._client.submit(_remote, self._job, self._setup, attempt, key=key, pure=False)
        self._running[attempt.id] = attempt, future
        future.add_done_callback(lambda _: self._inbox.put(attempt.id))

    def news(self, timeout_s: float) -> Sequence[News]:
        """See `Engine`."""
        found: list[News] = []
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                heard = self._inbox.get(timeout=0 if found else max(0.001, give_up - time.monotonic()))
            except queue.Empty:
                return found
            name, records = (heard, -1) if isinstance(heard, str) else heard
            if name not in self._running:
                continue
            attempt, future = self._running[name]
            if records >= 0:
                found.append(Alive(attempt, records))
            else:
                del self._running[name]
                found += _outcome(attempt, future)

    def cancel(self, attempt: Attempt) -> None:
        """See `Engine`. What a worker has begun it ends; nobody waits for it."""
        known = self._running.pop(attempt.id, None)
        if known is not None:
            known[1].cancel()

    def close(self) -> None:
        """See `Engine`."""
        running, self._running = self._running, {}
        for _, future in running.values():
            future.cancel()
        if self._job:
            self._client.unsubscribe_topic(self._job)
            self._job = ""
        if self._own:
            self._client.close()


def _outcome(attempt: Attempt, future: Any) -> list[News]:
    from distributed.scheduler import KilledWorker

    if future.status == "finished":
        result: Done | Raised = future.result()
        return [result]
    if future.status == "cancelled":
        return [Died(attempt, "Dask cancelled it")]
    error: BaseException = future.exception()
    if isinstance(error, KilledWorker):
        return [Died(attempt, "the workers of Dask that had it died")]
    return [Raised(attempt, error, "".join(traceback.format_exception(error)))]


def _remote(job: str, setup: bytes, attempt: Attempt) -> Done | Raised:
    """Runs on a worker."""
    from distributed import get_worker

    worker = get_worker()
    records, last = 0, time.monotonic()
    worker.log_event(job, (attempt.id, 0))

    def beat(more: int) -> None:
        nonlocal records, last
        records += more
        if time.monotonic() - last >= _BEAT_S:
            worker.log_event(job, (attempt.id, records))
            records, last = 0, time.monotonic()

    try:
        known, place = _known(job, setup)
        answer = perform(known, place, attempt, beat)
    except Exception as error:  # noqa: BLE001  told to whoever decides whether it is tried again
        return Raised(attempt, error.with_traceback(None), traceback.format_exc())
    return Done(attempt, answer)


def _known(job: str, setup: bytes) -> tuple[Setup, WorkPlace]:
    """What a worker needs for a job, unpacked once; several threads may ask at once."""
    known = _setups.get(job)
    if known is None:
        import pickle

        unpacked: Setup = pickle.loads(setup)  # noqa: S301  of the client, whose code runs here in any case
        known = unpacked, place_of(unpacked)
        _setups.clear()
        _setups[job] = known
    return known
