"""Any input, split size, number of workers, of reducers, order and engine: the result of a dictionary."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import djp_dagster as djp
from djp_dagster.mapreduce import buffers, runs, tasks
from djp_dagster.testing import check_combine_fn
from tests.mapreduce.kit import counted, grouped, text_of, words

KEYS = st.one_of(st.text(max_size=3), st.integers(-5, 5), st.tuples(st.text(max_size=1), st.integers(0, 3)), st.none())
PAIRS = st.lists(st.tuples(KEYS, st.integers(-9, 9)), max_size=60)
MIXED = st.lists(st.tuples(KEYS, st.integers(-(2**70), 2**70) | st.fractions() | st.integers(0, 3)), max_size=60)
COMBINERS: dict[str, tuple[djp.CombineFn[Any, Any, Any], Any]] = {
    "sum": (djp.Sum(), sum),
    "count": (djp.Count(), len),
    "min": (djp.Min(), min),
    "max": (djp.Max(), max),
    "mean": (djp.Mean(), lambda values: sum(values) / len(values)),
    "top": (djp.TopK(2), lambda values: sorted(values, reverse=True)[:2]),
    "distinct": (djp.Distinct(), lambda values: len(set(values))),
    "collect": (djp.Collect(), sorted),
}


def itself(pair: Any) -> Any:
    return (pair,)


def _tiny(patch: pytest.MonkeyPatch) -> None:
    """So little memory that everything is spilled, merged in rounds, and read in small batches."""
    patch.setattr("djp_dagster.mapreduce.job.LEAST_BYTES", 2000)
    patch.setattr("djp_dagster.mapreduce.job.BASE_BYTES", 1 << 60)
    patch.setattr(buffers, "_MOST_SPILLS", 3)
    patch.setattr(tasks, "_MOST_RUNS", 3)
    patch.setattr(tasks, "ROWS", 5)
    patch.setattr(runs, "ROWS", 4)
    patch.setattr("djp_dagster.mapreduce.place._INLINE_BYTES", 100)


class TestAgainstADictionary:
    @pytest.mark.parametrize("name", COMBINERS)
    @settings(max_examples=40)
    @given(pairs=PAIRS, split=st.integers(1, 20), reducers=st.integers(1, 5), spill=st.booleans())
    def test_combined(self, name: str, pairs: list[Any], split: int, reducers: int, spill: bool) -> None:
        combine, expected = COMBINERS[name]
        with pytest.MonkeyPatch.context() as patch:
            if spill:
                _tiny(patch)
            result = djp.map_reduce(itself, djp.Items(pairs, split_items=split), combine=combine, reducers=reducers)
            assert result.to_dict() == {key: expected(values) for key, values in grouped(pairs).items()}

    @settings(max_examples=60)
    @given(pairs=MIXED, split=st.integers(1, 20), reducers=st.integers(1, 5))
    def test_numbers_of_any_kind(self, pairs: list[Any], split: int, reducers: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            _tiny(patch)
            result = djp.map_reduce(itself, djp.Items(pairs, split_items=split), combine=djp.Sum(), reducers=reducers)
            found = result.to_dict()
        assert found == {key: sum(values) for key, values in grouped(pairs).items()}

    @settings(max_examples=60)
    @given(
        pairs=PAIRS, split=st.integers(1, 20), reducers=st.integers(1, 5), order=st.sampled_from([False, True, "desc"])
    )
    def test_reduced(self, pairs: list[Any], split: int, reducers: int, order: Any) -> None:
        by: Any = (lambda value: -value) if order == "desc" else order
        with pytest.MonkeyPatch.context() as patch:
            _tiny(patch)
            result = djp.map_reduce(
                itself,
                djp.Items(pairs, split_items=split),
                reduce=lambda key, values: list(values),
                sort_values=by,
                reducers=reducers,
            )
            found = result.to_dict()
        for key, values in grouped(pairs).items():
            got = found.pop(key)
            if order:
                assert got == sorted(values, reverse=order == "desc")
            else:
                assert sorted(got) == sorted(values)
        assert not found

    @settings(max_examples=30)
    @given(pairs=PAIRS, reducers=st.integers(1, 5))
    def test_each_partition_is_sorted(self, pairs: list[Any], reducers: int) -> None:
        texts = [(str(key), value) for key, value in pairs]
        result = djp.map_reduce(itself, djp.Items(texts, split_items=7), combine=djp.Sum(), reducers=reducers)
        for partition in result.partitions():
            keys = [key for key, _ in partition]
            assert keys == sorted(set(keys))

    def test_a_generator_gives_what_it_likes(self) -> None:
        def reduce(key: str, values: Any) -> Any:
            total = sum(values)
            if total > 1:
                yield key, total
                yield key.upper(), -total

        pairs = [("a", 1), ("b", 1), ("a", 2)]
        result = djp.map_reduce(itself, djp.Items(pairs), reduce=reduce, reducers=1)
        assert list(result) == [("a", 3), ("A", -3)]

    def test_a_reducer_that_stops_early(self) -> None:
        pairs = [(n % 3, n) for n in range(1000)]
        result = djp.map_reduce(itself, djp.Items(pairs), reduce=lambda key, values: next(values), sort_values=True)
        assert result.to_dict() == {0: 0, 1: 1, 2: 2}


class TestEngines:
    @pytest.mark.parametrize("engine", ["inline", 1, 2, 3])
    @pytest.mark.parametrize("with_combiner", [True, False])
    def test_are_equal(self, tmp_path: Path, seed: random.Random, engine: Any, with_combiner: bool) -> None:
        lines = text_of(seed, 3000)
        path = tmp_path / "file"
        path.write_text("\n".join(lines))
        how: dict[str, Any] = {"combine": djp.Sum()} if with_combiner else {"reduce": lambda key, values: sum(values)}
        result = djp.map_reduce(
            words,
            djp.TextFiles(path, split_bytes=seed.randint(2000, 100_000)),
            engine=engine if isinstance(engine, str) else djp.Processes(engine),
            reducers=seed.randint(1, 4),
            **how,
        )
        assert result.to_dict() == counted(lines)
        assert result.report.records == len("\n".join(lines).removesuffix("\n").split("\n"))
        assert result.report.pairs == sum(counted(lines).values())


class TestChecker:
    def test_passes_what_is_right(self) -> None:
        for combine, _ in COMBINERS.values():
            check_combine_fn(combine, [1, 2, 3, -7, 10**20, 0])

    def test_catches_a_mean_of_means(self) -> None:
        class MeanOfMeans(djp.Mean):
            def merge(self, one: Any, other: Any) -> Any:
                return (self.extract(one) + self.extract(other)) / 2, 1

        with pytest.raises(AssertionError, match="MeanOfMeans makes"):
            check_combine_fn(MeanOfMeans(), [1, 2, 4])

    def test_catches_one_that_depends_on_the_order(self) -> None:
        class First(djp.Max):
            def merge(self, one: Any, other: Any) -> Any:
                return one

        with pytest.raises(AssertionError, match="divided or ordered"):
            check_combine_fn(First(), ["a", "b"])

    def test_catches_one_that_changes_what_it_is_merged_from(self) -> None:
        class Minus(djp.Sum):
            def merge(self, one: Any, other: Any) -> Any:
                return one - other

        with pytest.raises(AssertionError, match="Minus makes"):
            check_combine_fn(Minus(), [1, 2, 3])
