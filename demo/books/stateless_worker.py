"""Stateless worker: a confirmation for each order, malformed or not."""

from definitions import orders, send_confirmations
from demo.books import mails
from demo.books.period import Period
from demo.outbox import CONFIRMATION


def check(period: Period) -> list[str]:
    """What is wrong."""
    return mails.check(period, send_confirmations, CONFIRMATION, due=period.sound(send_confirmations, orders), undue=())
