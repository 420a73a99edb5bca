"""Every number of the lesson once more, by hand: plain Python, no tensor, nothing of the package.

Where the lesson iterates, differentiates or enumerates, this uses the closed form, and the other way round.
"""

from __future__ import annotations

import math
from itertools import permutations

NAMES = ("cats", "reward function", "anything else")
REF = (0.8, 0.1, 0.1)
REWARDS = (0.0, 1.5, 0.5)
BETA = 0.5
Z = 0.8 + 0.1 * math.e**3 + 0.1 * math.e
PI_R = (0.8 / Z, 0.1 * math.e**3 / Z, 0.1 * math.e / Z)
LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def mean(p: tuple[float, ...], values: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(p, values, strict=True))


def expected() -> dict[str, float]:
    """Name -> value. Differences that should vanish are 0."""
    return {**_policy(), **_example(), **_partition(), **_preferences(), **_reward(), **_loss(), **_gradient()}


def _policy() -> dict[str, float]:
    log_z = math.log(Z)
    found = {
        "beta": 0.5, "j_reference": 0.2, "j_best": 1.5 - 0.5 * math.log(10), "j_optimum": log_z / 2,
        "gradient_error": 0, "gradient_without_kl": _gradient_of_the_penalty(),
        "steps_moved": 0, "steps_disagreement": 0, "steps_scale": 2,
        "z": Z, "log_z": log_z, "beta_log_z": log_z / 2, "identity_error": 0,
        "kl_to_reference": kl(PI_R, REF), "kl_to_optimum": 0,
        "kl_gaussian": 8, "kl_narrow_wide": LN2 + 17 / 8 - 0.5, "kl_wide_narrow": -LN2 + 20 / 2 - 0.5,
        "kl_exact": mean(PI_R, REWARDS) / BETA - log_z,
    }  # fmt: skip
    for name, ref, reward, pi in zip(NAMES, REF, REWARDS, PI_R, strict=True):
        found |= {f"example.{name}.pi_ref": ref, f"example.{name}.reward": reward, f"example.{name}.pi_r": pi}
    lines = [
        ("the objective", 0.2, log_z / 2), ("times -1, max becomes min", -0.2, -log_z / 2),
        *(
            (line, -0.4, -log_z)
            for line in (
                "times 1/beta", "one expectation", "the reward as a logarithm", "one logarithm",
                "add and subtract log Z", "the denominator is a policy, pi_r",
            )
        ),
        ("drop the constant -log Z", log_z - 0.4, 0),
    ]  # fmt: skip
    for i, (line, at_ref, at_solution) in enumerate(lines, start=1):
        start = f"lines.{i}. {line}"
        found |= {f"{start}.at pi_ref": at_ref, f"{start}.at its solution": at_solution}
        found[f"{start}.solution moved by (TV)"] = 0
    third = (1 / 3, 1 / 3, 1 / 3)
    policies = {"the reference": REF, "uniform": third, "always the best": (0.0, 1.0, 0.0), "pi_r": PI_R}
    for name, p in policies.items():
        j = mean(p, REWARDS) - BETA * kl(p, REF)
        row = (mean(p, REWARDS), kl(p, REF), j, kl(p, PI_R), j)
        columns = ("E r", "KL(pi || pi_ref)", "J", "KL(pi || pi_r)", "beta log Z - beta KL(pi || pi_r)")
        found |= {f"identity.{name}.{column}": value for column, value in zip(columns, row, strict=True)}
    return found | {f"slide.{m}.KL, nats": m * m / 2 for m in range(-4, 1)}


def _gradient_of_the_penalty() -> float:
    """Largest entry of beta grad KL at the softmax of (0.3, -0.2, 0.1): d KL / d logit_i = pi_i (log-ratio_i - KL)."""
    weights = [math.exp(x) for x in (0.3, -0.2, 0.1)]
    pi = tuple(w / sum(weights) for w in weights)
    return BETA * max(abs(p * (math.log(p / q) - kl(pi, REF))) for p, q in zip(pi, REF, strict=True))


def _example() -> dict[str, float]:
    found: dict[str, float] = {
        "share_cats": 0.8, "share_function": 0.1, "share_both": 0.9, "gap": 10,
        "gap_95_two": math.log(19 * 8), "gap_99_two": math.log(99 * 8),
        "gap_95_three": math.log(19 * 9), "gap_99_three": math.log(99 * 9),
        "crossover_per_nat": math.log(8), "crossover": 10 / math.log(8), "frontier_slope": 2,
    }  # fmt: skip
    for beta in (0.5, 1, 2, 5, 100):
        two, three = (1 / (1 + others * math.exp(-10 / beta)) for others in (8, 9))
        row = {"renormalised": two, "third outcome": three, "E r": 10 * two}
        row["KL(pi_r || pi_ref)"] = kl((1 - two, two), (8 / 9, 1 / 9))
        found |= {f"sweep.{beta}.{column}": value for column, value in row.items()}
    return found


