"""A study on a world of two letters' length: its runs, its resumption, its refusals, and what the exact answers say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli import main as command
from preftune.config.comparison import STUDY_CONFIGS, StudyConfig
from preftune.equations.bradley_terry import bt_prob
from preftune.errors import ArtifactError
from preftune.judges.reward_model import load_scorer
from preftune.recipes import study
from preftune.records import Response, from_json
from preftune.studies.frontier import ARMS, BETAS, Arm, run
from preftune.studies.prepare import prepare
from preftune.studies.rl import table_scorer
from preftune.studies.settings import FAST, Course, Reinforcement, Setting
from preftune.studies.world import LEARNED, Start, begin
from preftune.worlds.enumerable import Labels

SEED = 1
TINY = replace(
    FAST,
    letters=2,
    prompts=2,
    hidden=16,
    demonstrations=800,
    sft=Course(60, 64, 5e-3, "adamw"),
    pairs=4000,
    preferences=Course(80, 64, 3e-3, "adamw", schedule="linear"),
    reward=Course(100, 32, 3e-3, "adamw", schedule="linear"),
    exact=Course(60, 1, 1e-2, "adamw", schedule="linear"),
    ppo=Reinforcement(Course(80, 64, 5e-3, "adamw", schedule="linear"), critic_lr=5e-3, horizon=100),
    rloo=Reinforcement(Course(80, 32, 5e-3, "adamw", schedule="linear"), critic_lr=0.0),
    every=20,
)
FEW = tuple(
    arm
    for arm in ARMS
    if (arm.family, arm.setting)
    in {("Frontier", "exact"), ("Exact gradient", "beta=1"), ("DPO", "beta=1"), ("Best of n", "learned reward")}
)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp("worlds")
    prepare(folder, SEED, TINY)
    return begin(folder, SEED, TINY)


@pytest.fixture(scope="module")
def policies(start: Start) -> dict[str, Any]:
    """The points of one arm of every family."""
    first = {arm.family: arm for arm in reversed(ARMS)}
    wanted = {"Exact gradient": "beta=1", "DPO": "beta=1", "PPO-GT": "beta=1", "RLOO": "beta=1"}
    chosen = {arm.family: arm for arm in ARMS if wanted.get(arm.family) == arm.setting}
    return {family: run(start, chosen.get(family, arm)) for family, arm in first.items()}


def config(out: Path, **keys: Any) -> StudyConfig:
    keys = {"out": str(out), "seeds": 1, "seed": SEED, "fast": True, "processes": 1, **keys}
    made = STUDY_CONFIGS["study frontier"](**keys)
    assert isinstance(made, StudyConfig)
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, start: Start, tmp_path: Path) -> Path:
    """`study frontier --fast` is a few runs of the tiny world, whose reference is there already."""
    monkeypatch.setitem(study.STUDIES, "frontier", replace(study.STUDIES["frontier"], fast=TINY, fast_arms=FEW))
    (tmp_path / "out" / "worlds").mkdir(parents=True)
    (tmp_path / "out" / "worlds" / str(SEED)).symlink_to(start.folder)
    return tmp_path / "out"


def numbers(out: Path) -> dict[tuple[str, str], Any]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {(line["family"], line["setting"]): line["points"] for line in lines}


def test_no_policy_is_above_the_frontier(policies: dict[str, Any]) -> None:
    """Every measurement of every method lies on or below the exact frontier, the frontier's own points on it."""
    assert set(policies) == {arm.family for arm in ARMS}
    for family, points in policies.items():
        assert all(point.kl >= 0 and point.gap > -1e-5 for point in points), family
    assert max(point.gap for point in policies["Frontier"]) < 1e-5
    assert [len(policies["Frontier"]), policies["Frontier"][0].kl] == [len(BETAS) + 1, 0.0]


def test_a_trained_policy_is_measured_as_it_went(policies: dict[str, Any]) -> None:
    """Trained methods are measured every so many optimizer steps, PPO too, whose rollouts take several."""
    for family in ("DPO", "KTO", "Preferred-FT", "PPO", "PPO-GT", "RLOO"):
        assert [point.step for point in policies[family]] == [20, 40, 60, 80]


def test_exact_gradients_reach_the_frontier_and_dpo_comes_close(start: Start, policies: dict[str, Any]) -> None:
    """At beta = 1 the exact gradient ends within 0.02 of the frontier and DPO within 0.1; reward rose in both."""
    assert policies["Exact gradient"][-1].gap < 0.02
    assert policies["DPO"][-1].gap < 0.1
    reference = policies["Frontier"][0].reward
    assert min(policies[family][-1].reward for family in ("Exact gradient", "DPO")) > reference + 0.3


