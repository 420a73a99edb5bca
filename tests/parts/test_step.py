"""Claims about the gradient of a step: one objective, however the step is split, for every loss of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.config.loss_terms import NAMED, parse_loss
from preftune.data.packing import micro_batches
from preftune.engine.clock import Clock
from preftune.equations.losses import LOSSES
from preftune.equations.objective import Objective, State, Term
from preftune.models.attention import install
from preftune.models.fresh import tiny_llama
from preftune.parts.meters import PreferenceMeter
from preftune.parts.reference import LiveReference
from preftune.parts.step import Scorer, accumulate
from preftune.tensors import TokenGroup

VOCABULARY = 40


def objective_of(loss: str) -> Objective:
    return Objective(tuple(Term(t.coefficient, LOSSES[t.loss].bind(**t.knobs)) for t in parse_loss(loss)))


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A policy and a reference with other weights, float64."""
    made = []
    for seed in (0, 1):
        model = tiny_llama(VOCABULARY, seed=seed).double()
        assert install(model) is None
        made.append(model)
    policy, reference = made
    with torch.no_grad():
        for mine, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
            mine.lerp_(theirs, 0.7)
    return policy, reference


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    """Twelve groups of two to four ranked and scored responses of unequal length, each with a stray one."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return draw.integers(0, VOCABULARY, draw.integers(low, high)).astype(np.int32)

    made = []
    for i in range(12):
        own = 2 + i % 3
        ranks = tuple(range(1, own + 1)) if i % 4 else (1,) * (own - 1) + (2,)
        pairs = tuple((w, l) for w in range(own) for l in range(own) if ranks[w] < ranks[l])
        made.append(
            TokenGroup(
                prompt=ids(2, 9),
                responses=tuple(ids(1, 12) for _ in range(own + 1)),
                pairs=pairs,
                weight=1.0 + i % 2,
                origin=f"row {i}",
                ranks=ranks,
                scores=tuple(1.4 - 0.3 * rank + 0.05 * i / 12 for rank in ranks),
                mismatched=1,
            )
        )
    return made


def step(
    models: tuple[torch.nn.Module, torch.nn.Module], groups: list[TokenGroup], objective: Objective, tokens: int
) -> tuple[list[Tensor], State, float]:
    """(gradients, state after the step, loss) of one step in micro-batches of so many tokens."""
    policy, reference = models
    policy.zero_grad(set_to_none=True)
    batches = list(micro_batches(groups, tokens_per_batch=tokens, packed=True))
    assert len(batches) == 1 if tokens > 1000 else len(batches) > 3
    score = Scorer(policy, objective, LiveReference(reference, same_weights=False, moves=None))
    meter = PreferenceMeter(objective)
    state = accumulate(score, batches, objective.initial_state(), meter, Clock())
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]
    return gradients, state, meter.held_out()["loss"]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    """Norm of the difference over norm of the first."""
    return float(
        torch.stack([(a - b).norm() for a, b in zip(one, other, strict=True)]).norm()
        / torch.stack([a.norm() for a in one]).norm()
    )


@pytest.mark.parametrize("loss", [*LOSSES, *NAMED])
def test_any_split_of_the_step_gives_one_gradient(
    loss: str, models: tuple[torch.nn.Module, torch.nn.Module], groups: list[TokenGroup]
) -> None:
    """Gradient, loss and what is remembered are those of the undivided step; no loss is an exception."""
    objective = objective_of(loss)
    whole, whole_state, whole_loss = step(models, groups, objective, 100_000)
    split, split_state, split_loss = step(models, groups, objective, 60)
    assert float(torch.stack([g.norm() for g in whole]).norm()) > 1e-9
    assert distance(whole, split) < 1e-9
    assert split_loss == pytest.approx(whole_loss, rel=1e-6)
    assert numbers(split_state) == pytest.approx(numbers(whole_state), rel=1e-9)


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.coupled or loss.update])
def test_the_exceptions_are_exceptions(
    loss: str, models: tuple[torch.nn.Module, torch.nn.Module], groups: list[TokenGroup]
) -> None:
    """Computed micro-batch by micro-batch, as others do, a coupled loss has another gradient."""
    objective = objective_of(loss)
    whole, _, _ = step(models, groups, objective, 100_000)
    blind = LOSSES[loss]
    naive = Objective((Term(1.0, replace(blind, coupled=False).bind()),))
    object.__setattr__(naive, "coupled", False)
    split, _, _ = step(models, groups, naive, 60)
    assert distance(whole, split) > 1e-6


def test_the_gradient_is_that_of_the_objective_written_out(
    models: tuple[torch.nn.Module, torch.nn.Module], groups: list[TokenGroup]
) -> None:
    """One backward through everything at once, without meters, totals or micro-batches, gives the same."""
    policy, reference = models
    objective = objective_of("0.7*dpo(beta=0.3) + 0.2*kto + 0.1*plackett_luce")
    gradients, _, _ = step(models, groups, objective, 60)
    (batch,) = micro_batches(groups, tokens_per_batch=10**6, packed=True)
    logps = Scorer(policy, objective, LiveReference(reference, same_weights=False, moves=None))(batch)
    policy.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for term in objective.terms:
        inputs = term.inputs(logps, groups)
        total = total + term.coefficient * (term.loss.values(inputs) * inputs.weight).sum() / inputs.weight.sum()
    total.backward()
    assert distance([p.grad for p in policy.parameters() if p.grad is not None], gradients) < 1e-9


def test_a_sum_is_the_sum_of_its_terms(
    models: tuple[torch.nn.Module, torch.nn.Module], groups: list[TokenGroup]
) -> None:
    """Gradient and loss of RPO are DPO's plus those of the likelihood term."""
    parts = [step(models, groups, objective_of(loss), 60) for loss in ("dpo(beta=0.1)", "nll")]
    whole = step(models, groups, objective_of("rpo"), 60)
    added = [a + b for a, b in zip(parts[0][0], parts[1][0], strict=True)]
    assert distance(added, whole[0]) < 1e-6  # Llama's norm computes in float32
    assert whole[2] == pytest.approx(parts[0][2] + parts[1][2], rel=1e-6)


def numbers(state: State) -> Mapping[str, float]:
    return {f"{loss}.{name}": value for loss, memory in state.items() for name, value in memory.items()}