def _partition() -> dict[str, float]:
    found: dict[str, float] = {
        "rate": 10**12, "with_end": 37_449, "forced_terms": 4096, "forced_error": 0,
        "vocabulary": 50_257, "nats_per_token": math.log(50_257), "even_odds": LN2,
    }  # fmt: skip
    for t in (1, 2, 3, 10, 20):
        terms = 50_257**t
        row = {"terms V^T": terms, "bytes": 8 * terms, "seconds": terms / 1e12, "years": terms / 1e12 / 86_400 / 365.25}
        found |= {f"terms.{t}.{column}": value for column, value in row.items()}
    for extra, label in zip((-2, -1, 0, 1, 2), ("-2", "-1", "0", "+1", "+2"), strict=True):
        shift = extra * math.log(50_257)
        row = {"shift of log u, nats": shift, "loss, uniform over tokens": math.log1p(50_257.0**-extra)}
        row["loss, uniform over responses"] = LN2
        found |= {f"lengths.{label}.{column}": value for column, value in row.items()}
    return found


def _preferences() -> dict[str, float]:
    margin = 1.5
    found: dict[str, float] = {
        "pairs_distinct": 6, "pairs_tied": 5, "pairs_stretched": 0, "rankings_total": 1, "ranking_of_two": 0,
        "bt_margin": margin, "bt_prob": sigmoid(margin), "bt_sum": 1, "bt_weight": 0,
        "bt_objective": math.log(sigmoid(margin)), "bt_cost": -math.log(sigmoid(margin)),
        "descent_on_cost": 0.5, "descent_on_objective": -0.5,
    }  # fmt: skip
    for name, score, rank in zip("ABCD", (9, 7, 7, 2), (1, 2, 2, 3), strict=True):
        found |= {f"ranks.{name}.score": score, f"ranks.{name}.rank": rank}
    weight = dict(zip(("cats", "reward", "else"), map(math.exp, REWARDS), strict=True))
    for first, second, last in permutations(weight):
        share = weight[first] / sum(weight.values()) * weight[second] / (weight[second] + weight[last])
        found[f"rankings.{first} > {second} > {last}.probability"] = share
    return found


def _reward() -> dict[str, float]:
    log_z = math.log(Z)
    without = [BETA * pi / ref + BETA * log_z for pi, ref in zip(PI_R, REF, strict=True)]
    found: dict[str, float] = {
        "round_trip": 0, "margin_true": 1.5, "margin_with_log": 1.5, "margin_without_log": without[1] - without[0],
        "prob_true": sigmoid(1.5), "prob_without_log": sigmoid(without[1] - without[0]),
        "cancel_loss": math.log1p(math.exp(-1.5)), "cancel_cost": math.log1p(math.exp(-1.5)),
        "cancel_spread": 0, "log_z_moved": 14,
    }  # fmt: skip
    for name, reward, wrong in zip(NAMES, REWARDS, without, strict=True):
        row = {"reward": reward, "beta log(pi_r/pi_ref)": reward - BETA * log_z, "+ beta log Z": reward}
        found |= {f"inverse.{name}.{column}": value for column, value in row.items()}
        found[f"inverse.{name}.without the log"] = wrong
    for c in (0, 7, -100):
        row = {
            "log Z": log_z + c / BETA,
            "DPO loss": -math.log(sigmoid(1.5)),
            "Bradley-Terry cost": -math.log(sigmoid(1.5)),
        }
        found |= {f"shifted.{c}.{column}": value for column, value in row.items()}
        found[f"shifted.{c}.pi_r moves by (TV)"] = 0
    return found


def _loss() -> dict[str, float]:
    found: dict[str, float] = {
        "loss_u_1": LN2, "loss_u_0.1": math.log(11), "loss_u_10": math.log(1.1), "slope_u_1": -0.5, "loss_u_dpo": 0,
    }  # fmt: skip
    for u in (0.01, 0.1, 0.5, 1, 2, 10, 100):
        found |= {f"loss_u.{u:g}.beta = {beta:g}": math.log1p(u**-beta) for beta in (0.1, 0.5, 1, 2)}
    return found


def _gradient() -> dict[str, float]:
    found: dict[str, float] = {
        "weight_error": 0, "weight_at_start": 0.25, "appendix_error": 0.5 * (sigmoid(8) - sigmoid(-8)),
        "u_after_step": math.exp(0.25), "small_beta_loss": math.log1p(math.exp(-0.005)),
    }  # fmt: skip
    for margin in (-8, -2, 0, 2, 8):
        right, swapped = 0.5 * sigmoid(-margin), 0.5 * sigmoid(margin)
        start = f"weights.{margin}"
        found |= {f"{start}.beta sigma(r_l - r_w)": right, f"{start}.by autograd": right}
        found[f"{start}.appendix, beta sigma(r_w - r_l)"] = swapped
    return found
