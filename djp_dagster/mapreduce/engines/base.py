"""What an engine is: it takes attempts at tasks, and tells what became of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from djp_dagster.claim_check.stores import PayloadStore
from djp_dagster.mapreduce.job import MapReduce
from djp_dagster.mapreduce.place import Piece, WorkPlace
from djp_dagster.mapreduce.sources.base import Form, Split
from djp_dagster.mapreduce.tasks import Beat, run_map, run_reduce


class Task(msgspec.Struct, frozen=True):
    """A task: a split to map, or a partition to reduce. Picklable.

    Attributes:
        name: e.g. ``map-00012``; what commits it has the same name.
    """

    name: str
    split: Any = None
    partition: int = -1
    pieces: tuple[Piece, ...] = ()

    @property
    def is_map(self) -> bool:
        """Whether it is no reduce task."""
        return self.split is not None

    @property
    def subject(self) -> str:
        """What it works on, for people."""
        return self.split.uri if self.is_map else f"partition {self.partition}"


class Attempt(msgspec.Struct, frozen=True):
    """A task that somebody is to do; the number-th time, from 1 on."""

    task: Task
    number: int

    @property
    def id(self) -> str:
        """Its name among all attempts of a job."""
        return f"{self.task.name}/{self.number}"


class Setup(msgspec.Struct, frozen=True):
    """What all tasks of a job have in common. Picklable by value.

    Attributes:
        temp_folder: where tasks have their temporary files; of the machine's unless given.
    """

    job: MapReduce
    form: Form
    partitions: int
    store: PayloadStore
    job_id: str
    temp_folder: str


class Done(msgspec.Struct, frozen=True):
    """An attempt has ended well."""

    attempt: Attempt
    answer: bytes


class Raised(msgspec.Struct, frozen=True):
    """An attempt raised.

    Attributes:
        trace: where, as text.
    """

    attempt: Attempt
    error: BaseException
    trace: str


class Died(msgspec.Struct, frozen=True):
    """The process of an attempt has ended by itself."""

    attempt: Attempt
    why: str


class Alive(msgspec.Struct, frozen=True):
    """An attempt has got on, by so many records."""

    attempt: Attempt
    records: int


News = Done | Raised | Died | Alive


class Engine(Protocol):
    """Does attempts. Used by one thread; closed at the end, which kills whatever is under way.

    Attributes:
        name: e.g. ``processes``.
        slots: how many attempts it does at once.
        can_kill: whether an attempt that stands still can be ended.
        shares_disks: whether what one attempt writes to a folder of this machine is there for every other one.
    """

    name: str
    slots: int
    can_kill: bool
    shares_disks: bool

    def start(self, setup: Setup) -> None:
        """Get ready for a job."""

    def submit(self, attempt: Attempt) -> None:
        """Have it done, now or as soon as a slot is free."""

    def news(self, timeout_s: float) -> Sequence[News]:
        """What has become of attempts since the last call; waits up to ``timeout_s`` for some."""

    def cancel(self, attempt: Attempt) -> None:
        """Nobody wants it any more: kill it if that is possible. It may still be in the news."""

    def close(self) -> None:
        """Kill what is under way, and release everything."""


def perform(setup: Setup, place: WorkPlace, attempt: Attempt, beat: Beat) -> bytes:
    """Do it; the encoded answer."""
    task = attempt.task
    if task.is_map:
        split: Split = task.split
        return run_map(setup.job, split, setup.form, setup.partitions, task.name, attempt.number, place, beat)
    return run_reduce(setup.job, task.partition, task.pieces, task.name, attempt.number, place, beat)


def place_of(setup: Setup) -> WorkPlace:
    """The work place as tasks see it: they commit nothing."""
    return WorkPlace(setup.store, setup.job_id, durable=False, temp_folder=Path(setup.temp_folder))
