"""DAG: each submission has come to its end on each of its branches, once: an event, or a dead letter."""

from collections import Counter

from definitions import extract_facts, resize_images, submissions, transcode_video
from demo.books.period import Period, difference, repeated

BRANCHES = (extract_facts, transcode_video, resize_images)


def check(period: Period) -> list[str]:
    """What is wrong."""
    problems = []
    for branch in BRANCHES:
        (topic,) = branch.emits
        made = period.made(topic)
        wanted = Counter(submitted.data["product_id"] for submitted in period.sound(branch, submissions))
        found = Counter(part.data["product_id"] for part in made)
        problems += repeated(f"part of {topic.name}", made)
        problems += difference(f"submission without a part of {topic.name}", set(wanted - found))
        problems += difference(f"part of {topic.name} without a submission", set(found - wanted))
    return problems
