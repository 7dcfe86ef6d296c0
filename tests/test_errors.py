"""The error tree."""

import copy
import pickle
import re

import pytest

from djp_dagster import errors
from djp_dagster.errors import DjpError, TerminalError, TransientError

CLASSES = sorted(
    (found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, Exception)),
    key=lambda kind: kind.__name__,
)
LINE = re.compile(r"^    ([│ ├└─]*)((?:[A-Z]\w+Error|DjpError)(?:, [A-Z]\w+Error)*)")


def drawn_tree() -> dict[str, str | None]:
    """Class to parent, as the module's docstring draws it."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := LINE.match(line):
            depth = len(match[1]) // 4
            del above[depth:]
            names = match[2].split(", ")
            for name in names:
                assert name not in parents, f"{name} is drawn twice"
                parents[name] = above[-1] if above else None
            above.append(names[-1])
    return parents


def test_the_tree_is_as_drawn() -> None:
    actual = {kind.__name__: kind.__bases__[0].__name__ if kind is not DjpError else None for kind in CLASSES}
    assert drawn_tree() == actual
    assert len(actual) > 30


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_is_documented_typed_and_picklable(kind: type[DjpError]) -> None:
    assert kind.__doc__
    assert kind.__module__ == "djp_dagster.errors"
    error = kind("what happened", topic="clicks", offset=7, position=("t", 0, 1))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == "what happened"
        assert again.facts == {"topic": "clicks", "offset": 7, "position": ("t", 0, 1)}
        assert again.transient == error.transient
    if kind is not DjpError:
        assert issubclass(kind, TransientError) != issubclass(kind, TerminalError)
        assert error.transient == issubclass(kind, TransientError)


def test_facts_may_be_absent() -> None:
    assert pickle.loads(pickle.dumps(DjpError("x"))).facts == {}


def test_users_may_derive_their_own() -> None:
    error = pickle.loads(pickle.dumps(MineError("x", a=1)))
    assert (type(error), error.facts, error.transient) == (MineError, {"a": 1}, True)


class MineError(TransientError):
    """A user's error."""
