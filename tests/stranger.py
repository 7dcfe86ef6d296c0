"""A stranger's first project: fifteen lines in a folder of its own, with Dagster's and djp's command lines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

PROJECT = """\
import dagster as dg
import djp_dagster as djp

orders = djp.Topic("orders", partitions=2, key="user_id")

@djp.consumer(topic=orders)
def totals(batch: djp.Batch):
    return batch.to_pandas().groupby("user_id", as_index=False).amount.sum()

@dg.asset
def report(context: dg.AssetExecutionContext, totals: djp.BatchOutputs) -> None:
    for output in totals.since("report"):
        context.add_output_metadata({"sum": int(output.load().amount.sum())})

defs = dg.Definitions.merge(djp.build_defs(totals), dg.Definitions(assets=[report]))
"""
# What would let a process find something else than what is installed beside its Python, and in its own home.
_OURS = ("DAGSTER_", "DJP_", "PYTHON", "VIRTUAL_ENV")


class Project:
    """A folder with the project in it, and a shell there.

    Args:
        folder: a new one.
        python: whose packages, and whose command lines.
    """

    def __init__(self, folder: Path, python: Path) -> None:
        self.folder, self.python = folder, python
        (folder / "home").mkdir()
        (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        (folder / "definitions.py").write_text(PROJECT)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
            "DAGSTER_HOME": str(folder / "home"),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, *command: str, given: str = "") -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            input=given,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def is_used(self) -> None:
        """Validate, publish, materialize, and look at what has come out."""
        self.run("dagster", "definitions", "validate", "-f", "definitions.py")
        lines = "\n".join(json.dumps({"user_id": f"u{n % 3}", "amount": n}) for n in range(10))
        publish = ("djp", "publish", "orders", "-", "--create", "--partitions", "2", "--key", "user_id")
        self.run(*publish, given=lines)
        self.run("dagster", "asset", "materialize", "--select", "totals,report", "-f", "definitions.py")
        (lag,) = [json.loads(line) for line in self.run("djp", "lag", "totals", "--json").splitlines()]
        assert "totals" in json.dumps(lag)
        look = (
            "import dagster as dg; i = dg.DagsterInstance.get();"
            "print(*[i.get_latest_materialization_event(dg.AssetKey(k)).asset_materialization.metadata[m].value"
            " for k, m in (('totals', 'events'), ('totals', 'lag_events'), ('report', 'sum'))])"
        )
        assert self.run(str(self.python), "-c", look).split() == ["10", "0", "45"]
