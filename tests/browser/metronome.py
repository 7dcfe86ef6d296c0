"""A code location beside the shop: its ticks show that the sensor daemon has gone round."""

import dagster as dg


@dg.sensor(minimum_interval_seconds=1)
def metronome() -> dg.SkipReason:
    """Tick, and do nothing."""
    return dg.SkipReason("tick")


defs = dg.Definitions(sensors=[metronome])
