"""Who can reach the labelling page, under which names, with which items, and what comes out of it again."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from asking import ask

from preftune.cli import main
from preftune.config.loop import LabelConfig
from preftune.data.sources import open_source
from preftune.errors import ConfigError, DataError
from preftune.records import RankedResponses, Response, SampledResponses, to_json
from preftune.web.inputs import gold_items, sampled_items
from preftune.web.labels import Answer
from preftune.web.serve import address, build, check_reach, listen, policy_for
from preftune.web.serve import main as serve
from preftune.web.store import Store


def options(**given: object) -> LabelConfig:
    return LabelConfig.model_validate({"db": "labels.db", **given})


@pytest.fixture
def pem(tmp_path: Path) -> str:
    (tmp_path / "any.pem").write_text("")
    return str(tmp_path / "any.pem")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "labels.example", "::"])
def test_others_are_let_in_only_with_accounts_and_tls(host: str, pem: str) -> None:
    """An address that other machines reach needs both, or the explicit flag; the refusal says what is missing."""
    here = {"host": host, "url": "https://labels.example"}
    with pytest.raises(ConfigError, match="give --accounts and --tls_cert and --tls_key, or --insecure"):
        check_reach(options(**here))
    with pytest.raises(ConfigError, match="give --tls_cert and --tls_key, or"):
        check_reach(options(**here, accounts=True))
    with pytest.raises(ConfigError, match="give --accounts, or"):
        check_reach(options(**here, tls_cert=pem, tls_key=pem))
    check_reach(options(**here, accounts=True, tls_cert=pem, tls_key=pem))
    check_reach(options(**here, insecure=True))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"host": "0.0.0.0", "insecure": True}, "say by which one the page is opened, --url"),
        ({"tls_cert": "here.pem"}, "belong together"),
        ({"tls_cert": "here.pem", "tls_key": "there.pem"}, "tls_cert here.pem is no file"),
        ({"url": "labels.example"}, r"url must be http\(s\)://name"),
        ({"url": "https://labels.example/team"}, r"url must be http\(s\)://name"),
        ({"url": "ftp://labels.example"}, r"url must be http\(s\)://name"),
        ({"invite": "Ada"}, "an invitation opens a page with accounts: add --accounts"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, object], problem: str) -> None:
    """Each in one line, before anything is opened."""
    with pytest.raises(ConfigError, match=problem):
        serve(options(**given))


@pytest.mark.parametrize(
    ("given", "opened", "hosts"),
    [
        ({}, "http://127.0.0.1:8517", {"127.0.0.1:8517", "localhost:8517", "[::1]:8517"}),
        ({"host": "::1"}, "http://[::1]:8517", {"127.0.0.1:8517", "localhost:8517", "[::1]:8517"}),
        ({"host": "10.0.0.5", "insecure": True}, "http://10.0.0.5:8517", {"10.0.0.5:8517"}),
        ({"url": "https://Labels.example/"}, "https://labels.example", {"labels.example"}),
        ({"host": "lab.example", "tls_cert": "c", "tls_key": "k"}, "https://lab.example:8517", {"lab.example:8517"}),
    ],
)
def test_the_names_it_answers_to(given: dict[str, object], opened: str, hosts: set[str]) -> None:
    """Its address, and on loopback this machine's names for itself; origins are the same names with the scheme."""
    found = policy_for(options(**given), 8517)
    scheme = opened.partition("://")[0]
    assert address(options(**given), 8517) == opened and found.hosts == hosts
    assert found.origins == {f"{scheme}://{name}" for name in hosts}


def test_a_taken_port_is_refused_in_words() -> None:
    """The second server on a port is told so; port 0 finds a free one."""
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {port}: .*; try --port 0"):
            listen("127.0.0.1", port)
        assert isinstance(first, socket.socket) and port > 0


