"""What differs between two versions is told: how many, and some of it; and nothing that does not."""

from pathlib import Path

import pytest

import djp_dagster as djp
from djp_dagster.testing import memory_stream
from djp_dagster.versions.comparison import Comparison, compare

SET = djp.Topic("set", partitions=2, key="k")


def setting(code: str, **changed: object) -> djp.Consumer:
    """A consumer that keeps what events say, but for some keys."""

    @djp.consumer(topic=SET, stateful=True, group="kept", code_version=code, max_batch=djp.Threshold(events=7))
    def kept(batch: djp.Batch) -> None:
        for record in batch:
            key = record.data["k"]
            value = changed.get(key, record.data["value"])
            if value is not None:
                batch.state.set((key, 1) if record.data.get("pair") else key, value)

    return kept


def compared(folder: Path, live: djp.Consumer, other: djp.Consumer, values: dict[str, object]) -> Comparison:
    with memory_stream() as stream:
        live.register(stream)
        stream.publish(SET, [SET.event(k=key, value=value, pair=key.startswith("p")) for key, value in values.items()])
        djp.run_pending(stream, live, state_folder=folder)
        djp.follow(stream, other, state_folder=folder)
        return compare(stream, other, folder=folder)


def test_the_same_is_the_same(tmp_path: Path) -> None:
    values: dict[str, object] = {f"{kind}{n}": {"n": n, "x": [n, None, 0.5]} for n in range(40) for kind in "kp"}
    found = compared(tmp_path, setting("1"), setting("2"), {**values, "nan": float("nan"), "in": [float("nan")]})
    assert found.equal
    assert found == Comparison(82, 82, 0, 0, 0, (), 0)


def test_every_difference_is_counted_and_shown(tmp_path: Path) -> None:
    values: dict[str, object] = {f"k{n:02}": n for n in range(30)}
    found = compared(tmp_path, setting("1", k03=None, k04=None), setting("2", k07=None, k11="other", k12=12), values)
    assert (found.keys, found.other_keys) == (28, 29)
    assert (found.only_here, found.only_there, found.differing, found.behind) == (1, 2, 1, 0)
    assert not found.equal
    assert sorted(found.examples) == [("k03", None, 3), ("k04", None, 4), ("k07", 7, None), ("k11", 11, "other")]


@pytest.mark.parametrize("empty", ["here", "there"])
def test_all_or_nothing(tmp_path: Path, empty: str) -> None:
    values: dict[str, object] = {f"k{n}": n for n in range(30)}
    nothing = setting("0", **dict.fromkeys(values))
    live, other = (nothing, setting("1")) if empty == "here" else (setting("1"), nothing)
    found = compared(tmp_path, live, other, values)
    assert (found.only_there, found.only_here) == ((30, 0) if empty == "here" else (0, 30))
    assert len(found.examples) == 20


def test_what_is_behind_is_said_and_what_is_not_there_is_not_made(tmp_path: Path) -> None:
    live, other = setting("1"), setting("2")
    with memory_stream() as stream:
        live.register(stream)
        with pytest.raises(djp.errors.UnknownGroupError, match=r"kept\.next"):
            compare(stream, other, folder=tmp_path)
        assert [info.name for info in stream.groups()] == ["kept"]
        djp.follow(stream, other, state_folder=tmp_path)
        stream.publish(SET, [SET.event(k="a", value=1), SET.event(k="b", value=2)])
        djp.run_pending(stream, live, state_folder=tmp_path)
        found = compare(stream, other, folder=tmp_path)
        assert (found.behind, found.only_here) == (2, 2)
