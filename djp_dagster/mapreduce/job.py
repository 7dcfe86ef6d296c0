"""`MapReduce`: what to do with records; where they come from and who does it are said elsewhere."""

import hashlib
import inspect
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.combining import CombineFn
from djp_dagster.units import Duration, Size, is_count, parse_bytes, parse_seconds

Mapper = Callable[..., Any]
Reducer = Callable[..., Any]

BASE_BYTES = 128 << 20
"""What a process takes before the first record: the interpreter, Arrow, and the blocks being mapped."""
LEAST_BYTES = 16 << 20


class MapReduce:
    """Map each record to pairs of key and value, and make one result of all values of a key.

    Either ``combine`` or ``reduce`` says how. With ``combine`` the values of a key become one accumulator where the
    records are, so little is shuffled, and no key is too frequent. With ``reduce`` a function gets all values of a key,
    one by one, in bounded memory.

    Results are exact and the same on every engine, with any number of workers, and after any number of retries, as far
    as mapper and reducer depend on their arguments alone; sums of fractions may differ in their last digits. They are
    sorted by key within each partition.

    Args:
        mapper: takes a record, and yields or returns pairs ``(key, value)``; with ``batch``, a block of records, and it
            may return a mapping. A second parameter named ``task`` gets a `MapTask`: where it is, and counters.
        combine: how values become one.
        reduce: ``reduce(key, values)`` returns the value of the key; or yields pairs, if it is a generator. A third
            parameter named ``task`` gets counters.
        sort_values: let ``reduce`` get a key's values sorted: True, or what to sort them by.
        batch: map whole blocks: True for what the source has (bytes of text, Arrow tables), or ``"pandas"``.
        reducers: into how many partitions the keys are divided; as many as there are workers unless given.
        partition_by: what of a key decides its partition; all of it unless given.
        max_bad_fraction: records that are damaged, or at which the mapper raises, are kept aside as long as they are no
            greater part of all than this. With ``batch`` the mapper may not raise.
        memory: what each process may take in all; what is more is sorted and written to disk.
        max_attempts: how often a task may die or stand still until the job fails; one that raises is tried twice.
        stalled_after: a task that maps no block, and merges none, for so long is killed and tried again.
        name: of the job; the mapper's unless given.

    Raises:
        InvalidSettingError: an argument of no use, or that contradicts another.

    Example:
        >>> from djp_dagster import MapReduce, Sum
        >>> words = MapReduce(lambda line: ((word, 1) for word in line.split()), combine=Sum())
        >>> words.run_local(["a rose is a rose"])
        {'a': 2, 'is': 1, 'rose': 2}
    """

    def __init__(
        self,
        mapper: Mapper,
        *,
        combine: CombineFn[Any, Any, Any] | None = None,
        reduce: Reducer | None = None,
        sort_values: bool | Callable[[Any], Any] = False,
        batch: bool | str = False,
        reducers: int | None = None,
        partition_by: Callable[[Any], Any] | None = None,
        max_bad_fraction: float = 0.0,
        memory: Size = "256MiB",
        max_attempts: int = 4,
        stalled_after: Duration = "10min",
        name: str | None = None,
    ) -> None:
        self.mapper, self.combine, self.reduce = mapper, combine, reduce
        self.sort_by = _itself if sort_values is True else sort_values or None
        self.batch, self.reducers, self.partition_by = batch, reducers, partition_by
        self.max_bad_fraction, self.max_attempts = max_bad_fraction, max_attempts
        self.memory_bytes = parse_bytes(memory, name="memory")
        self.stalled_after_s = parse_seconds(stalled_after, name="stalled_after")
        self.name = str(name or getattr(mapper, "__name__", type(mapper).__name__))
        self.__doc__ = mapper.__doc__
        self._check()
        self.mapper_wants_task = _wants_task(mapper)
        self.reducer_wants_task = reduce is not None and _wants_task(reduce)
        self.reducer_yields = inspect.isgeneratorfunction(reduce)

    def _check(self) -> None:
        for setting, value, allowed, rule in (
            ("mapper", self.mapper, callable(self.mapper), "a function"),
            ("mapper", self.mapper, not inspect.iscoroutinefunction(self.mapper), "no async function"),
            (
                "combine",
                self.combine,
                self.combine is None or isinstance(self.combine, CombineFn),
                "a CombineFn object",
            ),
            ("reduce", self.reduce, self.reduce is None or callable(self.reduce), "a function"),
            (
                "combine",
                self.combine,
                (self.combine is None) != (self.reduce is None),
                "given, or else reduce=: one of the two",
            ),
            ("sort_values", True, self.sort_by is None or self.reduce is not None, "used with reduce= only"),
            (
                "reducers",
                self.reducers,
                self.reducers is None or (is_count(self.reducers) and 1 <= self.reducers <= 10_000),
                "1 to 10000",
            ),
            (
                "max_bad_fraction",
                self.max_bad_fraction,
                0 <= self.max_bad_fraction < 1,
                "0 or more, and below 1",
            ),
            ("max_attempts", self.max_attempts, is_count(self.max_attempts) and self.max_attempts >= 1, "1 or more"),
            ("batch", self.batch, isinstance(self.batch, bool | str), "True, 'bytes', 'arrow' or 'pandas'"),
        ):
            if not allowed:
                raise InvalidSettingError(
                    f"MapReduce({setting}={value!r}) must be {rule}", setting=setting, value=value
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the mapper."""
        return self.mapper(*args, **kwargs)

    def __repr__(self) -> str:
        return f"MapReduce({self.name})"

    @property
    def budget_bytes(self) -> int:
        """What keys and values may take in memory; the rest of ``memory`` is for everything else."""
        return max(LEAST_BYTES, (self.memory_bytes - BASE_BYTES) // 2)

    def run_local(self, records: Iterable[Any]) -> dict[Any, Any]:
        """The results for some records in memory, by key, in order of the keys: for unit tests.

        Raises:
            BadRecordsError, MapReduceFailedError, InvalidValueError: as a real run.
        """
        from djp_dagster.mapreduce.running import map_reduce
        from djp_dagster.mapreduce.sources.topics import Items

        with map_reduce(self, Items(records), engine="inline") as result:
            return result.to_dict()

    def identity(self) -> str:
        """What decides the results: equal only for equal code, settings, and values that functions hold on to."""
        held = [_held(one) for one in self._functions()]
        return hashlib.sha256(repr((self._code(), held)).encode()).hexdigest()

    @property
    def code_version(self) -> str:
        """Changes with the source of the functions, and with settings that decide the results."""
        return hashlib.sha256(repr(self._code()).encode()).hexdigest()[:12]

    def _functions(self) -> tuple[Any, ...]:
        return self.mapper, self.reduce, self.partition_by, self.sort_by, self.combine

    def _code(self) -> tuple[Any, ...]:
        sources = [_source(one) for one in self._functions()]
        return self.name, sources, _settings(self.combine), self.batch, self.max_bad_fraction


def as_job(mapper: "Mapper | MapReduce", settings: dict[str, Any]) -> MapReduce:
    """The job that a mapper and settings make; or the job itself.

    Raises:
        InvalidSettingError: a job and settings were given.
    """
    if not isinstance(mapper, MapReduce):
        return MapReduce(mapper, **settings)
    if settings:
        raise InvalidSettingError(
            f"{sorted(settings)} belong to the MapReduce, which is given already; say it there",
            setting=min(settings),
            value=None,
        )
    return mapper


def _itself(value: Any) -> Any:
    return value


def _wants_task(function: Callable[..., Any]) -> bool:
    try:
        return "task" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return False


def _source(thing: Any) -> tuple[str, str]:
    """Its name, and the source of its module: two functions of one module are two."""
    from djp_dagster.processing.consumer import bytecode

    if thing is None:
        return "", ""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    name = f"{getattr(named, '__module__', '')}.{named.__qualname__}"
    module = inspect.getmodule(named)
    try:
        return name, inspect.getsource(module if module is not None and module.__name__ != "__main__" else named)
    except (OSError, TypeError):
        return name, bytecode(named)


def _settings(combine: Any) -> Any:
    """What of a CombineFn's attributes can be compared in every process; with those that it stands on."""
    if combine is None:
        return None
    found = [(name, value) for name, value in sorted(vars(combine).items()) if not name.startswith("_")]
    plain = [(name, value) for name, value in found if isinstance(value, int | float | str | None)]
    return plain, [(_source(value), _settings(value)) for _, value in found if isinstance(value, CombineFn)]


def _held(thing: Any) -> str:
    """A hash of what it holds on to: the code itself, values of enclosing functions, defaults, attributes."""
    import cloudpickle

    from djp_dagster.processing.consumer import bytecode

    held = thing
    if inspect.isfunction(thing):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        held = (bytecode(thing), cells, thing.__defaults__, thing.__kwdefaults__)
    try:
        return hashlib.sha256(cloudpickle.dumps(held)).hexdigest()
    except Exception:  # noqa: BLE001  what cannot be compared is never the same again
        return uuid.uuid4().hex


def pairs_of(found: Any) -> Sequence[tuple[Any, Any]]:
    """What a mapper over whole blocks returned, as pairs."""
    if found is None:
        return ()
    if hasattr(found, "items"):
        return list(found.items())
    return found if isinstance(found, list) else list(found)
