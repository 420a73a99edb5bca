"""The page behind a certificate: https and nothing else, with cookies that travel over TLS only."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preftune.cli import main
from preftune.records import Response, SampledResponses, to_json
from preftune.web.security import csrf_token


def certificate(folder: Path, name: str) -> list[str]:
    """--tls_cert and --tls_key of a fresh self-signed certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        if os.environ.get("CI") == "true":
            pytest.fail("no openssl to make a certificate with")
        pytest.skip("no openssl to make a certificate with")
    cert, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    command = f"{openssl} req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 1 -subj /CN=127.0.0.1"
    extension = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key]
    done = subprocess.run([*command.split(), *extension], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["--tls_cert", cert, "--tls_key", key]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[re.Match[str]]:
    """The link that the running command printed: its port and its token."""
    sampled = SampledResponses(prompt="which?", responses=(Response(text="a"), Response(text="b")))
    (tmp_path / "samples.jsonl").write_text(to_json(sampled) + "\n")
    told = ["--samples", "samples.jsonl", "--db", "labels.db", "--port", "0", *certificate(tmp_path, "here")]
    server = subprocess.Popen(
        [sys.executable, "-m", "preftune", "label", *told], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr
        said = [server.stderr.readline() for _ in range(3)]
        found = re.search(r"https://127\.0\.0\.1:(\d+)/enter#token=([\w-]{22})", said[1])
        assert found, said
        yield found
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130 and server.stderr.read() == "preftune: stopped\n"
    finally:
        server.kill()
        server.communicate()


def test_the_page_answers_over_tls_only(link: re.Match[str], tmp_path: Path) -> None:
    """Whoever trusts the certificate gets a Secure cookie and an item; without trust, and without TLS, nothing."""
    port, token = int(link[1]), link[2]
    trusting = ssl.create_default_context(cafile=str(tmp_path / "here.pem"))
    page = http.client.HTTPSConnection("127.0.0.1", port, context=trusting, timeout=20)

    def ask(path: str, body: object, **more: str) -> http.client.HTTPResponse:
        page.request("POST", path, json.dumps(body), {"origin": f"https://127.0.0.1:{port}", **more})
        return page.getresponse()

    page.request("GET", "/enter")
    entrance = page.getresponse()
    assert entrance.status == 200 and b"page.js" in entrance.read()
    reply = ask("/api/session", {"token": token})
    cookie = str(reply.getheader("set-cookie"))
    assert reply.status == 200 and reply.read() and {"Secure", "HttpOnly"} <= set(cookie.split("; "))
    session = cookie.partition(";")[0].partition("=")[2]
    headers = {"cookie": cookie.partition(";")[0], "x-csrf-token": csrf_token(session)}
    (task,) = json.loads(ask("/api/tasks", {"count": 1}, **headers).read())["tasks"]
    assert task["prompt"][0]["raw"] == "which?"
    page.request("POST", "/api/tasks", '{"count": 1}', {**headers, "origin": f"http://127.0.0.1:{port}"})
    assert page.getresponse().status == 403  # the same address without TLS is another origin
    page.close()

    with pytest.raises(ssl.SSLCertVerificationError):
        http.client.HTTPSConnection("127.0.0.1", port, timeout=20).request("GET", "/enter")
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    plain.request("GET", "/enter")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        plain.getresponse()
    plain.close()


def test_a_certificate_that_cannot_serve_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another certificate's key, a key with a password, a file that is none: one line, before the store is made."""
    given, other = certificate(tmp_path, "here"), certificate(tmp_path, "there")
    locked = str(tmp_path / "locked.key")
    lock = ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", given[3], "-out", locked]
    subprocess.run(lock, check=True, capture_output=True)
    (tmp_path / "none.key").write_text("no key")
    for key in (other[3], locked, str(tmp_path / "none.key")):
        assert main(["label", "--db", str(tmp_path / "l.db"), *given[:2], "--tls_key", key]) == 2
        said = capsys.readouterr().err
        assert f"tls_key {key} do not serve TLS" in said and said.count("\n") == 1
    assert not (tmp_path / "l.db").exists()
