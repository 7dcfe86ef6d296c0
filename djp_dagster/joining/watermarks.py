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
        highest, last = self._seen.get(topic, (_NOTHING, stamp))
        # What is redriven was seen before, and says nothing of what its input does now.
        self._seen[topic] = (max(highest, event_micros), max(last, stamp))

    def at(self, now: int) -> int:
        """Where it is at append time ``now``."""
        active = [highest for highest, last in self._seen.values() if now - last <= self._idle]
        if active:
            return min(active)
        highest = max((highest for highest, _ in self._seen.values()), default=_NOTHING)
        if highest == _NOTHING:
            return _NOTHING
        return highest + now - max(last for _, last in self._seen.values())

    def passes(self, due: int) -> int:
        """The append time at which it passes ``due`` if nothing more comes; or has, if something has just come."""
        lasts = [last for _, last in self._seen.values()]
        newest = max(lasts, default=due)
        for moment in (newest, *sorted(last + self._idle + 1 for last in lasts)):
            if moment >= newest and self.at(moment) > due:
                return moment
        return newest + due - max((highest for highest, _ in self._seen.values()), default=newest) + 1
