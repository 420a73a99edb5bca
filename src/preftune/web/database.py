"""SQLite or PostgreSQL behind one lock: `reading()` and `writing()` transactions, durable when `writing()` returns.

Writers take turns (BEGIN IMMEDIATE; a row lock on `settings`), so a rule that holds inside one transaction holds.
Labels come at human speed: turns cost nothing, and the two databases behave alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, select, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError

from preftune.errors import ConfigError
from preftune.web import schema

__all__ = ["Database"]

MIGRATION_LOCK = 0x7072656674756E65
"""Of `pg_advisory_xact_lock`: "preftune" in ASCII."""
BUSY_SECONDS = 60


class Database:
    """An open database whose tables are up to date; with `new` False a file that is not there is refused, not made."""

    def __init__(self, url: str, *, new: bool = True):
        self.engine = _engine(url)
        file = self.engine.url.database
        if not new and self.engine.dialect.name == "sqlite" and not Path(str(file)).is_file():
            raise ConfigError(
                f"there is no store {file}; name the file that `preftune label --db` keeps labels in, "
                "or fill a new one: preftune label --samples FILE"
            )
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self._turn = threading.Lock()
        self._writer = self.engine.execution_options(preftune_writes=True)
        try:
            self._migrate()
        except OperationalError as error:
            self.engine.dispose()
            reason = str(error.orig).strip()
            raise ConfigError(f"the database {url!r} cannot be opened: {reason}; check path, server, rights") from error

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view of everything."""
        with self.engine.connect() as connection:
            if not self.is_sqlite:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """The only writer until it ends; then all of it is on disk, or, after an exception, none."""
        # The threads of this process queue here: SQLite itself only asks again after ever longer pauses.
        with self._turn, self._writer.begin() as connection:
            connection.execute(select(schema.settings.c.id).with_for_update()).one()
            yield connection

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
        with self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if connection.execute(select(schema.settings.c.id)).first() is None:
                connection.execute(insert(schema.settings).values(id=1, content=""))


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url if "://" in url else f"sqlite:///{url}")
        if parsed.get_backend_name() == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise ConfigError(f"{url!r} names no file, so labels would be lost; give a path such as labels.db")
            engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
            return engine
        if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
            raise ConfigError(f"{parsed.drivername} is no database for labels; use a path or postgresql+psycopg://...")
        parsed = parsed.set(drivername="postgresql+psycopg")
        engine = create_engine(parsed, isolation_level="READ COMMITTED", pool_pre_ping=True)
        event.listen(engine, "connect", _prepare_postgres)
        return engine
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"{url!r} is no database: {error}; use a path or postgresql+psycopg://...") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"{url!r} needs {error.name}: pip install 'preftune[team]'") from error


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("preftune_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _prepare_postgres(connection: Any, _record: Any) -> None:
    # A server may be set to acknowledge before the disk has it; this session is not.
    connection.execute("SET synchronous_commit = on")
    connection.commit()
