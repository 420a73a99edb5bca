"""Nine lines from the objective to KL(pi || pi_r), and a check that refuses any line that is not what it claims."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.equations.kl import total_variation
from preftune.equations.optimum import optimal_policy
from preftune.errors import ConfigError, RunError
from preftune.theory.derivation import Problem, Step, derive, follow, negate, optimum, same, scale, shift, steps_of

REF = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.5, 0.5], dtype=torch.float64)
BETA = 0.5


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    """A reference, rewards and a beta over 2 to 8 responses."""
    k = draw(st.integers(2, 8))
    number = st.floats(-3, 3, allow_subnormal=False)
    logits, rewards = (torch.tensor(draw(st.lists(number, min_size=k, max_size=k))).double() for _ in range(2))
    return torch.log_softmax(logits, -1), rewards, draw(st.sampled_from([0.3, 1.0, 4.0]))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(worlds())
def test_every_line_has_the_same_solution(world: tuple[Tensor, Tensor, float]) -> None:
    """J, -J, -J/beta, the log-ratio forms and the forms with log Z agree on the best policy, TV below 1e-8: pi_r."""
    lines = derive(*world)
    assert len(lines) == 9
    assert max(line.moved for line in lines) < 1e-8
    found = optimum(steps_of(*world)[0], len(world[0]))
    assert float(total_variation(found, optimal_policy(*world))) < 1e-8


def test_the_lines_have_these_values() -> None:
    """On the page's example, by hand: -J, then /beta, and KL(pi_ref || pi_r) = log Z - E_ref r/beta at the end."""
    lines = derive(REF, REWARDS, BETA)
    log_z = math.log(0.8 + 0.1 * math.e**3 + 0.1 * math.e)
    assert [line.sense for line in lines] == ["max"] + ["min"] * 8
    assert [line.at_reference for line in lines] == pytest.approx([0.2, -0.2, *[-0.4] * 6, log_z - 0.4], abs=1e-14)
    assert [line.at_optimum for line in lines] == pytest.approx([log_z / 2, -log_z / 2, *[-log_z] * 6, 0], abs=1e-14)
    assert lines[0].formula == "max E r - beta KL(pi || pi_ref)" and lines[-1].formula == "min KL(pi || pi_r)"


@pytest.mark.parametrize("factor", [-2.0, 0.0, math.nan, math.inf])
def test_a_scale_that_is_not_positive_is_refused(factor: float) -> None:
    """argmin c f = argmin f needs c > 0: the message says what a negative one does, and what to use instead."""
    with pytest.raises(ConfigError, match=r"scale by \S+: a factor must be a number > 0, this one .*; negate changes"):
        scale(factor)


def test_a_negative_scale_would_have_moved_the_solution() -> None:
    """The refusal is not pedantry: turned over, the problem has no solution inside the simplex at all."""
    problem = Problem("min", lambda p: -1 * steps_of(REF, REWARDS, BETA)[1][0].value(p))
    with pytest.raises(RunError, match="no minimum inside the simplex: the problem is flat, or curves the wrong way"):
        optimum(problem, 3)


def test_transforms_do_what_they_are_called() -> None:
    """negate swaps sign and sense and undoes itself; scale multiplies; shift adds; same is the identity."""
    problem = Problem("max", lambda p: p.exp()[0] * 3)
    assert negate(problem).sense == "min" and negate(negate(problem)).sense == "max"
    at = f64(0.25, 0.75).log()
    values = [float(p.value(at)) for p in (negate(problem), scale(4.0)(problem), shift(1.0)(problem), same(problem))]
    assert values == pytest.approx([-0.75, 3.0, 1.75, 0.75])


def test_a_line_that_is_written_wrongly_is_refused() -> None:
    """A sign lost on the way is found at the probes, with the name of the line."""
    first, steps = steps_of(REF, REWARDS, BETA)
    wrong = Step("lost sign", "", negate, lambda p: -steps[0].value(p))
    with pytest.raises(RunError, match="lost sign: as written it differs from the transformed line before by"):
        follow(first, [wrong], REF)


def test_a_transform_that_moves_the_solution_is_refused() -> None:
    """A line may be what its transform says and still be no step of a derivation."""
    first, _ = steps_of(REF, REWARDS, BETA)
    tilted = Step(
        "tilt", "", lambda q: Problem(q.sense, lambda p: q.value(p) + p.exp()[0]), lambda p: first.value(p) + p.exp()[0]
    )
    with pytest.raises(RunError, match=r"tilt: the solution moved by 0\.\d+ in total variation, allowed 1e-08"):
        follow(first, [tilted], REF)


def test_the_minimiser_finds_solutions_it_was_not_made_for() -> None:
    """min sum c pi^2 is at pi proportional to 1/c, max entropy is uniform: found without a gradient by hand."""
    c = f64(1, 2, 3, 6)
    found = optimum(Problem("min", lambda p: (c * p.exp() ** 2).sum()), 4)
    torch.testing.assert_close(found.exp(), f64(6, 3, 2, 1) / 12, rtol=0, atol=1e-12)
    found = optimum(Problem("max", lambda p: -(p.exp() * p).sum()), 5)
    torch.testing.assert_close(found.exp(), torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_minimiser_says_when_there_is_nothing_to_find() -> None:
    """A linear problem is solved at a corner, not inside."""
    with pytest.raises(RunError, match="no maximum inside the simplex"):
        optimum(Problem("max", lambda p: (p.exp() * REWARDS).sum()), 3)
