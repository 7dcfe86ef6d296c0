"""The same commands on PostgreSQL."""

import json
import signal

from sqlalchemy.engine import make_url

from djp_dagster import Topic, consumer, open_stream
from tests.cli.conftest import Djp, document, documents
from tests.cli.test_processes import Start, line_of


def test_every_command_speaks_to_postgresql(djp: Djp, start: Start, postgres_url: str) -> None:
    url = make_url(postgres_url).set(password="secret").render_as_string(hide_password=False)
    made = djp("publish", "t", "--create", "--partitions", 3, "--producer", "p", given="1\n2\n3\n", stream=url)
    assert made.stdout.startswith("published 3 events")
    again = djp("publish", "t", "--producer", "p", given="1\n2\n3\n4\n", stream=url)
    assert again.stdout.startswith("published 1 events")
    with open_stream(postgres_url) as stream:
        consumer(topic=Topic("t", partitions=3), group="g")(lambda batch: None).register(stream)
        found = documents(djp("tail", "t", "--json", stream=url))
        assert sorted(one["data"] for one in found) == [1, 2, 3, 4]
        assert document(djp("topics", "--json", stream=url))["records"] == 4
        assert document(djp("lag", "--json", stream=url))["events"] == 4
        assert document(djp("seek", "g", "--to", "latest", "--execute", "--json", stream=url))["skipped"] == 4
        assert document(djp("groups", "show", "g", "--json", stream=url))["pending_events"] == 0
        assert document(djp("dead-letters", "redrive", "g", "--all", "--json", stream=url))["requests"] == []
        said = djp("doctor", stream=url).stdout
        assert "reachable and writable" in said
        assert "secret" not in said
        tail = start("--stream", url, "tail", "t", "-f", "--json")
        for _ in range(4):
            line_of(tail.stdout)
        stream.publish("t", [Topic("t").event(n=5)])
        assert json.loads(line_of(tail.stdout))["data"] == {"n": 5}
        tail.send_signal(signal.SIGINT)
        assert tail.communicate(timeout=30) == (b"", b"")
        assert tail.returncode == 130
