"""``djp claims``: look at claims, get and verify their payloads, collect garbage."""

import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.claim_check.claims import Claim
from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.errors import DjpError, InvalidSettingError, PayloadMissingError

if TYPE_CHECKING:
    from djp_dagster.claim_check.collection import CollectionReport
    from djp_dagster.claim_check.stores import PayloadStore
    from djp_dagster.streams.stream import EventStream

_store_option = click.option(
    "--store",
    "url",
    metavar="URL",
    help="The payload store: a folder, or s3://bucket/prefix (settings from DJP_S3_... and what boto3 finds); that of "
    "the stream unless given.",
)
_CLAIM = "A token as JSON, the URI of a payload, or TOPIC:PARTITION:OFFSET of a record."


@click.group("claims")
def command() -> None:
    """Look at claims and their payloads, and collect garbage."""


@command.command("show")
@click.argument("claim")
@_store_option
@click.option("--url", "url_for", metavar="DURATION", help="Print a URL by which anybody may read it for that long.")
@output.json_option
@pass_access
def show_command(access: Access, claim: str, url: str | None, url_for: str | None, as_json: bool) -> None:
    """Say where the payload of CLAIM lies, what it is, and whether it is there."""
    store, found = _resolved(access, url, claim)
    if url_for is not None:
        click.echo(store.presign(found, expires_in=url_for))
        return
    facts = _facts(store, found)
    if as_json:
        output.print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {output.plain('-' if value is None else value)}")


@command.command("get")
@click.argument("claim")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path, dir_okay=False), help="A file; else stdout.")
@_store_option
@pass_access
def get_command(access: Access, claim: str, path: Path | None, url: str | None) -> None:
    """Write the payload of CLAIM to a file or to standard output, verified."""
    store, found = _resolved(access, url, claim)
    if path is not None:
        store.download(found, path)
        output.note(f"{path}: {output.size(path.stat().st_size)}")
        return
    if sys.stdout.isatty():
        raise click.UsageError("a payload is no text for a terminal; name a file: -o FILE, or redirect the output")
    with store.open(found) as file:
        shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)


@command.command("verify")
@click.argument("claims", metavar="[CLAIM]...", nargs=-1)
@click.option("--topic", help="All records of a topic that carry a claim.")
@_store_option
@output.json_option
@pass_access
def verify_command(access: Access, claims: tuple[str, ...], topic: str | None, url: str | None, as_json: bool) -> None:
    """Read payloads and compare them with their claims; exit code 1 if any is missing or damaged."""
    if bool(claims) == (topic is not None):
        raise click.UsageError("name claims, or a topic with --topic")
    good = size = 0
    problems: list[dict[str, Any]] = []
    for name, store, found in _wanted(access, url, claims, topic):
        try:
            size += store.verify(found() if callable(found) else found)
            good += 1
        except DjpError as error:
            if error.transient:
                raise
            problems.append({"claim": name, "error": type(error).__name__, "message": str(error)})
    if as_json:
        output.print_json({"verified": good, "bytes": size, "problems": problems})
    else:
        if problems:
            table = output.table("claim", "error", "message")
            for problem in problems:
                table.add_row(*(output.plain(value) for value in problem.values()))
            output.show(table)
        click.echo(f"{output.count(good)} payloads are as their claims say ({output.size(size)}), {len(problems)} not")
    if problems:
        raise click.exceptions.Exit(1)


@command.command("gc")
@click.option("--grace", default="1d", show_default=True, metavar="DURATION", help="See the documentation.")
@click.option("--delete", is_flag=True, help="Do it; without this, only say what would be done.")
@click.option("--assets", "assets_url", metavar="URL", help="The store of a ClaimCheckIOManager, not the stream's.")
@output.json_option
@pass_access
def gc_command(access: Access, grace: str, delete: bool, assets_url: str | None, as_json: bool) -> None:
    """Condemn payloads that nothing refers to any more, and delete those condemned for long enough.

    What one run condemns, a later one deletes; run it daily.
    """
    if assets_url is None:
        report = access.open().collect_payloads(grace=grace, dry_run=not delete)
    else:
        from djp_dagster.claim_check.pointers import collect_values

        report = collect_values(_open(assets_url), grace=grace, dry_run=not delete)
    if as_json:
        output.print_json(report)
        return
    _show_report(report)


