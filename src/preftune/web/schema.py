"""The tables of a label store, equal on SQLite and PostgreSQL; `migrations/` creates them.

Numbers (`id`) are given by the store, 1, 2, ... without gaps. Texts an outsider wrote are kept as ASCII JSON, times as
milliseconds since 1970, UTC. Rows of `events` are never changed or deleted: triggers refuse it.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = ["accounts", "events", "invites", "items", "metadata", "sessions", "settings", "tasks"]

metadata = MetaData()

settings = Table(
    "settings",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
)

items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key", String(64), nullable=False, unique=True),
    Column("content", Text, nullable=False),
    Column("is_gold", Boolean(create_constraint=False), nullable=False),
    Column("priority", Double),
    Index("items_by_priority", "is_gold", "priority"),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("item", Integer, ForeignKey("items.id"), nullable=False),
    Column("annotator", String(200), nullable=False),
    Column("shown", Text, nullable=False),
    Column("expires", BigInteger, nullable=False),
    # The fold of the task's events, kept beside them: which event stands, and what kind of answer it states.
    Column("standing", Integer),
    Column("answered", String(16)),
    UniqueConstraint("item", "annotator", name="one_task_per_item_and_annotator"),
    Index("tasks_by_annotator", "annotator", "id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("task", Integer, ForeignKey("tasks.id"), nullable=False),
    Column("annotator", String(200), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("answer", Text),
    Column("undoes", Integer, ForeignKey("events.id"), unique=True),
    Column("client_key", String(200), nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("annotator", "client_key", name="one_event_per_client_key"),
    Index("events_by_task", "task", "id"),
    Index("events_by_annotator", "annotator", "id"),
)

accounts = Table(
    "accounts",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("role", String(32), nullable=False),
    Column("password", Text),
    Column("created", BigInteger, nullable=False),
)

invites = Table(
    "invites",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("role", String(32), nullable=False),
    Column("created", BigInteger, nullable=False),
    Column("redeemed", BigInteger),
)

sessions = Table(
    "sessions",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("account", String(200), ForeignKey("accounts.name"), nullable=False),
    Column("expires", BigInteger, nullable=False),
    Column("revoked", BigInteger),
)
