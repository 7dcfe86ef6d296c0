"""The tables. Format version 4.

Record batches are rows of ``record_batches``: one per append and partition, with the cumulative byte count, so that
"how much and how old is what has piled up" is an index look-up. JSON columns are text, for whoever opens the file.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

FORMAT_VERSION = 4

metadata = MetaData()
# SQLite numbers rows itself only in an INTEGER primary key.
_Id = BigInteger().with_variant(Integer, "sqlite")

meta = Table(
    "djp_meta",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
    sqlite_with_rowid=False,
)

topics = Table(
    "djp_topics",
    metadata,
    Column("topic_id", _Id, primary_key=True, autoincrement=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("partitions", Integer, nullable=False),
    Column("key_path", Text),
    Column("max_event_bytes", BigInteger, nullable=False),
    Column("retention", Text, nullable=False),
    Column("offload_above", BigInteger),
    Column("created_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

partitions = Table(
    "djp_partitions",
    metadata,
    Column("topic_id", BigInteger, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("begin_offset", BigInteger, nullable=False),
    Column("end_offset", BigInteger, nullable=False),
    Column("end_bytes", BigInteger, nullable=False),
    Column("last_append_micros", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

record_batches = Table(
    "djp_record_batches",
    metadata,
    Column("row_id", _Id, primary_key=True, autoincrement=True),
    Column("topic_id", BigInteger, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("base_offset", BigInteger, nullable=False),
    Column("count", Integer, nullable=False),
    Column("base_bytes", BigInteger, nullable=False),
    Column("bytes", Integer, nullable=False),
    Column("append_micros", BigInteger, nullable=False),
    Column("min_event_micros", BigInteger, nullable=False),
    Column("max_event_micros", BigInteger, nullable=False),
    Column("codec", Integer, nullable=False),
    Column("blob", LargeBinary, nullable=False),
)
# Covers every look-up but the blob itself, so that scanning positions never touches payload pages.
Index(
    "djp_record_batches_by_offset",
    record_batches.c.topic_id,
    record_batches.c.partition,
    record_batches.c.base_offset,
    record_batches.c["count"],
    record_batches.c.base_bytes,
    record_batches.c.bytes,
    record_batches.c.append_micros,
    unique=True,
)
Index(
    "djp_record_batches_by_time",
    record_batches.c.topic_id,
    record_batches.c.partition,
    record_batches.c.append_micros,
    record_batches.c.base_offset,
)

producers = Table(
    "djp_producers",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("last_sequence", BigInteger, nullable=False),
    Column("updated_micros", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

groups = Table(
    "djp_groups",
    metadata,
    Column("group_id", _Id, primary_key=True, autoincrement=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("topics", Text, nullable=False),
    Column("tasks", Integer, nullable=False),
    Column("stateful", Boolean, nullable=False),
    Column("code_version", Text),
    Column("created_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

positions = Table(
    "djp_positions",
    metadata,
    Column("group_id", BigInteger, primary_key=True),
    Column("topic_id", BigInteger, primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("begun", BigInteger, nullable=False),
    Column("committed", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

tasks = Table(
    "djp_tasks",
    metadata,
    Column("group_id", BigInteger, primary_key=True),
    Column("task", Integer, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("owner", Text),
    Column("ttl_micros", BigInteger, nullable=False),
    Column("expires_micros", BigInteger, nullable=False),
    Column("last_batch", String(64)),
    Column("last_attempt", Integer, nullable=False),
    Column("last_epoch", BigInteger, nullable=False),
    Column("fired_micros", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)

members = Table(
    "djp_members",
    metadata,
    Column("group_id", BigInteger, primary_key=True),
    Column("owner", String(200), primary_key=True),
    Column("ttl_micros", BigInteger, nullable=False),
    Column("expires_micros", BigInteger, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("asked_to_leave", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

intents = Table(
    "djp_intents",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("group_id", BigInteger, nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("running", Boolean, nullable=False),
    Column("body", Text, nullable=False),
    sqlite_with_rowid=False,
)

deadlines = Table(
    "djp_deadlines",
    metadata,
    Column("group_id", BigInteger, primary_key=True),
    Column("task", Integer, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("due_micros", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
Index("djp_deadlines_by_due", deadlines.c.group_id, deadlines.c.task, deadlines.c.due_micros)

snapshots = Table(
    "djp_snapshots",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("group_id", BigInteger, nullable=False),
    Column("task", Integer, nullable=False),
    Column("changelog_id", BigInteger, nullable=False),
    Column("changelog_offset", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("payload", Text, nullable=False),
    Column("mentions", LargeBinary, nullable=False),
    Column("created_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("djp_snapshots_by_task", snapshots.c.group_id, snapshots.c.task, snapshots.c.id)

dead_letters = Table(
    "djp_dead_letters",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("group_id", BigInteger, nullable=False),
    Column("topic", String(200), nullable=False),
    Column("partition", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("append_micros", BigInteger, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("error_type", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("redrives", Integer, nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("created_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("djp_dead_letters_by_status", dead_letters.c.group_id, dead_letters.c.status, dead_letters.c.id)

outputs = Table(
    "djp_outputs",
    metadata,
    Column("sequence", _Id, primary_key=True, autoincrement=True),
    Column("group_id", BigInteger, nullable=False),
    Column("batch_id", String(64), nullable=False, unique=True),
    Column("attempt", Integer, nullable=False),
    Column("payload", Text, nullable=False),
    Column("committed_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("djp_outputs_by_group", outputs.c.group_id, outputs.c.sequence)

readers = Table(
    "djp_readers",
    metadata,
    Column("group_id", BigInteger, primary_key=True),
    Column("reader", String(200), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("proposed", BigInteger),
    Column("proposer", Text),
    sqlite_with_rowid=False,
)

requests = Table(
    "djp_requests",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("group_id", BigInteger, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_micros", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
Index("djp_requests_by_status", requests.c.group_id, requests.c.status, requests.c.id)
