"""The optimizer step on parts is the step on whole weights, for any number of ranks.

Real processes over gloo; the oracle is the same step on a whole copy of the model, with the same gradients.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import ends, start

DRIVER = str(Path(__file__).with_name("rank_updates.py"))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_update_has_the_same_bits_for_any_number_of_ranks(size: int, tmp_path: Path) -> None:
    """AdamW, lean AdamW, RMSprop and SGD, in both dtypes, offloaded or not: weights and moments, and what stochastic
    rounding draws, because its bits go by the position in the whole weight. (AdamW's float32 numbers: to the last but
    one.)"""
    found = ends(start([DRIVER, str(tmp_path)], size))
    assert [code for code, _ in found] == [0] * size, "\n".join(told for _, told in found)
    for rank in range(size):
        differs = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(differs) == 14 and "adamw_lean bfloat16 offloaded" in differs
        assert {case: names for case, names in differs.items() if names} == {}
