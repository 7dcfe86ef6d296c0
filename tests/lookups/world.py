"""The consumer of the tests that kill a process: it asks a service for each event, several at the same time."""

import sys

import djp_dagster as djp

PARTITIONS = 2
ORDERS = djp.Topic("orders", partitions=PARTITIONS, key="user")
NAMED = djp.Topic("named", partitions=PARTITIONS, key="user")
LEASE_S = 0.6


@djp.consumer(topic=ORDERS, emits=[NAMED], isolate="per_event", concurrency=6, max_batch=djp.Threshold(events=15))
def name(record: djp.Record, batch: djp.Batch, users: djp.HttpLookup) -> None:
    """Pass each order on, with the name of its user."""
    user = users.get(record.data["user"])
    batch.emit(NAMED.event(user=record.data["user"], n=record.data["n"], name=user["name"]))


def users_at(url: str) -> djp.HttpLookup:
    return djp.HttpLookup(base_url=url, path="/users/{key}", first_pause="1ms")


def main(path: str, url: str) -> None:
    """What the process does that is killed."""
    with djp.open_stream(path) as stream:
        djp.run_pending(stream, name, resources={"users": users_at(url)}, lease=LEASE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
