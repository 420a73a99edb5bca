"""A growing file holds whole lines, whatever happened to it, and only one process writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from preftune.engine import lines
from preftune.engine.lines import growing
from preftune.errors import ArtifactError, RunError, UserError


def test_whole_lines_stay_and_a_torn_one_goes(tmp_path: Path) -> None:
    """Cut at any byte, the file gives back the lines before the cut and goes on behind them."""
    path = tmp_path / "a" / "f.jsonl"
    with growing(path, begins="{") as file:
        assert file.lines == ()
        file.append(["{one}", "{tw\u00f6}"])
        file.append(["{3}"])
    content = path.read_bytes()
    assert content.decode() == "{one}\n{tw\u00f6}\n{3}\n"
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        with growing(path, begins="{") as file:
            assert list(file.lines) == content[:end].decode(errors="ignore").split("\n")[:-1]
            file.append(["{new}"])
        assert path.read_text().splitlines() == [*file.lines, "{new}"]


@pytest.mark.parametrize("content", ["[1]\n{2}\n", "{1}\n\n{2}\n", "{1}\ntorn", "notes"])
def test_a_file_of_somebody_else_is_left_as_it_was(tmp_path: Path, content: str) -> None:
    """A line that begins otherwise, blank and torn ones too, is named; nothing is cut."""
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"f\.jsonl:[12]: the line does not begin with \{; choose another --out"):
        growing(path, begins="{").__enter__()
    assert path.read_text() == content


def test_one_process_writes(tmp_path: Path) -> None:
    """A second writer is refused; after the first has left it may."""
    path = tmp_path / "f.jsonl"
    with growing(path, begins="{"), pytest.raises(UserError, match="another process is writing it"):
        growing(path, begins="{").__enter__()
    with growing(path, begins="{") as file:
        assert file.lines == ()
    with pytest.raises(UserError, match=r"cannot be written .* choose another --out"):
        growing(tmp_path, begins="{").__enter__()


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be synced is reported, with what to do."""

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with growing(tmp_path / "f.jsonl", begins="{") as file:
        monkeypatch.setattr(lines, "os", type("os", (), {**vars(os), "fsync": staticmethod(full)}))
        with pytest.raises(RunError, match=r"No space left on device.*run the same command again"):
            file.append(["{1}"])
        monkeypatch.undo()
