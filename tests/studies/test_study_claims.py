"""Studies of single claims: each from its command to its page, and what their numbers mean."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune.config.comparison import STUDY_CONFIGS, StudyConfig
from preftune.equations.optimum import optimal_policy
from preftune.errors import ArtifactError
from preftune.recipes import study
from preftune.studies import cost as study_cost
from preftune.studies import data as study_data
from preftune.studies import frontier as study_frontier
from preftune.studies import gradient as study_gradient
from preftune.studies import length as study_length
from preftune.studies import shift as study_shift
from preftune.studies import tuning as study_tuning
from preftune.studies.claims import OPTIMUM, among, by_arm, taught, worth
from preftune.studies.frontier import Arm
from preftune.studies.prepare import prepare
from preftune.studies.rl import padded
from preftune.studies.settings import LONG, SMALL, TINY
from preftune.studies.table import STUDIES
from preftune.studies.updates import METHODS
from preftune.studies.world import Start, begin
from preftune.worlds.enumerable import Labels

CLAIMS = [name for name in STUDIES if name != "frontier"]


def config(name: str, out: Path, **keys: Any) -> StudyConfig:
    made = STUDY_CONFIGS[f"study {name}"](**{"out": str(out), "seeds": 1, "fast": True, "processes": 1, **keys})
    assert isinstance(made, StudyConfig)
    return made


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("claims")
    prepare(folder, 0, TINY)
    return begin(folder, 0, TINY)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_study_goes_from_its_command_to_its_page(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line per arm and seed, figures in two colour schemes, a table of claims, a verdict each on the console."""
    out = tmp_path / "out"
    card = study.main(config(name, out))
    arms = STUDIES[name].fast_arms or STUDIES[name].arms
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted((line["family"], line["setting"]) for line in lines) == sorted((a.family, a.setting) for a in arms)
    verdicts = capsys.readouterr().out.splitlines()
    assert verdicts == card.results["verdicts"]
    ends = ("confirmed", "contradicted", "cannot be told")
    assert verdicts and all(verdict.endswith(ends) for verdict in verdicts)
    page = (out / "study.md").read_text()
    assert "| claim | measured | numbers | verdict | what it cannot show |" in page
    assert sum(page.count(f"**{end}**") for end in ends) == len(verdicts)
    for file in (f"{name}.svg", f"{name}-dark.svg"):
        assert (out / file).read_text().startswith("<?xml")


