"""Claims about divergences and alignments of next-token distributions that never exist as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.models.distributions import token_alignment, token_divergence

C, V, D, REF_D = 23, 131, 19, 11  # awkward: nothing divides anything, and the reference has a size of its own

Given = dict[str, Any]
SETTINGS = [
    {},
    {"softcap": 2.0, "ref_softcap": 2.0},
    {"softcap": 3.0, "scale": 0.3},
    {"scale": 0.3, "ref_softcap": 1.5, "ref_scale": 1.7},
]


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = False) -> Given:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    given = {"hidden_Cd": normal(C, D), "weight_Vd": normal(V, D)}
    reference = {"ref_hidden_Cd": normal(C, REF_D), "ref_weight_Vd": normal(V, REF_D)}
    return given | reference | ({"bias": normal(V), "ref_bias": normal(V)} if bias else {})


def leaves(given: Given) -> dict[str, Tensor]:
    """What the policy is made of."""
    return {name: given[name] for name in ("hidden_Cd", "weight_Vd", "bias") if name in given}


def logits(given: Given, options: Given, side: str = "") -> Tensor:
    """[C, V], whole."""
    found = given[f"{side}hidden_Cd"] @ given[f"{side}weight_Vd"].T + given.get(f"{side}bias", 0)
    found = found * options.get(f"{side}scale", 1.0)
    cap = options.get(f"{side}softcap")
    return found if cap is None else torch.tanh(found / cap) * cap


def divergence_by_definition(given: Given, options: Given) -> Tensor:
    """sum_v p (log p - log q) over the whole vocabulary."""
    log_p, log_q = (torch.log_softmax(logits(given, options, side), -1) for side in ("ref_", ""))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradients(values: Tensor, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a sum in which every token counts differently."""
    upstream = torch.linspace(-2, 3, len(values), dtype=values.dtype)
    return dict(zip(of, torch.autograd.grad(values, list(of.values()), upstream), strict=True))


def as_float64(given: Given) -> Given:
    return {name: t.detach().double().requires_grad_() for name, t in given.items()}


