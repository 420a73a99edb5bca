"""Claims about what a run card and a bug report say of the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from preftune.engine.host import describe, git_commit


def test_a_bug_report_names_versions_and_hardware_and_nothing_private() -> None:
    """Exactly these facts, and no path: a run card may be published."""
    report = describe()
    built = torch.__version__  # such as 2.15.0+cu132; the package may be named without its build
    assert report["versions"]["torch"] in (built, built.partition("+")[0])
    assert set(report["host"]) == {"os", "machine", "processor", "cores", "memory_gib", "accelerators"}
    assert report["host"]["cores"] >= 1 and report["host"]["memory_gib"] > 0
    text = json.dumps(report)
    assert os.getcwd() not in text and os.path.expanduser("~") not in text


def test_the_commit_is_that_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty outside a repository; marked when tracked files differ."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() == ""

    def git(*words: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "first")
    assert git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "a").write_text("2")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_run_never_imports_torch() -> None:
    """Stages that need no tensor start without those seconds; accelerators are then not looked for."""
    code = (
        "import sys, preftune.engine.run as r; print(r.new_card('x', {}).host['accelerators'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
