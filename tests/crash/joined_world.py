"""A world of products that are joined: three parts of each, a table of them, a count per seller; and who does it.

``uploads`` → **metadata**, **video**, **images** (each emits a part of the product, to a topic of its name; video fails
on some) → **create** (the join, with a deadline) → ``products`` → **catalog** (a table) and **sellers** (a count).

A product is *slow* (its image is uploaded much later), comes *twice*, cannot be transcoded (*poison*, *refused*), is
*unfit* (the join's handler fails on it), or is *good*.
"""

import random
import time
from pathlib import Path
from zlib import crc32

import djp_dagster as djp
from tests.crash.world import LEASE_S, PATIENT, announce, arm, until_stopped

PARTITIONS = 3
LONG_S = 3600.0
"""A deadline that never passes."""
GAP = 10
"""So many publishes later the rest of a slow product comes."""
PARTS = ("metadata", "video", "images")
UPLOADS = djp.Topic("uploads", partitions=PARTITIONS, key="product")
TOPICS = {name: djp.Topic(name, partitions=PARTITIONS, key="product") for name in PARTS}
PRODUCTS = djp.Topic("products", partitions=PARTITIONS, key="product")
LATE = djp.Topic("late-parts", partitions=PARTITIONS, key="product")
SNAPSHOTS = djp.SnapshotPolicy(changes=5, bytes="1MiB", keep=2)
FATES = {"good": 0.7, "slow": 0.1, "twice": 0.1, "poison": 0.02, "refused": 0.05, "unfit": 0.03}


def making(name: str) -> djp.Consumer:
    """The consumer that makes one part of each product."""
    topic = TOPICS[name]

    def make(batch: djp.Batch) -> None:
        for record in batch:
            data = record.data
            if name == "video" and data["fate"] == "poison":
                raise ValueError(f"product {data['product']} is poison")
            if name == "video" and data["fate"] == "refused":
                batch.fail(record, "refused")
            elif name in data["parts"]:
                batch.emit(topic.event({one: data[one] for one in ("product", "seller", "n", "fate", "text")}))

    return djp.consumer(
        topic=UPLOADS, emits=[topic], group=name, max_batch=djp.Threshold(events=20), retry=PATIENT, max_poison=25
    )(make)


def creating(deadline_s: float) -> djp.Join:
    """The join: two versions of each product, in either order; some are withdrawn by the second."""

    def create(parts: djp.Joined) -> None:
        seller, fate = parts["metadata"].data["seller"], parts["metadata"].data["fate"]
        where = {name: [record.partition, record.offset] for name, record in parts.items()}
        draw = crc32(str(parts.key).encode())
        for version in (1, 2) if draw % 2 else (2, 1):
            page = {"where": where, "version": version, "text": f"All about {parts.key}. " * 15}
            withdrawn = version == 2 and draw % 5 == 0
            product = {"product": parts.key, "seller": seller, "version": version}
            parts.emit(PRODUCTS.event(product, page=None if withdrawn else page))
        if fate == "unfit":
            raise ValueError(f"product {parts.key} is unfit")

    return djp.join(
        inputs=dict(TOPICS),
        key="product",
        deadline=deadline_s,
        on_deadline="dead_letter",
        late=LATE,
        emits=[PRODUCTS],
        group="create",
        max_batch=djp.Threshold(events=40),
        max_poison=100,
        retry=PATIENT,
        snapshots=SNAPSHOTS,
    )(create)


catalog = djp.Table(
    "catalog",
    topic=PRODUCTS,
    value="page",
    sequence="version",
    max_batch=djp.Threshold(events=30),
    retry=PATIENT,
    snapshots=SNAPSHOTS,
)


@djp.consumer(topic=PRODUCTS, stateful=True, max_batch=djp.Threshold(events=20), retry=PATIENT, snapshots=SNAPSHOTS)
def sellers(batch: djp.Batch) -> None:
    """Products per seller, in each task."""
    for record in batch:
        if record.data["version"] == 1:
            batch.state.set(record.data["seller"], batch.state.get(record.data["seller"], 0) + 1)


