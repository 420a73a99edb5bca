"""The table of losses by name. A new loss is a function, its gradient weights and one row beside them.

(And one row in the contract suite of the tests, which derives it again.)
"""

from __future__ import annotations

from preftune.equations import (
    anchored,
    divergences,
    length_normalised,
    listwise,
    pairwise,
    reference_free,
    shaped,
    token_level,
    unpaired,
    whole_step,
)
from preftune.equations.contract import BoundLoss, Loss

__all__ = ["LOSSES", "BoundLoss", "Loss"]

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for family in (
        pairwise,
        shaped,
        anchored,
        divergences,
        length_normalised,
        token_level,
        reference_free,
        listwise,
        whole_step,
        unpaired,
    )
    for loss in family.LOSSES
}
"""Every loss by name."""
