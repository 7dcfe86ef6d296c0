"""What the daemon of `benchmarks.workers` loads: one consumer that echoes, in run mode or in worker mode.

The environment says how: ``BENCH_STREAM`` is the stream's file, ``BENCH_WORKERS`` the number of workers (0: run mode).
"""

import os

import dagster as dg

import djp_dagster as djp

WORK = djp.Topic("work")
EFFECTS = djp.Topic("effects")


@djp.consumer(topic=WORK, emits=[EFFECTS])
def echo(batch: djp.Batch) -> None:
    """Answer each stamp with what it holds and with the process that handled it; add up everything else."""
    total = count = 0
    for record in batch:
        if record.type == "stamp":
            batch.emit(EFFECTS.event(stamp=record.data, pid=os.getpid()))
        else:
            total += record.data["amount"]
            count += 1
    if count:
        batch.emit(EFFECTS.event(count=count, total=total, pid=os.getpid()))


_WORKERS = int(os.environ.get("BENCH_WORKERS", "0"))
_ON = dg.DefaultSensorStatus.RUNNING

defs = dg.Definitions(
    assets=[*djp.build_topic_assets(echo), djp.build_stream_asset(echo)],
    sensors=[
        djp.build_worker_sensor([echo], workers=_WORKERS, lease="5s", default_status=_ON)
        if _WORKERS
        else djp.build_stream_sensor(echo, default_status=_ON)
    ],
    resources={"event_stream": djp.SqlEventStream(url=f"sqlite:///{os.environ.get('BENCH_STREAM', 'bench.db')}")},
    executor=dg.in_process_executor,
)
