"""Of two processes one has less memory: it takes smaller parts by itself, the numbers stay, and both are told of it.

Real processes over gloo on one machine; the oracle is the same stage in one process with memory enough.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_counts import run
from ranks import ends, rows, start

DRIVER = str(Path(__file__).with_name("rank_short.py"))


def stages(model: Path, pairs: Path, asked: Path, out: Path) -> list[Any]:
    """The stages that draw or learn, small; a batch of drawing is more than rank 1 can hold."""
    common = {"model": str(model), "device": "cpu"}
    drawn = {**common, "prompts": str(asked), "n": 2, "max_tokens": 6}
    pieces = {"batch_size": 6, "dtype": "float32", "max_steps": 2, "lr": 1e-4}
    return [
        ["sample", {**drawn, "out": str(out / "sample.jsonl"), "batch_size": 6}],
        ["dpo", {**common, **pieces, "data": str(pairs), "max_length": 128, "out": str(out / "dpo")}],
        ["ppo", {**drawn, **pieces, "missing_eos": "none", "reward": "rule:regex:[aeiou]", "out": str(out / "ppo")}],
        ["evaluate", {**drawn, "reference": f"start={model}", "out": str(out / "evaluate"), "batch_size": 6}],
    ]


@pytest.fixture(scope="module")
def both(
    tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """Folders of one process and of two, and what the second one said."""
    folder = tmp_path_factory.mktemp("short")
    asked, out = folder / "asked.jsonl", {name: folder / name for name in ("alone", "together")}
    words = ("the cat", "a dog", "the park", "the mat", "a good answer", "a film", "once", "a girl", "the end", "upon")
    asked.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    for path in out.values():
        path.mkdir()
    plans = {name: stages(tiny_model_folder, pairs_file, asked, path) for name, path in out.items()}
    run(plans["alone"])
    (folder / "plan.json").write_text(json.dumps(plans["together"]))
    found = ends(start([DRIVER, str(folder / "plan.json")], 2))
    assert [code for code, _ in found] == [0, 0], "\n".join(told for _, told in found)
    return out["alone"], out["together"], found[1][1].splitlines()


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_one_short_rank_changes_no_number(stage: str, both: tuple[Path, Path, list[str]]) -> None:
    """The metrics of every step are those of one process up to rounding."""
    one, many = (rows(folder / stage) for folder in both[:2])
    assert len(many) == len(one) == 2
    for mine, theirs in zip(one, many, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize("file", ["sample.jsonl", "evaluate/samples/tiny_model0.jsonl"])
def test_answers_are_the_same(file: str, both: tuple[Path, Path, list[str]]) -> None:
    """Drawn two at a time or six: every text in its order, every log-prob up to rounding."""
    one, many = ([json.loads(line) for line in (folder / file).read_text().splitlines()] for folder in both[:2])
    answers = [[answer for row in lines for answer in row["responses"]] for lines in (one, many)]
    assert [a["text"] for a in answers[0]] == [a["text"] for a in answers[1]] and len(answers[0]) == 20
    assert [a["logp"] for a in answers[1]] == pytest.approx([a["logp"] for a in answers[0]], abs=1e-4)


def test_what_one_rank_had_to_do_is_said_and_kept(both: tuple[Path, Path, list[str]]) -> None:
    """Rank 1 says it with its name, and the card, which rank 0 writes, keeps it."""
    _, together, said = both
    assert said and all(line.startswith("rank 1: out of memory ") for line in said)
    for stage in ("dpo", "ppo", "evaluate"):
        notes = json.loads((together / stage / "run.json").read_text())["notes"]
        assert [note for note in notes if note in said], stage
