"""docs/parity.md is complete over our losses, and true to the settings and the tests that compare them with TRL's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from trl_settings import MATCHES

from preftune.equations.losses import LOSSES

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs/parity.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \| (.*) \|$", flags=re.MULTILINE)


def defined_in(file: str) -> list[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def test_every_loss_has_a_row_with_its_settings() -> None:
    """All of them in the table's order: knobs and TRL's arguments as they are compared, "none" where it has none."""
    shown = {name: (knobs, settings) for name, knobs, settings, _ in ROW.findall(TEXT)}
    assert list(shown) == list(LOSSES)
    for name, found in shown.items():
        match = MATCHES.get(name)
        knobs = ", ".join(f"`{knob} = {value:g}`" for knob, value in match.knobs.items()) if match else ""
        assert found == (knobs or "-", str(match or "none")), name
    assert f"implementation of {len(MATCHES)} of the losses" in TEXT


def test_every_knob_is_translated() -> None:
    """No agreement rests on two defaults that happen to be equal."""
    for name, match in MATCHES.items():
        assert set(match.knobs) == set(LOSSES[name].knobs()), name


def test_every_disagreement_has_a_row_and_every_row_a_test() -> None:
    """The two lower tables are the two files' tests, in order; the upper one names no other."""
    pinned = defined_in("test_trl_disagreements.py"), defined_in("test_trl_limits.py")
    assert re.findall(r"^\| `(test_\w+)` \|", TEXT, flags=re.MULTILINE) == [*pinned[0], *pinned[1]]
    named = {test for *_, where in ROW.findall(TEXT) for test in re.findall(r"`(test_\w+)`", where)}
    assert named == {*pinned[0], *pinned[1]}