def test_best_of_n_is_as_good_as_its_judge(policies: dict[str, Any]) -> None:
    """The best of n by the truth rises with n and earns more than the best by a reward model that errs."""
    true, learned = (policies[family] for family in ("Best of n, true reward", "Best of n"))
    assert [point.reward for point in true] == sorted(point.reward for point in true)
    assert all(t.reward > l.reward + 1e-6 for t, l in zip(true, learned, strict=True))


def test_reinforcement_learning_finds_the_price_it_pays(policies: dict[str, Any]) -> None:
    """PPO on the truth and the exact gradient at one price end near one another, well above the reference."""
    exact, ppo = policies["Exact gradient"][-1], policies["PPO-GT"][-1]
    assert abs(ppo.reward - ppo.kl - (exact.reward - exact.kl)) < 0.1
    assert policies["RLOO"][-1].reward > policies["Frontier"][0].reward + 0.2


def test_a_target_kl_is_approached(start: Start) -> None:
    """PPO that is told a KL comes to it from the start, where it is 0, on either side of the fixed price's."""
    ends = [run(start, Arm("PPO-GT", "", "ppo", {"target_kl": target}, truth=True))[-1].kl for target in (0.2, 1.5)]
    assert abs(ends[0] - 0.2) < 0.2 and abs(ends[1] - 1.5) < 0.5


def test_comparisons_are_draws_of_the_reference_with_odds_of_the_reward(start: Start) -> None:
    """Both answers follow the reference, and the chosen one wins in the share of its Bradley-Terry odds."""
    groups = start.pairs(Labels())
    place = {tuple(ids.tolist()): m for m, ids in enumerate(_answers(start))}
    asked = {tuple(start.world.prompt_ids(prompt)): x for x, prompt in enumerate(start.prompts)}
    counts = torch.zeros_like(start.rewards)
    surprise = 0.0
    for group in groups:
        x, w, l = asked[tuple(group.prompt.tolist())], *(place[tuple(ids.tolist())] for ids in group.responses)
        counts[x, w] += 1
        counts[x, l] += 1
        r_w, r_l = start.rewards[x, w], start.rewards[x, l]
        better = float(bt_prob(torch.maximum(r_w, r_l), torch.minimum(r_w, r_l)))
        surprise += (1.0 if r_w > r_l else 0.0 if r_w < r_l else better) - better
    n = len(groups)
    assert TINY.pairs * 0.5 < n <= TINY.pairs
    assert abs(surprise) < 4 * math.sqrt(n) / 2
    law = start.law.logps.exp()
    apart = law * (1 - law)  # the mass of a draw whose partner is another answer
    expected = apart / apart.sum(-1, keepdim=True)
    found = counts / counts.sum(-1, keepdim=True)
    assert float((found - expected).abs().sum(-1).max()) < 0.2


