"""Which attempts are made: until every task of a phase has an answer that is committed, or the job has failed."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from djp_dagster.errors import BadRecordsError, DjpError, MapReduceFailedError, WorkerDiedError
from djp_dagster.mapreduce.engines.base import Alive, Attempt, Died, Done, Engine, News, Raised, Task
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.mapreduce.place import WorkPlace

_LOOK_S = 0.25
_RAISES = 2
"""An exception must repeat to be believed."""
_STRAGGLES = 2.0
_LEAST_STRAGGLE_S = 2.0


class RemoteTraceback(Exception):  # noqa: N818  it is no error, but where one came from
    """Where an exception of another process was raised."""

    def __init__(self, trace: str) -> None:
        super().__init__(f"\n{trace}")


class _State:
    """What is known of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.attempts = self.losses = self.raises = 0
        self.running: dict[int, Attempt] = {}

    def next(self) -> Attempt:
        """Another attempt."""
        self.attempts += 1
        attempt = Attempt(self.task, self.attempts)
        self.running[self.attempts] = attempt
        return attempt


class Counts(msgspec.Struct):
    """How a phase went: attempts begun, those that came to nothing, and second ones beside slow ones."""

    attempts: int = 0
    lost: int = 0
    raised: int = 0
    duplicates: int = 0


class Phase:
    """All map tasks, or all reduce tasks.

    Args:
        job: which.
        engine: does attempts.
        place: where answers are committed.
        tell: called with the number of records done, for whoever shows progress.
        stop_at: called with each answer that is committed; may raise to end the job.
    """

    def __init__(
        self,
        job: MapReduce,
        engine: Engine,
        place: WorkPlace,
        *,
        tell: Callable[[int, bool], None],
        stop_at: Callable[[bytes], None] = lambda answer: None,
    ) -> None:
        self._job, self._engine, self._place = job, engine, place
        self._tell, self._stop_at = tell, stop_at
        self._states: dict[str, _State] = {}
        self._since: dict[str, tuple[float, float]] = {}  # of attempts: begun, last heard of
        self._took: list[float] = []
        self.counts = Counts()

    def run(self, tasks: Sequence[Task], answers: dict[str, bytes]) -> dict[str, bytes]:
        """The answers of all tasks; those that are known already are not done again.

        Raises:
            WorkerDiedError, MapReduceFailedError: a task failed for good; others are killed.
            DjpError: of a task, if it is one that repeating does not help.
        """
        self._states = {task.name: _State(task) for task in tasks if task.name not in answers}
        for _ in range(len(tasks) - len(self._states)):
            self._tell(0, True)
        for state in self._states.values():
            self._begin(state)
        while self._states:
            news = self._engine.news(_LOOK_S)
            for one in news:
                self._heed(one, answers)
            self._look_for_stalled()
            self._double_stragglers()
        return answers

    def _begin(self, state: _State) -> None:
        attempt = state.next()
        self.counts.attempts += 1
        self._engine.submit(attempt)

    def _heed(self, news: News, answers: dict[str, bytes]) -> None:
        attempt = news.attempt
        now = time.monotonic()
        begun, _ = self._since.get(attempt.id, (now, now))
        state = self._states.get(attempt.task.name)
        if isinstance(news, Alive):
            self._since[attempt.id] = begun, now
            if state is not None:
                self._tell(news.records, False)
            return
        self._since.pop(attempt.id, None)
        if state is None or attempt.number not in state.running:
            return  # of a task that is done, or an attempt that nobody waits for
        del state.running[attempt.number]
        if isinstance(news, Done):
            self._took.append(now - begun)
            answers[attempt.task.name] = answer = self._place.commit(attempt.task.name, news.answer)
            self._stop_at(answer)
            self._forget(state)
            self._tell(0, True)
        elif isinstance(news, Died):
            self._lost(state, news.why)
        else:
            self._raised(state, news)

    def _forget(self, state: _State) -> None:
        del self._states[state.task.name]
        for attempt in state.running.values():
            self._since.pop(attempt.id, None)
            self._engine.cancel(attempt)

    def _lost(self, state: _State, why: str) -> None:
        self.counts.lost += 1
        state.losses += 1
        if state.losses >= self._job.max_attempts:
            raise WorkerDiedError(
                f"{state.task.name} of {self._job.name!r} ({state.task.subject}) was tried {state.losses} times, and "
                f"each time {why}; look for what kills processes, such as too little memory, or a crash in the mapper",
                task=state.task.name,
                subject=state.task.subject,
            )
        if not state.running:
            self._begin(state)

    def _raised(self, state: _State, news: Raised) -> None:
        self.counts.raised += 1
        error = news.error
        transient = isinstance(error, OSError) or (isinstance(error, DjpError) and error.transient)
        final = isinstance(error, DjpError) and not transient and not isinstance(error, BadRecordsError)
        state.raises += 1
        limit = self._job.max_attempts if transient else 1 if final else _RAISES
        if state.raises < limit:
            if not state.running:
                time.sleep(min(0.1 * 2**state.raises, 2.0) if transient else 0)
                self._begin(state)
            return
        if error.__cause__ is None and not isinstance(error, BadRecordsError):
            error.__cause__ = RemoteTraceback(news.trace)
        if isinstance(error, DjpError):
            raise error
        raise MapReduceFailedError(
            f"{state.task.name} of {self._job.name!r} ({state.task.subject}) raised {type(error).__name__} each of "
            f"{state.raises} times: {error}",
            task=state.task.name,
            subject=state.task.subject,
        ) from error

    def _look_for_stalled(self) -> None:
        if not self._engine.can_kill:
            return
        too_old = time.monotonic() - self._job.stalled_after_s
        for state in list(self._states.values()):
            for attempt in list(state.running.values()):
                since = self._since.get(attempt.id)
                if since is not None and since[1] < too_old:
                    self._since.pop(attempt.id)
                    del state.running[attempt.number]
                    self._engine.cancel(attempt)
                    self._lost(state, f"it stood still for {self._job.stalled_after_s:.0f} s")

    def _double_stragglers(self) -> None:
        """Try what takes far longer than the rest a second time, on slots that have nothing else to do."""
        if self._engine.slots < 2 or not self._took or not self._engine.can_kill:
            return
        under_way = sum(len(state.running) for state in self._states.values())
        late = max(_STRAGGLES * statistics.median(self._took), _LEAST_STRAGGLE_S)
        now = time.monotonic()
        for state in self._states.values():
            if under_way >= self._engine.slots:
                return
            begun = [self._since[attempt.id][0] for attempt in state.running.values() if attempt.id in self._since]
            if len(state.running) == 1 and begun and now - begun[0] > late:
                self.counts.duplicates += 1
                under_way += 1
                self._begin(state)


def decoded(answer: bytes, kind: type[Any]) -> Any:
    """An answer as what it is."""
    return msgspec.msgpack.decode(answer, type=kind)
