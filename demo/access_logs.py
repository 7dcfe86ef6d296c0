"""Access logs of the shop's web server, made up: a file for each of the last days, compressed; or your own.

``DJP_LOGS`` names others, such as ``/var/log/nginx/*.gz`` or ``s3://logs/shop/**``, in the combined log format.
"""

import gzip
import os
import random
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

_DAYS, _LINES = 3, 30_000
_DAMAGED = 0.001
_LINE = re.compile(r'(\S+) \S+ \S+ \[([^\]]+)\] "\S+ (\S+)[^"]*" (\d+) \S+ "([^"]*)"')
_TIME = "%d/%b/%Y:%H:%M:%S %z"
_REFERRERS = ("-", "-", "-", "https://search.example/?q=shoes", "https://news.example/today", "https://shop.example/")


class Hit(NamedTuple):
    """What a line says: who asked, when (in seconds since 1970), for which page, and coming from where."""

    visitor: str
    at: float
    page: str
    referrer: str


def pattern() -> str:
    """Which files: those that ``DJP_LOGS`` names, else the made-up ones under DAGSTER_HOME."""
    return os.environ.get("DJP_LOGS") or str(_folder() / "*.log.gz")


def _folder() -> Path:
    return Path(os.environ.get("DAGSTER_HOME") or ".demo") / "access_logs"


def hit(line: str) -> Hit:
    """A line of the combined log format.

    Raises:
        ValueError: it is none.
    """
    found = _LINE.match(line)
    if found is None:
        raise ValueError("no line of the combined log format")
    visitor, at, target, _, referrer = found.groups()
    moment = datetime.strptime(at, _TIME)  # noqa: DTZ007  with its offset
    return Hit(visitor, moment.timestamp(), target.partition("?")[0], referrer)


def make() -> int:
    """Make up the files of the last days that are not there; how many lines each has, or 0 if they are yours."""
    if os.environ.get("DJP_LOGS"):
        return 0
    _folder().mkdir(parents=True, exist_ok=True)
    today = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    for number in range(1, _DAYS + 1):
        day = today - timedelta(days=number)
        path = _folder() / f"{day:%Y-%m-%d}.log.gz"
        if not path.exists():
            part = path.with_suffix(".part")
            part.write_bytes(gzip.compress("".join(_lines(day)).encode(), compresslevel=1))
            part.replace(path)
    return _LINES


def _lines(day: datetime) -> Iterator[str]:
    """A day of visits: people look at some pages, go away, and come back; now and then a line is damaged."""
    chance = random.Random(day.toordinal())  # noqa: S311
    ahead = sorted(chance.random() * 86_400 for _ in range(_LINES))
    for second in ahead:
        visitor = f"203.0.113.{int(chance.paretovariate(1.1)) % 250}"
        product = int(chance.paretovariate(0.9)) % 200
        page = chance.choice(("/", "/cart", f"/products/p{product}", f"/products/p{product}?ref=mail"))
        if chance.random() < _DAMAGED:
            yield f"{visitor} - - [a line that the disk was full for\n"
            continue
        at = (day + timedelta(seconds=second)).strftime(_TIME)
        yield f'{visitor} - - [{at}] "GET {page} HTTP/1.1" 200 {chance.randrange(200, 90_000)} '
        yield f'"{chance.choice(_REFERRERS)}" "Mozilla/5.0"\n'
