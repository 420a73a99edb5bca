"""How alembic runs the migrations: on the connection, and in the transaction, that `database.Database` hands over.

alembic loads this file under the name `env_py`; a plain import does nothing.
"""

from __future__ import annotations

from alembic import context

__all__ = ["migrate"]


def migrate() -> None:
    """Run what alembic was asked for."""
    context.configure(connection=context.config.attributes["connection"])
    context.run_migrations()


if __name__ == "env_py":
    migrate()
