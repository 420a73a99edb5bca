"""Claims about the simulated annotators: their mistakes have the stated frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from preftune.errors import ConfigError
from preftune.judges.contract import Comparison
from preftune.judges.scores import scorer
from preftune.judges.simulated import annotator
from preftune.records import Judgement, Response

N = 4000
by_first_letter = scorer(lambda prompt, text: {"a": 0.1, "b": 0.0}[text[0]])


def judge(kind: str, questions: Sequence[Comparison], seed: int = 0, **knobs: float) -> list[Judgement]:
    return annotator(kind, knobs, by_first_letter, name=kind, seed=seed)(questions)


def questions(better: str, worse: str) -> list[Comparison]:
    return [Comparison(prompt=f"p{i}", first=Response(text=better), second=Response(text=worse)) for i in range(N)]


def near(judgements: Sequence[Judgement], probability: float) -> bool:
    """The share of first within five standard deviations of the stated probability."""
    share = sum(j.outcome == "first" for j in judgements) / len(judgements)
    return abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / len(judgements)) + 1e-12


def test_the_deterministic_annotator_makes_no_mistake() -> None:
    """The larger score wins every time; equal scores of different texts tie."""
    assert {j.outcome for j in judge("deterministic", questions("aa", "bb"))} == {"first"}
    assert {j.outcome for j in judge("deterministic", questions("aa", "ab"))} == {"tie"}


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.5, 1.0])
def test_the_noisy_annotator_flips_as_often_as_stated(flip: float) -> None:
    """A winner is turned over with that probability, a tie never becomes one."""
    assert near(judge("noisy", questions("aa", "bb"), flip=flip), 1 - flip)
    assert {j.outcome for j in judge("noisy", questions("aa", "ab"), flip=flip)} == {"tie"}


@pytest.mark.parametrize("scale", [0.0, 5.0, 20.0])
def test_bradley_terry_prefers_with_the_odds_of_the_score_difference(scale: float) -> None:
    """Odds exp(scale * 0.1) to 1, whichever stands first."""
    odds = math.exp(scale * 0.1)
    assert near(judge("bradley_terry", questions("aa", "bb"), scale=scale), odds / (1 + odds))
    assert near(judge("bradley_terry", questions("bb", "aa"), scale=scale), 1 / (1 + odds))


def test_the_length_biased_annotator_pays_for_length() -> None:
    """Log-odds bias * (n_a - n_b) / (n_a + n_b) beside the score's; without bias it is Bradley-Terry."""
    odds = math.exp(2 * 0.1 + 3 * (2 - 6) / 8)
    assert near(judge("length_biased", questions("aa", "bbbbbb"), scale=2, bias=3), odds / (1 + odds))
    plain = judge("length_biased", questions("aa", "bbbbbb"), scale=2, bias=0)
    odds = math.exp(0.2)
    assert near(plain, odds / (1 + odds))


def test_another_seed_is_another_annotator() -> None:
    """Draws are independent between seeds and between prompts, and equal for equal content."""
    one, other = (judge("noisy", questions("aa", "bb"), seed=seed, flip=0.5) for seed in (0, 1))
    equal = sum(a.outcome == b.outcome for a, b in zip(one, other, strict=True))
    assert abs(equal - N / 2) < 5 * math.sqrt(N) / 2
    assert one == judge("noisy", questions("aa", "bb"), seed=0, flip=0.5)


def test_an_annotator_keeps_its_scores_to_itself() -> None:
    """What is simulated is a person: judgements carry no latent reward."""
    assert {(j.first.score, j.second.score) for j in judge("bradley_terry", questions("aa", "bb"))} == {(None, None)}


@pytest.mark.parametrize(
    ("kind", "knobs", "problem"),
    [("perfect", {}, "simulated:perfect is unknown; allowed: deterministic, noisy, bradley_terry, length_biased"),
     ("noisy", {"scale": 1}, "simulated:noisy has no knob scale; it has: flip"),
     ("noisy", {"flip": 1.5}, r"simulated:noisy: flip must be in \[0, 1\], not 1.5"),
     ("noisy", {"flip": math.nan}, "not nan"),
     ("deterministic", {"flip": 0.1}, "it has: none")],
)  # fmt: skip
def test_an_unknown_annotator_is_refused(kind: str, knobs: dict[str, float], problem: str) -> None:
    """By kind, by knob, by value."""
    with pytest.raises(ConfigError, match=problem):
        annotator(kind, knobs, by_first_letter, name=kind, seed=0)
