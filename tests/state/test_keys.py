"""Keys as bytes: they come back, they keep their order, and ranges of keys are ranges of bytes."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from djp_dagster.errors import InvalidValueError
from djp_dagster.state.keys import decode_key, encode_key, key_range
from djp_dagster.state.task_state import TaskState
from djp_dagster.testing import memory_stream
from tests.state.kit import store_in

INTEGERS = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([-(2**63), -1, 0, 1, 255, 256, 2**63, 2**64 - 1])
STRINGS = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["", "\0", "a", "a\0", "a\0b", "\x7f"])
BYTES = st.binary(max_size=4) | st.sampled_from([b"", b"\0", b"\0\xff", b"\xff", b"\xff\xff", b"a\0", b"a\xff"])
PARTS = INTEGERS | STRINGS | BYTES
KEYS: Any = PARTS | st.lists(PARTS, max_size=4).map(tuple)
_KINDS = {int: 1, str: 2, bytes: 3, tuple: 4}


def order(key: Any) -> Any:
    """The order that is promised: by kind, then by value; tuples part by part."""
    return (_KINDS[type(key)], tuple(map(order, key)) if isinstance(key, tuple) else key)


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other and list(map(type, _parts(one))) == list(map(type, _parts(other)))


def _parts(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


@given(KEYS)
def test_a_key_comes_back(key: Any) -> None:
    assert same(decode_key(encode_key(key)), key)


@settings(max_examples=1000)
@given(KEYS, KEYS)
def test_encoded_keys_compare_as_keys_do(one: Any, other: Any) -> None:
    assert (encode_key(one) < encode_key(other)) == (order(one) < order(other))
    assert (encode_key(one) == encode_key(other)) == same(one, other)


@settings(max_examples=500)
@given(st.lists(PARTS, max_size=3), st.lists(PARTS, max_size=3))
@example(["a"], ["a\0"])
@example([1, ""], [1, "\0"])
@example([b"a"], [b"a\0\xff", 1])
@example([b"\xff"], [b"\xff\xff"])
@example(["a"], ["a", b"\xff"])
@example([], [2**64 - 1])
def test_tuples_begin_with_a_prefix_if_their_bytes_are_in_its_range(one: list[Any], other: list[Any]) -> None:
    prefix, key = tuple(one), tuple(other)
    low, high = key_range(prefix)
    assert high is not None
    assert (low <= encode_key(key) < high) == same(key[: len(prefix)], prefix)


@settings(max_examples=500)
@given(STRINGS, KEYS)
def test_so_do_strings(prefix: str, key: Any) -> None:
    low, high = key_range(prefix)
    assert high is not None
    assert (low <= encode_key(key) < high) == (isinstance(key, str) and key.startswith(prefix))


@settings(max_examples=500)
@given(BYTES, KEYS)
def test_so_do_bytes(prefix: bytes, key: Any) -> None:
    low, high = key_range(prefix)
    assert high is not None
    assert (low <= encode_key(key) < high) == (isinstance(key, bytes) and key.startswith(prefix))


class _Text(str):
    """A string, and something else."""


REFUSED: list[Any] = [True, False, None, 1.5, _Text("s"), ["a"], {"a": 1}]
REFUSED += ["\ud800", -(2**63) - 1, 2**80, ("a", True), ("a", None), ("a", 1.5), ("a", ("b",)), ("\udfff",), (2**80,)]


@pytest.mark.parametrize("key", REFUSED, ids=repr)
def test_what_is_no_key_is_refused(key: Any) -> None:
    with memory_stream() as stream:
        store = store_in(stream)
        state = TaskState(store.file)
        uses: list[Callable[[], Any]] = [
            lambda: encode_key(key),
            lambda: state.get(key),
            lambda: state.get_many(["fine", key]),
            lambda: state.set(key, 1),
            lambda: state.delete(key),
        ]
        if key is not None:
            uses += [lambda: list(state.items(start=key)), lambda: list(state.items(prefix=key))]
        for use in uses:
            with pytest.raises(InvalidValueError, match=r"key|integers"):
                use()
        assert (state.changes(), list(state.items())) == ([], [])
        store.close()


def test_integers_have_no_prefix() -> None:
    with pytest.raises(InvalidValueError, match="start and stop"):
        key_range(7)


# A small world of keys, so that ranges hold some of them and changes meet.
FEW: Any = st.sampled_from(["", "a", "a\0", "ab", "b", 0, 7, -7, b"a", b"a\xff", b"\xff", ("a",), ("a", 1), ("a", 2)])
MORE: Any = FEW | st.sampled_from([("a\0",), ("a", "b", b"\0"), ("b", 1), (), (1, "a"), (b"a", 1)])
BOUNDS = st.none() | MORE
PREFIXES: Any = st.none() | MORE.filter(lambda key: not isinstance(key, int))


def begins_with(key: Any, prefix: Any) -> bool:
    if prefix is None:
        return True
    if type(key) is not type(prefix):
        return False
    return same(key[: len(prefix)], prefix)


class RangesAgainstDict(RuleBasedStateMachine):
    """Ranges of a `TaskState` are those of a sorted dict: of what is stored, changed since, and deleted since."""

    @initialize()
    def begin(self) -> None:
        self.context = memory_stream()
        self.store = store_in(self.context.__enter__())
        self.state = TaskState(self.store.file)
        self.model: dict[Any, Any] = {}
        self.stored: dict[Any, Any] = {}

    @rule(key=MORE, value=st.integers(0, 9))
    def set(self, key: Any, value: int) -> None:
        self.state.set(key, value)
        self.model[encode_key(key)] = (key, value)

    @rule(key=MORE)
    def delete(self, key: Any) -> None:
        self.state.delete(key)
        self.model.pop(encode_key(key), None)

    @rule(keys=st.lists(MORE))
    def look_up(self, keys: list[Any]) -> None:
        found = {encode_key(key): value for key, value in self.state.get_many(keys).items()}
        wanted = {encode_key(key) for key in keys}
        assert found == {key: value for key, (_, value) in self.model.items() if key in wanted}

    @rule(prefix=PREFIXES, start=BOUNDS, stop=BOUNDS)
    def range(self, prefix: Any, start: Any, stop: Any) -> None:
        expected = [
            (key, value)
            for key, value in sorted(self.model.values(), key=lambda item: order(item[0]))
            if begins_with(key, prefix)
            and (start is None or order(key) >= order(start))
            and (stop is None or order(key) < order(stop))
        ]
        found = list(self.state.items(prefix=prefix, start=start, stop=stop))
        assert found == expected
        assert all(same(one, other) for (one, _), (other, _) in zip(found, expected, strict=True))

    @rule()
    def committed_items_are_those_before_the_batch(self) -> None:
        assert [key for key, _ in self.state.committed()] == sorted(self.stored)

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def commit(self) -> None:
        changes = self.state.changes()
        offset = self.store.offset
        self.store.apply(changes, offset, offset + len(changes))
        self.state, self.stored = TaskState(self.store.file), dict(self.model)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.context.__exit__(None, None, None)


TestRangesAgainstDict = RangesAgainstDict.TestCase
TestRangesAgainstDict.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)


def test_a_range_may_be_longer_than_a_page() -> None:
    with memory_stream() as stream:
        store = store_in(stream)
        state = TaskState(store.file)
        for number in range(2500):
            state.set(("n", number), number)
        changes = state.changes()
        store.apply(changes, 0, len(changes))
        state = TaskState(store.file)
        for number in range(0, 2500, 2):
            state.delete(("n", number))
        state.set(("n", 5000), 5000)
        odd = [*range(1, 2500, 2), 5000]
        assert [value for _, value in state.items(prefix=("n",))] == odd
        assert [value for _, value in state.items(start=("n", 100), stop=("n", 2400))] == odd[50:1200]
        assert [decode_key(key) for key, _ in state.committed(*key_range(("n",)))] == [("n", n) for n in range(2500)]
        store.close()


def test_a_key_looked_for_that_came_and_went_is_no_change() -> None:
    with memory_stream() as stream:
        store = store_in(stream)
        store.apply([(encode_key("old"), b"\x01")], 0, 1)
        state = TaskState(store.file)
        assert state.get("new") is None
        state.set("new", 1)
        state.delete("new")
        assert state.changes() == []
        # What is there must be deleted, and what nobody has looked for may be there.
        state.get("old")
        state.delete("old")
        state.delete("unseen")
        assert state.changes() == [(encode_key("old"), None), (encode_key("unseen"), None)]
        store.close()