def test_cookies_of_a_tls_page_travel_over_tls_only(tmp_path: Path) -> None:
    """Secure is set exactly when the page is opened by https."""
    for url, secure in ((None, False), ("https://labels.example", True)):
        given = options(db=str(tmp_path / "l.db"), url=url)
        store = Store.open(str(tmp_path / "l.db"))
        app, link = build(given, store, 8517)
        here = address(given, 8517)
        headers = [("host", here.partition("://")[2]), ("origin", here)]
        body = json.dumps({"token": link.partition("#token=")[2]}).encode()
        cookie = str(ask(app, "POST", "/api/session", headers, body).header("set-cookie"))
        assert ("Secure" in cookie) is secure and "HttpOnly" in cookie
        store.close()


SAMPLED = SampledResponses(
    prompt="p", responses=(Response(text="a", score=0.5), Response(text="b", score=2.0), Response(text="c", score=1.5))
)


def test_samples_become_items(tmp_path: Path) -> None:
    """One item per line, its place kept; the closer the two best scores, the sooner it is asked."""
    path = tmp_path / "samples.jsonl"
    unscored = replace(SAMPLED, responses=(Response(text="a", score=1.0), Response(text="b")), origin="prompts.jsonl:9")
    path.write_text(f"{to_json(SAMPLED)}\n{to_json(unscored)}\n")
    first, second = sampled_items(path)
    assert (first.responses, first.origin, first.priority) == (SAMPLED.responses, "samples.jsonl:1", -0.5)
    assert (second.origin, second.priority) == ("prompts.jsonl:9", None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "samples.jsonl:1: is no record of preftune sample"),
        ('{"type": "Message", "role": "a", "content": "b"}', "samples.jsonl:1: is a Message"),
        (to_json(replace(SAMPLED, responses=SAMPLED.responses[:1])), "samples.jsonl:1: holds 1 responses; 2 to 9"),
        (to_json(replace(SAMPLED, responses=SAMPLED.responses * 4)), "samples.jsonl:1: holds 12 responses; 2 to 9"),
    ],
)
def test_a_flawed_sample_is_refused_by_line(tmp_path: Path, line: str, problem: str) -> None:
    """File, line, what was found."""
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=problem):
        list(sampled_items(tmp_path / "samples.jsonl"))
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.jsonl"):
        list(sampled_items(tmp_path / "nowhere.jsonl"))


def test_gold_items_know_their_answer(tmp_path: Path) -> None:
    """Any preference layout is a list of gold items; what compares nothing is refused."""
    path = tmp_path / "gold.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "good", "rejected": "bad"}) + "\n")
    (item,) = gold_items(path)
    best = item.responses[item.gold.ranks.index(1)] if item.gold else None
    assert best is not None and best.text == "good"
    path.write_text(json.dumps({"prompt": "p", "completion": "c", "label": True}) + "\n")
    with pytest.raises(DataError, match="needs two or more responses"):
        list(gold_items(path))


