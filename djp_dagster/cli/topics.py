"""``djp topics``."""

from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access

if TYPE_CHECKING:
    from djp_dagster.streams.model import TopicInfo
    from djp_dagster.streams.stream import EventStream


@click.command("topics")
@click.option("--internal", is_flag=True, help="The library's own topics too, such as changelogs.")
@output.json_option
@pass_access
def command(access: Access, internal: bool, as_json: bool) -> None:
    """List topics, what they hold, and who reads them."""
    stream = access.open()
    readers = _readers(stream)
    now = stream.log.now_micros()
    found = [_facts(stream, info, readers.get(info.name, [])) for info in stream.topics(internal=internal)]
    if as_json:
        for facts in found:
            output.print_json(
                facts | {"oldest": output.moment(facts["oldest"]), "newest": output.moment(facts["newest"])}
            )
        return
    if not found:
        output.note("no topics; make one: djp publish TOPIC FILE --create")
        return
    rows = output.table(
        "topic", "parts", "key", "records", "bytes", "oldest", "newest", "kept", "groups",
        right=("parts", "records", "bytes", "oldest", "newest"),
    )  # fmt: skip
    for facts in found:
        rows.add_row(
            facts["topic"],
            str(facts["partitions"]),
            facts["key"] or "-",
            output.count(facts["records"]),
            output.size(facts["bytes"], estimated=facts["bytes_estimated"]),
            output.ago(facts["oldest"], now),
            output.ago(facts["newest"], now),
            _retention(facts),
            ", ".join(facts["groups"]) or "-",
        )
    output.show(rows)


def _readers(stream: "EventStream") -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for group in stream.groups():
        for topic in group.topics:
            readers.setdefault(topic, []).append(group.name)
    return readers


def _facts(stream: "EventStream", info: "TopicInfo", groups: list[str]) -> dict[str, Any]:
    spans = stream.log.spans([info.name])
    held = stream.log.backlog({at: span.begin for at, span in spans.items()})
    return {
        "topic": info.name,
        "partitions": info.partitions,
        "key": info.key,
        "records": held.events,
        "bytes": held.bytes,
        "bytes_estimated": held.estimated,
        "oldest": held.oldest_micros,
        "newest": held.newest_micros,
        "retention_s": info.retention.age_s,
        "retention_cap_s": info.retention.cap_s,
        "max_event_bytes": info.max_event_bytes,
        "groups": groups,
    }


def _retention(facts: dict[str, Any]) -> str:
    kept = "for ever" if facts["retention_s"] is None else output.duration(facts["retention_s"])
    return kept if facts["retention_cap_s"] is None else f"{kept}, cap {output.duration(facts['retention_cap_s'])}"
