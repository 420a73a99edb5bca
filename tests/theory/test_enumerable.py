"""Completions enumerated through real transformers models, against score, the sampler and plain recursion."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.data.packing import micro_batches
from preftune.equations.kl import kl_divergence, rao_blackwell_kl
from preftune.errors import ConfigError
from preftune.models.attention import install
from preftune.models.fresh import letter_tokenizer, tiny_llama
from preftune.models.generate import sample
from preftune.models.logprobs import score
from preftune.tensors import TokenGroup
from preftune.theory.enumerable import Completions, count_completions, enumerate_completions

EOS = 3  # not the last id: four symbols 0, 1, 2, 4
SYMBOLS = (0, 1, 2, 4)
LIMIT = 3


def opinionated(model: Any, seed: int = 0) -> Any:
    """The model in float64 with weights large enough to prefer something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.4 * torch.randn(weight.shape, generator=g))
    return model.double()


def llama(vocabulary: int = 5, eos_id: int = EOS, seed: int = 0) -> Any:
    size = {"hidden": 16, "layers": 2, "heads": 2, "positions": 12}
    return opinionated(tiny_llama(vocabulary, **size, bos_id=eos_id, eos_id=eos_id), seed)


def gpt2() -> Any:
    """Absolute positions, and dropout that is active until it is switched off."""
    config = GPT2Config(
        vocab_size=5, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS
    )
    return opinionated(GPT2LMHeadModel(config).train())


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


def enumerated(model: Any, prompts: Sequence[Sequence[int]], **settings: float) -> Completions:
    with torch.no_grad():
        return enumerate_completions(model, prompts, eos_id=EOS, max_tokens=LIMIT, **settings)


def all_answers() -> Iterator[tuple[int, ...]]:
    """Every answer of at most LIMIT tokens, written down by hand: strings that end, then strings that are cut."""
    for length in range(LIMIT):
        yield from ((*string, EOS) for string in product(SYMBOLS, repeat=length))
    yield from product(SYMBOLS, repeat=LIMIT)


def test_every_completion_stands_there_once(model: Any) -> None:
    """The rows are all strings that end and all that are cut, in order, with lengths and flags that fit."""
    found = enumerated(model, [[0]])
    rows = [tuple(row[:n]) for row, n in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]
    assert rows == list(all_answers())
    assert found.finished.tolist() == [EOS in row for row in rows]
    assert len(rows) == count_completions(len(SYMBOLS), LIMIT) == 85
    assert count_completions(8, 5) == 37_449


