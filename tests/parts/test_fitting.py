"""Claims about micro-batches that do not fit in memory: the step goes on with the same numbers, or the row is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little_memory import NO_MEMORY, short_backward

from preftune.data.packing import fed_tokens, pack
from preftune.engine.memory import out_of_memory
from preftune.errors import RunError
from preftune.parts import common
from preftune.parts.fitting import Budget, attempt, attempt_in_step, shorter_answers
from preftune.recipes import dpo, reward, sft
from preftune.tensors import TokenGroup

SMALL = {
    "batch_size": 12,
    "max_steps": 3,
    "max_length": 128,
    "tokens_per_batch": 4096,
    "dtype": "float32",
    "device": "cpu",
}


def tight(monkeypatch: pytest.MonkeyPatch, limit: int, *, backward: bool) -> list[int]:
    """Every model opened from now on has memory for `limit` tokens; returns where the token counts are noted.

    With `backward` it gives out in the middle of the backward pass, when half of the gradients are added already.
    """
    seen: list[int] = []
    plain = common.open_model

    def opened(*args: Any, **settings: Any) -> Any:
        loaded, batching = plain(*args, **settings)
        layers = loaded.model.get_decoder().layers

        def layer(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            seen.append(output.shape[1])
            if not backward and output.shape[1] > limit:
                raise NO_MEMORY
            return short_backward(output, limit) if torch.is_grad_enabled() and backward else output

        layers[0].register_forward_hook(layer)
        return loaded, batching

    for recipe in (dpo, sft, reward):
        monkeypatch.setattr(recipe, "open_model", opened)
    return seen


RUNS: dict[str, Callable[..., Any]] = {
    "dpo": lambda **settings: dpo.train(dpo.DpoConfig(**settings)),
    "a loss of the whole step": lambda **settings: dpo.train(dpo.DpoConfig(loss="bco", **settings)),
    "sft": lambda **settings: sft.main(sft.SftConfig(**settings)),
    "reward": lambda **settings: reward.main(reward.RewardConfig(**settings)),
}


def course(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("share_", "_per_second", "seconds", "padding")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("stage", RUNS)
def test_a_step_that_does_not_fit_goes_on_with_the_numbers_of_a_smaller_budget(
    stage: str,
    backward: bool,
    tiny_model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit the run that had the lowered budget from the start, and the card says once what was lowered."""
    files = {"model": str(tiny_model_folder), "data": str(pairs_file)}
    seen = tight(monkeypatch, 300, backward=backward)
    card = RUNS[stage](**SMALL | files, out=str(tmp_path / "tight"))
    notes = [note for note in card.notes if note.startswith("out of memory")]
    lowered = [int(re.findall(r"--tokens_per_batch (\d+)", note)[0]) for note in notes]
    assert lowered and lowered == sorted(lowered, reverse=True)
    assert max(seen) > 300, "memory must have been short"
    monkeypatch.undo()
    RUNS[stage](**SMALL | files | {"tokens_per_batch": max(lowered[-1], 128)}, out=str(tmp_path / "small"))
    assert course(tmp_path / "tight") == course(tmp_path / "small")
    assert card.status == "done"


@pytest.mark.parametrize("stage", RUNS)
def test_a_row_that_never_fits_is_named_with_a_setting(
    stage: str, tiny_model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """file:line, its tokens, and what to set; the run card says failed."""
    files = {"model": str(tiny_model_folder), "data": str(pairs_file)}
    tight(monkeypatch, 30, backward=True)
    with pytest.raises(
        RunError, match=r"pairs.jsonl:\d+: out of memory with this row alone, \d+ tokens .*--max_length"
    ):
        RUNS[stage](**SMALL | files, out=str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def rows(*lengths: int) -> list[TokenGroup]:
    draw = torch.arange(100, dtype=torch.int32).numpy()
    return [
        TokenGroup(draw[:4], (draw[:n], draw[50 : 50 + n]), ((0, 1),), origin=f"f:{i}") for i, n in enumerate(lengths)
    ]


def test_the_length_it_proposes_is_one_that_fits() -> None:
    """Rows of 4 + 2 * (n - 1) tokens and memory for 20: a pair within the proposed length fits whatever it holds."""
    groups, budget = rows(3, 9, 20), Budget(lambda note: None)

    def work(batches: Any) -> None:
        for batch in batches:
            if batch.input_ids.numel() > 20:
                raise MemoryError

    with pytest.raises(
        RunError, match=r"f:2: .* 42 tokens with its 2 responses. 20 tokens did fit: set --max_length 10"
    ):
        attempt(lambda: [pack([g]) for g in groups], work, budget, lambda: None)


def test_the_length_of_answers_it_proposes_is_one_that_fits() -> None:
    """A prompt of 4 with two answers of at most 8 is fed at most the 20 tokens that did fit; of 9, more."""
    (row,) = rows(20)
    assert "20 tokens did fit: set --max_tokens 8, or a lower --n" in shorter_answers(row, 20)
    fitting, longer = (fed_tokens(group) for group in rows(8, 9 + 1))
    assert fitting <= 20 < longer
    assert shorter_answers(row, 5) == "set --max_tokens lower, or a lower --n"


def test_where_all_must_compute_together_the_exit_names_the_row() -> None:
    """Nothing is done anew: of several rows the longest is named and half of the tokens proposed, one row by itself."""

    def work(batches: Any) -> None:
        for batch in batches:
            if batch.input_ids.numel() > 20:
                raise NO_MEMORY

    several = r"out of memory at 62 tokens, 3 rows, the longest of them f:1, .* set --tokens_per_batch 31, .*--resume"
    with pytest.raises(RunError, match=several):
        attempt_in_step([pack(rows(3, 20, 5))], work, Budget())
    alone = r"f:1: out of memory with this row alone, 42 tokens .* 20 tokens did fit: set --max_length 10.*--resume"
    with pytest.raises(RunError, match=alone):
        attempt_in_step([pack([row]) for row in (rows(9)[0], rows(3, 20)[1])], work, Budget())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    """A RuntimeError of another kind passes, and so does one outside of a micro-batch."""

    def wrong(batches: Any) -> None:
        for _ in batches:
            raise RuntimeError("shapes do not match")

    def after(batches: Any) -> None:
        list(batches)
        raise NO_MEMORY

    for work, message in ((wrong, "shapes do not match"), (after, "CUDA out of memory")):
        with pytest.raises(RuntimeError, match=message):
            attempt(lambda: [pack(rows(5, 5))], work, Budget(), lambda: None)


def test_what_the_allocators_raise_is_recognised() -> None:
    """The real error of torch's CPU allocator, Python's own, and those of CUDA and cuBLAS."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(found.value)
    assert out_of_memory(MemoryError()) and out_of_memory(NO_MEMORY)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not out_of_memory(RuntimeError("size mismatch")) and not out_of_memory(ValueError("out of memory"))