def _show_report(report: "CollectionReport") -> None:
    if report.garbage:
        table = output.table("payload", "size", "stored", "fate", right=("size",))
        for found in sorted(report.garbage, key=lambda one: -one.bytes)[:20]:
            stored = found.stored_at.isoformat(timespec="seconds").replace("+00:00", "Z")
            table.add_row(found.key, output.size(found.bytes), stored, found.fate)
        output.show(table)
    click.echo(
        f"{output.count(report.payloads)} payloads, {output.size(report.payload_bytes)}: {output.count(report.in_use)} "
        f"in use, {output.count(report.young)} younger than the grace period"
    )
    for fate in sorted(report.counts):
        number, size = report.count(fate)
        click.echo(f"{fate}: {output.count(number)} ({output.size(size)})")
    click.echo(
        f"condemned before, and needed again or gone: {report.pardoned}; unfinished uploads: {report.unfinished}; "
        f"objects of others, left alone: {report.foreign}"
    )
    if report.dry_run:
        output.note("a dry run: nothing was changed; --delete does it")


def _open(url: str) -> "PayloadStore":
    from djp_dagster.claim_check.location import open_payload_store

    return open_payload_store(url)


def _resolved(access: Access, url: str | None, text: str) -> "tuple[PayloadStore, Claim]":
    position = text.rsplit(":", 2)
    if not text.startswith("{") and "://" not in text and len(position) == 3:
        stream = access.open()
        claim = _claim_of_record(stream, *position)
        return (_open(url) if url is not None else stream.payloads), claim
    claim = Claim.from_json(text) if text.startswith("{") else Claim(uri=text)
    return (_open(url) if url is not None else access.open().payloads), claim


def _claim_of_record(stream: "EventStream", topic: str, partition: str, offset: str) -> Claim:
    if not (partition.isdigit() and offset.isdigit()):
        raise click.BadParameter(f"{topic}:{partition}:{offset} is no claim. {_CLAIM}")
    for record in stream.records(topic, int(partition), int(offset), int(offset) + 1):
        if record.claim is None:
            raise InvalidSettingError(
                f"record {offset} of topic {topic!r} partition {partition} carries no claim: its data is in the stream",
                setting="claim",
                value=offset,
            )
        return record.claim
    raise InvalidSettingError(
        f"topic {topic!r} partition {partition} has no record {offset}", setting="claim", value=offset
    )


def _wanted(access: Access, url: str | None, claims: tuple[str, ...], topic: str | None) -> Iterator[tuple[Any, ...]]:
    if topic is None:
        for text in claims:
            yield (text[:80], *_resolved(access, url, text))
        return
    stream = access.open()
    store = _open(url) if url is not None else stream.payloads
    for partition in range(stream.log.topic(topic).partitions):
        for record in stream.records(topic, partition):
            if "dataref" in (record.ext or {}):
                # Asked for later: a claim that is none is the record's problem.
                yield f"{topic}:{partition}:{record.offset}", store, lambda record=record: record.claim


def _facts(store: "PayloadStore", claim: Claim) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "uri": claim.uri,
        "bytes": claim.size,
        "sha256": claim.sha256,
        "media type": claim.media_type,
        "encoding": claim.encoding,
        "expires": claim.expires.isoformat() if claim.expires is not None else None,
    }
    try:
        found = store.info(claim)
    except PayloadMissingError:
        return facts | {"is there": "no", "stored bytes": None, "stored": None}
    stored = datetime.fromtimestamp(found.modified, timezone.utc).isoformat(timespec="seconds")
    return facts | {"is there": "yes", "stored bytes": found.bytes, "stored": stored}