def test_an_export_of_a_store_that_is_not_there_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A slip in the name leaves no empty store behind and the earlier export as it was."""
    (tmp_path / "pairs.jsonl").write_text("kept")
    assert main(["label", "export", "--db", str(tmp_path / "labls.db"), "--out", str(tmp_path / "pairs.jsonl")]) == 2
    assert f"there is no store {tmp_path / 'labls.db'}; name the file" in capsys.readouterr().err
    assert (tmp_path / "pairs.jsonl").read_text() == "kept" and not (tmp_path / "labls.db").exists()


def test_a_page_with_nothing_to_label_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip in the name serves no empty page and makes no file; nor is a store without items served as one."""
    monkeypatch.setattr("preftune.web.serve._serve", lambda *_: None)  # it would not return
    slip = str(tmp_path / "typo.db")
    assert main(["label", "--db", slip, "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert f"there is no store {slip}; name the file" in said and "preftune label --samples FILE" in said
    (tmp_path / "none.jsonl").write_text("")
    assert main(["label", "--db", slip, "--port", "0", "--samples", str(tmp_path / "none.jsonl")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["none.jsonl"]
    assert main(["label", "--db", slip, "--accounts", "--invite", "Ada"]) == 0  # before the page, as docs/labelling.md
    capsys.readouterr()
    assert main(["label", "--db", slip, "--accounts", "--port", "0"]) == 2
    assert "the store holds nothing to label: give --samples" in capsys.readouterr().err


def test_export_and_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs are read by training, a history comes back byte for byte, another tool's rows are refused by line."""
    db, out = str(tmp_path / "l.db"), tmp_path / "out"
    (tmp_path / "samples.jsonl").write_text(f"{to_json(SAMPLED)}\n")
    store = Store.open(db)
    store.add_items(sampled_items(tmp_path / "samples.jsonl"))
    (task,) = store.next_tasks("Ada", 1)
    store.answer("Ada", task.id, Answer(kind="ranking", ranks=(3, 1, 2)), "k" * 20)
    store.close()

    def run(*arguments: str) -> str:
        code = main(["label", *arguments])
        said = capsys.readouterr()
        return f"{code}\n{said.out}{said.err}"

    said = run("export", "--db", db, "--out", str(out / "pairs.jsonl"))
    assert said.startswith("0\n") and "3 lines of pairs" in said and "1 labels" in said and "Ada: 3 comparisons" in said
    rows = list(open_source(out / "pairs.jsonl", kind="preferences"))
    best = [row.responses[row.ranks.index(1)].text for row in rows if isinstance(row, RankedResponses)]
    assert sorted(best) == ["b", "b", "c"]
    other = str(tmp_path / "other.db")
    assert run("export", "--db", db, "--kind", "history", "--out", str(out / "h1.jsonl")).startswith("0\n")
    assert run("import", "--db", other, "--data", str(out / "h1.jsonl")).startswith("0\n")
    assert run("export", "--db", other, "--kind", "history", "--out", str(out / "h2.jsonl")).startswith("0\n")
    assert (out / "h1.jsonl").read_bytes() == (out / "h2.jsonl").read_bytes()
    assert run("import", "--db", other, "--data", str(out / "h1.jsonl")).startswith("2\n")
    (tmp_path / "flawed.jsonl").write_text('{"prompt": "p", "chosen": "", "rejected": "b"}\n{"prompt": 1}\n')
    assert "rows are no labels" in run("import", "--db", other, "--data", str(tmp_path / "flawed.jsonl"))


def test_an_invitation_is_a_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The link, and nothing else, on standard output; a name that has an account is refused."""
    arguments = [
        "label",
        "--db",
        str(tmp_path / "l.db"),
        "--accounts",
        "--url",
        "https://labels.example",
        "--invite",
        "Ada",
    ]
    assert main(arguments) == 0
    link = capsys.readouterr().out.strip()
    assert link.startswith("https://labels.example/enter#invite=") and len(link.partition("=")[2]) == 22
    store = Store.open(str(tmp_path / "l.db"))
    assert store.accounts.redeem(link.partition("=")[2]).name == "Ada"
    store.close()
    assert main(arguments) == 2 and "an account named 'Ada' exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"judge": "rule:length", "out": "o", "samples": "s", "db": "l.db"}, "db belongs to the labelling page"),
        ({"judge": "rule:length", "out": "o", "samples": "s", "overlap": "2"}, "overlap belongs to the labelling page"),
        ({"judge": "rule:length", "samples": "s"}, "missing out: give --out"),
        ({"db": "l.db", "out": "o"}, "out needs judge"),
        ({"db": "l.db", "orders": "both"}, "orders needs judge"),
        ({"samples": "s"}, "missing db: give --db VALUE, or a --judge"),
    ],
)
def test_page_and_judges_are_told_apart(given: dict[str, str], problem: str) -> None:
    """A key of the one is refused for the other."""
    with pytest.raises(ConfigError, match=problem):
        LabelConfig.model_validate(given)
