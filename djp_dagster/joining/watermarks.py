"""How far event time has come: the watermark of a task's inputs."""

from collections.abc import Sequence

from djp_dagster.joining.entries import Summary

_NOTHING = -(1 << 62)


class Watermark:
    """The lowest of the highest event times of all inputs, without those that have been idle for long.

    If all of them are, event time goes on with the clock from where it was: else what waits for the next event would
    wait for ever.

    Args:
        summary: where it is kept.
        topics: the inputs.
        idle_micros: how long an input may be silent before it is ignored.
    """

    def __init__(self, summary: Summary, topics: Sequence[str], idle_micros: int) -> None:
        self._seen, self._topics, self._idle = summary.watermarks, topics, idle_micros

    def see(self, topic: str, event_micros: int, stamp: int) -> None:
        """A record of ``topic`` was appended at ``stamp``."""
        if not self._seen:
            self._seen.update(dict.fromkeys(self._topics, (_NOTHING, stamp)))
        highest, _ = self._seen.get(topic, (_NOTHING, stamp))
        self._seen[topic] = (max(highest, event_micros), stamp)

    def at(self, now: int) -> int:
        """Where it is at append time ``now``."""
        active = [highest for highest, last in self._seen.values() if now - last <= self._idle]
        if active:
            return min(active)
        highest = max((highest for highest, _ in self._seen.values()), default=_NOTHING)
        if highest == _NOTHING:
            return _NOTHING
        return highest + now - max(last for _, last in self._seen.values())

    def next_look(self, due: int, now: int) -> int:
        """When it will pass ``due``, or may, if nothing more comes."""
        last = max((last for _, last in self._seen.values()), default=now)
        idle_from = last + self._idle + 1
        return idle_from if now < idle_from else now + max(due - self.at(now), 0) + 1
