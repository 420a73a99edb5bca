"""Claims about how responses of a batch become pairs and labelled responses."""

from __future__ import annotations

import math

import numpy as np
import torch

from preftune.tensors import PairIndex, ResponseLogps, TokenGroup


def group(lengths: list[int], **more: object) -> TokenGroup:
    responses = tuple(np.arange(n, dtype=np.int32) for n in lengths)
    return TokenGroup(prompt=np.array([7], dtype=np.int32), responses=responses, **more)  # type: ignore[arg-type]


def logps(*groups: TokenGroup) -> ResponseLogps:
    """Every response's policy log-prob is its number, its log-ratio a tenth of that."""
    number = torch.arange(sum(len(g.responses) for g in groups)).double()
    return ResponseLogps(number, number / 10, torch.ones_like(number))


def test_the_gap_of_scores_is_chosen_minus_rejected() -> None:
    """Positive where the chosen response has the larger score, NaN where the source does not score."""
    scored = group([1, 1, 1], pairs=((2, 0), (0, 1)), scores=(1.0, 4.0, 3.5))
    index = PairIndex.of([group([1, 1], pairs=((1, 0),)), scored])
    assert index.score_gap is not None and math.isnan(index.score_gap[0])
    assert index.score_gap[1:].tolist() == [2.5, -3.0]
    assert (index.chosen.tolist(), index.rejected.tolist()) == ([1, 4, 2], [0, 2, 3])


def test_a_pair_is_a_desirable_and_an_undesirable_response() -> None:
    """Its chosen response first; a labelled response is itself; each with the weight of its row."""
    groups = [group([1, 1], pairs=((1, 0),), weight=2.0), group([1], labels=(False,)), group([1], labels=(True,))]
    labelled = logps(*groups).labelled(groups)
    assert labelled.policy.tolist() == [1, 0, 2, 3]
    assert labelled.desirable.tolist() == [True, False, False, True]
    assert labelled.weight.tolist() == [2, 2, 1, 1]


def test_mismatched_responses_are_those_lent_and_no_others() -> None:
    """The log-ratios of responses that answer another prompt stand apart and carry no label."""
    groups = [group([1, 1, 1], pairs=((0, 1),), mismatched=1), group([1, 1], labels=(True,), mismatched=1)]
    labelled = logps(*groups).labelled(groups)
    torch.testing.assert_close(labelled.mismatched_log_ratio, torch.tensor([0.2, 0.4]).double())
    assert labelled.policy.tolist() == [0, 1, 3]
