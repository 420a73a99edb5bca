"""Claims about everything one forward of the policy tells of its completion tokens, against plain logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from preftune.data.packing import pack, pad
from preftune.errors import RunError
from preftune.models.attention import install, own_attention
from preftune.models.logprobs import TokenScores, score, score_tokens
from preftune.studies.cost import peak
from preftune.tensors import PackedBatch, ResponseLogps, TokenGroup

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}


def build(kind: str, seed: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    further = GEMMA | {"query_pre_attn_scalar": 16} if kind == "Gemma2" else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL | further | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert install(model) is None
    return model


def groups() -> list[TokenGroup]:
    draw = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, 97, n).astype(np.int32)

    return [
        TokenGroup(ids(9), (ids(6), ids(11), ids(2)), ((0, 1), (2, 1)), origin="pairs.jsonl:1"),
        TokenGroup(ids(4), (ids(1), ids(7)), ((0, 1),), origin="pairs.jsonl:2"),
    ]


@pytest.fixture
def truly_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of transformers round to float32 in a float64 model too; while a test runs they do not."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def alone(model: Any, temperature: float) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-softmax [L, V], targets [L]) of every response, one sequence at a time, by the model's own forward."""
    with own_attention(model):
        for group in groups():
            for response in group.responses:
                ids = torch.from_numpy(np.concatenate((group.prompt, response)).astype(np.int64))
                start = len(group.prompt)
                logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
                yield torch.log_softmax(logits / temperature, -1), ids[start:]


def by_definition(policy: Any, reference: Any, temperature: float = 1.0) -> TokenScores:
    """The same from whole distributions."""
    logps, reference_logps, divergence, alignment = [], [], [], []
    for (log_q, y), (log_p, _) in zip(alone(policy, temperature), alone(reference, temperature), strict=True):
        log_p, at = log_p.detach(), torch.arange(len(y))
        logps.append(log_q[at, y])
        reference_logps.append(log_p[at, y])
        divergence.append((log_p.exp() * (log_p - log_q)).sum(-1))
        alignment.append((log_q[at, y] - torch.logsumexp(2 * log_q, -1)).detach())
    return TokenScores(*map(torch.cat, (logps, reference_logps, divergence, alignment)))


