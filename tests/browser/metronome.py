"""A code location beside the shop: its ticks show that the daemons of sensors and of schedules have gone round."""

import dagster as dg


@dg.sensor(minimum_interval_seconds=1)
def metronome() -> dg.SkipReason:
    """Tick, and do nothing."""
    return dg.SkipReason("tick")


@dg.op
def nothing() -> None:
    """Never run."""


@dg.job
def never() -> None:
    """Dagster has no schedule without a job."""
    nothing()


@dg.schedule(job=never, cron_schedule="* * * * *")
def minute_hand() -> dg.SkipReason:
    """Tick at every full minute, and do nothing."""
    return dg.SkipReason("tick")


defs = dg.Definitions(jobs=[never], sensors=[metronome], schedules=[minute_hand])