# -- divergence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 64, 130, 131, 1000, None])
@pytest.mark.parametrize("options", SETTINGS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("bias", [False, True])
def test_divergence_and_its_gradients_equal_the_definition(bias: bool, options: Given, chunk: int | None) -> None:
    """float64, whatever the block size, with a bias, a softcap and a scale of each side's own."""
    given = inputs(bias=bias)
    ours = token_divergence(**given, **options, chunk=chunk)
    theirs = divergence_by_definition(given, options)
    assert (ours > 0.01).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = gradients(theirs, leaves(given))
    for name, found in gradients(ours, leaves(given)).items():
        assert (found - expected[name]).abs().max() <= 1e-12 * expected[name].abs().max(), name


def test_the_reference_has_no_gradient() -> None:
    """Its hidden states, weight and bias are data, even where they ask for gradients."""
    given = inputs(bias=True)
    token_divergence(**given).sum().backward()
    assert all(given[name].grad is None for name in given if name.startswith("ref_"))
    assert all(tensor.grad is not None for tensor in leaves(given).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_policy_that_is_its_reference_has_no_divergence_and_no_pull(dtype: torch.dtype) -> None:
    """Zero to the bit, in value and gradient: a fresh policy starts where DPO does."""
    given = inputs(dtype)
    given |= {"ref_hidden_Cd": given["hidden_Cd"], "ref_weight_Vd": given["weight_Vd"]}
    found = token_divergence(**given, softcap=3.0, ref_softcap=3.0, chunk=20)
    assert not found.any()
    assert all(not gradient.any() for gradient in gradients(found, leaves(given)).values())


def test_float32_divergence_is_exact_to_its_rounding() -> None:
    """Far from the reference by 1e-6 of its value, near to it by 1e-6 nats."""
    given = inputs(torch.float32, bias=True)
    exact = as_float64(given)
    ours, theirs = token_divergence(**given, chunk=20), divergence_by_definition(exact, {})
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    expected = gradients(theirs, leaves(exact))
    for name, found in gradients(ours, leaves(given)).items():
        assert found.dtype == torch.float32
        assert (found - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
    near = given | {"ref_hidden_Cd": given["hidden_Cd"] * 1.001, "ref_weight_Vd": given["weight_Vd"]}
    near |= {"ref_bias": given["bias"]}
    ours, theirs = token_divergence(**near, chunk=20), divergence_by_definition(as_float64(near), {})
    assert 0 < theirs.max().item() < 1e-3
    assert (ours - theirs).abs().max() <= 1e-6


def test_the_level_of_the_logits_costs_no_precision() -> None:
    """Logits around 60, where a float32 is 4e-6 apart: a policy near its reference is still measured to 2e-6 nats."""
    given = inputs(torch.float32, bias=True)
    high = given["bias"].detach() + 60
    near = given | {"bias": high, "ref_bias": high}
    near |= {"ref_hidden_Cd": given["hidden_Cd"] * 1.01, "ref_weight_Vd": given["weight_Vd"]}
    ours, theirs = token_divergence(**near, chunk=20), divergence_by_definition(as_float64(near), {})
    assert (ours - theirs).abs().max() <= 2e-6


def test_bf16_weights_give_float32_divergences_and_bf16_gradients() -> None:
    """The products run in bf16 and everything else does not: within a bf16 rounding of logits of size 16."""
    given = inputs(torch.bfloat16)
    exact = as_float64(given)
    ours, theirs = token_divergence(**given, chunk=50), divergence_by_definition(exact, {})
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 32 * 2**-8
    expected = gradients(theirs, leaves(exact))
    for name, found in gradients(ours, leaves(given)).items():
        assert found.dtype == torch.bfloat16
        assert (found - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_a_reference_in_another_dtype_is_read_as_it_is() -> None:
    """bf16 reference weights beside a float32 policy: the reference's distribution is the bf16 model's."""
    given = inputs(torch.float32)
    mixed = given | {name: given[name].bfloat16() for name in ("ref_hidden_Cd", "ref_weight_Vd")}
    ours, theirs = token_divergence(**mixed, chunk=40), divergence_by_definition(as_float64(mixed), {})
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 16 * 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_far_apart_keep_value_and_gradient_finite(dtype: torch.dtype) -> None:
    """Both sides certain, of different tokens or of one: 2e4 nats and 0, where softmax().log() would give NaN."""
    hidden = torch.tensor([[1e4], [-1e4]], dtype=dtype).requires_grad_()
    ref_hidden = torch.full((2, 1), -1e4, dtype=dtype)
    weight = torch.linspace(-1, 1, 41, dtype=dtype)[:, None].requires_grad_()
    found = token_divergence(hidden, weight, ref_hidden, weight.detach(), chunk=6)
    assert found[0].item() == pytest.approx(2e4, rel=1e-6)
    assert found[1].item() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (hidden, weight)))


def test_what_a_bias_forbids_on_both_sides_is_harmless_and_on_one_side_counts() -> None:
    """Padded vocabularies: -inf on both sides is as if the entries did not exist; the policy alone may not forbid."""
    given = inputs(bias=True)
    blocked = {name: given[name].detach().index_fill(0, torch.arange(40), -math.inf) for name in ("bias", "ref_bias")}
    fewer = {name: t[40:] if len(t) == V else t for name, t in given.items()}
    found = token_divergence(**given | blocked, chunk=10)
    torch.testing.assert_close(found, divergence_by_definition(fewer, {}), rtol=1e-12, atol=1e-12)
    of = {name: given[name] for name in ("hidden_Cd", "weight_Vd")}
    assert all(g.isfinite().all() for g in gradients(found, of).values())

    only_reference = token_divergence(**given | {"ref_bias": blocked["ref_bias"]}, chunk=10)
    assert only_reference.isfinite().all() and (only_reference > 0).all()
    assert torch.isinf(token_divergence(**given | {"bias": blocked["bias"]}, chunk=10)).all()


# -- alignment --------------------------------------------------------------------------------------------------------


def alignment_by_definition(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """log q(y) - log sum q^2 from probabilities."""
    q = torch.softmax(logits_CV, -1)
    return q[torch.arange(len(targets_C)), targets_C].log() - q.square().sum(-1).log()


@pytest.mark.parametrize("chunk", [1, 64, 131, None])
@pytest.mark.parametrize("options", SETTINGS[:3], ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("bias", [False, True])
def test_alignment_equals_the_definition_and_has_no_gradient(bias: bool, options: Given, chunk: int | None) -> None:
    """float64, whatever the block size, with bias, softcap and scale; detached though the inputs ask for gradients."""
    given = leaves(inputs(bias=bias))
    own = {name: value for name, value in options.items() if not name.startswith("ref_")}
    targets = torch.randint(V, (C,), generator=torch.Generator().manual_seed(1))
    found = token_alignment(**given, targets_C=targets, **own, chunk=chunk)
    assert not found.requires_grad
    torch.testing.assert_close(found, alignment_by_definition(logits(given, own), targets), rtol=1e-11, atol=1e-11)


def test_alignment_of_uniform_and_of_certain_distributions() -> None:
    """0 for every token of a uniform one; where the policy is certain 0 for its token, -1e4 for others, no overflow."""
    hidden, targets = torch.ones(2, 1), torch.tensor([0, 3])
    assert token_alignment(hidden, torch.ones(5, 1), targets, chunk=2).abs().max() <= 1e-6
    certain = torch.tensor([[0.0], [0.0], [0.0], [1e4], [-1e4]])
    assert token_alignment(hidden, certain, targets, chunk=2).tolist() == [-1e4, 0.0]


def test_alignment_in_float32_follows_float64() -> None:
    given = leaves(inputs(torch.float32))
    targets = torch.arange(C) * 5
    found = token_alignment(**given, targets_C=targets, chunk=16)
    exact = alignment_by_definition(logits(as_float64(given), {}), targets)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()


# -- memory -----------------------------------------------------------------------------------------------------------


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
def test_no_whole_distributions_are_held(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward or the backward is larger than a block or the weight's gradient, on either side."""
    tokens, entries, size, block = 64, 1024, 8, 2**14
    monkeypatch.setattr("preftune.models.head._BLOCK_ELEMENTS", {"cpu": block})
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.randn(entries, size, requires_grad=True)
    other = torch.randn(tokens, size), torch.randn(entries, size)
    allowed = max(tokens * chunk if chunk else block, entries * size)
    assert allowed < tokens * entries
    made = sizes_made(lambda: token_divergence(hidden, weight, *other, softcap=3.0, chunk=chunk).sum().backward())
    assert max(made) <= allowed and tokens * (chunk or block // 2 // tokens) in made
    targets = torch.randint(entries, (tokens,))
    assert max(sizes_made(lambda: token_alignment(hidden, weight, targets, chunk=chunk))) <= allowed


def test_no_scored_token_gives_empty_results_and_zero_gradients() -> None:
    given = inputs()
    none = given | {name: given[name][:0] for name in ("hidden_Cd", "ref_hidden_Cd")}
    found = token_divergence(**none)
    assert found.shape == (0,)
    assert not torch.autograd.grad(found.sum(), given["weight_Vd"])[0].any()
    assert token_alignment(none["hidden_Cd"], given["weight_Vd"], torch.zeros(0, dtype=torch.int64)).shape == (0,)
