"""KL estimates of whole responses against the exact KL of the enumerable world's laws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.data.packing import micro_batches
from preftune.equations.kl import kl_divergence
from preftune.equations.stats import Interval, mean_interval
from preftune.evaluation.divergence import Divergence, divergences, log_ratios
from preftune.models.attention import install
from preftune.models.generate import draw
from preftune.models.load import LoadedModel, load
from preftune.tensors import PackedBatch, TokenGroup
from preftune.theory.enumerable import enumerate_completions
from preftune.worlds.enumerable import EOS_ID, random_world, write_model

WORLD = random_world(seed=0, max_tokens=3)
PROMPTS, TOKENS = WORLD.prompts[::4], 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """(policy, reference) of opinions: random weights, and the same moved at random by a third."""
    folder = tmp_path_factory.mktemp("world") / "model"
    write_model(folder, seed=0)
    loaded = [load(folder, dtype=torch.float32) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ours, theirs in zip(*(one.model.parameters() for one in loaded), strict=True):
            if ours.ndim == 2:
                theirs.copy_(0.15 * torch.randn(ours.shape, generator=generator))
                ours.copy_(theirs + 0.04 * torch.randn(ours.shape, generator=generator))
    assert all(install(one.model) is None for one in loaded)
    return loaded[0], loaded[1]


def batching(groups: Sequence[TokenGroup]) -> Iterator[PackedBatch]:
    return micro_batches(groups, tokens_per_batch=2000, packed=True)


def drawn(writer: LoadedModel, n: int, **settings: Any) -> list[TokenGroup]:
    """n responses to every prompt, as the tokens that were drawn."""
    size: dict[str, Any] = {"n": n, "max_tokens": TOKENS, "batch_size": 2048, "seed": 3}
    rows = draw(writer.model, writer.tokenizer, list(PROMPTS), **size, **settings)
    return [
        TokenGroup(np.array(row[0].prompt, np.int32), tuple(np.array(one.ids, np.int32) for one in row)) for row in rows
    ]


def exact(writer: LoadedModel, other: LoadedModel, temperature: float = 1.0) -> float:
    """KL of the enumerated laws, mean over the prompts, nats."""
    settings: dict[str, Any] = {"eos_id": EOS_ID, "max_tokens": TOKENS, "temperature": temperature}
    with torch.no_grad():
        ours, theirs = (
            enumerate_completions(one.model, [WORLD.prompt_ids(prompt) for prompt in PROMPTS], **settings)
            for one in (writer, other)
        )
    return float(kl_divergence(ours.logps, theirs.logps).mean())


def estimates(found: list[list[Divergence]]) -> tuple[Interval, Interval]:
    """(Rao-Blackwellised, k1), the responses of one prompt as independent: the prompts are not a sample here."""
    flat = [one for of_prompt in found for one in of_prompt]
    per_prompt = len(found)
    sides = []
    for name in ("rao_blackwell", "k1"):
        values = np.array([getattr(one, name) for one in flat]).reshape(per_prompt, -1)
        centred = values - values.mean(1, keepdims=True) + values.mean()  # what varies is the draw, not the prompt
        sides.append(mean_interval(centred.ravel(), level=0.999))
    return sides[0], sides[1]


@pytest.mark.parametrize(("temperature", "forward"), [(1.0, False), (0.6, False), (1.5, True)])
def test_both_estimates_hold_the_exact_kl_of_the_sampled_laws(
    models: tuple[LoadedModel, LoadedModel], temperature: float, forward: bool
) -> None:
    """99.9 % intervals, 128 responses to each of 16 prompts, temperature as drawn; RB's is less than half as wide."""
    writer, other = models[::-1] if forward else models
    groups = drawn(writer, 128, temperature=temperature)
    found = divergences(writer.model, other.model, groups, batching, temperature=temperature)
    rao_blackwell, k1 = estimates(found)
    truth = exact(writer, other, temperature)
    assert truth > 0.05
    for estimate in (rao_blackwell, k1):
        assert estimate.low < truth < estimate.high
    assert k1.high - k1.low > 2 * (rao_blackwell.high - rao_blackwell.low)
    assert all(one.rao_blackwell >= -1e-6 for of_prompt in found for one in of_prompt)


