"""What can be declared, and what a wrong declaration is told."""

import re
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster import Batch, EventStream, Join, Joined, Table, Topic
from djp_dagster.errors import GroupMismatchError, InvalidSettingError
from djp_dagster.testing import run_consumer
from tests.joining.kit import LATE, OUT, A, B, C, joined, part

INPUTS = {"a": A, "b": B}


@pytest.mark.parametrize(
    ("settings", "setting", "told"),
    [
        ({"inputs": {}}, "inputs", 'name the parts: inputs={"metadata": metadata, "video": video}'),
        ({"inputs": [A, B]}, "inputs", "name the parts"),
        ({"inputs": {"a": "a"}}, "inputs", "give a Topic, or (Topic, event type)"),
        ({"inputs": {"a": (A, 1)}}, "inputs", "give a Topic, or (Topic, event type)"),
        ({"inputs": {"a": (A, "x", "y")}}, "inputs", "give a Topic, or (Topic, event type)"),
        (
            {"inputs": {"a": A, "b": A}},
            "inputs",
            "topic 'a' has several parts; tell them apart: (topic, 'event type') for each",
        ),
        ({"inputs": {"a": (A, "x"), "b": A}}, "inputs", "topic 'a' has several parts"),
        ({"inputs": {"a": (A, "x"), "b": (A, "x")}}, "inputs", "topic 'a' has several parts"),
        (
            {"inputs": {"a": (A, "x"), "b": (Topic("a", partitions=2, key="k", retention="1d"), "y")}},
            "inputs",
            "topic 'a' is declared twice and differently",
        ),
        ({"optional": ["c"], "deadline": 1}, "optional", "use names of inputs: ['a', 'b']"),
        ({"optional": "b", "deadline": 1}, "optional", "use names of inputs: ['a', 'b']"),
        ({"optional": ["a", "b"], "deadline": 1}, "optional", "at least one part must be required"),
        ({"optional": ["b"]}, "optional", "give a deadline, or they are waited for as long as the others"),
        ({"count": {"c": 2}}, "count", "use names of inputs: ['a', 'b']"),
        ({"count": {"b": 0}}, "count", "give a number above 0, or the path in the data that holds it"),
        ({"count": {"b": True}}, "count", "give a number above 0"),
        ({"count": {"b": ""}}, "count", "give a number above 0"),
        ({"count": {"b": 2.5}}, "count", "give a number above 0"),
        ({"on_deadline": "ignore"}, "on_deadline", "use one of ['dead_letter', 'partial']"),
        ({"clock": "wall"}, "clock", "use one of ['append_time', 'event_time']"),
        ({"duplicates": "none"}, "duplicates", "use one of ['first', 'last', 'all']"),
        ({"late": "ignore"}, "late", "use 'drop', 'dead_letter', or a Topic"),
        ({"deadline": 0}, "deadline", "it must be above 0"),
        ({"idle_after": 0}, "idle_after", "it must be above 0"),
        ({"remember": "0s"}, "remember", "it must be above 0"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], setting: str, told: str) -> None:
    with pytest.raises(InvalidSettingError, match=rf"^@join\({setting}=.*\): .*{re.escape(told)}") as refused:
        joined(**{"inputs": INPUTS, **settings})
    assert refused.value.facts["setting"] == setting


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"deadline": "soon"}, "deadline"),
        ({"remember": -1}, "remember"),
        ({"max_buffer_bytes": "much"}, "max_buffer_bytes"),
        ({"max_emit_bytes": "much"}, "max_emit_bytes"),
        ({"group": "no good"}, "name"),
    ],
)
def test_other_values_are_refused_as_everywhere(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(InvalidSettingError) as refused:
        joined(**{"inputs": INPUTS, **settings})
    assert refused.value.facts["setting"] == setting


def test_it_is_a_consumer() -> None:
    @djp.join(inputs=INPUTS, key="k", emits=[OUT], late=LATE, deadline="1h", remember="30d", max_buffer_bytes="1MiB")
    def pair(parts: Joined, service: Any) -> None:
        """Both of them."""

    assert isinstance(pair, Join)
    assert (pair.group, pair.__doc__, pair.resource_names) == ("pair", "Both of them.", ("service",))
    assert ([topic.name for topic in pair.topics], [topic.name for topic in pair.emits]) == (
        ["a", "b"],
        ["out", "late"],
    )
    assert pair.stateful
    assert pair.aligned
    rules = pair.rules
    assert (rules.deadline_micros, rules.remember_micros) == (3_600_000_000, 30 * 86_400_000_000)
    assert (rules.max_buffer_bytes, rules.late, rules.late_topic) == (1 << 20, "topic", "late")
    assert [topic.name for topic in joined(inputs=INPUTS, late=OUT).emits] == ["out"]


def test_its_handler_gets_resources_and_tables() -> None:
    prices = Table("prices", topic=Topic("prices", partitions=2, key="k"), value="price")

    def handle(parts: Joined, rate: float) -> None:
        price = parts.table(prices).get(parts.key, 0)
        parts.emit(OUT.event(k=parts.key, cost=price * rate), topic=OUT)
        parts.log.info("priced %s", parts.key)

    join = joined(inputs=INPUTS, handler=handle, tables=[prices])
    run = run_consumer(
        join,
        {A: [part(A, "x"), part(A, "waits")], B: [part(B, "x")]},
        resources={"rate": 2.5},
        tables={prices: [prices.topics[0].event(k="x", price=4)]},
    )
    assert [record.data for record in run.emitted["out"]] == [{"k": "x", "cost": 10.0}]
    # What its state looks like to who reads it: keys of events, no payloads, nothing of its indexes.
    state = {
        key: {name: value for name, value in found.items() if "micros" not in name} for key, found in run.state.items()
    }
    assert state.keys() == {"x", "waits"}
    assert state["x"] == {"status": "completed"}
    assert (state["waits"]["status"], state["waits"]["parts"]) == ("pending", ["a"])


def test_it_cannot_become_another_group(stream: EventStream) -> None:
    joined(inputs=INPUTS).register(stream)
    with pytest.raises(GroupMismatchError, match="use another group name"):
        joined(inputs={**INPUTS, "c": C}).register(stream)

    @djp.consumer(topics=[A, B], group="j")
    def j(batch: Batch) -> None: ...

    with pytest.raises(GroupMismatchError, match="use another group name"):
        j.register(stream)