def _answers(start: Start) -> list[Any]:
    rows = zip(start.law.tokens.numpy(), start.law.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


def test_tables_of_rewards_are_the_scorers(start: Start) -> None:
    """A looked-up reward is the world's, and a learned one the reward model's on the text, up to one constant."""
    texts = start.world.texts(start.law.tokens)
    asked = [(start.prompts[1], Response(text=texts[m], finished=bool(start.law.finished[m]))) for m in (3, 8, 20, 50)]
    found = table_scorer(start, start.rewards)(asked)
    assert found == [float(start.rewards[1, m]) for m in (3, 8, 20, 50)]
    ours = torch.tensor(table_scorer(start, start.learned)(asked))
    told = torch.tensor(load_scorer(start.folder / "reward")(asked))
    torch.testing.assert_close(ours - ours[0], told - told[0], rtol=0, atol=1e-4)


def test_a_killed_study_continues_with_the_same_numbers(small: Path) -> None:
    """Cut in the middle of a line and run again, the results are those of a run that was never cut."""
    study.main(config(small))
    whole = (small / "results.jsonl").read_bytes()
    before = numbers(small)
    assert set(before) == {(arm.family, arm.setting) for arm in FEW}
    kept = whole.splitlines(keepends=True)
    (small / "results.jsonl").write_bytes(b"".join(kept[:2]) + kept[2][: len(kept[2]) // 2])
    study.main(config(small))
    assert numbers(small) == before
    assert (small / "results.jsonl").read_bytes().startswith(b"".join(kept[:2]))


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (KeyboardInterrupt(), "stopped", "this run was stopped and goes on with the same command"),
        (ZeroDivisionError("of mine"), "failed", "this run failed: ZeroDivisionError: of mine"),
    ],
    ids=["stopped", "failed"],
)
def test_a_study_that_does_not_come_to_its_end_leaves_its_page(
    end: BaseException, status: str, said: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json and report.html of the lines that are there, with why; the same command goes on and replaces both."""
    whole = study.computed

    def breaks_off(*told: Any) -> Iterator[str]:
        lines = whole(*told)
        yield next(lines)
        raise end

    monkeypatch.setattr(study, "computed", breaks_off)
    with pytest.raises(type(end)):
        study.main(config(small))
    monkeypatch.setattr(study, "computed", whole)
    told = from_json((small / "run.json").read_text())
    assert (told.status, told.results) == (status, {"runs": len(FEW), "runs_done": 1})
    assert said in (small / "report.html").read_text().partition("Read this first")[2]
    assert study.main(config(small)).status == from_json((small / "run.json").read_text()).status == "done"
    assert "Read this first" not in (small / "report.html").read_text()


def test_what_is_there_is_not_run_again_and_is_told_anew(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished study only draws and tells again: the same verdicts, in words, without a run."""
    card = study.main(config(small))
    capsys.readouterr()
    monkeypatch.setattr(study.Job, "line", lambda job: pytest.fail("it ran again"))
    again = study.main(config(small))
    assert again.results["verdicts"] == card.results["verdicts"] == capsys.readouterr().out.splitlines()
    assert "ends within 0.02 of the exact frontier" in card.results["verdicts"][0]
    page = (small / "study.md").read_text()
    assert "| Exact gradient | beta=1 |" in page and all(verdict in page for verdict in card.results["verdicts"])
    for name in ("frontier.svg", "frontier-dark.svg"):
        assert "exact frontier" in (small / name).read_text()


@pytest.mark.parametrize("change", [{"seed": 4}, {"setting": replace(TINY, pairs=1000)}])
def test_lines_of_another_study_are_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Other seeds or another size do not mix with what is there; nothing is overwritten."""
    study.main(config(small))
    before = (small / "results.jsonl").read_bytes()
    if "setting" in change:
        monkeypatch.setitem(study.STUDIES, "frontier", replace(study.STUDIES["frontier"], fast=change.pop("setting")))
    with pytest.raises(ArtifactError, match="is no run of this study"):
        study.main(config(small, **change))
    assert (small / "results.jsonl").read_bytes() == before


def test_a_file_of_something_else_is_refused(small: Path) -> None:
    """A results file that holds other lines is left as it was."""
    (small / "results.jsonl").write_text('{"type": "RunCard"}\n')
    with pytest.raises(ArtifactError, match="does not begin with"):
        study.main(config(small))
    (small / "results.jsonl").write_text('{"study": "frontier", "seed": 3}\n')
    with pytest.raises(ArtifactError, match=r"results.jsonl:1: no line of a study"):
        study.main(config(small))


def test_only_what_an_arm_reads_makes_its_identity(start: Start) -> None:
    """Another tuning of PPO invalidates PPO's lines and no other."""
    other = replace(TINY, ppo=replace(TINY.ppo, critic_lr=1.0))

    def identity(setting: Setting, family: str) -> str:
        arm = next(arm for arm in ARMS if arm.family == family)
        return study.Job(start.folder, SEED, setting, "frontier", arm).identity

    assert identity(TINY, "PPO") != identity(other, "PPO")
    assert identity(TINY, "DPO") == identity(other, "DPO")
    assert identity(TINY, "DPO") != identity(replace(TINY, pairs=1), "DPO")


def test_what_a_seed_needs_is_made_once(start: Start) -> None:
    """Preparing again touches nothing."""
    files = [start.folder / "reference" / "model.safetensors", start.folder / LEARNED]
    before = [path.stat().st_mtime_ns for path in files]
    prepare(start.folder, SEED, TINY)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_command_names_its_studies(capsys: pytest.CaptureFixture[str]) -> None:
    """`preftune study` without a known name is refused with one that there is."""
    assert command(["study", "moon"]) == 2
    assert "did you mean study" in capsys.readouterr().err
