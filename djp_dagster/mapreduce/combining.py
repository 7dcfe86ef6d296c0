"""`CombineFn`: combiner, reducer and incremental merge in one; and those everybody needs.

An accumulator is made where the records are, one per key and task, so what is shuffled is small and a key with half of
all records is spread over all map tasks. That is only right if it does not matter how values are divided among
accumulators, and in which order these are merged; `djp_dagster.testing.check_combine_fn` looks for values that show
that it does. After Apache Beam's CombineFn.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Iterable, MutableMapping, Sequence
from math import isclose
from random import Random
from typing import Any, Generic, TypeVar

from djp_dagster.errors import InvalidSettingError
from djp_dagster.mapreduce.values import pack, unpack
from djp_dagster.units import is_count

V = TypeVar("V")
A = TypeVar("A")
R = TypeVar("R")


class CombineFn(ABC, Generic[V, A, R]):
    """What becomes of the values of a key. Objects must be picklable and keep nothing between calls.

    Accumulators are plain data: None, numbers, str, bytes, dates, and tuples, lists, sets and dicts of these. `add` and
    `merge` may change the accumulator they are given first, and return it.

    Example:
        >>> class Longest(CombineFn):
        ...     def create(self):
        ...         return ""
        ...     def add(self, accumulator, value):
        ...         return max(accumulator, value, key=lambda text: (len(text), text))
        ...     def merge(self, one, other):
        ...         return self.add(one, other)
        >>> from djp_dagster import MapReduce
        >>> MapReduce(lambda word: [(word[0], word)], combine=Longest()).run_local(["to", "tea", "an"])
        {'a': 'an', 't': 'tea'}
    """

    adds: bool = False
    """Whether accumulators that are numbers are merged by adding them: many at once, then."""

    @abstractmethod
    def create(self) -> A:
        """An accumulator of no values."""

    @abstractmethod
    def add(self, accumulator: A, value: V) -> A:
        """The accumulator with one more value."""

    @abstractmethod
    def merge(self, one: A, other: A) -> A:
        """The accumulator of the values of both."""

    def extract(self, accumulator: A) -> R:
        """The result."""
        return accumulator  # type: ignore[return-value]

    def fold(self, table: MutableMapping[Any, A], pairs: Iterable[tuple[Any, V]]) -> None:
        """Add pairs of key and value to a table of accumulators. The hot loop: once per pair."""
        create, add = self.create, self.add
        for key, value in pairs:
            table[key] = add(table[key] if key in table else create(), value)


class Sum(CombineFn[Any, Any, Any]):
    """The sum of the values: numbers, exactly if they are whole; or whatever can be added, such as timedeltas."""

    adds = True

    def create(self) -> Any:
        """See `CombineFn`."""
        return 0

    def add(self, accumulator: Any, value: Any) -> Any:
        """See `CombineFn`."""
        return accumulator + value

    def merge(self, one: Any, other: Any) -> Any:
        """See `CombineFn`."""
        return one + other

    def fold(self, table: MutableMapping[Any, Any], pairs: Iterable[tuple[Any, Any]]) -> None:
        """See `CombineFn`."""
        for key, value in pairs:
            if key in table:
                table[key] = table[key] + value  # not in place: the value may be the mapper's own
            else:
                table[key] = value


class Count(CombineFn[Any, int, int]):
    """How many values there are."""

    adds = True

    def create(self) -> int:
        """See `CombineFn`."""
        return 0

    def add(self, accumulator: int, value: Any) -> int:
        """See `CombineFn`."""
        return accumulator + 1

    def merge(self, one: int, other: int) -> int:
        """See `CombineFn`."""
        return one + other

    def fold(self, table: MutableMapping[Any, int], pairs: Iterable[tuple[Any, Any]]) -> None:
        """See `CombineFn`."""
        for key, _ in pairs:
            table[key] = table[key] + 1 if key in table else 1


class _Extreme(CombineFn[Any, Any, Any]):
    """The common part of `Min` and `Max`. An accumulator is None, or the extreme in a tuple: values may be None."""

    def create(self) -> Any:
        """See `CombineFn`."""
        return None

    def add(self, accumulator: Any, value: Any) -> Any:
        """See `CombineFn`."""
        return (value,) if accumulator is None else self.merge(accumulator, (value,))

    def extract(self, accumulator: Any) -> Any:
        """See `CombineFn`."""
        return None if accumulator is None else accumulator[0]


class Min(_Extreme):
    """The least value."""

    def merge(self, one: Any, other: Any) -> Any:
        """See `CombineFn`."""
        return one if other is None or (one is not None and one <= other) else other


class Max(_Extreme):
    """The greatest value."""

    def merge(self, one: Any, other: Any) -> Any:
        """See `CombineFn`."""
        return one if other is None or (one is not None and one >= other) else other


class Mean(CombineFn[float, "tuple[float, int]", float]):
    """The arithmetic mean of numbers."""

    def create(self) -> tuple[float, int]:
        """See `CombineFn`."""
        return 0, 0

    def add(self, accumulator: tuple[float, int], value: float) -> tuple[float, int]:
        """See `CombineFn`."""
        return accumulator[0] + value, accumulator[1] + 1

    def merge(self, one: tuple[float, int], other: tuple[float, int]) -> tuple[float, int]:
        """See `CombineFn`."""
        return one[0] + other[0], one[1] + other[1]

    def extract(self, accumulator: tuple[float, int]) -> float:
        """See `CombineFn`."""
        return accumulator[0] / accumulator[1] if accumulator[1] else float("nan")


class TopK(CombineFn[Any, "list[Any]", "list[Any]"]):
    """The ``k`` greatest values, the greatest first.

    Args:
        k: how many.
    """

    def __init__(self, k: int) -> None:
        if not is_count(k) or k < 1:
            raise InvalidSettingError(f"TopK(k={k!r}) must be 1 or more", setting="k", value=k)
        self.k = k

    def create(self) -> list[Any]:
        """See `CombineFn`."""
        return []

    def add(self, accumulator: list[Any], value: Any) -> list[Any]:
        """See `CombineFn`."""
        if len(accumulator) < self.k:
            heapq.heappush(accumulator, value)
        else:
            heapq.heappushpop(accumulator, value)
        return accumulator

    def merge(self, one: list[Any], other: list[Any]) -> list[Any]:
        """See `CombineFn`."""
        for value in other:
            one = self.add(one, value)
        return one

    def extract(self, accumulator: list[Any]) -> list[Any]:
        """See `CombineFn`."""
        return sorted(accumulator, reverse=True)


class Distinct(CombineFn[Any, "set[Any]", int]):
    """How many different values there are, exactly; so each key keeps all of them."""

    def create(self) -> set[Any]:
        """See `CombineFn`."""
        return set()

    def add(self, accumulator: set[Any], value: Any) -> set[Any]:
        """See `CombineFn`."""
        accumulator.add(value)
        return accumulator

    def merge(self, one: set[Any], other: set[Any]) -> set[Any]:
        """See `CombineFn`."""
        one |= other
        return one

    def extract(self, accumulator: set[Any]) -> int:
        """See `CombineFn`."""
        return len(accumulator)


class Collect(CombineFn[Any, "list[Any]", "list[Any]"]):
    """All values, sorted; so each key keeps all of them. A ``reduce=`` gets them one by one, in bounded memory."""

    def create(self) -> list[Any]:
        """See `CombineFn`."""
        return []

    def add(self, accumulator: list[Any], value: Any) -> list[Any]:
        """See `CombineFn`."""
        accumulator.append(value)
        return accumulator

    def merge(self, one: list[Any], other: list[Any]) -> list[Any]:
        """See `CombineFn`."""
        one += other
        return one

    def extract(self, accumulator: list[Any]) -> list[Any]:
        """See `CombineFn`."""
        return sorted(accumulator)


def find_disagreement(
    combine: CombineFn[Any, Any, Any], values: Sequence[Any], *, rounds: int, seed: int
) -> "tuple[list[Any], Any, Any] | None":
    """Some of the values that give two results when they are divided or ordered otherwise: these, and the results."""
    chance = Random(seed)  # noqa: S311
    for number in range(rounds):
        # Few at first: what is found then can be understood.
        some = [chance.choice(values) for _ in range(2 + number * 6 // rounds)]
        expected = _result(combine, [some])
        shuffled = chance.sample(some, len(some))
        edges = sorted(chance.randint(0, len(some)) for _ in range(chance.randint(1, 3)))
        shares = [shuffled[start:end] for start, end in zip([0, *edges], [*edges, len(some)], strict=True)]
        found = _result(combine, shares)
        if not _alike(found, expected):
            return some, expected, found
    return None


def _result(combine: CombineFn[Any, Any, Any], shares: Iterable[Sequence[Any]]) -> Any:
    """As the engines do it: an accumulator for each share that has values, merged one after the other."""
    accumulators = []
    for share in shares:
        table: dict[str, Any] = {}
        combine.fold(table, [("key", value) for value in share])
        if table:
            accumulators.append(unpack(pack(table["key"])))
    merged = accumulators[0]
    for other in accumulators[1:]:
        merged = combine.merge(merged, other)
    return combine.extract(merged)


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return bool(one == other)
