"""The first half of the lesson: from the objective of KL-regularised rewards to its solution, in numbers.

One small problem runs through it: a prompt, three responses, a reference and rewards that can be checked by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from preftune.equations.kl import gaussian_kl, k1, kl_divergence, total_variation
from preftune.equations.optimum import expected_reward, frontier, log_partition, objective, optimal_policy
from preftune.equations.stats import mean_interval
from preftune.errors import ConfigError
from preftune.theory.curves import crossover_beta, reward_gap
from preftune.theory.derivation import derive, scale
from preftune.theory.numbers import Chapter, Number, number, table
from preftune.theory.partition import (
    LOGP_BYTES,
    TERMS_PER_SECOND,
    YEAR,
    brute_force_log_partition,
    partition_seconds,
    partition_terms,
)

__all__ = [
    "BETA",
    "REF_LOGPS",
    "RESPONSES",
    "REWARDS",
    "divergence",
    "objective_and_steps",
    "optimal",
    "partition",
    "refusal",
    "this_is_a",
    "tv_of_shift",
]

RESPONSES = ("cats", "reward function", "anything else")
REF_LOGPS = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64).log()
REWARDS = torch.tensor([0.0, 1.5, 0.5], dtype=torch.float64)
BETA = 0.5

UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64).log()
BEST = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).log()


def refusal(name: str, meaning: str, make: Callable[[], object]) -> Number:
    """The message of the ConfigError that calling `make` provokes; AssertionError when it provokes none."""
    try:
        make()
    except ConfigError as problem:
        return number(name, str(problem), meaning)
    raise AssertionError(f"{name}: nothing was refused")


def objective_and_steps() -> tuple[Chapter, Chapter]:
    """What is maximised, and the nine lines that end at KL(pi || pi_r)."""
    pi_r = optimal_policy(REF_LOGPS, REWARDS, BETA)
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    logps = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad(objective(logps, REF_LOGPS, REWARDS, BETA), logits, retain_graph=True)
    signal = (REWARDS - BETA * (logps - REF_LOGPS)).detach()
    (by_score,) = torch.autograd.grad((logps.detach().exp() * signal * logps).sum(), logits, retain_graph=True)
    (reward_only,) = torch.autograd.grad((logps.detach().exp() * REWARDS * logps).sum(), logits)
    shares = zip(REF_LOGPS.exp().tolist(), REWARDS.tolist(), pi_r.exp().tolist(), strict=True)
    grid = [(i / 30, j / 30) for i in range(31) for j in range(31 - i)]
    points = torch.tensor([[max(0.0, 1 - b - c), b, c] for b, c in grid], dtype=torch.float64)
    path = torch.stack([optimal_policy(REF_LOGPS, REWARDS, beta) for beta in _betas(0.03, 30)])
    aim = Chapter(
        "objective", "The objective", "max over pi of  E_{y~pi} r(x, y) - beta KL(pi || pi_ref)",
        (
            number("beta", BETA, "beta, the price of one nat of KL"),
            number("j_reference", float(objective(REF_LOGPS, REF_LOGPS, REWARDS, BETA)), "J of the reference"),
            number("j_best", float(objective(BEST, REF_LOGPS, REWARDS, BETA)), "J of always the best response"),
            number("j_optimum", float(objective(pi_r, REF_LOGPS, REWARDS, BETA)), "J of pi_r, the largest there is"),
            number(
                "gradient_error", float((exact - by_score).abs().max()),
                "grad J by autograd against E[(r - beta log(pi/pi_ref)) grad log pi], largest difference",
            ),
            number(
                "gradient_without_kl", float((exact - reward_only).abs().max()),
                "grad J against E[r grad log pi] alone, largest difference",
            ),
        ),
        (table("example", ("response", "`pi_ref`", "reward", "`pi_r`"), dict(zip(RESPONSES, shares, strict=True))),),
        {
            "simplex.b": tuple(points[:, 1].tolist()), "simplex.c": tuple(points[:, 2].tolist()),
            "simplex.j": tuple(objective(points.log(), REF_LOGPS, REWARDS, BETA).tolist()),
            "path.b": tuple(path.exp()[:, 1].tolist()), "path.c": tuple(path.exp()[:, 2].tolist()),
            **{f"mark.{x}": (float(REF_LOGPS.exp()[i]), float(pi_r.exp()[i])) for x, i in (("b", 1), ("c", 2))},
        },
    )  # fmt: skip
    return aim, _steps()


def _steps() -> Chapter:
    lines = derive(REF_LOGPS, REWARDS, BETA)
    columns = ("line", "formula", "at `pi_ref`", "at its solution", "solution moved by (TV)")
    rows = {
        f"{i}. {line.name}": (line.formula, line.at_reference, line.at_optimum, line.moved)
        for i, line in enumerate(lines, start=1)
    }
    return Chapter(
        "steps", "Nine lines, one solution", "max E r - beta KL(pi || pi_ref)  =  min KL(pi || pi_r)",
        (
            number("steps_moved", max(line.moved for line in lines), "largest move of the solution, total variation"),
            number(
                "steps_disagreement", max(line.disagreement for line in lines),
                "largest difference between a line as written and the transformed line before",
            ),
            number("steps_scale", 1 / BETA, "1/beta, the scale of line 3"),
            refusal("steps_refused", "scaling by -1/beta instead", lambda: scale(-1 / BETA)),
        ),
        (table("lines", columns, rows),),
    )  # fmt: skip


def optimal() -> Chapter:
    """pi_r in closed form, and the identity that makes it the maximum."""
    pi_r = optimal_policy(REF_LOGPS, REWARDS, BETA)
    log_z = float(log_partition(REF_LOGPS, REWARDS, BETA))
    policies = {"the reference": REF_LOGPS, "uniform": UNIFORM, "always the best": BEST, "`pi_r`": pi_r}

    def row(logps: Tensor) -> tuple[float, ...]:
        to_ref, to_r = (float(kl_divergence(logps, other)) for other in (REF_LOGPS, pi_r))
        j = float(objective(logps, REF_LOGPS, REWARDS, BETA))
        return float(expected_reward(logps, REWARDS)), to_ref, j, to_r, BETA * log_z - BETA * to_r

    rows = {name: row(logps) for name, logps in policies.items()}
    columns = ("policy", "`E r`", "`KL(pi || pi_ref)`", "`J`", "`KL(pi || pi_r)`", "`beta log Z - beta KL(pi || pi_r)`")
    return Chapter(
        "optimum", "The solution", "pi_r(y|x) = pi_ref(y|x) exp(r(x, y)/beta) / Z(x),  J(pi) = beta log Z - beta KL",
        (
            number("z", math.exp(log_z), "Z = 0.8 + 0.1 e^3 + 0.1 e"),
            number("log_z", log_z, "log Z, nats"),
            number("beta_log_z", BETA * log_z, "beta log Z, the largest J"),
            number("identity_error", max(abs(r[2] - r[4]) for r in rows.values()), "largest error of the identity"),
            number("kl_to_reference", rows["`pi_r`"][1], "KL(pi_r || pi_ref) at the solution, nats: not minimised"),
            number("kl_to_optimum", rows["`pi_r`"][3], "KL(pi_r || pi_r) at the solution, nats: minimised"),
        ),
        (table("identity", columns, rows),),
    )  # fmt: skip


def divergence() -> Chapter:
    """KL as a picture of two Gaussians, as a sum, and from samples."""
    pi_r = optimal_policy(REF_LOGPS, REWARDS, BETA)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(pi_r.exp(), 10_000, replacement=True, generator=generator)
    sampled = mean_interval(k1((pi_r - REF_LOGPS)[drawn]).numpy())
    slide = {f"{mean:g}": (float(gaussian_kl(0, 1, mean, 1)),) for mean in (-4, -3, -2, -1, 0)}
    means, y = [-4 + i / 10 for i in range(51)], [-7 + i / 10 for i in range(111)]
    densities = {
        f"density.{mean:g}": tuple(math.exp(-((v - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for v in y)
        for mean in range(-4, 1)
    }
    return Chapter(
        "kl", "What a nat is", "KL(q || p) = E_{y~q} log(q(y)/p(y)) >= 0, and 0 only where q = p",
        (
            number("kl_gaussian", float(gaussian_kl(0, 1, -4, 1)), "KL of N(0, 1) from N(-4, 1), nats"),
            number("kl_narrow_wide", float(gaussian_kl(0, 1, -4, 2)), "KL of N(0, 1) from N(-4, 2), nats"),
            number("kl_wide_narrow", float(gaussian_kl(-4, 2, 0, 1)), "KL of N(-4, 2) from N(0, 1), nats"),
            number("kl_exact", float(kl_divergence(pi_r, REF_LOGPS)), "KL(pi_r || pi_ref) of the example, summed"),
            number("kl_sampled", sampled.estimate, "the same from 10,000 samples of pi_r, seed 0", 4),
            number("kl_sampled_low", sampled.low, "lower end of its 95 % interval", 4),
            number("kl_sampled_high", sampled.high, "upper end of its 95 % interval", 4),
        ),
        (table("slide", ("mean of the other", "KL, nats"), slide),),
        {
            "slide.mean": tuple(means), "slide.kl": tuple(gaussian_kl(0, 1, torch.tensor(means).double(), 1).tolist()),
            "density.y": tuple(y), **densities,
        },
    )  # fmt: skip


def this_is_a() -> Chapter:
    """'this is a' -> 'cats' .8, 'reward function' .1: what is missing from the example, and beta swept."""
    cats, function = 0.8, 0.1
    both, gap, names = cats + function, 10.0, ("renormalised", "third outcome")
    refs = dict(zip(names, (_f64(cats, function) / both, _f64(cats, function, 1 - both)), strict=True))
    refs = {name: probs.log() for name, probs in refs.items()}

    def share(name: str, beta: float) -> float:
        rewards = _f64(0.0, gap, 0.0)[: len(refs[name])]
        return float(optimal_policy(refs[name], rewards, beta).exp()[1])

    swept, betas, near = (0.5, 1.0, 2.0, 5.0, 100.0), _betas(0.5, 100), 1e-4
    edge = frontier(refs[names[0]], _f64(0.0, gap), [*swept, *betas, 2 - near, 2 + near])
    slope = float((edge.reward[-2] - edge.reward[-1]) / (edge.kl[-2] - edge.kl[-1]))
    columns = ("`beta`", *names, "`E r`", "`KL(pi_r || pi_ref)`")
    rows = {
        f"{beta:g}": (*(share(name, beta) for name in names), float(edge.reward[i]), float(edge.kl[i]))
        for i, beta in enumerate(swept)
    }
    gaps = [
        number(f"gap_{level}_{outcomes}", reward_gap(level / 100, p, 1.0), f"reward gap for {level} %, {name}, beta 1")
        for outcomes, name, p in zip(("two", "three"), names, (function / both, function), strict=True)
        for level in (95, 99)
    ]
    along = slice(len(swept), -2)
    return Chapter(
        "this-is-a", "What `beta` does, on one example", "'this is a' -> 'cats' or 'reward function': what moves it?",
        (
            number("share_cats", cats, "probability of 'cats' under the reference"),
            number("share_function", function, "probability of 'reward function' under the reference"),
            number("share_both", both, "both together"),
            *gaps,
            number("gap", gap, "reward gap used below"),
            number("crossover_per_nat", math.log(cats / function), "log 8: crossover beta = gap / this"),
            number("crossover", crossover_beta(gap, cats / function), "beta where both are equally likely"),
            number("frontier_slope", slope, "dE r / dKL along the curve at beta = 2"),
        ),
        (table("sweep", columns, rows),),
        {
            "beta": tuple(betas),
            **{f"sweep.{name}": tuple(share(name, beta) for beta in betas) for name in names},
            "sweep.reward": tuple(edge.reward[along].tolist()), "sweep.kl": tuple(edge.kl[along].tolist()),
        },
    )  # fmt: skip


def partition() -> Chapter:
    """V, V^2, V^T: counted exactly, timed at a generous rate, and summed where it fits."""
    generator = torch.Generator().manual_seed(0)
    v, t = 4, 6
    start = torch.log_softmax(torch.randn(v, generator=generator, dtype=torch.float64), -1)
    move = torch.log_softmax(torch.randn(v, v, generator=generator, dtype=torch.float64), -1)
    value = torch.randn(v, generator=generator, dtype=torch.float64)

    def ref_logps(tokens: Tensor) -> Tensor:
        return start[tokens[:, 0]] + move[tokens[:, :-1], tokens[:, 1:]].sum(-1)

    forced = brute_force_log_partition(ref_logps, lambda tokens: value[tokens].sum(-1), v, t, BETA)
    reach = start + value / BETA
    for _ in range(t - 1):
        reach = torch.logsumexp(reach[:, None] + move, 0) + value / BETA
    by_transfer = float(torch.logsumexp(reach, 0))
    terms = {f"{length}": partition_terms(50_257, length) for length in (1, 2, 3, 10, 20)}
    rows = {
        length: (n, n * LOGP_BYTES, partition_seconds(n), partition_seconds(n) / YEAR) for length, n in terms.items()
    }
    lengths = range(1, 21)
    return Chapter(
        "partition", "Why Z is not computed", "Z(x) = sum over all responses: V^T terms for T tokens of a vocabulary V",
        (
            number("rate", TERMS_PER_SECOND, "terms per second, assumed"),
            number("with_end", partition_terms(8, 5, up_to=True), "responses of at most 5 tokens, 8 and an end mark"),
            number("forced_terms", partition_terms(v, t), "terms of a toy: 4 tokens, length 6"),
            number("forced", forced, "its log Z, every term added up"),
            number("forced_error", abs(forced - by_transfer), "against the product of transfer matrices"),
            refusal(
                "partition_refused", "two tokens of a real vocabulary",
                lambda: brute_force_log_partition(ref_logps, ref_logps, 50_257, 2, BETA),
            ),
        ),
        (table("terms", ("tokens", "terms `V^T`", "bytes", "seconds", "years"), rows, 4),),
        {
            "terms.length": tuple(map(float, lengths)), "terms.year": (math.log10(TERMS_PER_SECOND * YEAR),),
            **{f"terms.{v}": tuple(math.log10(partition_terms(v, n)) for n in lengths) for v in (100, 1_000, 50_257)},
        },
    )  # fmt: skip


def _f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tv_of_shift(constant: float) -> float:
    """How far pi_r moves when `constant` is added to every reward of the example: total variation."""
    moved = optimal_policy(REF_LOGPS, REWARDS + constant, BETA)
    return float(total_variation(moved, optimal_policy(REF_LOGPS, REWARDS, BETA)))


def _betas(low: float, high: float, n: int = 61) -> list[float]:
    """n values from low to high, equally spaced on a logarithmic axis."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]
