"""`preftune inspect`: what training would see, printed; what training would refuse, named and stops it too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftune.cli import main as cli
from preftune.errors import DataError
from preftune.recipes.inspect import InspectConfig, main

GOOD = [
    {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran"},
    {"prompt": "the dog", "chosen": " ran to the park", "rejected": " sat"},
]
IDENTICAL = {"prompt": "once upon", "chosen": " a time", "rejected": " a time"}


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_data_set_is_shown_as_training_would_see_it(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Format, accounting, lengths, and the first examples decoded with their marks."""
    data = write(tmp_path / "d.jsonl", [*GOOD, GOOD[0]])
    report = main(InspectConfig(model=str(tiny_model_folder), data=data, examples=1))
    out = capsys.readouterr().out
    assert out.startswith(f"{data}: trl, sha256 ")
    assert "3 rows = 2 used + 0 refused + 0 truncated + 1 duplicate\n2 pairs, 4 responses to 2 prompts" in out
    assert f"1 duplicate:\n  {data}:3: row: is a copy of {data}:1\n" in out
    assert "    | <s>the cat\n" in out
    assert "    +  sat on the mat</s>\n" in out
    assert "    -  ran</s>\n" in out
    assert "the dog" not in out
    assert report.used == 2


def test_every_refused_row_is_listed_before_the_error(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as there are: 30 bad rows give 30 lines, and exit code 2 unless they are allowed."""
    data = write(tmp_path / "d.jsonl", [*GOOD, *[IDENTICAL] * 30])
    flags = ["inspect", "--model", str(tiny_model_folder), "--data", data, "--examples", "0"]
    assert cli(flags) == 2
    shown = capsys.readouterr()
    assert shown.out.count(": rejected: has the same tokens as chosen") == 30
    assert "30 of 32 rows are refused, 0 allowed, and 2 are left; training would stop here" in shown.err
    assert cli([*flags, "--allow_refused", "30"]) == 0


def test_prompts_of_the_evaluation_data_are_refused_in_the_training_data(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sets are examined, the held-out one first."""
    data = write(tmp_path / "train.jsonl", GOOD)
    held_out = write(tmp_path / "eval.jsonl", [{**GOOD[1], "chosen": " sat down"}])
    report = main(InspectConfig(model=str(tiny_model_folder), data=data, eval_data=held_out, allow_refused=1))
    assert [str(refusal) for refusal in report.refusals] == [
        f"{data}:2: prompt: stands in the evaluation data too, whose numbers would then prove nothing"
    ]
    out = capsys.readouterr().out
    assert out.index(held_out) < out.index(f"{data}: trl")


def test_a_bad_evaluation_set_is_an_error_too(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Training would stop at it as well."""
    data = write(tmp_path / "train.jsonl", GOOD)
    held_out = write(tmp_path / "eval.jsonl", [IDENTICAL])
    with pytest.raises(DataError, match=r"eval\.jsonl: 1 of 1 rows are refused, 1 allowed, and 0 are left"):
        main(InspectConfig(model=str(tiny_model_folder), data=data, eval_data=held_out, allow_refused=1))


def test_demonstrations_and_cuts_are_shown(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chosen side alone, cut on the right: the report counts it, the example shows no end mark."""
    data = write(tmp_path / "d.jsonl", [{**GOOD[0], "chosen": " sat" * 50}])
    model = str(tiny_model_folder)
    main(InspectConfig(model=model, data=data, kind="demonstrations", max_length=20, truncation="response"))
    out = capsys.readouterr().out
    assert "1 rows = 0 used + 0 refused + 1 truncated + 0 duplicate" in out
    assert "1 responses to 1 prompts" in out
    assert "rejected" not in out.split("cut: ")[0]
    assert "cut: 0 prompts, 1 responses" in out
    assert "1 responses lost their end mark" in out
    assert "tokens, scored, no end mark" in out


def test_unpaired_rows_are_counted_and_measured_by_label(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many are desirable and how long they are beside the others; copies and contradictions as in pairs."""
    good = {"prompt": "the cat", "completion": " sat", "label": True}
    bad = {"prompt": "the cat", "completion": " ran to the park", "label": False}
    other = {"prompt": "the dog", "completion": " sat", "label": True}
    rows = [good, bad, good, other, {**bad, "prompt": "once"}, {**bad, "prompt": "once", "label": True}]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = main(InspectConfig(model=str(tiny_model_folder), data=str(data), examples=2, allow_refused=2))
    out = capsys.readouterr().out
    assert out.startswith(f"{data}: unpaired, sha256 ")
    assert "6 rows = 3 used + 2 refused + 0 truncated + 1 duplicate\n" in out
    assert "2 desirable and 1 undesirable responses to 2 prompts" in out
    assert [line.split()[0] for line in out.splitlines()[3:8]] == [
        "tokens", "prompt", "desirable", "undesirable", "total"
    ]  # fmt: skip
    assert f"2 refused:\n  {data}:5: label: {data}:6 gives the same response the other label\n" in out
    assert f"1 duplicate:\n  {data}:3: row: is a copy of {data}:1\n" in out
    assert "    +  sat</s>\n" in out and "    -  ran to the park</s>\n" in out
    assert (report.desirable, report.undesirable, report.pairs) == (2, 1, 0)


def test_dropped_rows_are_listed(tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out on request is still left out: it is named, and stops nothing."""
    data = write(tmp_path / "d.jsonl", [*GOOD, {**GOOD[0], "chosen": " sat" * 50}])
    main(InspectConfig(model=str(tiny_model_folder), data=data, max_length=40, truncation="drop"))
    out = capsys.readouterr().out
    assert f"1 dropped:\n  {data}:3: length: " in out


def test_real_pairs_with_a_real_tokenizer(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real checkpoint's tokenizer (no pad token) reads real pairs; no row vanishes."""
    model, data = shared / "models/stories260k", shared / "data/ultrafeedback/short_val.jsonl.gz"
    report = main(InspectConfig(model=str(model), data=str(data), truncation="drop", allow_refused=50))
    assert report.rows == report.used + report.refused + report.truncated + report.duplicate
    assert report.used > 0.9 * report.rows
    assert capsys.readouterr().out.count("</s>\n") >= 3
