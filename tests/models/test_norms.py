"""Claims about RMSNorms whose gradient is written down: the model's own values, better gradients, less kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from preftune.models.checkpointing import recompute_activations
from preftune.models.norms import lighten_norms

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
          "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
NORMS = {"Llama": 5, "Gemma2": 9, "Qwen3": 9, "Olmo2": 9, "Mistral": 5}
"""Architecture -> its RMSNorms in two layers, those of queries and keys included. They are written in three ways."""
IDS = torch.arange(24).view(2, 12)


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """Norms have weights of their own, as after training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**COMMON)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype)


def numbers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and the gradients of a sum of their squares in one vector."""
    logits = model(IDS, use_cache=False).logits
    gradients = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
    return logits.detach(), torch.cat([gradient.double().flatten() for gradient in gradients])


def norm_of(model: Any) -> Any:
    return model.model.layers[0].post_attention_layernorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_values_are_the_models_own_and_gradients_are_by_rounding(kind: str, dtype: torch.dtype) -> None:
    """Of the whole model: logits to the bit, gradients to the rounding of its dtype, for every way to write a norm."""
    plain, ours = tiny(kind, dtype), tiny(kind, dtype)
    assert lighten_norms(ours) == NORMS[kind]
    (logits, gradients), (own, theirs) = numbers(ours), numbers(plain)
    assert torch.equal(logits, own)
    off = (gradients - theirs).norm() / theirs.norm()
    assert off < {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]  # 5 to 10 roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Olmo2"])
def test_the_gradient_of_a_norm_is_at_least_as_close_to_float64_as_autograds(kind: str, dtype: torch.dtype) -> None:
    """Against float64 arithmetic of the formula: input and weight, of rows of very different sizes."""
    plain, ours = (norm_of(tiny(kind, dtype)) for _ in range(2))
    assert lighten_norms(ours) == 1
    draw = torch.Generator().manual_seed(0)
    x, up = (torch.randn(3, 50, 32, generator=draw).to(dtype) for _ in range(2))
    x *= torch.logspace(-2, 2, 50)[None, :, None].to(dtype)
    eps = getattr(plain, "variance_epsilon", None) or plain.eps

    def gradients(norm: Any) -> list[Tensor]:
        at = x.clone().requires_grad_()
        return list(torch.autograd.grad(norm(at), (at, norm.weight), up))

    wide, weight = x.double().requires_grad_(), plain.weight.detach().double().requires_grad_()
    gain = weight + 1 if kind == "Gemma2" else weight
    value = gain * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    exact = torch.autograd.grad(value, (wide, weight), up.double())
    for mine, own, true in zip(gradients(ours), gradients(plain), exact, strict=True):
        error, theirs = ((found.double() - true).norm() / true.norm() for found in (mine, own))
        assert error < max(1.05 * theirs, 2e-7)


def test_a_norm_keeps_its_input_and_one_number_per_token() -> None:
    """In bfloat16; autograd keeps nearly three times as much, most of it in float32."""

    def kept(norm: Any) -> int:
        held: dict[int, Tensor] = {}

        def see(tensor: Tensor) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        x = torch.randn(1, 40, 32).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            norm(x)
        return sum(tensor.untyped_storage().nbytes() for tensor in held.values()) - norm.weight.nbytes

    plain, ours = (norm_of(tiny("Llama", torch.bfloat16)) for _ in range(2))
    lighten_norms(ours)
    assert kept(ours) == 40 * (32 * 2 + 4)
    assert kept(plain) > 2.8 * kept(ours)


def test_what_is_somebody_elses_is_not_written_over() -> None:
    """A float32 input and the gradient from above are what they were: nothing is computed in their memory."""
    norm = norm_of(tiny("Llama"))
    lighten_norms(norm)
    x, up = (torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    x_before, up_before, x = x.clone(), up.clone(), x.requires_grad_()
    norm(x).backward(up)
    assert torch.equal(x, x_before)
    assert torch.equal(up, up_before)


def test_a_frozen_weight_gets_no_gradient() -> None:
    """Under an adapter norms are frozen, and what they hand down is the same."""
    model, frozen = tiny("Llama"), tiny("Llama")
    for each in (model, frozen):
        lighten_norms(each)
    norm_of(frozen).weight.requires_grad_(False)
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    own, same = (torch.autograd.grad(norm_of(each)(x).square().sum(), x)[0] for each in (model, frozen))
    assert torch.equal(own, same)


def test_without_gradients_the_models_own_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and scoring are what they were; with gradients ours runs instead."""
    model = tiny("Llama")
    lighten_norms(model)
    called: list[int] = []
    plain = type(norm_of(model)).forward
    monkeypatch.setattr(type(norm_of(model)), "forward", lambda self, x: (called.append(1), plain(self, x))[1])
    with torch.no_grad():
        model(IDS)
    assert len(called) == 5
    model(IDS)
    assert len(called) == 5


@pytest.mark.parametrize("kind", ["Cohere", "Olmo"])
def test_norms_of_another_kind_stay_as_they_are(kind: str) -> None:
    """Cohere's and OLMo's subtract the mean."""
    model = tiny(kind)
    assert lighten_norms(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_one_that_has_the_names_and_does_something_else_stays_as_it_is() -> None:
    """A percent more, a mean subtracted, a second argument that it needs, or float64 throughout."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    class Gated(Other):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * gate

    for module in (Other(), Gated(), tiny("Llama", torch.float64)):
        assert lighten_norms(module) == 0


def test_what_is_given_beside_hidden_states_reaches_the_module() -> None:
    """A norm with an optional gate, called with one, is the module's own."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            out = self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps))
            return out if gate is None else out * gate

    plain, ours = Gated(), Gated()
    ours.load_state_dict(plain.state_dict())
    assert lighten_norms(ours) == 1
    x, gate = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 3, 8)
    assert torch.equal(ours(x, gate=gate), plain(x, gate))
    assert torch.equal(ours(x), plain(x))


def test_a_copy_has_weights_of_its_own() -> None:
    """A copied model computes with the copy's norms."""
    model = tiny("Llama")
    lighten_norms(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(numbers(other)[0], numbers(tiny("Llama"))[0])


@pytest.mark.parametrize("recomputed", ["selective", "full"])
def test_recomputed_activations_change_no_gradient(recomputed: Any) -> None:
    model, other = tiny("Llama"), tiny("Llama")
    for each in (model, other):
        lighten_norms(each)
    recompute_activations(other, recomputed)
    for ours, theirs in zip(numbers(other), numbers(model), strict=True):
        assert torch.equal(ours, theirs)
