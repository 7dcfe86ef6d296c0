"""Equal keys of sorted rows: merged into one accumulator, or handed to a reducer with all their values."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from djp_dagster.mapreduce.combining import CombineFn
from djp_dagster.mapreduce.runs import Rows, rows_of
from djp_dagster.mapreduce.values import kind_of

if TYPE_CHECKING:
    import numpy as np

_LARGEST = 1 << 63
_first = itemgetter(0)
_second = itemgetter(1)


def combined(windows: Iterable[Rows], combine: CombineFn[Any, Any, Any]) -> Iterator[Rows]:
    """The rows with one accumulator for each key. All rows of a key must be in one window."""
    for rows in windows:
        starts = _starts(rows)
        yield rows if len(starts) == len(rows) else _combined(rows, starts, combine)


def _starts(rows: Rows) -> "np.ndarray[Any, Any]":
    """Where another key begins."""
    import numpy as np
    import pyarrow.compute as pc

    if len(rows) < 2:
        return np.arange(len(rows))
    differs = pc.not_equal(rows.keys.slice(1), rows.keys.slice(0, len(rows) - 1))
    return np.concatenate(([0], np.flatnonzero(differs.to_numpy(zero_copy_only=False)) + 1))


def _combined(rows: Rows, starts: "np.ndarray[Any, Any]", combine: CombineFn[Any, Any, Any]) -> Rows:
    import numpy as np
    import pyarrow as pa

    if combine.adds and _can_be_added(rows):
        sums = np.add.reduceat(rows.values.to_numpy(zero_copy_only=False), starts)
        return replace(rows, keys=rows.keys.take(pa.array(starts)), values=pa.array(sums, rows.values.type))
    pairs = rows.pairs()
    key, accumulator = next(pairs)
    keys, accumulators = [key], [accumulator]
    merge = combine.merge
    for key, other in pairs:
        if key == keys[-1]:
            accumulators[-1] = merge(accumulators[-1], other)
        else:
            keys.append(key)
            accumulators.append(other)
    return rows_of(keys, accumulators)


def _can_be_added(rows: Rows) -> bool:
    """Whether numpy's sum is Python's: of fractions, or of whole numbers that cannot overflow 64 bits."""
    import pyarrow.compute as pc

    kind = kind_of(rows.field)
    if kind != "int":
        return kind == "float"
    extremes = pc.min_max(rows.values).as_py()
    return bool(max(abs(extremes["min"]), abs(extremes["max"])) * len(rows) < _LARGEST)


def extracted(windows: Iterable[Rows], combine: CombineFn[Any, Any, Any]) -> Iterator[Rows]:
    """The rows with results in place of accumulators."""
    if type(combine).extract is CombineFn.extract:
        yield from windows
        return
    for rows in windows:
        pairs = list(rows.pairs())
        yield rows_of([key for key, _ in pairs], [combine.extract(accumulator) for _, accumulator in pairs])


def reduced(
    windows: Iterable[Rows], reduce: Callable[[Any, Iterator[Any]], Any], *, yields: bool, rows_at_once: int
) -> Iterator[Rows]:
    """What the reducer makes of each key and its values, which it gets one by one.

    Args:
        windows: sorted rows; a key's may be spread over several.
        reduce: called once for each key.
        yields: whether it yields pairs of key and value, or returns the key's value.
        rows_at_once: how many results are given out at once.
    """
    keys: list[Any] = []
    values: list[Any] = []
    for key, pairs in groupby((pair for rows in windows for pair in rows.pairs()), key=_first):
        found = reduce(key, map(_second, pairs))
        if yields:
            for result in found:
                keys.append(result[0])
                values.append(result[1])
        else:
            keys.append(key)
            values.append(found)
        if len(keys) >= rows_at_once:
            yield rows_of(keys, values)
            keys, values = [], []
    if keys:
        yield rows_of(keys, values)
