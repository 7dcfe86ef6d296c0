"""``djp topics``."""

import pytest

from djp_dagster import EventStream, Topic, consumer
from tests.cli.conftest import Djp, document, documents

ORDERS = Topic("orders", partitions=3, key="user", retention="7d", retention_cap="30d")


def test_a_stream_without_topics(djp: Djp, stream: EventStream) -> None:
    result = djp("topics")
    assert result.stdout == ""
    assert "--create" in result.stderr
    assert djp("topics", "--json").stdout == ""


def test_what_a_topic_holds_and_who_reads_it(djp: Djp, stream: EventStream) -> None:
    stream.create_topic(ORDERS)
    appended = stream.publish(ORDERS, [ORDERS.event(user=f"u{n}") for n in range(1200)])
    for group in ("mails", "counts"):
        consumer(topic=ORDERS, group=group, stateful=group == "counts")(lambda batch: None).register(stream)
    facts = document(djp("topics", "--json"))
    assert facts["topic"] == "orders"
    assert (facts["partitions"], facts["key"], facts["records"]) == (3, "user", 1200)
    assert facts["groups"] == ["counts", "mails"]
    assert (facts["retention_s"], facts["retention_cap_s"]) == (7 * 86400.0, 30 * 86400.0)
    assert facts["bytes"] > 1200 * 10
    assert facts["oldest"] == facts["newest"]
    assert facts["oldest"].endswith("Z")
    assert len(appended) == 3
    shown = djp("topics").stdout
    assert "1,200" in shown
    assert "7 d, cap 30 d" in shown
    assert "counts, mails" in shown


def test_internal_topics_only_on_request(djp: Djp, stream: EventStream) -> None:
    consumer(topic=ORDERS, group="counts", stateful=True)(lambda batch: None).register(stream)
    assert [facts["topic"] for facts in documents(djp("topics", "--json"))] == ["orders"]
    names = [facts["topic"] for facts in documents(djp("topics", "--internal", "--json"))]
    assert names == ["__changelog.counts", "orders"]


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(
    djp: Djp, stream: EventStream, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        topic = Topic(f"a-topic-of-a-rather-long-name-{number}", key="some.nested.field")
        stream.create_topic(topic)
        for group in range(3):
            consumer(topic=topic, group=f"group-{number}-{group}")(lambda batch: None).register(stream)
    monkeypatch.setenv("COLUMNS", str(width))
    lines = djp("topics").stdout.splitlines()
    assert max(map(len, lines)) <= width
    monkeypatch.delenv("COLUMNS")
    assert len(djp("topics").stdout.splitlines()) == 2 + 3, "in a pipe a row is a line"
