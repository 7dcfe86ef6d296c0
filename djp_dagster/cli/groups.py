"""``djp groups``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from djp_dagster.cli import output
from djp_dagster.cli.access import Access, pass_access
from djp_dagster.doctor import is_held

if TYPE_CHECKING:
    from djp_dagster.streams.model import GroupInfo, Intent, TaskInfo
    from djp_dagster.streams.stream import EventStream


_MOST_OUTPUTS = 10_000
"""Nothing counts outputs without reading their references, so more of them are not counted."""


@click.group("groups", invoke_without_command=True)
@output.json_option
@click.pass_context
@pass_access
def command(access: Access, ctx: click.Context, as_json: bool) -> None:
    """List consumer groups; or show or delete one."""
    if ctx.invoked_subcommand is not None:
        return
    stream = access.open()
    found = [_facts(stream, info) for info in stream.groups()]
    if as_json:
        for facts in found:
            output.print_json(facts)
        return
    if not found:
        output.note("no groups; a consumer's first run makes its group")
        return
    rows = output.table(
        "group", "topics", "tasks", "state", "pending", "dead", "held by", right=("tasks", "pending", "dead")
    )
    for facts in found:
        rows.add_row(
            facts["group"],
            ", ".join(facts["topics"]),
            str(facts["tasks"]),
            "yes" if facts["stateful"] else "no",
            output.count(facts["pending_events"]),
            output.count(facts["dead_letters_pending"]),
            short_holders(facts["holders"]),
        )
    output.show(rows)


def _facts(stream: "EventStream", info: "GroupInfo") -> dict[str, Any]:
    return {
        "group": info.name,
        "topics": list(info.topics),
        "tasks": info.tasks,
        "stateful": info.stateful,
        "created": output.moment(info.created_micros),
        "pending_events": stream.pending(info.name).events,
        "dead_letters_pending": stream.coordinator.count_dead_letters(info.name, "pending"),
        "holders": holders(stream.coordinator.tasks(info.name), stream.log.now_micros()),
    }


def holders(tasks: "Sequence[TaskInfo]", now_micros: int) -> dict[str, list[int]]:
    """The tasks each live lease holder has."""
    found: dict[str, list[int]] = {}
    for task in tasks:
        if task.owner is not None and is_held(task, now_micros):
            found.setdefault(task.owner, []).append(task.task)
    return found


def short_holders(found: dict[str, list[int]]) -> str:
    """Holders and their tasks, for a table."""
    return ", ".join(f"{short_owner(owner)} ({ranges(tasks)})" for owner, tasks in found.items()) or "nobody"


def short_owner(owner: str) -> str:
    """A run by the first 8 letters of its id, as Dagster shows it; others whole."""
    return owner[:12] if owner.startswith("run-") else output.plain(owner)


def ranges(numbers: Sequence[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3 and 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


@command.command("show")
@click.argument("group")
@output.json_option
@pass_access
def show_command(access: Access, group: str, as_json: bool) -> None:
    """Show who works on GROUP, how far it is, its open batches and requests."""
    stream = access.open()
    info = stream.coordinator.group(group)
    facts = _facts(stream, info) | _details(stream, info)
    if as_json:
        output.print_json(facts)
    else:
        _show_details(facts)


def _details(stream: "EventStream", info: "GroupInfo") -> dict[str, Any]:
    coordinator, now = stream.coordinator, stream.log.now_micros()
    tasks = coordinator.tasks(info.name)
    spans = stream.log.spans(info.topics)
    return {
        "now": output.moment(now),
        "task_list": [_task(task, now) for task in tasks],
        "positions": [
            {
                "topic": at.topic,
                "partition": at.partition,
                "begin": spans[at].begin,
                "committed": committed,
                "end": spans[at].end,
                "lag": stream.log.backlog({at: committed}).events,
            }
            for at, committed in stream.positions(info.name).items()
        ],
        "open_batches": [batch_facts(intent, now) for intent in coordinator.intents(info.name)],
        "next_deadline": output.moment(coordinator.next_deadline(info.name, range(info.tasks))),
        "open_requests": [
            {
                "id": request.id,
                "kind": request.kind,
                "body": dict(request.body),
                "age_s": (now - request.created_micros) / 1e6,
            }
            for request in coordinator.requests(info.name)
        ],
        "members": [
            {"owner": one.owner, "live": one.live, "paused": one.paused, "asked_to_leave": one.asked_to_leave}
            for one in coordinator.members(info.name)
        ],
    } | _outputs(stream, info.name)


def _outputs(stream: "EventStream", group: str) -> dict[str, Any]:
    last = stream.coordinator.last_output(group)
    number = len(stream.outputs(group, limit=_MOST_OUTPUTS + 1))
    return {
        "outputs": min(number, _MOST_OUTPUTS),
        "more_outputs": number > _MOST_OUTPUTS,
        "last_output": None if last is None else output.moment(last.committed_micros),
    }


def _count_of_outputs(facts: dict[str, Any]) -> str:
    return f"{'more than ' if facts['more_outputs'] else ''}{facts['outputs']:,}"


def _task(task: "TaskInfo", now: int) -> dict[str, Any]:
    return {
        "task": task.task,
        "epoch": task.epoch,
        "holder": task.owner if is_held(task, now) else None,
        "lease_left_s": (task.expires_micros - now) / 1e6 if is_held(task, now) else None,
        "vanished_holder": None if is_held(task, now) else task.owner,
        "last_batch": task.last_batch,
    }


def batch_facts(intent: "Intent", now_micros: int) -> dict[str, Any]:
    """What is to be told of an open batch."""
    return {
        "batch_id": intent.batch_id,
        "kind": intent.kind,
        "tasks": list(intent.tasks),
        "reason": intent.reason,
        "attempt": intent.attempt,
        "failures": intent.failures,
        "deaths": intent.deaths,
        "poison": len(intent.poison),
        "events": sum(part.end - part.start for part in intent.ranges) + len(intent.dead_letters),
        "age_s": (now_micros - intent.now_micros) / 1e6,
        "not_before": output.moment(intent.not_before_micros or None),
    }


def _show_details(facts: dict[str, Any]) -> None:
    from rich.console import Group

    title = (
        f"group {facts['group']} reads {', '.join(facts['topics'])}; {'with' if facts['stateful'] else 'no'} state, "
        f"{_count_of_outputs(facts)} outputs, {facts['dead_letters_pending']:,} pending dead letters"
    )
    output.show(Group(title, ""), _task_table(facts), "", _position_table(facts))
    for member in facts["members"]:
        said = [name.replace("_", " ") for name in ("paused", "asked_to_leave") if member[name]]
        state = ", ".join(said if member["live"] else ["vanished"]) or "live"
        click.echo(f"worker {short_owner(member['owner'])}: {state}")
    if facts["open_batches"]:
        output.show("", batch_table(facts["open_batches"]))
    for request in facts["open_requests"]:
        click.echo(f"request {request['id']} ({request['kind']}): open for {output.duration(request['age_s'])}")
    if facts["next_deadline"]:
        click.echo(f"next deadline: {facts['next_deadline']}")


def _task_table(facts: dict[str, Any]) -> Any:
    rows = output.table("task", "epoch", "held by", "lease left", right=("task", "epoch", "lease left"))
    for task in facts["task_list"]:
        holder = short_owner(task["holder"]) if task["holder"] else "nobody"
        if task["vanished_holder"]:
            holder = f"nobody ({short_owner(task['vanished_holder'])} vanished)"
        rows.add_row(str(task["task"]), str(task["epoch"]), holder, output.duration(task["lease_left_s"]))
    return rows


def _position_table(facts: dict[str, Any]) -> Any:
    figures = ("partition", "committed", "end", "lag")
    rows = output.table("topic", *figures, right=figures)
    for at in facts["positions"]:
        rows.add_row(at["topic"], *(output.count(at[name]) for name in figures))
    return rows


def batch_table(batches: Sequence[dict[str, Any]]) -> Any:
    """A table of open batches."""
    figures = ("events", "attempt", "failures", "deaths", "age")
    rows = output.table("open batch", "tasks", "reason", *figures, right=figures)
    for batch in batches:
        rows.add_row(
            batch["batch_id"][:12],
            ranges(batch["tasks"]),
            output.plain(batch["reason"]),
            output.count(batch["events"]),
            *(str(batch[name]) for name in figures[1:4]),
            output.duration(batch["age_s"]),
        )
    return rows


@command.command("delete")
@click.argument("group")
@click.option("--yes", is_flag=True, help="Really; without it, only say what would go.")
@output.json_option
@pass_access
def delete_command(access: Access, group: str, yes: bool, as_json: bool) -> None:
    """Delete GROUP: its offsets, deadlines, dead letters, output references, and its state.

    The topics it reads, and what it emitted, stay. Nothing may be working on it.
    """
    stream = access.open()
    facts = _facts(stream, stream.coordinator.group(group)) | _outputs(stream, group)
    goes = (
        f"group {group}: {facts['tasks']} tasks' offsets, {facts['dead_letters_pending']:,} pending dead letters, "
        f"{_count_of_outputs(facts)} output references{', its state' if facts['stateful'] else ''}"
    )
    if not yes:
        raise click.UsageError(f"this would delete {goes}; say --yes to do it")
    stream.delete_group(group)
    if as_json:
        output.print_json({"deleted": facts})
    else:
        click.echo(f"deleted {goes}")