def test_another_temperature_than_the_samplers_is_another_kl(models: tuple[LoadedModel, LoadedModel]) -> None:
    """Responses of temperature 0.4 scored at 1 leave the exact KL of either temperature outside the interval."""
    writer, other = models
    rao_blackwell, _ = estimates(divergences(writer.model, other.model, drawn(writer, 128, temperature=0.4), batching))
    for temperature in (0.4, 1.0):
        truth = exact(writer, other, temperature)
        assert not rao_blackwell.low < truth < rao_blackwell.high


def test_equal_models_are_exactly_nothing_apart(models: tuple[LoadedModel, LoadedModel]) -> None:
    """Zero to the bit, both estimates, every response, at a temperature too."""
    model = models[0].model
    for temperature in (1.0, 0.7):
        found = divergences(model, model, drawn(models[0], 4), batching, temperature=temperature)
        assert {(one.rao_blackwell, one.k1) for of_prompt in found for one in of_prompt} == {(0.0, 0.0)}


def test_every_response_keeps_its_place_and_its_tokens(models: tuple[LoadedModel, LoadedModel]) -> None:
    """However groups are batched: k1 and other_logp of each response are the enumerated laws' at that response."""
    writer, other = models
    groups = [TokenGroup(g.prompt, g.responses[: 1 + i * 7 % 5]) for i, g in enumerate(drawn(writer, 5)[::-1])]
    settings: dict[str, Any] = {"eos_id": EOS_ID, "max_tokens": TOKENS}
    with torch.no_grad():
        asked = [group.prompt.tolist() for group in groups]
        ours, theirs = (enumerate_completions(one.model, asked, **settings) for one in models)
    for size in (20, 2000):

        def cut(some: Sequence[TokenGroup], size: int = size) -> Iterator[PackedBatch]:
            return micro_batches(some, tokens_per_batch=size, packed=True)

        in_batches = [id(group) for batch in cut(groups) for group in batch.groups]
        assert (in_batches == [id(group) for group in groups]) == (size == 2000)
        found = divergences(writer.model, other.model, groups, cut)
        ratios = log_ratios(writer.model, other.model, groups, cut)
        for x, group in enumerate(groups):
            at = [ours.position(response.tolist()) for response in group.responses]
            for i, one in enumerate(found[x]):
                log_ratio = float(ours.logps[x, at[i]] - theirs.logps[x, at[i]])
                assert one.k1 == pytest.approx(log_ratio, abs=1e-4) == ratios[x][i]
                assert one.other_logp == pytest.approx(float(theirs.logps[x, at[i]]), abs=1e-4)
                assert one.tokens == len(group.responses[i])


def test_the_mean_log_ratio_of_reference_responses_is_forced_down(models: tuple[LoadedModel, LoadedModel]) -> None:
    """E_ref log(pi / ref) = -KL(ref || pi): the identity behind the displacement finding, within the interval."""
    policy, reference = models
    groups = drawn(reference, 128)
    ratios = np.array(log_ratios(policy.model, reference.model, groups, batching))
    centred = ratios - ratios.mean(1, keepdims=True) + ratios.mean()
    mean = mean_interval(centred.ravel(), level=0.999)
    assert mean.low < -exact(reference, policy) < mean.high < 0


def test_the_world_is_left_as_it_was(models: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    """Measuring leaves no gradient behind and draws no global random number."""
    state = torch.get_rng_state()
    divergences(models[0].model, models[1].model, drawn(models[0], 2), batching)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for one in models for p in one.model.parameters())
