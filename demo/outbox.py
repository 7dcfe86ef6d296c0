"""The outbox: mails as files, one for each batch, under DAGSTER_HOME. Whoever looks sees what would have been sent."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_KEPT = 500


class Mail(NamedTuple):
    """One mail."""

    to: str
    about: str
    text: str


def folder() -> Path:
    """``$SHOP_OUTBOX``, else ``$DAGSTER_HOME/outbox``; ``.djp/outbox`` without either."""
    return Path(os.environ.get("SHOP_OUTBOX") or Path(os.environ.get("DAGSTER_HOME") or ".djp") / "outbox")


def deliver(batch_id: str, mails: Sequence[Mail]) -> None:
    """Put the mails of a batch into the outbox: whole, and once, however often the batch is tried."""
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    beside = place / f".{batch_id}.tmp"
    beside.write_text("\n".join(json.dumps(mail._asdict()) for mail in mails) + "\n")
    beside.replace(place / f"{batch_id}.jsonl")
    for old in sorted(place.glob("*.jsonl"), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)
