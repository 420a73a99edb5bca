"""Claims about log-probabilities under a vocabulary projection that never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from preftune.models.head import block_entries, token_logprobs

C, V, D = 37, 131, 19  # awkward: nothing divides anything


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = False, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "hidden_Cd": normal(C, D),
        "weight_Vd": normal(V, D),
        "targets_C": torch.randint(V, (C,), generator=draw),
        "bias": normal(V) if bias else None,
    }


def reference(hidden_Cd: Tensor, weight_Vd: Tensor, targets_C: Tensor, **options: Any) -> Tensor:
    """The definition, with the whole [C, V] in memory."""
    bias, softcap, scale = options["bias"], options.get("softcap"), options.get("scale", 1.0)
    logits = hidden_Cd @ weight_Vd.T + (0 if bias is None else bias)
    logits = logits * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.log_softmax(logits, -1)[torch.arange(len(targets_C)), targets_C]


def values_and_gradients(function: Any, given: dict[str, Any], **options: Any) -> list[Tensor]:
    leaves = [t for t in given.values() if t is not None and t.requires_grad]
    logps = function(**given, **options)
    upstream = torch.linspace(-2, 3, len(logps), dtype=logps.dtype)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream)]


NOTHING, PART, ALL = 0, 60 * C * 8, 2**28
"""Bytes the forward may keep: no block, about half of the vocabulary in float64, every block."""


def keep(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr("preftune.models.head._KEPT_BYTES", {"cpu": room})


@pytest.mark.parametrize("room", [NOTHING, PART, ALL])
@pytest.mark.parametrize("chunk", [1, 7, 64, 130, 131, 1000, None])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_all_gradients_equal_log_softmax(
    bias: bool, softcap: float | None, scale: float, chunk: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64, whatever the block size and whatever part is kept for the backward, with bias, softcap and scale."""
    keep(monkeypatch, room)
    given = inputs(bias=bias)
    ours = values_and_gradients(token_logprobs, given, softcap=softcap, scale=scale, chunk=chunk)
    theirs = values_and_gradients(reference, given, softcap=softcap, scale=scale)
    assert len(ours) == len(theirs) == 3 + bias
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float64
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


