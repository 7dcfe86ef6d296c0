"""Batching: every sound order in the files, and no record in two of them."""

from collections import Counter

from definitions import order_files, orders
from demo.books.period import Period, difference


def check(period: Period) -> list[str]:
    """What is wrong."""
    import pandas as pd

    stream, group = period.stream, order_files.group
    written: Counter[tuple[int, int]] = Counter()
    ids = period.ids_just_before(order_files)
    sequence = period.began.last_output[group]
    while outputs := stream.outputs(group, after=sequence):
        for output in outputs:
            with stream.payloads.open(output.payload) as file:
                frame = pd.read_parquet(file, columns=["partition", "offset", "event_id"])
            written.update(zip(frame["partition"], frame["offset"], strict=True))
            ids.update(frame["event_id"])
        sequence = outputs[-1].sequence
    wanted = {order.id for order in period.sound(order_files, orders) if order.data.get("amount") is not None}
    problems = [f"order {position} is in {n} files" for position, n in written.items() if n > 1]
    return problems[:5] + difference("order in no file", wanted - ids)
