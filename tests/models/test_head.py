"""Claims about log-probabilities under a vocabulary projection that never exists as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.models.head import token_logprobs

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


@pytest.mark.parametrize("chunk", [1, 7, 64, 130, 131, 1000, None])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_all_gradients_equal_log_softmax(
    bias: bool, softcap: float | None, scale: float, chunk: int | None
) -> None:
    """float64, whatever the block size, with bias, softcap and scale."""
    given = inputs(bias=bias)
    ours = values_and_gradients(token_logprobs, given, softcap=softcap, scale=scale, chunk=chunk)
    theirs = values_and_gradients(reference, given, softcap=softcap, scale=scale)
    assert len(ours) == len(theirs) == 3 + bias
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float64
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()


def test_float32_is_exact_to_its_rounding() -> None:
    given = inputs(torch.float32, bias=True)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
             for name, t in given.items()}  # fmt: skip
    ours = values_and_gradients(token_logprobs, given, chunk=20)
    for one, other in zip(ours, values_and_gradients(reference, exact), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


def test_bf16_gives_float32_log_probs_and_bf16_gradients() -> None:
    """The products run in bf16, the softmax does not: errors stay within a bf16 rounding of the logits (2^-8 of 16)."""
    given = inputs(torch.bfloat16)
    exact = {name: t if t is None or t.dtype == torch.int64 else t.detach().double().requires_grad_()
             for name, t in given.items()}  # fmt: skip
    ours = values_and_gradients(token_logprobs, given, chunk=50)
    theirs = values_and_gradients(reference, exact)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (ours[0] - theirs[0]).abs().max() <= 16 * 2**-8
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


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
    """No tensor made in the forward or the backward is larger than a block or the weight's gradient."""
    tokens, entries, size, block = 64, 4096, 8, 2**14
    monkeypatch.setattr("preftune.models.head._BLOCK_ELEMENTS", {"cpu": block})
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.randn(entries, size, requires_grad=True)
    targets = torch.randint(entries, (tokens,))
    made = sizes_made(lambda: token_logprobs(hidden, weight, targets, softcap=3.0, chunk=chunk).sum().backward())
    assert max(made) <= max(tokens * chunk if chunk else block, entries * size) < tokens * entries


def test_a_frozen_head_costs_no_gradient_of_its_own() -> None:
    """Only what asks for a gradient gets one, and without gradients nothing is kept."""
    given = inputs(bias=True)
    frozen = given | {"weight_Vd": given["weight_Vd"].detach(), "bias": given["bias"].detach()}
    token_logprobs(**frozen).sum().backward()
    reference(**given).sum().backward()
    expected, given["hidden_Cd"].grad = given["hidden_Cd"].grad.clone(), None
    token_logprobs(**frozen).sum().backward()
    assert torch.allclose(given["hidden_Cd"].grad * 2, expected)
    made = sizes_made(lambda: token_logprobs(**frozen, chunk=5).sum().backward())
    assert 5 * C in made and max(made) < V * D
    with torch.no_grad():
        assert token_logprobs(**given).grad_fn is None


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
