"""What the tests of the page share: an empty database, SQLite and PostgreSQL in turn.

PostgreSQL is the server PREFTUNE_TEST_POSTGRES names (a URL), else one started here. Where there is none the tests are
skipped, visibly; on CI that is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from label_items import OPENED, NewDatabase
from private_postgres import binaries, private_postgres
from sqlalchemy import create_engine, make_url, text


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    given = os.environ.get("PREFTUNE_TEST_POSTGRES")
    if given:
        yield given
    elif binaries() is None:
        reason = "no PostgreSQL: PREFTUNE_TEST_POSTGRES names no server and initdb is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    else:
        with private_postgres() as url:
            yield url


@pytest.fixture
def new_postgres(postgres_server: str) -> Iterator[NewDatabase]:
    """URLs of empty databases on that server: a schema each."""
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def new() -> str:
        name = f"labels_{os.getpid()}_{os.urandom(4).hex()}"
        with engine.connect() as connection:
            connection.execute(text(f"CREATE SCHEMA {name}"))
        made.append(name)
        url = make_url(postgres_server).update_query_dict({"options": f"-csearch_path={name}"})
        return url.render_as_string(hide_password=False)

    yield new
    with engine.connect() as connection:
        for name in made:
            connection.execute(text(f"DROP SCHEMA {name} CASCADE"))
    engine.dispose()


@pytest.fixture
def new_sqlite(tmp_path: Path) -> NewDatabase:
    """Paths of SQLite databases that do not exist yet."""
    number = count()
    return lambda: str(tmp_path / f"labels{next(number)}.db")


@pytest.fixture(params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest) -> NewDatabase:
    """Each test that takes it runs on both."""
    new: NewDatabase = request.getfixturevalue(f"new_{request.param}")
    return new


@pytest.fixture(autouse=True)
def stores_are_closed() -> Iterator[None]:
    """What `opened` opened."""
    yield
    while OPENED:
        OPENED.pop().close()
