"""A model behind a URL: the same answers as on this machine, patience with what passes, one error for what does not."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from preftune.cli import main
from preftune.errors import ConfigError, RunError
from preftune.models import remote
from preftune.models.generate import sample
from preftune.models.load import load
from preftune.models.remote import Request, complete, complete_many, endpoint
from preftune.records import Message, from_json

CHAT = (Message(role="system", content="Be brief."), Message(role="user", content="the cat"))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
serial = itertools.count()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.delenv(remote.KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    """The URL of `faulty_server.py`, a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("faulty_server.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()  # type: ignore[union-attr]


def fresh() -> str:
    """A prompt the server has not seen."""
    return f"prompt {next(serial)}"


def seen(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/seen").json()


@pytest.fixture(scope="module")
def served(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(URL, folder) of the tiny model behind `transformers serve`."""
    folder = tmp_path_factory.mktemp("served")
    for file in tiny_model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    # This server draws only where the folder says so; without it every temperature is 0.
    GenerationConfig(do_sample=True, top_k=0, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    log = folder / "serve.log"
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            deadline = time.monotonic() + 120
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", folder
        finally:
            process.kill()  # asked politely, it waits for its threads


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_real_server_writes_what_the_model_writes_here(served: tuple[str, Path]) -> None:
    """`transformers serve` at temperature 0: text and conversation get the very responses of `models.generate`."""
    url, folder = served
    here = load(folder, dtype=torch.float32)
    prompts = ["the cat sat", "a good answer", CHAT]
    settings = {"temperature": 0.0, "max_tokens": 12}
    local = sample(here.model, here.tokenizer, prompts, **settings)
    requests = [Request(prompt=prompt, logprobs=True, **settings) for prompt in prompts]
    answers = complete_many(url, str(folder), requests, concurrency=3)
    assert [[(a.text, a.finished) for a in row] for row in answers] == [
        [(a.text, a.finished) for a in row] for row in local
    ]
    assert all(f" engine={url}/v1 tokens=12" in a.provenance for row in answers for a in row)
    (first, second) = complete(url, str(folder), "the cat", n=2, max_tokens=12, seed=1)  # it writes one at a time
    assert first.text != second.text and first.logp is None
    with pytest.raises(ConfigError, match=r"refused the request, status 400: .*pinned"):
        complete(url, "another model", "the cat")


@pytest.mark.slow
def test_a_real_server_answers_a_file_of_prompts(served: tuple[str, Path], tmp_path: Path) -> None:
    """`preftune sample --engine`: every prompt once, in order, texts and conversations; run again, nothing is asked."""
    url, folder = served
    rows = [{"prompt": "the cat"}, {"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": "the cat"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["sample", "--engine", url, "--engine_model", str(folder), "--prompts", str(tmp_path / "p.jsonl")]
    arguments += ["--n", "2", "--max_tokens", "6", "--out", str(tmp_path / "s.jsonl")]
    assert main(arguments) == 0
    content = (tmp_path / "s.jsonl").read_bytes()
    records = [from_json(line) for line in content.decode().splitlines()]
    assert [r.prompt for r in records] == ["the cat", (Message(role="user", content="hi"),)]
    assert all(len(r.responses) == 2 and len({a.text for a in r.responses}) == 2 for r in records)
    assert main(arguments) == 0
    assert (tmp_path / "s.jsonl").read_bytes() == content
    card = from_json((tmp_path / "s.jsonl.run.json").read_text())
    assert card.status == "done" and card.hashes == {"engine": f"{url}/v1", "engine_model": str(folder)}


def test_what_is_sent_is_what_the_standard_says(faulty: str) -> None:
    """A text goes to /v1/completions, a conversation to /v1/chat/completions, with all settings of the sampler."""
    settings = {"n": 2, "temperature": 0.7, "top_p": 0.9, "max_tokens": 5, "seed": 11}
    text = fresh()
    complete(faulty, "ok", text, **settings)
    complete(f"{faulty}/v1/", "ok", CHAT, **settings, logprobs=True)
    sent, chat = seen(faulty)["requests"][-2:]
    assert sent == {"path": "/v1/completions", "model": "ok", "prompt": text, **settings}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the cat"}]
    assert chat == {
        "path": "/v1/chat/completions", "model": "ok", "messages": messages, **settings, "logprobs": True,
    }  # fmt: skip


@pytest.mark.parametrize("prompt", ["text", CHAT], ids=["text", "conversation"])
def test_finish_reason_and_log_probs_are_read(faulty: str, prompt: Any) -> None:
    """`stop` is finished, `length` is not; a log-prob counts the end mark, and is absent where it is another's."""
    stopped, cut = complete(faulty, "ok", prompt, n=2, seed=5, logprobs=True)
    assert (stopped.text, stopped.finished, stopped.logp) == (" so 5", True, -0.875)
    assert (cut.text, cut.finished, cut.logp) == (" so 6", False, -0.75)
    for other in ({"temperature": 0.5}, {"top_p": 0.9}):
        assert complete(faulty, "ok", prompt, logprobs=True, **other)[0].logp is None
    assert complete(faulty, "ok", prompt)[0].logp is None


def test_log_probs_of_other_tokens_than_the_texts_are_not_taken() -> None:
    """A list without the end mark of a finished response, or with other tokens than the text, gives no log-prob."""
    listed = {"tokens": [" a", " b"], "token_logprobs": [-1.0, -2.0]}
    assert remote._logp(listed, " a b", False) == -3.0
    assert remote._logp(listed, " a b", True) is None
    assert remote._logp(listed, " a", True) == -3.0
    assert remote._logp(listed, " a c", False) is None
    assert remote._logp({"tokens": [" a"], "token_logprobs": [None]}, " a", False) is None
    assert remote._logp(None, " a", False) is None


@pytest.mark.parametrize("faults", ["500 ok", "429 ok", "503 drop half ok", "drop drop ok", "slow ok"])
def test_what_passes_is_tried_again(faulty: str, faults: str) -> None:
    """Server errors, full queues, lost connections, torn answers and timeouts end in the answer that follows them."""
    prompt = fresh()
    (answer,) = complete(faulty, faults, prompt, seed=3, timeout=0.5)
    assert answer.text == " so 3"
    assert sum(r.get("prompt") == prompt for r in seen(faulty)["requests"]) == len(faults.split())


def test_a_server_may_ask_for_a_longer_pause(faulty: str) -> None:
    """Retry-After is waited for."""
    began = time.monotonic()
    complete(faulty, "429 ok", fresh())
    assert time.monotonic() - began > 0.2


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("500", RunError, "no answer after 3 tries, the last one ended with status 500"),
        ("drop", RunError, "no answer after 3 tries, the last one ended with RemoteProtocolError"),
        ("400", ConfigError, "refused the request, status 400"),
        ("401", ConfigError, "status 401.*it wants another key in the environment variable PREFTUNE_API_KEY"),
        ("404", ConfigError, "does it serve '404', and under this URL"),
        ("302", ConfigError, "refused the request, status 302"),
        ("html", RunError, "the answer is not JSON; is this the right URL"),
        ("empty", RunError, "holds no choice, although 1 were asked for"),
        ("strange", RunError, "is no completion .*; is this the right URL"),
    ],
)
def test_what_does_not_pass_is_one_error_without_the_key(
    faulty: str, fault: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says what the server said; a key that the server repeats is not in it."""
    monkeypatch.setenv(remote.KEY_VARIABLE, "sk-secret-1234")
    with pytest.raises(error, match=message) as caught:
        complete(faulty, fault, fresh(), retries=2)
    assert "secret" not in str(caught.value)
    assert seen(faulty)["authorization"][-1] == "Bearer sk-secret-1234"


def test_nobody_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is tried again, then reported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RunError, match=f"127.0.0.1:{port}/v1/completions: no answer after 2 tries.*ConnectError"):
        complete(f"http://127.0.0.1:{port}", "m", "hi", retries=1)


def test_a_server_that_writes_one_at_a_time_is_asked_n_times(faulty: str) -> None:
    """Fewer choices than asked for are added to with further seeds, and the token count of one choice is kept."""
    answers = complete(faulty, "one", fresh(), n=3, seed=2)
    assert [a.text for a in answers] == [" so 2", " so 3", " so 4"]
    assert all(a.provenance.endswith(" tokens=3") for a in answers)


def test_a_server_without_log_probs_is_asked_without(faulty: str) -> None:
    """Log-probs are wished for, not demanded."""
    prompt = fresh()
    assert complete(faulty, "nologprobs", prompt, logprobs=True)[0].logp is None
    asked = [r for r in seen(faulty)["requests"] if r.get("prompt") == prompt]
    assert ["logprobs" in r for r in asked] == [True, False]


def test_many_requests_keep_their_order_and_the_bound(faulty: str) -> None:
    """Answers stand in the order of the requests, whatever failed on the way; never more than `concurrency` at once."""
    told: list[int] = []
    requests = [Request(prompt=fresh(), seed=seed) for seed in range(30)]
    answers = complete_many(faulty, "busy 500 busy", requests[:15], concurrency=3, progress=told.append)
    answers += complete_many(faulty, "500 busy", requests[15:], concurrency=3, progress=told.append)
    assert [a.text for (a,) in answers] == [f" so {seed}" for seed in range(30)]
    assert sum(told) == 30 and 2 <= seen(faulty)["most_at_once"] <= 3
    with pytest.raises(ConfigError, match="concurrency=0 must be at least 1"):
        complete_many(faulty, "ok", requests, concurrency=0)


def test_one_refusal_ends_the_others(faulty: str) -> None:
    """A refused request is raised, and those behind it are not sent."""
    prompts = [fresh() for _ in range(40)]
    with pytest.raises(ConfigError, match="status 400"):
        complete_many(faulty, "400", [Request(prompt=prompt) for prompt in prompts], concurrency=1)
    assert sum(r.get("prompt") in prompts for r in seen(faulty)["requests"]) < 5


def test_the_key_is_in_no_file(faulty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling with a key leaves samples, run card and page without it."""
    monkeypatch.setenv(remote.KEY_VARIABLE, "sk-secret-1234")
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n')
    arguments = ["sample", "--engine", faulty, "--engine_model", "ok", "--prompts", str(tmp_path / "p.jsonl")]
    assert main([*arguments, "--out", str(tmp_path / "s.jsonl")]) == 0
    assert seen(faulty)["authorization"][-1] == "Bearer sk-secret-1234"
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "s.jsonl", "s.jsonl.html", "s.jsonl.run.json"]
    assert all("secret" not in path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is no server; give its URL"),
        ("ftp://host", "is no server; give its URL"),
        ("http://host:99999", "is no server; give its URL"),
        ("http://me:secret@host/v1", "the URL of host must hold no user"),
        ("http://host/v1?key=secret", "must hold no user, query or fragment"),
    ],
)
def test_unusable_urls_are_refused(url: str, message: str) -> None:
    """What is no URL, and what would put a secret into files, is refused without repeating the secret."""
    with pytest.raises(ConfigError, match=message) as caught:
        endpoint(url)
    assert "secret" not in str(caught.value)
