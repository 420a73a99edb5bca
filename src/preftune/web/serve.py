"""`preftune label --samples F --db URL`: fill the store, print the link, serve the page until it is stopped.

The page is served on this machine only, to whoever holds the link. For others it takes accounts and TLS, or the word
`--insecure`: then whoever can read the network between can read and write labels.
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import sys
import webbrowser
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import uvicorn

from preftune.errors import ConfigError
from preftune.web.app import ENTRY, PUBLIC, Site, create_app
from preftune.web.doors import LocalDoor, TeamDoor
from preftune.web.inputs import gold_items, sampled_items
from preftune.web.labels import Settings
from preftune.web.security import Guard, Policy, is_loopback
from preftune.web.store import Store

__all__ = ["PageOptions", "address", "build", "check_reach", "listen", "main", "policy_for"]


class PageOptions(Protocol):
    """What `preftune label` can be told about its page."""

    @property
    def samples(self) -> str: ...
    @property
    def db(self) -> str | None: ...
    @property
    def gold(self) -> str | None: ...
    @property
    def guidelines(self) -> str | None: ...
    @property
    def annotator(self) -> str: ...
    @property
    def overlap(self) -> int: ...
    @property
    def gold_rate(self) -> float: ...
    @property
    def random_share(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def url(self) -> str | None: ...
    @property
    def open(self) -> bool: ...
    @property
    def accounts(self) -> bool: ...
    @property
    def invite(self) -> str | None: ...
    @property
    def tls_cert(self) -> str | None: ...
    @property
    def tls_key(self) -> str | None: ...
    @property
    def insecure(self) -> bool: ...


def main(options: PageOptions) -> None:
    """Serve until stopped, or with `invite` print an invitation and end. Raises ConfigError, DataError."""
    check_reach(options)
    if options.invite is not None:
        return _invite(options)
    _check_certificate(options)
    with listen(options.host, options.port) as listener:
        port = int(listener.getsockname()[1])
        store = _fill(options)
        try:
            app, link = build(options, store, port)
            _say(f"labelling page: {link}")
            _say("Ctrl-C stops it; every label that the page calls saved is on disk")
            if options.open and _has_display():
                webbrowser.open(link)
            _serve(app, options, listener)
        finally:
            store.close()


def check_reach(options: PageOptions) -> None:
    """Refuse to be reached by others without accounts and TLS. Raises ConfigError."""
    if bool(options.tls_cert) != bool(options.tls_key):
        raise ConfigError("tls_cert and tls_key belong together: give both files, or none")
    for name, file in (("tls_cert", options.tls_cert), ("tls_key", options.tls_key)):
        if file and not Path(file).is_file():
            raise ConfigError(f"{name} {file} is no file; give a PEM file")
    if not is_loopback(options.host) and not options.insecure:
        missing = ["--accounts"] * (not options.accounts) + ["--tls_cert and --tls_key"] * (not options.tls_cert)
        if missing:
            raise ConfigError(
                f"host {options.host} can be reached from other machines: give {' and '.join(missing)}, or --insecure "
                "where something else protects it (host 127.0.0.1 needs none of them)"
            )
    if options.host in ("0.0.0.0", "::") and not options.url:
        raise ConfigError(
            f"host {options.host} is every address: say by which one the page is opened, --url https://..."
        )
    if options.url:
        parts = urlsplit(options.url)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
            raise ConfigError(f"url must be http(s)://name or http(s)://name:port, not {options.url!r}")


def address(options: PageOptions, port: int) -> str:
    """How the page is opened: scheme://host:port without a path."""
    if options.url:
        return options.url.rstrip("/").lower()
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "https" if options.tls_cert else "http"
    return f"{scheme}://{host}" if port == {"http": 80, "https": 443}[scheme] else f"{scheme}://{host}:{port}"


def policy_for(options: PageOptions, port: int) -> Policy:
    """The names this server answers to: its address, and on loopback every name of this machine for itself."""
    here = address(options, port)
    scheme, _, own = here.partition("://")
    names = {own}
    if is_loopback(options.host) and not options.url:
        names |= {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
    return Policy(
        hosts=frozenset(names),
        origins=frozenset(f"{scheme}://{name}" for name in names),
        cookie=f"preftune_{port}",
        public=PUBLIC,
        entry=ENTRY,
    )


def build(options: PageOptions, store: Store, port: int) -> tuple[Guard, str]:
    """The app of a store, and the link that opens it."""
    here = address(options, port)
    site = Site(
        database=hashlib.sha256(_database(options).encode()).hexdigest()[:16],
        guidelines=_read_guidelines(options.guidelines) if options.guidelines else "",
        secure=here.startswith("https:"),
    )
    if options.accounts:
        return create_app(store, TeamDoor(store.accounts), policy_for(options, port), site), f"{here}/enter"
    door = LocalDoor(store.accounts, options.annotator)
    return create_app(store, door, policy_for(options, port), site), f"{here}/enter#token={door.token}"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError when the port is taken."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()  # the printed link works at once: who comes early waits for the server
        except OSError:
            listener.close()
            raise
    except OSError as problem:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {problem.strerror}; try --port 0, any free one"
        ) from None
    return listener


def _check_certificate(options: PageOptions) -> None:
    """Read the files as the server will, before anything is opened: it would say less."""
    if not options.tls_cert or not options.tls_key:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")  # nobody is asked for one
    except OSError as problem:
        raise ConfigError(
            f"tls_cert {options.tls_cert} and tls_key {options.tls_key} do not serve TLS: {problem}; "
            "give a certificate and its own private key, both PEM, the key without password"
        ) from None


def _fill(options: PageOptions) -> Store:
    wanted = Settings(
        overlap=options.overlap,
        gold_rate=options.gold_rate if options.gold else 0.0,
        random_share=options.random_share,
        seed=options.seed,
    )
    samples = list(sampled_items(Path(options.samples))) if options.samples else []
    gold = list(gold_items(Path(options.gold))) if options.gold else []
    store = Store.open(_database(options), wanted, new=bool(samples or gold))
    added = store.add_items([*samples, *gold])
    if store.is_empty():
        store.close()
        raise ConfigError("the store holds nothing to label: give --samples, what `preftune sample` wrote")
    _say(f"{added.new} new items, {added.known} known already; {options.overlap} label(s) wanted per item")
    return store


def _invite(options: PageOptions) -> None:
    """The link is the result: it goes to stdout, alone."""
    if not options.accounts or not options.invite:
        raise ConfigError("an invitation opens a page with accounts: add --accounts, and --invite NAME")
    store = Store.open(_database(options))
    try:
        token = store.accounts.create_invite(options.invite)
    finally:
        store.close()
    print(f"{address(options, options.port)}/enter#invite={token}")


def _serve(app: Guard, options: PageOptions, listener: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=5,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _database(options: PageOptions) -> str:
    if not options.db:
        raise ConfigError("missing db: give --db labels.db, a new or existing file, or postgresql+psycopg://...")
    return options.db


def _read_guidelines(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ConfigError(f"cannot read guidelines {path}: {problem}; give a Markdown file in UTF-8") from None


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
