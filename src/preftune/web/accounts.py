"""Who may label: invites, accounts, sessions. Only hashes of tokens and passwords are stored.

A token is 128 random bits, so one SHA-256 hides it; a password is not, so argon2id does. Rows are found by the hash of
what was given, and the hashes compared once more in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select, update

from preftune.errors import ConfigError, DataError
from preftune.web.database import Database
from preftune.web.schema import accounts, invites, sessions

__all__ = ["Account", "Accounts"]

ROLES = ("annotator", "admin")
SESSION_SECONDS = 30 * 24 * 3600
MIN_PASSWORD_CHARS = 8
MAX_PASSWORD_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Account:
    """A person's name, unique and shown to the team, and what they may do: `annotator`, `admin`."""

    name: str
    role: str


class Accounts:
    """The accounts of a label store."""

    def __init__(self, database: Database, clock: Callable[[], float]):
        self._database = database
        self._clock = clock

    def create_invite(self, name: str, role: str = "annotator") -> str:
        """A token that makes one account of this name, once. Raises DataError on a taken name or unknown role."""
        if role not in ROLES:
            raise DataError(f"role {role!r} is unknown; allowed: {', '.join(ROLES)}")
        if not (0 < len(name) <= 200 and name.isprintable() and name == name.strip()):
            raise DataError(f"name {ascii(name)[:80]}: 1 to 200 printable characters without outer spaces are needed")
        token = _new_token()
        with self._database.writing() as connection:
            if connection.execute(select(accounts).where(accounts.c.name == name)).first() is not None:
                raise DataError(f"an account named {name!r} exists; choose another name")
            row = {"token": _hash(token), "name": name, "role": role, "created": self._now()}
            connection.execute(insert(invites).values(row))
        return token

    def redeem(self, token: str, password: str | None = None) -> Account:
        """Turn an invite into an account, once. Raises DataError on a token that is unknown or used."""
        hashed = None if password is None else _hash_password(password)
        with self._database.writing() as connection:
            row = _same(connection.execute(select(invites).where(invites.c.token == _hash(token))).first(), token)
            taken = (
                None if row is None else connection.execute(select(accounts).where(accounts.c.name == row.name)).first()
            )
            if row is None or row.redeemed is not None or taken is not None:
                raise DataError("this invite is unknown or was used; ask for a new one")
            connection.execute(update(invites).where(invites.c.token == row.token).values(redeemed=self._now()))
            values = {"name": row.name, "role": row.role, "password": hashed, "created": self._now()}
            connection.execute(insert(accounts).values(values))
        return Account(row.name, row.role)

    def log_in(self, name: str, password: str) -> Account | None:
        """The account, when name and password fit. An unknown name takes as long as a wrong password."""
        with self._database.reading() as connection:
            row = connection.execute(select(accounts).where(accounts.c.name == name)).first()
        stored = None if row is None else row.password
        fits = _password_fits(stored or _hash_password(secrets.token_urlsafe()), password)
        return Account(row.name, row.role) if row is not None and stored is not None and fits else None

    def create_session(self, name: str, seconds: int = SESSION_SECONDS) -> str:
        """A token that stands for the account until it expires or is revoked."""
        token = _new_token()
        row = {"token": _hash(token), "account": name, "expires": self._now() + 1000 * seconds}
        with self._database.writing() as connection:
            if connection.execute(select(accounts).where(accounts.c.name == name)).first() is None:
                raise DataError(f"there is no account named {name!r}; invite it first")
            connection.execute(insert(sessions).values(row))
        return token

    def session(self, token: str) -> Account | None:
        """Whose session this is; None when the token is unknown, expired or revoked."""
        query = select(sessions, accounts.c.name, accounts.c.role).join(accounts, accounts.c.name == sessions.c.account)
        with self._database.reading() as connection:
            row = _same(connection.execute(query.where(sessions.c.token == _hash(token))).first(), token)
        if row is None or row.revoked is not None or row.expires <= self._now():
            return None
        return Account(row.name, row.role)

    def revoke(self, token: str) -> None:
        """End a session; an unknown one is ended already."""
        with self._database.writing() as connection:
            connection.execute(update(sessions).where(sessions.c.token == _hash(token)).values(revoked=self._now()))

    def _now(self) -> int:
        return int(1000 * self._clock())


def _new_token() -> str:
    return secrets.token_urlsafe(16)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _same(row: Row[Any] | None, token: str) -> Row[Any] | None:
    return row if row is not None and hmac.compare_digest(row.token, _hash(token)) else None


def _hasher() -> Any:
    try:
        from argon2 import PasswordHasher
    except ModuleNotFoundError as error:
        raise ConfigError(
            "passwords need argon2-cffi: pip install 'preftune[team]', or use invite links only"
        ) from error
    return PasswordHasher()


def _hash_password(password: str) -> str:
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise DataError(f"a password needs {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters")
    return str(_hasher().hash(password.encode("utf-8", "surrogatepass")))


def _password_fits(stored: str, password: str) -> bool:
    from argon2.exceptions import VerifyMismatchError

    try:
        return bool(_hasher().verify(stored, password[:MAX_PASSWORD_CHARS].encode("utf-8", "surrogatepass")))
    except VerifyMismatchError:
        return False
