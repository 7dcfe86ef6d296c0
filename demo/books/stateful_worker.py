"""Stateful worker: the table is what its topic says; a receipt for each order that has an amount."""

import tempfile
from pathlib import Path
from typing import Any

from definitions import orders, send_receipts, user_emails, user_updates
from demo.books import mails
from demo.books.period import Period, difference
from demo.outbox import RECEIPT


def check(period: Period) -> list[str]:
    """What is wrong."""
    placed = list(period.sound(send_receipts, orders))
    due = [order for order in placed if order.data.get("amount") is not None]
    undue = [order for order in placed if order.data.get("amount") is None]
    return _table(period) + mails.check(period, send_receipts, RECEIPT, due=due, undue=undue)


def _table(period: Period) -> list[str]:
    """The table against the latest version of each user's address among all updates that it has handled."""
    latest: dict[str, tuple[int, str | None]] = {}
    failed = {
        (letter.topic, letter.partition, letter.offset)
        for letter in period.stream.dead_letters(user_emails.group, status=None, limit=100_000)
    }
    for at, end in period.positions[user_emails.group].items():
        for update in period.stream.records(user_updates, at.partition, end=end):
            if update.position not in failed:
                user_id, version = update.data["user_id"], update.data["version"]
                if user_id not in latest or version >= latest[user_id][0]:
                    latest[user_id] = (version, update.data["email"])
    expected: dict[Any, str] = {user_id: email for user_id, (_, email) in latest.items() if email is not None}
    with (
        tempfile.TemporaryDirectory() as folder,
        period.stream.view(user_emails, folder=Path(folder)) as view,
    ):
        found = dict(view.items())
    differ = {str(user_id) for user_id in expected.keys() | found.keys() if expected.get(user_id) != found.get(user_id)}
    return difference("address in the table that is not the latest, or missing", differ)