@pytest.mark.parametrize("room", [NOTHING, ALL])
def test_float32_is_exact_to_its_rounding(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(monkeypatch, room)
    given = inputs(torch.float32, bias=True)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for name, t in given.items()}  # fmt: skip
    ours = values_and_gradients(token_logprobs, given, chunk=20)
    for one, other in zip(ours, values_and_gradients(reference, exact), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


@pytest.mark.parametrize("room", [NOTHING, ALL])
def test_bf16_gives_float32_log_probs_and_bf16_gradients(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products run in bf16, the softmax does not: errors stay within a bf16 rounding of the logits (2^-8 of 16)."""
    keep(monkeypatch, room)
    given = inputs(torch.bfloat16)
    exact = {name: t if t is None or t.dtype == torch.int64 else t.detach().double().requires_grad_()
             for name, t in given.items()}  # fmt: skip
    ours = values_and_gradients(token_logprobs, given, chunk=50)
    theirs = values_and_gradients(reference, exact)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (ours[0] - theirs[0]).abs().max() <= 16 * 2**-8
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_a_token_that_is_nearly_certain_keeps_its_gradient_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """p - 1 = -1e-3 is kept as such: 1 minus a p rounded to bf16 would be 0, or four times as much."""
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[0.0]] * 50 + [[10.8]], dtype=torch.bfloat16)
    for room in (NOTHING, ALL):
        keep(monkeypatch, room)
        (gradient,) = torch.autograd.grad(token_logprobs(hidden, weight, torch.tensor([50]), chunk=20).sum(), hidden)
        odds = 50 * math.exp(-float(weight[50]))
        assert float(gradient) == pytest.approx(float(weight[50]) * odds / (1 + odds), rel=0.02)


def test_what_is_kept_is_used_and_a_second_backward_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all blocks kept the backward makes two products a block, not three, and gives the same twice."""
    given = inputs()
    products: list[int] = []
    for room in (NOTHING, ALL):
        keep(monkeypatch, room)
        logps = token_logprobs(**given, chunk=40)
        leaves = (given["hidden_Cd"], given["weight_Vd"])
        first: list[Tensor] = []
        with FlopCounterMode(display=False) as counter:
            first += torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
        products.append(counter.get_total_flops() // (2 * C * V * D))
        for one, other in zip(first, torch.autograd.grad(logps.sum(), leaves), strict=True):
            assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    assert products == [3, 2]


@pytest.mark.parametrize("room", [NOTHING, ALL])
def test_blocks_of_no_probability_have_no_gradient_but_their_target(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later block 1e4 nats above the target's: the target still gets -1, its neighbours nothing; no overflow."""
    keep(monkeypatch, room)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        hidden = torch.ones(1, 1, dtype=dtype)
        weight = torch.tensor([[0.0], [1.0], [2.0], [1e4]], dtype=dtype, requires_grad=True)
        token_logprobs(hidden, weight, torch.tensor([1]), chunk=1 if dtype == torch.float64 else 3).sum().backward()
        assert weight.grad is not None
        assert torch.allclose(weight.grad[:, 0], torch.tensor([0, 1, 0, -1], dtype=dtype), atol=1e-15)


def test_bf16_weight_gradients_are_accumulated_in_float32() -> None:
    """4096 equal contributions of 1 / 1024 to one weight make 4: a bf16 running sum would stop below 1 / 2."""
    n, size = 4096, 8
    hidden = torch.full((n, size), 2.0**-10, dtype=torch.bfloat16)
    weight = torch.zeros(1024, size, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(n, dtype=torch.int64), chunk=100).sum().backward()
    assert weight.grad is not None
    expected = n * 2.0**-10 * (1 - 1 / 1024)
    assert (weight.grad[0].float() - expected).abs().max() <= expected * 2**-8


def sizes_made(function: Callable[[], Any]) -> list[int]:
    """Elements of every tensor that `function` brings into being, its backward included."""
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    with Watch():
        function()
    return made


@pytest.mark.parametrize("chunk", [16, 500, None])
def test_the_whole_of_tokens_by_vocabulary_never_exists(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made, forward or backward, is larger than a block, the weight's gradient or what may be kept."""
    tokens, entries, size, block = 64, 4096, 8, 2**14
    keep(monkeypatch, 4 * entries * size)
    monkeypatch.setattr("preftune.models.head._BLOCK_ELEMENTS", {"cpu": block})
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.randn(entries, size, requires_grad=True)
    targets = torch.randint(entries, (tokens,))
    made = sizes_made(lambda: token_logprobs(hidden, weight, targets, softcap=3.0, chunk=chunk).sum().backward())
    assert max(made) <= max(tokens * chunk if chunk else block, entries * size) < tokens * entries


def test_a_frozen_head_costs_no_gradient_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what asks for a gradient gets one, and without gradients nothing is kept."""
    keep(monkeypatch, NOTHING)
    given = inputs(bias=True)
    frozen = given | {"weight_Vd": given["weight_Vd"].detach(), "bias": given["bias"].detach()}
    token_logprobs(**frozen).sum().backward()
    reference(**given).sum().backward()
    expected, given["hidden_Cd"].grad = given["hidden_Cd"].grad.clone(), None
    token_logprobs(**frozen).sum().backward()
    assert torch.allclose(given["hidden_Cd"].grad * 2, expected)
    made = sizes_made(lambda: token_logprobs(**frozen, chunk=5).sum().backward())
    assert 5 * C in made and max(made) < V * D
    keep(monkeypatch, ALL)
    with torch.no_grad():
        assert max(sizes_made(lambda: token_logprobs(**given, chunk=5))) < C * V


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    """Logits of +-1e4, where exp is 0 or infinite: a certain token has log-prob 0, an impossible one -2e4 - log 40."""
    hidden = torch.tensor([[1e4], [-1e4]])
    weight = torch.tensor([[-1.0], [1.0]]).repeat_interleave(40, 0)[:41]
    logps = token_logprobs(hidden, weight, torch.tensor([40, 40]), chunk=3)
    assert logps[0] == 0.0
    assert logps[1] == pytest.approx(-2e4 - math.log(40), rel=1e-6)


def test_entries_a_bias_forbids_are_harmless() -> None:
    """A bias of -inf over whole blocks (padded vocabularies) leaves the others as if these did not exist."""
    given = inputs(torch.float32, bias=True)
    bias = given["bias"].detach().clone()
    bias[:40] = float("-inf")
    targets = given["targets_C"].clamp(min=40)
    logps = token_logprobs(given["hidden_Cd"], given["weight_Vd"], targets, bias=bias, chunk=10)
    fewer = reference(given["hidden_Cd"], given["weight_Vd"][40:], targets - 40, bias=bias[40:])
    assert torch.allclose(logps, fewer, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(logps.sum(), (given["hidden_Cd"], given["weight_Vd"])))


def test_no_scored_token_gives_an_empty_result_and_zero_gradients() -> None:
    given = inputs()
    logps = token_logprobs(given["hidden_Cd"][:0], given["weight_Vd"], given["targets_C"][:0])
    assert logps.shape == (0,)
    (gradient,) = torch.autograd.grad(logps.sum(), given["weight_Vd"])
    assert not gradient.any()


@pytest.mark.parametrize(("tokens", "entries"), [(867, 2304), (8192, 256), (10_000, 209), (10**6, 64)])
def test_a_block_is_whole_where_it_can_be(tokens: int, entries: int) -> None:
    """On a CPU 2^21 logits at a time, in a multiple of 256 entries where so many fit, never below 64."""
    assert block_entries(torch.empty(tokens, 1)) == entries