def test_the_law_sums_to_one_and_is_that_of_one_sequence_at_a_time(model: Any) -> None:
    """exp sums to 1 for every prompt, and each entry is the chain rule over single forwards without any batch."""
    prompts = [[1], [4, 0, 2], [EOS, 1]]
    found = enumerated(model, prompts)
    torch.testing.assert_close(found.logps.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    model.eval()
    for p, prompt in enumerate(prompts):
        for m, answer in enumerate(all_answers()):
            if m % 7 == 0:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
                alone = torch.log_softmax(logits, -1)[torch.arange(len(answer)), list(answer)].sum()
                assert float(found.logps[p, m]) == pytest.approx(float(alone), abs=1e-10)


def test_a_float32_model_of_the_full_size_sums_to_one_in_one_pass() -> None:
    """8 letters and 5 tokens are 37,449 completions; the float32 law sums to 1 and differs from float64 by rounding."""
    model = tiny_llama(9, hidden=16, layers=1, heads=2, positions=8, eos_id=8)
    with torch.no_grad():
        single = enumerate_completions(model, [[0, 1]], eos_id=8, max_tokens=5)
        double = enumerate_completions(model.double(), [[0, 1]], eos_id=8, max_tokens=5)
    assert single.logps.shape == (1, 37_449) and single.logps.dtype == torch.float64
    assert abs(float(single.logps.exp().sum()) - 1) < 1e-12
    torch.testing.assert_close(single.logps, double.logps, rtol=0, atol=1e-5)


def test_chunks_do_not_change_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many prefixes are fed at once, the numbers are the same up to rounding."""
    whole = enumerated(llama(), [[1, 2]])
    monkeypatch.setattr("preftune.theory.enumerable.TOKENS_AT_ONCE", 9)
    torch.testing.assert_close(enumerated(llama(), [[1, 2]]).logps, whole.logps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [True, False])
def test_the_law_is_what_training_scores(packed: bool) -> None:
    """`score` on packed and on padded rows gives each completion the log-prob it has in the enumeration."""
    model, prompt = llama(), [0, 4]
    assert install(model) is None
    found = enumerated(model, [prompt])
    rows = range(0, len(found.tokens), 5)
    answers = [found.tokens[m, : found.lengths[m]].numpy().astype(np.int32) for m in rows]
    group = TokenGroup(prompt=np.array(prompt, dtype=np.int32), responses=tuple(answers))
    logps = []
    with torch.no_grad():
        for batch in micro_batches([group], tokens_per_batch=64, packed=packed, pad_id=0):
            tokens = score(model, batch).split(batch.lengths.tolist())
            logps += [float(t.sum()) for t in tokens]
    torch.testing.assert_close(torch.tensor(logps, dtype=torch.float64), found.logps[0, list(rows)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampler_draws_from_the_law(temperature: float) -> None:
    """Answers of `models.generate.sample` follow the enumerated law (chi-square), finished or cut, at a temperature."""
    letters = "abcd"
    model, tokenizer = llama(eos_id=4, seed=11), letter_tokenizer(4)
    with torch.no_grad():
        law = enumerate_completions(model, [[4, 1, 0]], eos_id=4, max_tokens=LIMIT, temperature=temperature)
    settings = {"n": 6000, "max_tokens": LIMIT, "batch_size": 6000, "temperature": temperature, "seed": 5}
    (answers,) = sample(model, tokenizer, ["ba"], **settings)
    drawn = Counter(law.position([letters.index(c) for c in answer.text]) for answer in answers)
    assert all(answer.finished == bool(law.finished[law.position(map_ids(answer.text))]) for answer in answers[:200])
    expected = 6000 * law.logps[0].exp()
    observed = torch.tensor([drawn[m] for m in range(len(expected))], dtype=torch.float64)
    often = expected >= 5
    cells = [(observed[often], expected[often]), (observed[~often].sum()[None], expected[~often].sum()[None])]
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in cells)
    freedom = int(often.sum())
    assert freedom >= 20
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)  # and not suspiciously good either


def map_ids(text: str) -> list[int]:
    return ["abcd".index(c) for c in text]


def test_temperature_renormalises_every_token() -> None:
    """A tempered policy divides logits per token; pi^(1/T) renormalised over responses is another law."""
    model = llama()
    warm, cold = enumerated(model, [[2]]), enumerated(model, [[2]], temperature=0.5)
    with torch.no_grad():
        first = torch.log_softmax(model(input_ids=torch.tensor([[2]])).logits[0, -1] / 0.5, -1)
    assert float(cold.logps[0, 0]) == pytest.approx(float(first[EOS]), abs=1e-12)
    per_response = torch.log_softmax(warm.logps / 0.5, -1)
    assert float((per_response - cold.logps).abs().max()) > 0.01


def test_gradients_flow_and_the_mode_is_left_as_it_was() -> None:
    """The score has mean 0 over the law, so the exact law can be differentiated; train mode and dropout come back."""
    model = gpt2()
    found = enumerate_completions(model, [[1]], eos_id=EOS, max_tokens=LIMIT)
    assert model.training and model.transformer.drop.training
    weight = model.transformer.h[0].mlp.c_fc.weight
    mean_score, reached = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for loss in ((found.logps.detach().exp() * found.logps).sum(), found.logps[0, 3])
    )
    assert float(mean_score.abs().max()) < 1e-12 < 1e-3 < float(reached.abs().max())


def test_an_exact_gradient_step_raises_the_likelihood_it_should() -> None:
    """Finite differences of the enumerated law equal its gradient."""
    model = llama()
    weight = model.lm_head.weight

    def value() -> Tensor:
        return enumerate_completions(model, [[1]], eos_id=EOS, max_tokens=2).logps[0, 7]

    (slope,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        at = weight[2, 3].clone()
        ends = []
        for step in (1e-5, -1e-5):
            weight[2, 3] = at + step
            ends.append(float(value()))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope[2, 3]), abs=1e-8)
    assert abs(float(slope[2, 3])) > 1e-4


def test_the_sequence_kl_is_the_expected_sum_of_step_kls() -> None:
    """Rao-Blackwell: E over the policy's completions of sum_t KL(next token) = KL of the two enumerated laws."""
    policy, reference = llama(seed=0), llama(seed=1)
    prompt = [0, 2]
    q, p = (enumerated(model, [prompt]) for model in (policy, reference))
    rows = torch.cat([torch.tensor(prompt).expand(len(q.tokens), -1), q.tokens], dim=1)
    with torch.no_grad():
        steps = [torch.log_softmax(m(input_ids=rows).logits[:, len(prompt) - 1 : -1], -1) for m in (policy, reference)]
    mask = torch.arange(LIMIT) < q.lengths[:, None]
    per_completion = rao_blackwell_kl(*steps, mask)
    exact = float(kl_divergence(q.logps, p.logps)[0])
    assert float((q.logps[0].exp() * per_completion).sum()) == pytest.approx(exact, rel=1e-10)
    k1 = q.logps[0] - p.logps[0]
    variance = [float((q.logps[0].exp() * (v - exact) ** 2).sum()) for v in (per_completion, k1)]
    assert exact > 0.1 and variance[0] < variance[1] / 2


def test_position_finds_a_completion_with_and_without_its_end() -> None:
    """Ids lead to their row; what is no completion is refused."""
    found = enumerated(llama(), [[1]])
    for m in range(85):
        ids = found.tokens[m, : found.lengths[m]].tolist()
        assert found.position(ids) == found.position([i for i in ids if i != EOS]) == m
    for wrong in ([0, EOS, 1], [0, 1, 2, 4], [0, 1, 2, EOS], [5], [-1], [EOS, EOS]):
        with pytest.raises(ConfigError, match="is no completion of at most 3 tokens that ends at 3"):
            found.position(wrong)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "too many": (
        lambda m: enumerate_completions(m, [[0]], eos_id=0, max_tokens=9),
        "4 symbols and at most 9 tokens make 349,525 completions of a prompt; at most 100,000",
    ),
    "astronomic": (
        lambda m: enumerate_completions(m, [[0]], eos_id=0, max_tokens=9000),
        r"make 10\^5418.7 completions",
    ),
    "no tokens": (lambda m: enumerate_completions(m, [[0]], eos_id=0, max_tokens=0), "max_tokens=0 must be at least 1"),
    "cold": (lambda m: enumerated(m, [[0]], temperature=0.0), "temperature=0.0 must be larger than 0"),
    "no prompt": (lambda m: enumerated(m, []), "every prompt needs at least one token"),
    "empty prompt": (lambda m: enumerated(m, [[0], []]), "every prompt needs at least one token"),
    "unknown id": (lambda m: enumerated(m, [[5]]), "token id 5 is outside the model's vocabulary of 5"),
    "unknown end": (
        lambda m: enumerate_completions(m, [[1]], eos_id=-1, max_tokens=2),
        "token id -1 is outside the model's vocabulary of 5",
    ),
    "no room": (
        lambda m: enumerated(m, [[0] * 11]),
        "a prompt of 11 tokens and 2 more exceed the model's 12 positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_enumerated_is_refused_by_its_count(case: str) -> None:
    """Too much says how much; a value out of range says which."""
    call, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        call(llama())
    assert enumerated(llama(), [[0] * 10]).logps.shape == (1, 85)
