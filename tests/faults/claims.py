"""Studies that say more than they measured: verdicts, worths and prompts that favour a claim."""

from __future__ import annotations

from fault import Fault

_CLAIMS = "src/preftune/evaluation/claims.py"
_SHARED = "src/preftune/studies/claims.py"
_JUDGED = "tests/evaluation/test_claims.py"


def _study(test: str) -> str:
    return f"tests/studies/test_study_claims.py -k {test}"


def _three(test: str) -> str:
    return f"tests/studies/test_weight_start_ceiling.py -k {test}"


FAULTS = [
    Fault(
        "claim: one interval above the bound confirms",
        _CLAIMS,
        "if all(number.low > bound",
        "if any(number.low > bound",
        _JUDGED,
    ),
    Fault(
        "claim: what cannot be told is contradicted",
        _CLAIMS,
        "any(number.high < bound",
        "any(number.low < bound",
        _JUDGED,
    ),
    Fault(
        "claim: every interval at 95 % of its own",
        _CLAIMS,
        "1 - (1 - level) / len(values)",
        "level",
        _JUDGED,
    ),
    Fault(
        "worth: reward alone, KL for nothing",
        _SHARED,
        'return (point["reward"] - point["kl"] - untrained)',
        'return (point["reward"] - untrained)',
        _study("test_worth"),
    ),
    Fault(
        "data: prompts called unseen are trained on",
        "src/preftune/studies/data.py",
        "held_out = among(start, others[EXTRA:])",
        "held_out = among(start, others[:HELD_OUT])",
        _study("test_unseen"),
    ),
    Fault(
        "length: every answer counts the same in the slope",
        "src/preftune/studies/length.py",
        "return (probabilities * (a - mean)",
        "return ((a - mean)",
        _study("test_slopes"),
    ),
    Fault(
        "gradient: the noise of the mean counts as bias",
        "src/preftune/studies/gradient.py",
        "between = (total @ total - (errors**2).sum())",
        "between = (total @ total)",
        _study("test_bias"),
    ),
    Fault(
        "tuning: a diverged run outweighs the good ones",
        "src/preftune/studies/tuning.py",
        "max(0.0, worth(points[-1], frontier[seed]))",
        "worth(points[-1], frontier[seed])",
        _study("test_a_diverged"),
    ),
    Fault(
        "cost: weights that two models share are held twice",
        "src/preftune/studies/cost.py",
        "weight.data_ptr(): weight.numel() for model",
        "object(): weight.numel() for model",
        _study("test_weights_held"),
    ),
    Fault(
        "cost: a reference in the loop is judged by the cached one",
        "src/preftune/studies/cost.py",
        "inside(live, 0, 1.1), NARROW)",
        "inside(cached, 0, 1.1), NARROW)",
        _study("test_costs_are_judged"),
    ),
    Fault(
        "cost: memory that was given back stays alive",
        "src/preftune/studies/cost.py",
        "-alive.pop(place, 0)",
        "0",
        _study("test_the_peak_of_an_update"),
    ),
    Fault(
        "cost: what was there before pays for what comes",
        "src/preftune/studies/cost.py",
        "-alive.pop(place, 0)",
        "size",
        _study("test_the_peak_of_an_update"),
    ),
    Fault(
        "cost: the policy's moments alone are held",
        "src/preftune/studies/cost.py",
        "for optimizer in update.optimizers for",
        "for optimizer in update.optimizers[:1] for",
        _study("test_between_updates"),
    ),
    Fault(
        "cost: memory is judged at the largest update alone",
        "src/preftune/studies/cost.py",
        "ends = (SIZES[0], SIZES[-1])",
        "ends = (SIZES[-1],)",
        _study("test_costs_are_judged"),
    ),
    Fault(
        "weight: the peak counts as the end",
        "src/preftune/studies/weight.py",
        "(max(rewards) - rewards[-1]) / gained",
        "(max(rewards) - max(rewards)) / gained",
        _three("test_quarters"),
    ),
    Fault(
        "weight: early is the whole first half",
        "src/preftune/studies/weight.py",
        "values[quarter : 2 * quarter].mean()",
        "values[: 2 * quarter].mean()",
        _three("test_quarters"),
    ),
    Fault(
        "weight: reward that rises counts as fallen",
        "src/preftune/studies/weight.py",
        "[-up for up in",
        "[up for up in",
        _three("test_degeneration"),
    ),
    Fault(
        "start: the fine-tuned reference moves with the policy",
        "src/preftune/studies/start.py",
        "LiveReference(deepcopy(model).requires_grad_(False), True, None)",
        "LiveReference(model, True, None)",
        _three("test_a_route"),
    ),
    Fault(
        "start: two stages are measured against the base as their own reference",
        "src/preftune/studies/start.py",
        "        anchor = enumerated(model, start.world, start.prompts).logps\n",
        "",
        _three("test_a_route"),
    ),
    Fault(
        "start: fine-tuning comes on top of the steps that all have",
        "src/preftune/studies/start.py",
        "replace(course, steps=course.steps - first)",
        "course",
        _three("test_a_route"),
    ),
    Fault(
        "start: two equal draws count as a pair",
        "src/preftune/studies/start.py",
        "wins = wins * (1 - torch.eye(rewards.shape[-1], dtype=wins.dtype))",
        "wins = 1 * wins",
        _three("test_the_chosen"),
    ),
    Fault(
        "ceiling: reward from zero instead of from the reference",
        "src/preftune/studies/ceiling.py",
        'return reached - reference["reward"]',
        "return reached",
        _three("test_a_ceiling"),
    ),
    Fault(
        "ceiling: the truth labels the further pairs",
        "src/preftune/studies/ceiling.py",
        "replace(start, rewards=start.learned, setting=setting)",
        "replace(start, setting=setting)",
        _three("test_more_pairs"),
    ),
]
