"""What is whole at the fullest moment of a step in parts, as FSDP2 holds it, is what the plan counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rank_gathered import config
from ranks import ends, start

from preftune.models.cost import Shape, Work, memory

DRIVER = str(Path(__file__).with_name("rank_gathered.py"))


def test_the_plan_counts_what_is_gathered_of_policy_and_reference(tmp_path: Path) -> None:
    """Backward: two of the policy's layers, both embeddings and heads; the reference's layers came and went before."""
    found = ends(start([DRIVER, str(tmp_path)], 2))
    assert [code for code, _ in found] == [0, 0], "\n".join(told for _, told in found)
    for rank in range(2):
        for tied, seen in zip((False, True), json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            shape = Shape.of(config(tied), torch.bfloat16)
            held = memory(shape, Work.of(20, (20, 20)), shards=2, reference_in_loop=True)
            parts = (4 * shape.parameters / 2, 2 * shape.parameters / 2)
            planned = (held.weights - parts[0], held.reference - parts[1])
            assert planned == pytest.approx(seen, rel=0.01), f"tied {tied}"  # norms are not dealt to layers
