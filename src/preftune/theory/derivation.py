"""From the objective to pi_r, line by line: every line is a problem one can solve, and has the same solution.

    max  E r - beta KL(pi || pi_ref)   ->  ...  ->   min  KL(pi || pi_r)                 (arXiv 2305.18290, A.1)

A line is written down by itself and reached by a named transform of the line before. Two things are executed for
each: the written line equals the transformed one at random policies, and a numerical minimiser that knows nothing of
the closed form finds the same policy as before. Policies are log-probabilities [K] of K enumerated responses, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from preftune.equations.kl import kl_divergence, total_variation
from preftune.equations.optimum import expected_reward, log_partition, objective, optimal_policy
from preftune.errors import ConfigError, RunError

__all__ = ["Line", "Problem", "Step", "derive", "follow", "negate", "optimum", "same", "scale", "shift", "steps_of"]

Value = Callable[[Tensor], Tensor]
"""log pi [K] -> a scalar; reads log pi as it stands, normalised or not."""

UNCHANGED = 1e-8  # total variation between two solutions that count as one
EQUAL = 1e-9  # difference, relative to its size, between two values that count as one


@dataclass(frozen=True, slots=True)
class Problem:
    """Find the policy at which `value` is largest or smallest."""

    sense: Literal["max", "min"]
    value: Value


Transform = Callable[[Problem], Problem]


@dataclass(frozen=True, slots=True)
class Step:
    """One line: what it is called, how it is reached from the line before, and how it is written."""

    name: str
    formula: str
    transform: Transform
    value: Value


@dataclass(frozen=True, slots=True)
class Line:
    """What was found when a line was executed."""

    name: str
    formula: str
    sense: Literal["max", "min"]
    at_reference: float
    """The line's value at pi = pi_ref."""
    at_optimum: float
    """Its value at the policy that solves it."""
    disagreement: float
    """Largest difference between the line as written and the transformed line before, over the probed policies."""
    moved: float
    """Total variation between its numerical solution and that of the first line."""


def negate(problem: Problem) -> Problem:
    """max f = -min(-f), at the same policy: the sign and the sense change together."""
    return Problem("min" if problem.sense == "max" else "max", lambda logps: -problem.value(logps))


def scale(factor: float) -> Transform:
    """f -> c f, c > 0, leaves the solution. Raises ConfigError on another factor: c < 0 turns the problem over."""
    if not (math.isfinite(factor) and factor > 0):
        what = "exchanges minimum and maximum" if factor < 0 else "forgets where the solution is"
        raise ConfigError(f"scale by {factor:g}: a factor must be a number > 0, this one {what}; negate changes sides")
    return lambda problem: Problem(problem.sense, lambda logps: factor * problem.value(logps))


def shift(constant: float) -> Transform:
    """f -> f + c leaves the solution, whatever c is, as long as c does not depend on pi."""
    return lambda problem: Problem(problem.sense, lambda logps: problem.value(logps) + constant)


def same(problem: Problem) -> Problem:
    """f -> f: the next line is the same function in other words."""
    return problem


def steps_of(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Problem, tuple[Step, ...]]:
    """The objective, and the eight lines that lead from it to KL(pi || pi_r); `ref_logps`, `rewards`: [K]."""
    log_z = float(log_partition(ref_logps, rewards, beta))
    pi_r = optimal_policy(ref_logps, rewards, beta)
    ref, tilt = ref_logps.exp(), (rewards / beta).exp()

    def mean(logps: Tensor, inside: Tensor) -> Tensor:
        return (logps.exp() * inside).sum()

    first = Problem("max", lambda p: objective(p, ref_logps, rewards, beta))
    return first, (
        Step(
            "times -1, max becomes min", "min beta KL(pi || pi_ref) - E r", negate,
            lambda p: beta * kl_divergence(p, ref_logps) - expected_reward(p, rewards),
        ),
        Step(
            "times `1/beta`", "min KL(pi || pi_ref) - E r/beta", scale(1 / beta),
            lambda p: kl_divergence(p, ref_logps) - expected_reward(p, rewards / beta),
        ),
        Step(
            "one expectation", "min E [log(pi / pi_ref) - r/beta]", same,
            lambda p: mean(p, p - ref_logps - rewards / beta),
        ),
        Step(
            "the reward as a logarithm", "min E [log(pi / pi_ref) - log exp(r/beta)]", same,
            lambda p: mean(p, (p.exp() / ref).log() - tilt.log()),
        ),
        Step(
            "one logarithm", "min E log(pi / (pi_ref exp(r/beta)))", same,
            lambda p: mean(p, (p.exp() / (ref * tilt)).log()),
        ),
        Step(
            "add and subtract `log Z`", "min E [log(pi / (pi_ref exp(r/beta) / Z)) - log Z]", same,
            lambda p: mean(p, (p.exp() / (ref * tilt / (ref * tilt).sum())).log() - (ref * tilt).sum().log()),
        ),
        Step(
            "the denominator is a policy, `pi_r`", "min KL(pi || pi_r) - log Z", same,
            lambda p: kl_divergence(p, pi_r) - log_z,
        ),
        Step("drop the constant `-log Z`", "min KL(pi || pi_r)", shift(log_z), lambda p: kl_divergence(p, pi_r)),
    )  # fmt: skip


