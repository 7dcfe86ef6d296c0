"""What both mailers should have left in the outbox: at most one mail for an order, and one if the address was known.

A mail is outside of the stream, so that no commit covers it. It is there once nevertheless: the mails of a batch are a
file under the batch's id, which is the same at every attempt.
"""

from collections import Counter
from collections.abc import Iterable

from definitions import user_emails
from demo import outbox
from demo.books.period import Period, difference
from djp_dagster import Consumer, Record

_ABOUT = "order "


def check(period: Period, consumer: Consumer, kind: str, due: Iterable[Record], undue: Iterable[Record]) -> list[str]:
    """What is wrong with the mails of a kind.

    Args:
        period: the time in question.
        consumer: the mailer.
        kind: of mail.
        due: orders that get one, if there is an address.
        undue: orders that get none.
    """
    files = outbox.files(period.mails)
    mailed = Counter(
        mail.about.removeprefix(_ABOUT)
        for file in files
        if outbox.kind_of(file.name) == kind
        for mail in outbox.mails_of(file)
    )
    placed = list(due)
    times = Counter(order.id for order in placed)  # an order that is published twice is two to a mailer
    times.update(period.ids_just_before(consumer) & set(times))
    problems = [f"order {one} has {mailed[one]} {kind}s for {n}" for one, n in times.items() if mailed[one] > n]
    problems = problems[:5] + difference(f"{kind} that was not due", {order.id for order in undue} & set(mailed))
    if len(files) >= outbox.KEPT:
        return problems  # what is missing may have been rotated away
    known = _known_throughout(period)
    wanted = {order.id for order in placed if order.data["user_id"] in known}
    return problems + difference(f"order without a {kind}, to an address that was known", wanted - set(mailed))


def _known_throughout(period: Period) -> set[str]:
    """The users whose address was known when the period began, and who never had it deleted."""
    began = period.began.positions[user_emails.group]
    known: set[str] = set()
    deleted: set[str] = set()
    for at, handled in began.items():
        for update in period.stream.records(at.topic, at.partition):
            if update.data.get("email") is None:
                deleted.add(update.data["user_id"])
            elif update.offset < handled:
                known.add(update.data["user_id"])
    return known - deleted
