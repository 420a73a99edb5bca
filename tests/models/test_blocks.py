"""Claims about attention of a group in parts: the definition's numbers, and nothing computed that causality hides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from preftune.models import blocks
from preftune.models.attention import Layout, dense
from preftune.models.blocks import attend_in_parts, parts_of
from preftune.tensors import AttentionPlan, Segment

SIBLINGS = AttentionPlan((Segment(0, 30), Segment(30, 41, 0, 20), Segment(41, 43, 0, 20)), 43)
"""A prompt of 20 tokens and three responses."""


def drawn(dtype: torch.dtype, n: int = 43, heads: int = 6, key_heads: int = 2, width: int = 8) -> list[Tensor]:
    """Queries, keys, values, and what comes back from above."""
    draw = torch.Generator().manual_seed(0)
    shapes = (1, heads, n, width), (1, key_heads, n, width), (1, key_heads, n, width), (1, n, heads, width)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(attend: Any, q: Tensor, k: Tensor, v: Tensor, up: Tensor) -> list[Tensor]:
    """What comes out, and the gradients of queries, keys and values."""
    q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), up)]


def in_parts(layout: Layout, window: int | None, softcap: float | None, scale: float = 0.3) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = parts_of(layout.plan.length, lambda rows, columns: layout.visible(rows, columns, window), q)
        return attend_in_parts(q, k, v, parts, scale, softcap)

    return attend


@pytest.mark.parametrize("part", [1, 8, 16, 128])
@pytest.mark.parametrize("kept", [0, 2**25])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 7])
def test_parts_give_the_values_and_gradients_of_the_definition(
    part: int, kept: int, softcap: float | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64, 1e-12, against one softmax over the whole row, differentiated by autograd: P kept or computed again."""
    monkeypatch.setattr(blocks, "PART", part)
    monkeypatch.setattr(blocks, "KEPT_BYTES", kept)
    layout, numbers = Layout(SIBLINGS), drawn(torch.float64)
    ours = with_gradients(in_parts(layout, window, softcap), *numbers)
    theirs = with_gradients(lambda q, k, v: dense(q, k, v, layout, 0.3, window, softcap), *numbers)
    for mine, true in zip(ours, theirs, strict=True):
        assert (mine - true).abs().max() < 1e-12


@pytest.mark.parametrize("n", [1, 2, 127, 128, 191, 200, 300, 1700])
def test_every_query_is_in_one_part_and_no_key_comes_after_its_part(n: int) -> None:
    """Parts in order, none much larger than PART; of a long group half of the scores are never computed."""
    parts = parts_of(n, lambda rows, columns: columns[None] <= rows[:, None], torch.zeros(()))
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == n
    assert all(part.mask.shape == (part.end - part.start, part.end) for part in parts)
    assert all(part.end - part.start <= 1.5 * blocks.PART for part in parts)
    scores = sum((part.end - part.start) * part.end for part in parts)
    assert scores <= n * (n + 1.5 * blocks.PART) / 2


def test_probabilities_are_kept_up_to_their_limit_and_computed_again_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward holds beside queries, keys and values: all of P, or nothing."""
    q, k, v, _ = (each.requires_grad_() for each in drawn(torch.float32))
    attend = in_parts(Layout(SIBLINGS), None, None)
    held: list[int] = []

    def see(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        attend(q, k, v)
        assert held == [q.numel(), k.numel(), v.numel(), 6 * 43 * 43]
        held.clear()
        monkeypatch.setattr(blocks, "KEPT_BYTES", 6 * 43 * 43 * 4 - 1)
        attend(q, k, v)
        assert held == [q.numel(), k.numel(), v.numel()]


def test_in_bfloat16_the_worst_gradient_is_no_worse_than_of_flash_attention() -> None:
    """1000 tokens against float64: sums over eight parts are rounded eight times, and torch's kernel rounds too."""
    n, scale = 1000, 0.125
    layout, numbers = Layout(AttentionPlan((Segment(0, n),), n)), drawn(torch.bfloat16, n, width=64)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    def worst(attend: Any) -> float:
        found = with_gradients(attend, *numbers)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    ours = in_parts(layout, None, None, scale)
    exact = with_gradients(ours, *(each.double() for each in numbers))
    assert worst(ours) < worst(flash) < 0.01
