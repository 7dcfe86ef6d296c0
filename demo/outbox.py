"""The outbox: mails as files, one for each batch, under DAGSTER_HOME. Whoever looks sees what would have been sent."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

KEPT = 500
"""So many files stay, the newest; older ones are removed."""
RECEIPT, CONFIRMATION = "receipt", "confirmation"
_CONFIRMED = "-confirmed"


class Mail(NamedTuple):
    """One mail."""

    to: str
    about: str
    text: str


def folder(environment: Mapping[str, str] = os.environ) -> Path:
    """``$SHOP_OUTBOX``, else ``$DAGSTER_HOME/outbox``; ``.djp/outbox`` without either."""
    return Path(environment.get("SHOP_OUTBOX") or Path(environment.get("DAGSTER_HOME") or ".djp") / "outbox")


def deliver(batch_id: str, mails: Sequence[Mail]) -> None:
    """Put the mails of a batch into the outbox: whole, and once, however often the batch is tried."""
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    beside = place / f".{batch_id}.tmp"
    beside.write_text("\n".join(json.dumps(mail._asdict()) for mail in mails) + "\n")
    beside.replace(place / f"{batch_id}.jsonl")
    for old in sorted(files(place), key=_age)[:-KEPT]:
        old.unlink(missing_ok=True)


def files(place: Path) -> list[Path]:
    """The files of mails that are there."""
    return list(place.glob("*.jsonl"))


def mails_of(file: Path) -> list[Mail]:
    """The mails in a file; none if it has been removed."""
    with suppress(FileNotFoundError):
        return [Mail(**json.loads(line)) for line in file.read_text().splitlines() if line]
    return []


def kind_of(name: str) -> str:
    """Whether the file of that name has receipts or confirmations."""
    return CONFIRMATION if Path(name).stem.endswith(_CONFIRMED) else RECEIPT


def _age(file: Path) -> float:
    """When it was written; what another process has just removed is the oldest."""
    with suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0
