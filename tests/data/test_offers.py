"""What a data set offers: what every one of its rows has, and the first row that has not."""

from __future__ import annotations

import numpy as np
import pytest

from preftune.data.offers import Offer, first_without, offers
from preftune.tensors import TokenGroup

ONE, TWO = ((np.array([1, 2], np.int32),) * k for k in (1, 2))
PROMPT = np.array([3], np.int32)
LABELLED = TokenGroup(PROMPT, ONE, labels=(False,), origin="labelled")
SHOWN = TokenGroup(PROMPT, ONE, origin="shown")
STATED = TokenGroup(PROMPT, TWO, ((0, 1),), origin="stated")
RANKED = TokenGroup(PROMPT, TWO, ((0, 1),), ranks=(1, 2), origin="ranked")
SCORED = TokenGroup(PROMPT, TWO, ((0, 1),), ranks=(1, 2), scores=(0.0, -1.0), origin="scored")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([LABELLED], {"labels"}),
        ([SHOWN], set()),
        ([STATED], {"pairs", "labels"}),
        ([RANKED], {"pairs", "labels", "rankings"}),
        ([SCORED], {"pairs", "labels", "rankings", "scores"}),
        ([SCORED, RANKED, SCORED], {"pairs", "labels", "rankings"}),
        ([SCORED, STATED], {"pairs", "labels"}),
        ([SCORED, LABELLED], {"labels"}),
        ([SCORED, SHOWN], set()),
    ],
    ids=lambda value: "+".join(sorted(value) if isinstance(value, set) else [g.origin for g in value]),
)
def test_only_what_every_row_has_is_offered(groups: list[TokenGroup], expected: set[Offer]) -> None:
    """A loss that reads what one row lacks would silently train on the others alone."""
    assert offers(groups) == expected


def test_the_first_row_that_lacks_something_is_named() -> None:
    groups = [SCORED, RANKED, STATED, LABELLED]
    named = {offer: first_without(groups, offer) for offer in ("scores", "rankings", "pairs", "labels")}
    assert named == {"scores": "ranked", "rankings": "stated", "pairs": "labelled", "labels": None}
