"""Jobs over the IO manager that other processes load; where they lie, the environment says."""

import os
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

import djp_dagster as djp

MANAGER = djp.ClaimCheckIOManager(store=djp.LocalPayloadStore(folder=dg.EnvVar("JOBS_PAYLOADS")), threshold="1KiB")


def place() -> Path:
    return Path(os.environ["JOBS_FOLDER"])


def ran(name: str) -> int:
    """How often a step has run, this time included."""
    with (place() / f"{name}.ran").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return times(name)


def times(name: str) -> int:
    return len((place() / f"{name}.ran").read_text().splitlines())


@dg.op
def numbers() -> pd.DataFrame:
    ran("numbers")
    return pd.DataFrame({"n": range(1000)})


@dg.op(out=dg.DynamicOut())
def pieces(frame: pd.DataFrame) -> Any:
    ran("pieces")
    for number in range(3):
        yield dg.DynamicOutput(frame[frame["n"] % 3 == number], mapping_key=f"piece_{number}")


@dg.op
def total(piece: pd.DataFrame) -> int:
    ran("total")
    return int(piece["n"].sum())


@dg.op
def add(totals: list) -> dict:  # type: ignore[type-arg]
    ran("add")
    if not (place() / "may_add").exists():
        raise RuntimeError("not yet")
    return {"total": sum(totals)}


@dg.op(retry_policy=dg.RetryPolicy(max_retries=2))
def retried(sums: dict) -> int:  # type: ignore[type-arg]
    if ran("retried") < 3:
        raise RuntimeError("again")
    return int(sums["total"])


@dg.job(resource_defs={"io_manager": MANAGER}, executor_def=dg.in_process_executor)
def summing() -> None:
    retried(add(pieces(numbers()).map(total).collect()))


@dg.asset
def upstream() -> pd.DataFrame:
    return pd.DataFrame({"pid": [os.getpid()] * 1000})


@dg.asset
def downstream(upstream: pd.DataFrame) -> dict[str, int]:
    return {"written_by": int(upstream["pid"][0]), "read_by": os.getpid()}


@dg.asset
def contended(context: dg.AssetExecutionContext) -> pd.DataFrame:
    """Two runs of it are at work at once: each waits for the other."""
    (place() / f"here-{context.run_id}").touch()
    give_up = time.monotonic() + 100
    while len(list(place().glob("here-*"))) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.02)
    return pd.DataFrame({"run": [context.run_id] * 5000})


defs = dg.Definitions(
    assets=[upstream, downstream, contended],
    jobs=[
        dg.define_asset_job("chain", selection=["upstream", "downstream"], executor_def=dg.multiprocess_executor),
        dg.define_asset_job("contend", selection=["contended"], executor_def=dg.in_process_executor),
    ],
    resources={"io_manager": MANAGER},
)


def chain() -> dg.JobDefinition:
    return defs.resolve_job_def("chain")


def contend() -> dg.JobDefinition:
    return defs.resolve_job_def("contend")
