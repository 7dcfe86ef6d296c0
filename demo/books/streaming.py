"""Streaming: a suggestion for each click, an alert for each absurd order."""

from definitions import clicks, fraud, fraud_alerts, orders, recommend, suggestions
from demo.books.period import Period, difference, repeated

ABSURD_AMOUNT = 10_000


def check(period: Period) -> list[str]:
    """What is wrong."""
    return _suggestions(period) + _alerts(period)


def _suggestions(period: Period) -> list[str]:
    """One for each click that did not fail, numbered without a gap per user: each has changed the state once."""
    made = period.made(suggestions)
    problems = repeated("suggestion", made)
    last: dict[str, int] = {}
    for suggestion in made:
        user_id, views = suggestion.data["user_id"], suggestion.data["views"]
        if views != last.get(user_id, views - 1) + 1:
            problems.append(f"{user_id}'s suggestion {views} follows {last[user_id]}")
        last[user_id] = views
    wanted = {click.id for click in period.sound(recommend, clicks)}
    answered = {suggestion.data["click"] for suggestion in made} | period.ids_just_before(recommend)
    return problems + difference("click without a suggestion", wanted - answered)


def _alerts(period: Period) -> list[str]:
    """One for each absurd amount; a dead letter for each order without an amount."""
    made = period.made(fraud_alerts)
    placed = list(period.handled(fraud, orders))
    alerted = {alert.data["order"] for alert in made}
    absurd = {order.id for order in placed if (order.data.get("amount") or 0) > ABSURD_AMOUNT}
    missing = {
        str(order.position)
        for order in placed
        if order.data.get("amount") is None and not period.has_failed(fraud, order)
    }
    return (
        repeated("alert", made)
        + difference("absurd order without an alert", absurd - alerted)
        + difference("alert about nothing", alerted - {order.id for order in placed})
        + difference("malformed order that is no dead letter", missing)
    )
