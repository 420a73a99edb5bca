"""`preftune explain`: the page, the terminal, or both."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from preftune.cli import main as cli
from preftune.cli import parse
from preftune.theory.lesson import lesson


def test_the_terminal_has_every_number_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--text alone: the numbers with what they mean, tables whole, and not a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli(["explain", "--text"]) == 0
    out = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    told = lesson()
    lines = [line.split() for line in out.splitlines()]
    for chapter in told.chapters:
        for number in chapter.numbers:
            assert any(number.text in line and number.meaning in line for line in out.splitlines()), number.name
        for row in (row for table in chapter.tables for row in table.rows):
            texts = [cell.text for cell in row if not isinstance(cell, str)]
            assert any(line[-len(texts) :] == texts for line in lines), row
    assert "\u2026" not in out and "`" not in out


def test_the_page_is_written_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out DIR, else runs/explain: the file of numbers, the page and its figures; a next step is named."""
    monkeypatch.chdir(tmp_path)
    assert cli(["explain"]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "runs/explain").iterdir()} == {"derivation.json", "index.html", "figures"}
    assert "Page: runs/explain/index.html" in out and "The objective" not in out
    command = next(line for line in out.splitlines() if line.startswith("Next: ")).removeprefix("Next: preftune ")
    assert parse(shlex.split(command))[0] == "dpo"


def test_both_can_be_had_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--text --out DIR: no option is silently ignored; an old page is replaced."""
    (tmp_path / "index.html").write_text("old")
    assert cli(["explain", "--text", "--out", str(tmp_path)]) == 0
    assert "1. The objective" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "derivation.json").read_text())["chapters"]) == 13
    assert (tmp_path / "index.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