def derive(ref_logps: Tensor, rewards: Tensor, beta: float) -> tuple[Line, ...]:
    """Every line of the derivation, executed on these numbers: [K] log pi_ref > -inf, [K] rewards, beta > 0."""
    first, steps = steps_of(ref_logps, rewards, beta)
    return follow(first, steps, ref_logps)


def follow(first: Problem, steps: Sequence[Step], ref_logps: Tensor, *, seed: int = 0) -> tuple[Line, ...]:
    """The lines from `first` on. Raises RunError where a line is not the transform it claims, or moves the solution."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(64, len(ref_logps), generator=generator, dtype=torch.float64)
    probes = [ref_logps, *torch.log_softmax(2 * random, -1)]
    start = optimum(first, len(ref_logps))
    lines = [_line("the objective", "max E r - beta KL(pi || pi_ref)", first, ref_logps, start, 0.0, 0.0)]
    problem = first
    for step in steps:
        claimed = step.transform(problem)
        problem = Problem(claimed.sense, step.value)
        pairs = [(float(problem.value(p)), float(claimed.value(p))) for p in probes]
        disagreement = max(abs(one - other) for one, other in pairs)
        if not disagreement <= EQUAL * max(1.0, *(abs(other) for _, other in pairs)):
            raise RunError(f"{step.name}: as written it differs from the transformed line before by {disagreement:.3g}")
        found = optimum(problem, len(ref_logps))
        moved = float(total_variation(found, start))
        if not moved <= UNCHANGED:
            raise RunError(f"{step.name}: the solution moved by {moved:.3g} in total variation, allowed {UNCHANGED}")
        lines.append(_line(step.name, step.formula, problem, ref_logps, found, disagreement, moved))
    return tuple(lines)


def optimum(problem: Problem, k: int, *, max_steps: int = 200) -> Tensor:
    """The policy over k responses that solves a strictly convex (min) or concave (max) problem; log pi [k], float64.

    Newton's method on the simplex from the uniform policy: at each point the quadratic model is minimised under
    sum pi = 1, and the step is cut so that no probability reaches 0 and the value falls. It reads values and
    derivatives alone. Raises RunError where there is no such solution inside the simplex.
    """
    sign = 1.0 if problem.sense == "min" else -1.0

    def value(pi: Tensor) -> Tensor:
        return sign * problem.value(pi.log())

    pi = torch.full((k,), 1 / k, dtype=torch.float64)
    kkt = torch.zeros(k + 1, k + 1, dtype=torch.float64)
    kkt[:k, k] = kkt[k, :k] = 1.0
    for _ in range(max_steps):
        slope, kkt[:k, :k] = _derivatives(value, pi)
        solved, problem_is_flat = torch.linalg.solve_ex(kkt, torch.cat([-slope, slope.new_zeros(1)]))
        step = solved[:k]
        if problem_is_flat or float(step @ kkt[:k, :k] @ step) < 0:
            raise RunError(f"no {problem.sense}imum inside the simplex: the problem is flat, or curves the wrong way")
        size = min(1.0, float(torch.where(step < 0, -0.99 * pi / step, torch.inf).min()))
        if float(step.abs().sum()) > 1e-6:  # below, rounding hides the fall of the value, and Newton needs no help
            while size > 1e-12 and not value(pi + size * step) < value(pi):
                size /= 2
        pi = (pi + size * step) / (pi + size * step).sum()
        if size == 1.0 and float((step / pi).abs().max()) < 1e-10:
            return pi.log()
    raise RunError(f"no {problem.sense}imum inside the simplex after {max_steps} steps of Newton's method")


def _derivatives(value: Value, at: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [k] and Hessian [k, k] by differentiating twice."""
    at = at.detach().requires_grad_()
    (slope,) = torch.autograd.grad(value(at), at, create_graph=True)
    rows = [torch.autograd.grad(entry, at, retain_graph=True)[0] for entry in slope]
    return slope.detach(), torch.stack(rows)


def _line(
    name: str, formula: str, problem: Problem, ref_logps: Tensor, found: Tensor, disagreement: float, moved: float
) -> Line:
    at_reference, at_optimum = float(problem.value(ref_logps)), float(problem.value(found))
    return Line(name, formula, problem.sense, at_reference, at_optimum, disagreement, moved)
