"""What the documentation says is so: the trees, the commands, the links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import rules

from preftune.cli import parse
from preftune.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fences(text: str, language: str = "") -> list[str]:
    """The contents of fenced blocks of one language; all blocks are matched, because an end looks like a start."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for named, block in blocks if re.fullmatch(language, named)]


def commands(text: str) -> list[str]:
    """Lines of shell blocks, continuations joined, comments and prompts removed."""
    blocks = "".join(fences(text, "(?:sh|bash)")).replace("\\\n", " ")
    return [line.removeprefix("$ ").strip() for line in blocks.splitlines() if line.strip() and line[0] != "#"]


def refused(command: str) -> str:
    """Why `preftune ...` or `make ...` of a page would be refused, "" when it would not."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return "" if set(words[1:]) <= set(targets) else f"no such target: {command}"
    if words[0] != "preftune" or words[1:] == ["env"] or words[-1] == "--help":
        return ""
    end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
    try:
        parse(words[1:end])
    except ConfigError as problem:
        return f"{command}: {problem}"
    return ""


def drawn_tree(text: str) -> set[str]:
    """Names in the README's drawing of src/preftune."""
    (block,) = [block for block in fences(text) if block.startswith("src/preftune/\n")]
    return {line.split()[0] for line in block.splitlines() if line.startswith("  ")}


def drawn_ranks(text: str) -> dict[str, tuple[int, set[str]]]:
    """`folder/` -> (rank, modules) of the drawing in architecture.md; files of the package itself by their own name."""
    (block,) = [block for block in fences(text) if block.startswith("rank ")]
    drawn: dict[str, tuple[int, set[str]]] = {}
    rank, folder = -1, ""
    for line in block.splitlines():
        words = line.split()
        if words[0] == "rank":
            rank, words = int(words[1]), words[2:]
        if words[0].endswith("/"):
            folder, words = words[0], words[1:]
        if folder == "preftune/":
            drawn |= {word: (rank, {word}) for word in words}
        else:
            drawn[folder] = (rank, drawn.get(folder, (rank, set()))[1] | set(words))
    return drawn


def real_ranks(root: Path) -> dict[str, tuple[int, set[str]]]:
    """The same from the disk and the table of ranks."""
    package = root / rules.PACKAGE
    found: dict[str, tuple[int, set[str]]] = {}
    for path in rules.modules(root):
        folder, stem = path.relative_to(package).parts[0], path.stem
        if path.parent == package:
            found |= {} if stem == "__init__" else {stem: (rules.RANKS[stem], {stem})}
        else:
            rank, stems = found.get(f"{folder}/", (rules.RANKS[folder], set()))
            found[f"{folder}/"] = (rank, stems if stem == "__init__" else stems | {stem})
    return found


def test_the_readme_draws_the_tree_as_it_is() -> None:
    """Every folder and file of the package, and nothing else."""
    package = ROOT / rules.PACKAGE
    real = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    real |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert drawn_tree((ROOT / "README.md").read_text(encoding="utf-8")) == real


def test_the_ranks_are_drawn_as_they_are() -> None:
    """architecture.md names every module at its rank, and nothing else."""
    assert drawn_ranks((ROOT / "docs/architecture.md").read_text(encoding="utf-8")) == real_ranks(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_of_a_page_is_understood(page: Path) -> None:
    """Stages, options and targets in shell blocks exist, and their values are accepted."""
    problems = [refused(command) for command in commands(page.read_text(encoding="utf-8"))]
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_a_page_names_exists(page: Path) -> None:
    """Relative links, and paths in backticks that start with a folder of this repository."""
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = re.findall(r"`((?:docs|tests|src|scripts|benchmarks)/[\w./-]+)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_shows_the_real_data_run() -> None:
    """inspect, sft and dpo are all there to be followed literally."""
    shown = {tuple(line.split()[:2]) for line in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    wanted = {
        ("preftune", "inspect"),
        ("preftune", "sft"),
        ("preftune", "dpo"),
        ("make", "quickstart"),
        ("make", "test"),
    }
    assert wanted <= shown


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("preftune dpo --model m --data d --out o --learning-rate 1", "unknown option --learning_rate"),
        ("preftune dpo --model m --data d --out o --loss ipo --beta 1 | tee log", "loss ipo has no knob beta"),
        ("preftune train", "unknown stage train"),
        ("make quickest", "no such target"),
    ],
)
def test_a_stale_command_is_found(command: str, problem: str) -> None:
    """The check above refuses what the program would refuse."""
    assert problem in refused(command)


def test_a_stale_drawing_is_found() -> None:
    """A missing, an extra or a misplaced module makes the drawings differ."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    real = real_ranks(ROOT)
    assert drawn_ranks(text.replace(" pairwise ", " ")) != real
    assert drawn_ranks(text.replace(" pairwise ", " pairwise made_up ")) != real
    assert drawn_ranks(text.replace("rank 3  worlds/", "rank 2  worlds/")) != real
    assert "made_up.py" in drawn_tree("```\nsrc/preftune/\n  made_up.py   x\n```\n")