def consumers(deadline_s: float) -> dict[str, djp.Consumer]:
    """All of them by name."""
    made = {name: making(name) for name in PARTS}
    return {**made, "create": creating(deadline_s), "catalog": catalog, "sellers": sellers}


NAMES = (*PARTS, "create", "catalog", "sellers")


def open_world(folder: str | Path, deadline_s: float) -> djp.EventStream:
    """The stream of a test's folder, with all topics and groups."""
    stream = djp.open_stream(Path(folder) / "stream.db")
    for consumer in consumers(deadline_s).values():
        consumer.register(stream)
    return stream


def work(
    folder: str,
    names: list[str],
    deadline_s: float,
    state: str = "state",
    point: str | None = None,
    hit: int = 1,
    how: str = "kill",
) -> None:
    """A worker process, whose local state lies in the folder ``state``."""
    arm(folder, point, hit, how)
    with open_world(folder, deadline_s) as stream:
        known = consumers(deadline_s)
        worker = djp.Worker(stream, [known[name] for name in names], lease=LEASE_S, state_folder=Path(folder) / state)
        announce(folder)
        worker.run(until_stopped(folder))


def run(
    folder: str,
    names: list[str],
    deadline_s: float,
    state: str = "state",
    point: str | None = None,
    hit: int = 1,
    how: str = "kill",
) -> None:
    """A process that runs what is pending of each in turn, again and again."""
    arm(folder, point, hit, how)
    with open_world(folder, deadline_s) as stream:
        local, known = until_stopped(folder), consumers(deadline_s)
        watcher = stream.log.watch()
        announce(folder)
        while not local.is_set():
            for name in names:
                try:
                    djp.run_pending(
                        stream, known[name], lease=LEASE_S, wait=0.3, stop=local, state_folder=Path(folder) / state
                    )
                except (djp.errors.LeaseBusyError, djp.errors.FencedError):
                    continue  # somebody else has it
            watcher.wait(0.1)


ENOUGH = "enough"
"""The file that ends publishing."""


def publish(folder: str, seed: int, deadline_s: float) -> None:
    """A named producer that goes on where the stream says its predecessor got to, until there is enough."""
    with open_world(folder, deadline_s) as stream:
        producer = stream.producer("uploader")
        announce(folder)
        while not (Path(folder) / ENOUGH).exists():
            number = producer.last_sequence + 1
            producer.publish("uploads", uploads_of(number, seed), sequence=number)
            time.sleep(0.08)  # the load: uploads come one after the other for as long as the test kills


def uploads_of(number: int, seed: int) -> list[djp.Event]:
    """The events of the ``number``-th publish: the same whenever asked."""
    fresh = [_upload(number, index, one) for index, one in enumerate(_products(number, seed))]
    again = [
        _upload(number, index, one, again=True)
        for index, one in enumerate(_products(number - GAP, seed), start=100)
        if one["fate"] in ("slow", "twice")
    ]
    return [*fresh, *again]


def _products(number: int, seed: int) -> list[dict[str, str]]:
    """The products whose first upload is in the ``number``-th publish."""
    if number < 1:
        return []
    chance = random.Random(seed * 1_000_003 + number)
    fates = chance.choices(list(FATES), list(FATES.values()), k=chance.randint(1, 4))
    return [
        {"product": f"p{number}-{index}", "seller": f"seller-{chance.randrange(7)}", "fate": fate}
        for index, fate in enumerate(fates)
    ]


def _upload(number: int, index: int, product: dict[str, str], *, again: bool = False) -> djp.Event:
    slow = product["fate"] == "slow"
    parts = [name for name in PARTS if not slow or (name == "images") == again]
    n = number * 1000 + index
    return UPLOADS.event({**product, "n": n, "parts": parts, "text": f"{product['product']} as of {n}. " * 5})