def gradients(model: Any, values_C: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every token counts differently."""
    model.zero_grad()
    values_C.backward(torch.linspace(-1, 2, len(values_C), dtype=values_C.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def everything(policy: Any, reference: Any, batch: PackedBatch, **more: float) -> TokenScores:
    return score_tokens(policy, batch, reference_model=reference, divergence=True, alignment=True, **more)


BATCHES = {"packed": lambda: pack(groups()), "padded": lambda: pad(groups(), pad_id=7)}


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.usefixtures("truly_float64")
def test_all_scores_and_gradients_equal_those_of_plain_logits(kind: str, layout: str) -> None:
    """float64, 1e-11, packed and padded, with Gemma 2's softcaps: values, and gradients by every policy weight."""
    policy, reference = build(kind, 0), build(kind, 1)
    ours, theirs = everything(policy, reference, BATCHES[layout]()), by_definition(policy, reference)
    for name in ("logps", "reference", "divergence", "alignment"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max(), name
    assert not ours.reference.requires_grad and not ours.alignment.requires_grad
    expected = gradients(policy, theirs.logps + 3 * theirs.divergence)
    for name, found in gradients(policy, ours.logps + 3 * ours.divergence).items():
        assert expected[name].norm() > 0, name
        assert (found - expected[name]).norm() <= 1e-11 * expected[name].norm(), name
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_float32_scores_equal_those_of_plain_logits_to_rounding(kind: str) -> None:
    """5e-6 nats for values of up to a few nats, the rounding of both sides and of the decoder before them."""
    policy, reference = (build(kind, seed, torch.float32) for seed in (0, 1))
    ours, theirs = everything(policy, reference, pack(groups())), by_definition(policy, reference)
    for name in ("logps", "reference", "divergence", "alignment"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 5e-6 * (1 + expected.abs().max()), name


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
@pytest.mark.usefixtures("truly_float64")
def test_a_temperature_divides_the_logits_of_both(kind: str, temperature: float) -> None:
    """float64, 1e-11: log-probs, divergence and alignment are those of softmax(z / T), behind Gemma 2's softcap too."""
    policy, reference = build(kind, 0), build(kind, 1)
    ours = everything(policy, reference, pack(groups()), temperature=temperature)
    theirs, plain = by_definition(policy, reference, temperature), by_definition(policy, reference)
    for name in ("logps", "reference", "divergence", "alignment"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert (found - expected).abs().max() <= 1e-11 * expected.abs().max(), name
        assert (found - getattr(plain, name)).abs().max() > 0.1, name


@pytest.mark.parametrize("layout", BATCHES)
def test_a_fresh_policy_diverges_nowhere(layout: str) -> None:
    """Policy and reference of the same weights: log-ratios, divergences and their gradients are zero to the bit."""
    policy, reference = (build("Llama", 0, torch.float32) for _ in range(2))
    found = everything(policy, reference, BATCHES[layout]())
    assert torch.equal(found.logps.detach(), found.reference)
    assert not found.divergence.any()
    assert not any(g.any() for g in gradients(policy, found.divergence).values())


def test_divergences_are_summed_and_alignments_averaged_along_a_response() -> None:
    """Never below zero, and per response what TDPO and WPO read."""
    policy, reference = build("Llama", 0), build("Llama", 1)
    batch = pack(groups())
    found = everything(policy, reference, batch)
    assert (found.divergence >= 0).all()
    responses = ResponseLogps.from_tokens(
        found.logps, batch.lengths, found.reference, divergence_C=found.divergence, alignment_C=found.alignment
    )
    per_response = [scores.split(batch.lengths.tolist()) for scores in (found.divergence, found.alignment)]
    torch.testing.assert_close(responses.divergence, torch.stack([tokens.sum() for tokens in per_response[0]]))
    torch.testing.assert_close(responses.alignment, torch.stack([tokens.mean() for tokens in per_response[1]]))


class Counted:
    """Counts the forwards of a decoder."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        model.get_decoder().register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


def test_one_forward_serves_every_question() -> None:
    """Policy and reference run once each, whatever is asked; what is not asked is None and not computed."""
    policy, reference = build("Llama", 0), build("Llama", 1)
    forwards, reference_forwards = Counted(policy), Counted(reference)
    batch = pack(groups())
    everything(policy, reference, batch)
    assert (forwards.calls, reference_forwards.calls) == (1, 1)
    plain = score_tokens(policy, batch)
    assert (plain.reference, plain.divergence, plain.alignment) == (None, None, None)
    assert torch.equal(plain.logps, score(policy, batch))
    aligned = score_tokens(policy, batch, alignment=True)
    assert aligned.reference is None and aligned.alignment is not None
    compared = score_tokens(policy, batch, reference_model=reference)
    assert compared.divergence is None
    assert torch.equal(compared.reference, score(reference, batch).detach())
    assert reference_forwards.calls == 3


def test_a_divergence_without_a_reference_or_across_vocabularies_is_refused() -> None:
    """Both messages say what to pass instead."""
    policy, batch = build("Llama", 0), pack(groups())
    with pytest.raises(
        RunError, match=r"^a divergence needs the reference's whole distributions: pass reference_model"
    ):
        score_tokens(policy, batch, divergence=True)
    larger = build("Llama", 1, vocab_size=104)
    with pytest.raises(RunError, match="the policy has 97 entries, the reference 104; use a reference"):
        score_tokens(policy, batch, reference_model=larger, divergence=True)
    assert score_tokens(policy, batch, reference_model=larger).reference is not None


def test_a_reference_in_memory_adds_nothing_to_the_peak_but_itself() -> None:
    """Its forward is over before anything of the policy's waits for the backward pass: bytes of the allocator."""
    policy, reference = (build("Llama", seed, torch.float32, hidden_size=128) for seed in (0, 1))
    batch = pack(groups() * 8)

    def most(beside: Any) -> int:
        def step() -> None:
            policy.zero_grad(set_to_none=True)
            score_tokens(policy, batch, reference_model=beside).logps.sum().backward()

        step()
        return peak(step, 0)

    alone = most(None)
    assert most(reference) <= alone + 64 * len(batch.targets)  # some numbers per completion token
