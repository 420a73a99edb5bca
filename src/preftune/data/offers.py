"""What a data set offers a loss to read: pairs, rankings, labels, scores.

    offer      every row ...                                                 read by
    pairs      compares two of its responses at least                        pairwise losses
    rankings   orders all its responses (a plain pair is an order of two)    listwise losses
    labels     labels its response, or has pairs: a chosen response is a     unpaired losses
               desirable one, a rejected response an undesirable one
    scores     has the source's score of every response                      losses with an offset per pair

A loss that reads what one row lacks would train on the others alone, so a recipe asks here first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from preftune.tensors import TokenGroup

__all__ = ["Offer", "first_without", "offers"]

Offer = Literal["pairs", "rankings", "labels", "scores"]

_HAS: dict[Offer, Callable[[TokenGroup], bool]] = {
    "pairs": lambda group: bool(group.pairs),
    "rankings": lambda group: bool(group.ranks),
    "labels": lambda group: bool(group.labels or group.pairs),
    "scores": lambda group: bool(group.scores),
}


def offers(groups: Sequence[TokenGroup]) -> frozenset[Offer]:
    """What all of the groups offer; everything when there is no group."""
    return frozenset(offer for offer in get_args(Offer) if first_without(groups, offer) is None)


def first_without(groups: Sequence[TokenGroup], offer: Offer) -> str | None:
    """The origin of the first group that does not offer it, for a message; None when all do."""
    return next((group.origin for group in groups if not _HAS[offer](group)), None)
