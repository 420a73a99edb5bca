"""Who gets in: at home whoever holds the link that was printed, in a team whoever was invited.

Both keep sessions in the store, so a restart of the server ends none.
"""

from __future__ import annotations

import hmac
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from preftune.errors import DataError
from preftune.web.accounts import Accounts
from preftune.web.security import new_token

__all__ = ["Door", "Key", "LocalDoor", "TeamDoor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What was handed in at the door; "" where not given."""

    token: str = ""
    """Of the link that was printed."""
    invite: str = ""
    name: str = ""
    password: str = ""


class Door(Protocol):
    """Who gets in, and who is in."""

    takes_names: bool
    """Whether the page should ask for name and password."""

    def enter(self, key: Key) -> str | None:
        """A new session, or None. Raises DataError on an invitation or a new password that cannot be accepted."""

    def who(self, session: str) -> str | None:
        """The annotator of a session, or None."""

    def leave(self, session: str) -> None:
        """End a session."""


class LocalDoor:
    """One annotator on this machine: `token` opens, as often as it is asked, until the server ends."""

    takes_names = False

    def __init__(self, accounts: Accounts, annotator: str) -> None:
        self.accounts, self.annotator, self.token = accounts, annotator, new_token()
        with suppress(DataError):  # the account exists already; another problem returns when a session is made
            accounts.redeem(accounts.create_invite(annotator))

    def enter(self, key: Key) -> str | None:
        """A new session for the holder of the token."""
        fits = hmac.compare_digest(key.token.encode(), self.token.encode())
        return self.accounts.create_session(self.annotator) if fits else None

    def who(self, session: str) -> str | None:
        """The annotator, while the session is this annotator's."""
        account = self.accounts.session(session)
        return account.name if account is not None and account.name == self.annotator else None

    def leave(self, session: str) -> None:
        """From now on this session is nobody's; the link opens another."""
        self.accounts.revoke(session)


class TeamDoor:
    """Invited people. An invitation opens once, and may set a password that opens from then on."""

    takes_names = True

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts
        self._one_at_a_time = Lock()

    def enter(self, key: Key) -> str | None:
        """A new session for an invitation, or for name and password; guesses are taken one at a time."""
        if key.invite:
            return self.accounts.create_session(self.accounts.redeem(key.invite, key.password or None).name)
        with self._one_at_a_time:
            account = self.accounts.log_in(key.name, key.password) if key.name and key.password else None
        return None if account is None else self.accounts.create_session(account.name)

    def who(self, session: str) -> str | None:
        """The account's name while the session lasts."""
        account = self.accounts.session(session)
        return None if account is None else account.name

    def leave(self, session: str) -> None:
        """From now on this session is nobody's; name and password open another."""
        self.accounts.revoke(session)
