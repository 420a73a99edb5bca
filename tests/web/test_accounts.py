"""Invites, accounts and sessions: once, until, by whom; only hashes are stored."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from label_items import Clock, NewDatabase, opened
from sqlalchemy import MetaData, select

from preftune.errors import ConfigError, DataError
from preftune.web.accounts import Account
from preftune.web.store import Store


def everything(store: Store) -> str:
    """All rows of all tables as text."""
    found = MetaData()
    with store._database.reading() as connection:
        found.reflect(connection)
        return repr([connection.execute(select(table)).all() for table in found.sorted_tables])


def test_an_invite_makes_one_account_once(new_database: NewDatabase) -> None:
    """The token works once, for the name and role it was made for; a second use and a guess are refused alike."""
    people = opened(new_database(), []).accounts
    token = people.create_invite("ann", "admin")
    assert people.redeem(token, "correct horse") == Account("ann", "admin")
    for wrong in (token, "guess", ""):
        with pytest.raises(DataError, match="unknown or was used"):
            people.redeem(wrong)
    with pytest.raises(DataError, match="exists"):
        people.create_invite("ann")


def test_racing_redeemers_make_one_account(new_database: NewDatabase) -> None:
    """Eight threads redeem two invites for one name: one succeeds."""
    people = opened(new_database(), []).accounts
    tokens = [people.create_invite("ann") for _ in range(2)] * 4

    def redeems(token: str) -> bool:
        try:
            people.redeem(token)
        except DataError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(redeems, tokens)) == 1


def test_a_password_opens_its_account_only(new_database: NewDatabase) -> None:
    """Right name and right password, nothing else; an account without password cannot be opened by any."""
    people = opened(new_database(), []).accounts
    people.redeem(people.create_invite("ann"), "correct horse")
    people.redeem(people.create_invite("bob"))
    assert people.log_in("ann", "correct horse") == Account("ann", "annotator")
    wrong = [("ann", "correct hors"), ("ann", ""), ("bob", ""), ("bob", "correct horse"), ("eve", "correct horse")]
    assert [people.log_in(*pair) for pair in wrong] == [None] * 5
    with pytest.raises(DataError, match="8 to 1000"):
        people.redeem(people.create_invite("carl"), "short")


def test_a_session_ends_when_it_expires_or_is_revoked(new_database: NewDatabase) -> None:
    """Until then the token stands for its account; other tokens stand for nobody."""
    clock = Clock()
    people = opened(new_database(), [], clock).accounts
    people.redeem(people.create_invite("ann"))
    one, two = (people.create_session("ann", seconds=60) for _ in range(2))
    assert one != two and len(one) >= 22  # 128 bits in base 64
    assert people.session(one) == people.session(two) == Account("ann", "annotator")
    people.revoke(one)
    assert (people.session(one), people.session(two), people.session("x")) == (None, Account("ann", "annotator"), None)
    clock.now += 60
    assert people.session(two) is None
    with pytest.raises(DataError, match="no account"):
        people.create_session("eve")


def test_no_secret_is_stored(new_database: NewDatabase) -> None:
    """Neither the tokens nor the password can be found in any table."""
    store = opened(new_database(), [])
    invite = store.accounts.create_invite("ann")
    store.accounts.redeem(invite, "correct horse")
    session = store.accounts.create_session("ann")
    stored = everything(store)
    assert "argon2id" in stored and "'ann'" in stored
    assert not [secret for secret in (invite, session, "correct horse") if secret in stored]


def test_names_and_roles_are_checked(new_sqlite: NewDatabase) -> None:
    """A name is printable and shown as it is; a role is one of two."""
    people = opened(new_sqlite(), []).accounts
    for name in ("", " ann", "a\nb", "x" * 201, "\u202e"):
        with pytest.raises(DataError, match="name"):
            people.create_invite(name)
    with pytest.raises(DataError, match="annotator, admin"):
        people.create_invite("ann", "king")


def test_passwords_without_argon2_are_refused(new_sqlite: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weaker hash is put in its place: the message names the extra to install."""
    monkeypatch.setitem(__import__("sys").modules, "argon2", None)
    people = opened(new_sqlite(), []).accounts
    with pytest.raises(ConfigError, match=r"preftune\[team\]"):
        people.redeem(people.create_invite("ann"), "correct horse")
    assert people.redeem(people.create_invite("ann")) == Account("ann", "annotator")
