"""Claims about adapters: what a fresh one computes, what it is trained by, and what stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_models import BASE, DORA, GROUPS, KINDS, LORA, build, logits, moved

from preftune.data.packing import pack
from preftune.errors import ConfigError
from preftune.models.adapters import AdapterSpec, attach, copy_beside, merged_state
from preftune.models.attention import install
from preftune.models.logprobs import check_packing, score
from preftune.models.value_head import critic_of

# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_its_base_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    """B = 0: equal logits and packed log-probs, every weight of the model's dtype, only the adapter trainable."""
    model = build(kind, dtype)
    assert install(model) is None
    with torch.no_grad():
        before = score(model, pack(GROUPS))
    attach(model, LORA, BASE, seed=0)
    with torch.no_grad():
        assert torch.equal(score(model, pack(GROUPS)), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_dora_is_its_base_up_to_rounding(kind: str) -> None:
    """m / |W| is 1 up to the rounding of a division: log-probs agree to 1e-12 in float64."""
    model = build(kind)
    with torch.no_grad():
        before = score(model, pack(GROUPS)) if install(model) is None else pytest.fail("not packed")
        attach(model, DORA, BASE, seed=0)
        assert float((score(model, pack(GROUPS)) - before).abs().max()) < 1e-12


@pytest.mark.parametrize("spec", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_stay_exact_with_an_adapter(kind: str, spec: AdapterSpec) -> None:
    """Packed log-probs equal each sequence alone by the model's own forward, and the probe still finds every layer."""
    model = build(kind)
    attach(model, spec, BASE, seed=0)
    moved(model)
    assert install(model) is None
    assert check_packing(model, pack(GROUPS)) < 1e-6  # rotary angles are float32


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_linear_layers_below_the_head(kind: str) -> None:
    """Found from the modules: every linear layer of every block, never the vocabulary projection."""
    count = {"Llama": 7, "Qwen3": 7, "Gemma2": 7, "Phi": 6, "GPT2": 4}[kind]
    model = build(kind)
    head = model.get_output_embeddings()
    assert attach(model, LORA, BASE, seed=0) == 2 * count
    assert model.get_output_embeddings() is head
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 2 * count


def test_named_targets_only() -> None:
    """`targets` adapts those layers; a name the model does not have is refused with those it has."""
    model = build("Llama")
    assert attach(model, AdapterSpec(2, 4.0, targets=("v_proj", "q_proj")), BASE, seed=0) == 4
    with pytest.raises(
        ConfigError, match=r"query is no linear layer of this model; it has down_proj, gate_proj, k_proj"
    ):
        attach(build("Llama"), AdapterSpec(2, 4.0, targets=("query",)), BASE, seed=0)


def test_the_first_values_are_a_function_of_the_seed_alone() -> None:
    """Equal for equal seeds whatever the global numbers are, and these are left as they were; uniform in 1/sqrt(d)."""
    drawn = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        expected = torch.random.get_rng_state()
        model = build("Llama")
        attach(model, LORA, BASE, seed=seed)
        assert torch.equal(torch.random.get_rng_state(), expected)
        drawn.append(model.model.layers[0].mlp.up_proj.lora_A["default"].weight.detach())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert 0.9 * 32**-0.5 < float(drawn[0].abs().max()) <= 32**-0.5


# -- what it is trained by --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_its_gradient_is_the_full_gradient_projected(kind: str) -> None:
    """dJ/dB = s G A^T and dJ/dA = s B^T G with G = dJ/dW of the merged plain model; nothing else has a gradient."""
    model = build(kind)
    attach(model, LORA, BASE, seed=0)
    moved(model)
    plain = build(kind)
    plain.load_state_dict({name: t.double() for name, t in merged_state(model).items()})
    assert install(model) is None and install(plain) is None
    weights = torch.linspace(-1, 1, 27, dtype=torch.float64)
    for one in (model, plain):
        (score(one, pack(GROUPS)) * weights).sum().backward()
    full = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    seen = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            g = full[f"{name}.weight"].T if kind == "GPT2" else full[f"{name}.weight"]
            assert torch.allclose(b.grad, 2 * g @ a.T, rtol=0, atol=1e-10)
            assert torch.allclose(a.grad, 2 * b.T @ g, rtol=0, atol=1e-10)
            seen += float(g.abs().max()) > 1e-6
    assert seen > 4
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_frozen_weights_cost_no_weight_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither layer nor vocabulary head computes one: no product in the backward has the shape of a frozen weight."""
    model = build("Llama", torch.float32)
    assert install(model) is None
    attach(model, LORA, BASE, seed=0)
    frozen = {tuple(p.shape) for p in model.parameters() if p.ndim == 2 and not p.requires_grad}
    frozen |= {shape[::-1] for shape in frozen}

    made: list[tuple[int, ...]] = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                made.append(tuple(out.shape))
            return out

    value = score(model, pack(GROUPS)).sum()
    with Shapes():
        value.backward()
    assert made and not frozen & set(made)


def test_a_copy_beside_shares_what_is_frozen() -> None:
    """A reference costs an adapter, not a model, and stays where it was when the policy moves, on to the last bit."""
    model = build("Llama")
    attach(model, LORA, BASE, seed=0)
    moved(model)
    before = logits(model)
    beside = copy_beside(model).requires_grad_(False)
    moved(model, seed=2)
    assert torch.equal(logits(beside), before) and not torch.equal(logits(model), before)
    own = dict(model.named_parameters())
    assert {n for n, p in beside.named_parameters() if p is not own[n]} == {n for n in own if ".lora_" in n}
    plain = build("Llama").requires_grad_(False)
    assert not {id(p) for p in copy_beside(plain).parameters()} & {id(p) for p in plain.parameters()}


def test_a_critic_beside_an_adapter_trains_an_adapter() -> None:
    """Adapter and value head are its own and trainable; the frozen weights are the policy's."""
    model = build("Llama")
    attach(model, LORA, BASE, seed=0)
    critic = critic_of(model)
    own = {id(p) for p in model.parameters()}
    trained = {n for n, p in critic.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or n.startswith("lm_head") for n in trained) and "lm_head.weight" in trained
    assert not any(id(p) in own for p in critic.parameters() if p.requires_grad)
    assert all(id(p) in own for p in critic.parameters() if not p.requires_grad)


def test_without_peft_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"adapters need peft, .*pip install 'preftune\[peft\]'"):
        attach(build("Llama"), LORA, BASE, seed=0)
