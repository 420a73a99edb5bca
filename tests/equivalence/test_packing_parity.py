"""Packed rows are exact: log-probs and gradients are those of every sequence alone, for every architecture served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, groups_of, tiny
from torch import Tensor

from preftune.data.packing import micro_batches, pack, pad
from preftune.models import attention, blocks
from preftune.models.attention import install, own_attention, use_backend
from preftune.models.checkpointing import recompute_activations
from preftune.models.logprobs import score
from preftune.tensors import PackedBatch, TokenGroup

FLOAT32, FLOAT64 = torch.float32, torch.float64


@pytest.fixture
def truly_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of transformers round to float32 in a float64 model too; while a test runs they do not."""
    monkeypatch.setattr(torch, "float32", FLOAT64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def alone(model: Any, groups: list[TokenGroup]) -> Tensor:
    """[C] by the model's own forward, one sequence at a time, and torch's log-softmax: nothing of preftune's."""
    found = []
    with own_attention(model):
        for group in groups:
            for response in group.responses:
                ids = torch.from_numpy(np.concatenate((group.prompt, response)).astype(np.int64))
                logits = model(input_ids=ids[None]).logits[0, len(group.prompt) - 1 : -1]
                found.append(torch.log_softmax(logits, -1)[torch.arange(len(response)), ids[len(group.prompt) :]])
    return torch.cat(found)


def gradients(model: Any, logps_C: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token counts differently, so that no two can be exchanged."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, len(logps_C), dtype=torch.float64).to(logps_C.dtype)
    (logps_C * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(model: Any, ours_C: Tensor, theirs_C: Tensor, tolerance: float) -> None:
    assert (ours_C - theirs_C).abs().max() <= tolerance * theirs_C.abs().max()
    ours, theirs = gradients(model, ours_C), gradients(model, theirs_C)
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("path", ["blocks", "parts", "segments", "dense"])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("truly_float64")
def test_packed_equals_alone_in_value_and_gradient(
    name: str, k: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float64, 1e-11: K responses over one prompt, whichever way the row is cut for attention."""
    model, groups = tiny(name, FLOAT64), groups_of(k)
    assert install(model) is None
    if path == "segments":  # what accelerators take
        monkeypatch.setattr(attention, "_BLOCK_ELSE", 0)
    if path == "parts":  # what longer groups take
        monkeypatch.setattr(blocks, "PART", 8)
    use_backend(model, "dense" if path == "dense" else "sdpa")
    assert_equal(model, score(model, pack(groups)), alone(model, groups), 1e-11)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_alone_in_float32(name: str, k: int) -> None:
    """float32, 3e-6 relative: rounding and nothing else, against each model's own forward."""
    model, groups = tiny(name, FLOAT32), groups_of(k)
    assert install(model) is None
    assert_equal(model, score(model, pack(groups)), alone(model, groups), 3e-6)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.usefixtures("truly_float64")
def test_padded_equals_packed(name: str) -> None:
    """The fall-back takes the same values and gradients, whatever the padding is."""
    model, groups = tiny(name, FLOAT64), groups_of(4)
    assert install(model) is None
    for pad_id in (0, 7):
        assert_equal(model, score(model, pad(groups, pad_id=pad_id)), score(model, pack(groups)), 1e-11)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 40, 75])
@pytest.mark.usefixtures("truly_float64")
def test_any_split_into_micro_batches_gives_the_same_gradients(budget: int, packed: bool) -> None:
    """Summed over the micro-batches, to float64 rounding: how a step is cut never changes it."""
    model, groups = tiny("llama", FLOAT64), groups_of(4)
    assert install(model) is None
    batches = list(micro_batches(groups, tokens_per_batch=budget, packed=packed))
    assert len(batches) > 1

    def step(batches: list[PackedBatch]) -> dict[str, Tensor]:
        model.zero_grad()
        for batch in batches:
            (score(model, batch) * torch.sin(batch.targets.double())).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, split = step([pack(groups)]), step(batches)
    for name, gradient in whole.items():
        assert (split[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    """The layout reaches the layers when they are computed again: values and gradients equal to the bit."""
    model, batch = tiny(name, FLOAT32), pack(groups_of(2))
    assert install(model) is None
    plain = score(model, batch)
    plain_gradients = gradients(model, plain)
    recompute_activations(model, "full")
    again = score(model, batch)
    assert torch.equal(again, plain)
    for gradient_name, gradient in gradients(model, again).items():
        assert torch.equal(gradient, plain_gradients[gradient_name]), gradient_name


def test_bf16_stays_within_its_rounding_of_float32() -> None:
    """The measured noise of bf16 on a tiny model: 2e-2 nats per token, 3 % of a gradient."""
    exact, rounded = tiny("llama", FLOAT32), tiny("llama", FLOAT32).bfloat16()
    exact.load_state_dict(rounded.float().state_dict())
    rounded.bfloat16()
    batch = pack(groups_of(4))
    for model in (exact, rounded):
        assert install(model) is None
    theirs_C, ours_C = score(exact, batch), score(rounded, batch)
    assert ours_C.dtype == torch.float32
    assert (ours_C - theirs_C).square().mean().sqrt() < 0.02 * theirs_C.abs().max()
    theirs, ours = gradients(exact, theirs_C), gradients(rounded, ours_C)
    for name, gradient in theirs.items():
        assert (ours[name].float() - gradient).norm() < 0.1 * gradient.norm(), name