def test_a_study_that_was_killed_continues(tmp_path: Path) -> None:
    """Lines that are there are kept as they are, the others are the same numbers; lines of other seeds are refused."""
    out = tmp_path / "out"
    study.main(config("tuning", out))
    whole = (out / "results.jsonl").read_text().splitlines(keepends=True)
    page = (out / "study.md").read_text()
    (out / "results.jsonl").write_text("".join(whole[:3]) + whole[3][:40])
    study.main(config("tuning", out))
    again = (out / "results.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == whole[:3]
    assert [json.loads(line)["points"] for line in again] == [json.loads(line)["points"] for line in whole]
    assert (out / "study.md").read_text().splitlines()[2:] == page.splitlines()[2:]
    with pytest.raises(ArtifactError, match="is no run of this study"):
        study.main(config("tuning", out, seed=3))


def test_the_sizes_of_a_study_are_part_of_a_line(tmp_path: Path) -> None:
    """A line is kept for the same setting alone: what any arm of a claim reads belongs to its identity."""
    for name in CLAIMS:
        row = STUDIES[name]
        for change in ({"preferences": LONG.preferences}, {"pairs": 77}, {"reward": SMALL.sft}):
            jobs = [
                study.Job(tmp_path, 0, setting, name, row.arms[-1]) for setting in (SMALL, replace(SMALL, **change))
            ]
            assert jobs[0].identity != jobs[1].identity, (name, change)


def test_worth_is_nothing_untrained_and_one_at_the_optimum(start: Start) -> None:
    """0 for the reference, 1 for pi_ref exp(r) / Z, below it for the solution of any other price."""
    frontier = [vars(point) for point in study_frontier.run(start, OPTIMUM)]
    at = {beta: vars(start.point(optimal_policy(start.law.logps, start.rewards, beta), 0)) for beta in (0.2, 1.0, 4.0)}
    assert worth(vars(start.point(start.law.logps, 0)), frontier) == 0
    assert worth(at[1.0], frontier) == pytest.approx(1, abs=1e-3)
    assert max(worth(at[0.2], frontier), worth(at[4.0], frontier)) < 0.9


def test_other_prompts_have_their_own_laws_and_rewards(start: Start) -> None:
    """Laws and rewards are those of the prompts asked; the world, the reference and the answers stay."""
    other = among(start, ["ab", "hgfe"])
    assert other.prompts == ("ab", "hgfe") and other.law.logps.shape == (2, start.law.logps.shape[1])
    torch.testing.assert_close(other.rewards, start.world.rewards(["ab", "hgfe"], start.law.tokens))
    same = among(start, start.prompts)
    torch.testing.assert_close(same.law.logps, start.law.logps)
    torch.testing.assert_close(same.learned, start.learned)


def test_a_reward_model_of_ones_own_learns_the_labels_it_is_given(start: Start) -> None:
    """Fitted to the opposite of the labels it ranks answers the other way round."""
    able = replace(start, setting=replace(TINY, reward=replace(TINY.reward, steps=120, batch_size=64, lr=5e-3)))
    groups = able.pairs(Labels())
    turned = [replace(group, responses=group.responses[::-1]) for group in groups]
    mass = start.law.logps.exp()

    def agreement(learned: torch.Tensor) -> float:
        centred = start.rewards - (mass * start.rewards).sum(-1, keepdim=True)
        return float((mass * learned * centred).sum())

    assert agreement(taught(able, groups).learned) > 0.2 > -0.2 > agreement(taught(able, turned).learned)


def test_every_drawn_configuration_is_within_its_ranges_and_a_function_of_seed_and_draw() -> None:
    """Methods share lr and beta of a draw; two draws and two seeds differ."""
    seen = []
    for seed in range(4):
        for draw in range(4):
            told = {kind: Arm("", "", kind, {"draw": draw}) for kind in ("offline", "ppo", "rloo")}
            (beta, dpo), (b, ppo), (c, rloo) = (study_tuning.drawn(SMALL, arm, seed) for arm in told.values())
            assert beta == b == c and 10**-0.5 <= beta <= 10**0.5
            rate = dpo.preferences.lr
            assert rate == ppo.ppo.course.lr == rloo.rloo.course.lr and 1e-4 <= rate <= 1e-2
            assert 16 <= dpo.preferences.batch_size <= 128 and ppo.ppo.knobs.epochs in (1, 2, 4)
            assert study_tuning.drawn(SMALL, told["ppo"], seed) == (b, ppo)
            seen.append((rate, beta))
    assert len(set(seen)) == 16


def test_a_diverged_configuration_counts_as_the_untrained_policy() -> None:
    """Worth below 0 is 0: nobody would use it in place of the reference; shares and curves are of this."""
    frontier = [{"kl": 0.0, "reward": 0.0}, {"kl": 1.0, "reward": 3.0}]
    ends = {"DPO": [(0.5, 2.5), (9.0, 1.0)], "PPO": [(1.0, 2.9), (1.0, 2.9)], "RLOO": [(0.0, 0.0), (1.0, 2.0)]}
    lines = [
        {"family": "Frontier", "setting": "exact", "seed": seed, "cpu_seconds": 1.0, "points": frontier}
        for seed in (0, 1)
    ] + [
        {"family": f, "setting": f"draw={i}", "seed": seed, "points": [{"kl": kl, "reward": r}]}
        for f, own in ends.items() for i, (kl, r) in enumerate(own) for seed in (0, 1)
    ]  # fmt: skip
    found = study_tuning.scores(lines)
    np.testing.assert_allclose(found["DPO"], [[1.0, 0.0]] * 2)
    np.testing.assert_allclose(found["PPO"], [[0.95, 0.95]] * 2)
    told = study_tuning.tell(lines)
    shares, areas = (finding.numbers for finding in told.findings)
    assert shares["DPO - PPO"].estimate == pytest.approx(0.5 - 1.0)
    assert areas["DPO - RLOO"].estimate == pytest.approx((0.5 + 1.0) / 2 - (0.25 + 0.5) / 2)
    assert told.findings[0].verdict == "contradicted"


def test_slopes_on_length_are_those_of_least_squares() -> None:
    """Against numpy's weighted fit; a reward that is a multiple of length is explained by it altogether."""
    g = np.random.default_rng(3)
    length, value, weight = g.integers(1, 5, 40).astype(float), g.normal(size=40), g.dirichlet(np.ones(40))
    slope, explained = study_length.slope_on(*(torch.tensor(x)[None] for x in (length, value, weight)))
    expected = np.polyfit(length, value, 1, w=np.sqrt(weight))[0]
    assert slope == pytest.approx(expected) and 0 < explained < 1
    exact = study_length.slope_on(
        torch.tensor(length), torch.tensor(0.4 * length + 1)[None], torch.tensor(weight)[None]
    )
    assert exact == pytest.approx((0.4, 1.0))


def test_truths_about_length_differ_by_their_price_of_a_letter(start: Start) -> None:
    """The biased labels share the neutral truth; the penalised truth is lower by 0.4 a letter."""
    letters = start.world.letters(start.law.tokens)
    best = {truth: study_length.run(start, Arm("Frontier", truth, "frontier")) for truth in study_length.TRUTHS}
    assert best["neutral"] == best["biased"]
    mean = float((start.law.logps.exp() * letters).sum(-1).mean())
    difference = best["neutral"][0].reward - best["penalised"][0].reward
    assert difference == pytest.approx(study_length.LETTER * mean)
    assert best["penalised"][-1].letters < best["neutral"][-1].letters


def test_unseen_prompts_are_unseen(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training sees its own prompts only, the wide arm the unlabelled ones too; the held-out ones are of neither."""
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(study_frontier, "run", lambda begun, arm: asked.append(begun.prompts) or [])
    places: list[tuple[str, ...]] = []

    def watching(begun: Start, prompts: Any) -> Start:
        places.append(tuple(prompts))
        return among(begun, prompts)

    monkeypatch.setattr(study_data, "among", watching)
    for family in (study_data.SMALL_DATA, study_data.WIDE):
        study_data.run(start, Arm(family, "prompts", "rloo", {"beta": 1.0, "extra": 24.0}))
    narrow, wide = asked
    held_out, extra = places[0], places[1]
    assert narrow == start.prompts and set(wide) == {*start.prompts, *extra} and len(wide) == len(narrow) + 24
    assert not set(held_out) & set(wide) and len(held_out) == 16


def test_gaps_are_taken_against_each_set_of_prompts() -> None:
    """A policy as good as the frontier of one set and behind that of another has a gap on the second alone."""
    at = {place: {"kl": 0.0, "reward": 0.0} for place in ("train", "held_out", "longer")}
    best = {place: {"kl": 1.0, "reward": 2.0} for place in at}
    own = {**best, "longer": {"kl": 1.0, "reward": 1.0}}
    lines = [
        {"family": "Frontier", "setting": "exact", "seed": 0, "points": [at, best]},
        {"family": "DPO", "setting": "beta=1", "seed": 0, "points": [own]},
    ]
    gaps = study_shift.gaps_of(lines, "DPO")
    np.testing.assert_allclose(gaps["held_out"], [[0.0, 0.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(gaps["longer"], [[0.25, 0.5, 1.0]])
    assert by_arm(lines)["DPO", "beta=1"] == {0: [own]}


def test_estimators_are_unbiased_and_tokens_pass_nothing(start: Start) -> None:
    """Through sampled tokens the gradient is 0; the mean of REINFORCE and RLOO is the exact one, RLOO less noisy."""
    found = {
        name: study_gradient.run(start, Arm(name, "n=64", "estimate", {"n": 64.0}))[0]
        for name in study_gradient.ESTIMATORS
    }
    blocked, plain, leave_one_out = found.values()
    assert (blocked.cosine, blocked.along) == (0, 0)
    assert (blocked.bias, blocked.noise) == pytest.approx((1, 1))
    for estimate in (plain, leave_one_out):
        assert estimate.along == pytest.approx(1, abs=0.15) and abs(estimate.bias) < 0.05
    assert leave_one_out.noise < plain.noise


def test_bias_is_measured_without_the_noise_of_the_mean() -> None:
    """Draws about g have bias 0 on average however few and noisy, draws about g + b have |b|^2 / |g|^2."""
    g = torch.Generator().manual_seed(0)
    exact, shift = torch.tensor([3.0, 4.0]).double(), torch.tensor([0.0, 5.0]).double()
    noise = 2 * torch.randn(4000, 6, 2, generator=g, dtype=torch.float64)
    for offset, bias in ((0 * shift, 0.0), (shift, 1.0)):
        found = [study_gradient.compared(exact + offset + draws, exact, 1) for draws in noise]
        assert np.mean([estimate.bias for estimate in found]) == pytest.approx(bias, abs=0.02)
        assert np.mean([estimate.noise for estimate in found]) == pytest.approx(bias + 2 * 4 / 25, abs=0.03)
    assert study_gradient.compared((exact * 2).expand(3, 2), exact, 1) == study_gradient.Estimate(1, 1.0, 2.0, 1.0, 1.0)


def costs(small: float = 1.0, **forwards: float) -> list[dict[str, Any]]:
    """Lines of two seeds: as the usual count says, packed rows half of it, but for what is given.

    A peak is that of SFT, `small` times it in the smallest update of DPO with a reference in the loop, twice in RLHF.
    """
    held = dict(zip(study_cost.MODEL, (1, 1, 2, 3, 4), strict=True))
    room = {"DPO, reference in the loop": {study_cost.SIZES[0]: small}, "RLOO": dict.fromkeys(study_cost.SIZES, 2.0)}
    room["PPO"] = room["RLOO"]
    return [
        {"family": name, "setting": rows, "seed": seed, "cpu_seconds": 1.0, "points": [
            {"step": n, "copies": held[name], "milliseconds": 1.0, "peak": 1000 * room.get(name, {}).get(n, 1.0),
             "forwards": forwards.get(name, study_cost.MODEL[name]) * (0.5 if rows == "packed" else 1)}
            for n in study_cost.SIZES
        ]}
        for name in study_cost.MODEL for rows in ("padded", "packed") for seed in (0, 1)
    ]  # fmt: skip


def test_costs_are_judged_against_sft_and_against_the_count() -> None:
    """DPO that costs what the count says is as easy as SFT from a cache and not with both models; 20 % off is off.

    So is a peak 20 % higher in the smallest update alone.
    """
    good, bad = "confirmed", "contradicted"
    usual = [finding.verdict for finding in study_cost.tell(costs()).findings]
    assert usual == [good, good, good, bad, good, good, good, good, good, good, good]
    dear = [finding.verdict for finding in study_cost.tell(costs(DPO=3.6, PPO=3.5)).findings]
    assert dear == [good, good, bad, bad, good, bad, bad, good, good, good, good]
    heavy = [finding.verdict for finding in study_cost.tell(costs(small=1.2)).findings]
    assert heavy == [*usual[:9], bad, good]


def test_weights_held_twice_count_once() -> None:
    """A model counts its weights over the first one's; those it shares with another are not held again."""
    one, other = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
    head = torch.nn.Linear(3, 1, bias=False)
    assert study_cost.copies([one]) == 1
    assert study_cost.copies([one, other]) == 2
    assert study_cost.copies([one, torch.nn.Sequential(one, head)]) == pytest.approx(1 + 3 / 9)


def test_the_peak_of_an_update_is_what_is_alive_at_once() -> None:
    """By hand: a thousand floats are 4000 bytes, and what is given back counts no more, nor what was there before.

    Without gradients two of three are alive at once. With them both exponentials are kept for the backward pass; when
    it takes them back the last one's gradient comes, then the last one goes and the first one's gradient takes its
    place: three, with the sum and its gradient of 4 bytes each.
    """
    before: list[torch.Tensor] = []
    assert study_cost.peak(lambda: before.append(torch.zeros(1000)), 0) == 4000
    weight = torch.zeros(1000, requires_grad=True)

    def forward() -> None:
        first = before.pop().exp()
        second = first.exp()
        del first
        second.exp()

    assert study_cost.peak(forward, 4000) == 4000 + 2 * 4000
    assert study_cost.peak(lambda: weight.exp().exp().sum().backward(), 4000) == 4000 + 3 * 4000 + 2 * 4


def test_between_updates_weights_and_moments_are_held(start: Start) -> None:
    """Three of every trained weight, one of every other; a critic costs three of its own, a reference in memory one."""
    held = {}
    for name, method in METHODS.items():
        setting = replace(TINY, preferences=replace(TINY.preferences, optimizer="adamw"))
        update = method(replace(start, setting=setting), padded(start), 16)
        update.take(1)
        held[name] = study_cost.held(update)
    weights = 4 * sum(weight.numel() for weight in start.reference.model.parameters())
    judge = 4 * sum(weight.numel() for weight in start.reward_model().parameters())  # type: ignore[attr-defined]
    counters = 4 * 2 * len(list(start.reference.model.parameters()))  # and the rotary tables, as small
    assert held["SFT"] == held["DPO"] == pytest.approx(3 * weights, abs=counters)
    assert held["DPO, reference in the loop"] - held["DPO"] == pytest.approx(weights, abs=counters)
    assert held["RLOO"] - held["DPO"] == pytest.approx(weights + judge, abs=2 * counters)
    assert held["PPO"] - held["RLOO"] == pytest.approx(3 * judge, abs=2 * counters)


def test_an_update_costs_the_forwards_of_its_parts(start: Start) -> None:
    """A step is three forwards, a reference in the loop one more, an epoch of PPO six more than its rollout's."""

    def spent(name: str, setting: Any = TINY) -> float:
        return study_cost.run(replace(start, setting=setting), Arm(name, "padded", "update"))[-1].forwards

    cached = spent("DPO")  # since torch 2.15 with flash attention, whose backward is 2.5 forwards and not 2
    assert spent("SFT") == pytest.approx(3, rel=1e-2) and cached == pytest.approx(3, rel=1e-2)
    assert spent("DPO, reference in the loop") - cached == pytest.approx(1, rel=1e-3)
    short, usual = (replace(TINY.ppo, knobs=replace(TINY.ppo.knobs, epochs=epochs)) for epochs in (1, 4))
    grown = spent("PPO", replace(TINY, ppo=usual)) - spent("PPO", replace(TINY, ppo=short))
    assert grown == pytest.approx(18, rel=0.05)
