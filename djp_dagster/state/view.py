"""`StateView`: the state of a group as others read it, from a local replica of its changelog.

Whoever keeps the state (a worker, or runs) commits it with its offsets. A view follows the changelog into files of its
own, so it works in any process and on any host, and takes no lease. Processes of one host share the files: what one has
brought up to date is there for the others. How it is brought up to date:

1. **Ask** for committed offsets, changelog ends and backlog, as of one moment.
2. **Catch up** each task's file to these ends, as `djp_dagster.state.store` does.
   *Another process is quicker:* its changes stand; this one goes on from where that one is.
   *A seek has replaced the changelog since step 1:* all is asked again.
3. **Note** the offsets in each file, if it is where step 1 says. A file that has gone further is noted by whoever took
   it there.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from djp_dagster.errors import InvalidSettingError, StaleReadError, StateMismatchError, StreamBusyError
from djp_dagster.partitioning import partition_of
from djp_dagster.state.keys import StateKey, decode_key, encode_key, key_range
from djp_dagster.state.store import TaskStore
from djp_dagster.state.stores import state_folder
from djp_dagster.streams.model import GroupView
from djp_dagster.streams.records import TopicPartition, decode_value
from djp_dagster.streams.stream import EventStream
from djp_dagster.streams.topics import changelog_of
from djp_dagster.units import Duration, parse_seconds

if TYPE_CHECKING:
    import pandas as pd

    from djp_dagster.processing.consumer import Consumer

_LOOK_EVERY_S = 0.05
_TRIES = 20


class StateView:
    """The state of a group, read only: get, get_many, items, to_pandas. Made by ``stream.view(...)``; close it.

    It shows what was committed when it was opened or last refreshed, or something newer. Keys are found in the task
    that their events went to; a key that is no event's key is looked for in all.

    Args:
        stream: where the group is.
        consumer: whose state it is.
        folder: where replicas lie (``$DJP_STATE_FOLDER``, else ``.djp/state``).

    Attributes:
        as_of: the committed offsets it is of: records before them are in it; others are, too, only if another process
            has brought its files further since.
        staleness_s: how long the oldest event that was not in it had been waiting when it was refreshed; 0 if none.

    Raises:
        InvalidSettingError: the consumer keeps no state.
        StateLostError: neither a snapshot nor the beginning of the changelog is left.
    """

    as_of: Mapping[TopicPartition, int]
    staleness_s: float

    def __init__(self, stream: EventStream, consumer: "Consumer", *, folder: Path | None = None) -> None:
        if not consumer.stateful:
            raise InvalidSettingError(
                f"consumer {consumer.group!r} keeps no state; declare it with @consumer(stateful=True), or use a Table",
                setting="stateful",
                value=False,
            )
        self._stream, self._consumer, self._group = stream, consumer, consumer.group
        self._folder = state_folder(folder) / stream.incarnation[:12] / consumer.group
        self._stores: list[TaskStore] = []
        self._pins = 0
        info = consumer.register(stream)
        try:
            for task in range(info.tasks):
                self._stores.append(self._open(task))
            self.refresh()
        except BaseException:
            self.close()
            raise

    def _open(self, task: int) -> TaskStore:
        coordinator, group = self._stream.coordinator, self._group
        return TaskStore(
            self._folder / f"replica-{task}.db",
            self._stream.log,
            TopicPartition(changelog_of(group), task),
            snapshots=lambda: coordinator.snapshots(group, task),
            payloads=self._stream.payloads if self._stream.has_payloads else None,
        )

    def __enter__(self) -> "StateView":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the replica's files; they stay, for the next."""
        for store in self._stores:
            store.close()

    def refresh(self, *, at_least: Mapping[TopicPartition, int] | None = None, wait: Duration = "10s") -> "StateView":
        """Bring it up to what is committed now.

        Args:
            at_least: offsets that must be committed; e.g. where what was published before has gone. It is waited for.
            wait: how long.

        Raises:
            StaleReadError: the group has not come that far in time.
            InvalidSettingError: it is pinned; or the group does not read what ``at_least`` names.
        """
        if self._pins:
            raise InvalidSettingError(
                f"the view of {self._group!r} is pinned; refresh it before or after `with view.pinned():`",
                setting="pinned",
                value=True,
            )
        give_up = time.monotonic() + parse_seconds(wait, name="wait")
        for _ in range(_TRIES):
            view = self._awaited(at_least or {}, give_up)
            if all(self._follow(task, end, view) for task, end in view.changelog.items()):
                self._take_note(view)
                return self
        raise StreamBusyError(f"the state of group {self._group!r} is replaced again and again; try again")

    def _awaited(self, at_least: Mapping[TopicPartition, int], give_up: float) -> GroupView:
        """Step 1, again until the group has come far enough."""
        while True:
            view = self._stream.coordinator.view(self._group)
            if unknown := sorted(at_least.keys() - view.positions.keys()):
                raise InvalidSettingError(
                    f"group {self._group!r} does not read {unknown[0].topic!r} partition {unknown[0].partition}",
                    setting="at_least",
                    value=unknown,
                )
            behind = [at for at, offset in at_least.items() if view.positions[at] < offset]
            if not behind:
                return view
            if time.monotonic() >= give_up:
                at, here, wanted = behind[0], view.positions[behind[0]], at_least[behind[0]]
                raise StaleReadError(
                    f"group {self._group!r} has come to {here} in {at.topic!r} partition {at.partition}, not yet to "
                    f"{wanted}; is its worker or its sensor on?",
                    group=self._group,
                    position=here,
                    wanted=wanted,
                )
            time.sleep(_LOOK_EVERY_S)

    def _follow(self, task: int, end: int, view: GroupView) -> bool:
        """Steps 2 and 3 for one task; whether it need not be asked again."""
        store = self._stores[task]
        reached = store.catch_up(end)
        if reached < end or store.file.lineage != f"{self._stream.incarnation}/{view.identity}":
            return False
        if reached == end:
            note = msgspec.json.encode([[*at, offset] for at, offset in view.positions.items()]).decode()
            try:
                store.file.note(end, note)
            except StateMismatchError as error:
                store.restore_later(str(error))
                return False
        return True

    def _take_note(self, view: GroupView) -> None:
        positions = dict(view.positions)
        for task, store in enumerate(self._stores):
            offset, note = store.file.standing()
            if offset != view.changelog.get(task, 0) and note is not None:
                newer = {TopicPartition(topic, part): at for topic, part, at in msgspec.json.decode(note)}
                positions.update({at: where for at, where in newer.items() if at.partition == task})
        self.as_of = positions
        self.staleness_s = view.backlog.age_s

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Within the block each task's state is seen as of one moment, whatever is committed or refreshed meanwhile."""
        with ExitStack() as stack:
            for store in self._stores:
                stack.enter_context(store.file.pinned())
            self._pins += 1
            try:
                yield
            finally:
                self._pins -= 1

    def get(self, key: StateKey, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        return self.get_many([key]).get(key, default)

    def __contains__(self, key: StateKey) -> bool:
        return key in self.get_many([key])

    def get_many(self, keys: Iterable[StateKey]) -> dict[StateKey, Any]:
        """The values of those keys that exist, one look-up per task for all of them."""
        tasks = len(self._stores)
        by_task: dict[int, dict[bytes, StateKey]] = {}
        for key in keys:
            encoded = encode_key(key)
            home = partition_of(key, tasks) if isinstance(key, str | int) else 0
            by_task.setdefault(home, {})[encoded] = key
        found: dict[StateKey, Any] = {}
        for home, wanted in by_task.items():
            left = dict(wanted)
            for task in (home, *(other for other in range(tasks) if other != home)):
                for encoded, raw in self._look_up(task, list(left)).items():
                    key = left.pop(encoded)
                    value = self._consumer.visible(decode_value(raw))
                    if value is not None:
                        found[key] = value
                if not left or self._consumer.keyed_by_topic:
                    break
        return found

    def _look_up(self, task: int, keys: list[bytes]) -> dict[bytes, bytes]:
        try:
            return self._stores[task].file.get_many(keys)
        except StateMismatchError as error:
            self._discard(task, error)
            return self._stores[task].file.get_many(keys)

    def _discard(self, task: int, error: StateMismatchError) -> None:
        """Have a damaged replica restored by the next look; within a pinned block that would be of another moment."""
        self._stores[task].restore_later(str(error))
        if self._pins:
            raise error

    def items(
        self, *, prefix: StateKey | None = None, start: StateKey | None = None, stop: StateKey | None = None
    ) -> Iterator[tuple[StateKey, Any]]:
        """Keys and values, task by task, in key order within each; all, or those of a range as in `TaskState.items`."""
        bounds = key_range(prefix, start, stop)
        for task in range(len(self._stores)):
            yield from self._scan(task, *bounds)

    def _scan(self, task: int, low: bytes = b"", high: bytes | None = None) -> Iterator[tuple[StateKey, Any]]:
        visible = self._consumer.visible
        while True:
            try:
                for encoded, raw in self._stores[task].file.items(low, high):
                    value = visible(decode_value(raw))
                    if value is not None:
                        yield decode_key(encoded), value
                    low = encoded + b"\0"  # the first key after it
            except StateMismatchError as error:
                self._discard(task, error)
            else:
                return

    @property
    def tasks(self) -> int:
        """How many tasks the state is split into."""
        return len(self._stores)

    def items_of(self, task: int) -> Iterator[tuple[StateKey, Any]]:
        """Keys and values of one task, in key order."""
        return self._scan(task)

    def __iter__(self) -> Iterator[StateKey]:
        """All keys."""
        return (key for key, _ in self.items())

    def __len__(self) -> int:
        """How many keys there are."""
        return sum(1 for _ in self.items())

    def to_pandas(self) -> "pd.DataFrame":
        """All of it: the column ``key``, and ``value``, or one column per field where values are objects.

        A field that is called ``key`` itself becomes ``value_key``.
        """
        import pandas as pd

        rows = self._rows()
        if rows and all(isinstance(value, dict) for _, value in rows):
            fields = ({"value_key" if name == "key" else name: one for name, one in row.items()} for _, row in rows)
            return pd.DataFrame([{"key": key, **row} for (key, _), row in zip(rows, fields, strict=True)])
        return pd.DataFrame([{"key": key, "value": value} for key, value in rows], columns=["key", "value"])

    def _rows(self) -> list[tuple[StateKey, Any]]:
        for _ in self._stores:
            try:
                with self.pinned():
                    return list(self.items())
            except StateMismatchError:
                if self._pins:
                    raise
                # One replica was damaged, and is restored by now.
        with self.pinned():
            return list(self.items())
