"""The user service of the shop, and the mailers that know addresses from it, or from a table of their own."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

import djp_dagster as djp
from definitions import clicks, dashboard, mailers, orders, send_confirmations, send_receipts, user_emails, user_updates
from demo.user_service import Addresses, server


def update(user_id: str, email: str | None, version: int) -> djp.Event:
    return user_updates.event(user_id=user_id, email=email, version=version)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[djp.EventStream]:
    with djp.open_stream(tmp_path / "stream.db") as opened:
        yield opened


@pytest.fixture
def addresses(stream: djp.EventStream) -> Addresses:
    return Addresses(stream)


@pytest.fixture
def users(addresses: Addresses) -> Iterator[djp.HttpLookup]:
    """Look-ups of the real service."""
    service = server(addresses, socket.create_server(("127.0.0.1", 0)))
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    lookup = djp.HttpLookup(
        base_url=f"http://127.0.0.1:{service.server_port}", path="/users/{key}", bulk_path="/users", first_pause="1ms"
    )
    yield lookup
    lookup.close()
    service.shutdown()
    service.server_close()
    thread.join()


def mails(outbox: Path) -> list[dict[str, str]]:
    return [json.loads(line) for file in sorted(outbox.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_it_knows_the_latest_address(stream: djp.EventStream, addresses: Addresses, users: djp.HttpLookup) -> None:
    stream.publish(user_updates, [update("ada", "new@x", 2), update("ada", "old@x", 1), update("bob", None, 1)])
    assert users.get("ada") is None, "it has not looked yet"
    addresses.look()
    assert users.get("ada") == {"id": "ada", "email": "new@x"}
    assert users.get_many(["ada", "bob", "eve"]) == {
        "ada": {"id": "ada", "email": "new@x"},
        "bob": {"id": "bob", "email": None},
    }


def test_confirmations_go_to_the_address_of_this_moment(
    stream: djp.EventStream, addresses: Addresses, users: djp.HttpLookup, outbox: Path
) -> None:
    stream.publish(user_updates, [update("ada", "a@x", 1), update("bob", None, 1)])
    addresses.look()
    placed = [orders.event(user_id=user) for user in ("ada", "bob", "eve")]
    done = djp.testing.run_consumer(send_confirmations, placed, resources={"users": users})
    assert [(mail["to"], mail["text"]) for mail in mails(outbox)] == [("a@x", "We have your order.")]
    counts = {name: sum(batch.counts.get(name, 0) for batch in done.batches) for name in ("mails", "users_keys")}
    assert counts == {"mails": 1, "users_keys": 3}
    assert done.dead_letters == []


@pytest.mark.usefixtures("outbox")
def test_the_two_mailers_are_compared_in_one_table(tmp_path: Path, addresses: Addresses, users: djp.HttpLookup) -> None:
    resource = djp.SqlEventStream(url=f"sqlite:///{tmp_path / 'stream.db'}", state_folder=str(tmp_path / "state"))
    with resource.open() as stream, dg.DagsterInstance.ephemeral() as instance:
        stream.create_topic(orders)
        stream.publish(user_updates, [update("ada", "a@x", 1)])
        djp.run_pending(stream, user_emails, state_folder=tmp_path / "state")
        addresses.look()
        stream.publish(orders, [orders.event(user_id="ada", amount=1.5)])
        assets = [djp.build_stream_asset(one) for one in (send_receipts, send_confirmations)]
        resources = {"event_stream": resource, "users": users}
        dg.materialize(assets, instance=instance, resources=resources)
        done = dg.materialize([mailers], instance=instance)
    (event,) = done.get_asset_materialization_events()
    table = event.materialization.metadata["compared"].value
    rows = {row.data["mailer"]: row.data for row in table.records}
    assert set(rows) == {"send_receipts", "send_confirmations"}
    assert {name: row["mails"] for name, row in rows.items()} == dict.fromkeys(rows, 1)
    assert rows["send_confirmations"]["calls"] >= 1
    assert rows["send_receipts"]["calls"] == 0


def test_the_dashboard_counts_what_was_looked_at() -> None:
    seen = [clicks.event(user_id=f"u{n}", product_id=f"p{n % 2}") for n in range(5)]
    done = djp.testing.run_consumer(dashboard, [*seen, clicks.event(user_id="u", page="/")])
    total = pd.concat(done.outputs).groupby("product_id")["views"].sum()
    assert total.to_dict() == {"p0": 3, "p1": 2}
