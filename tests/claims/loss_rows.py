"""Every row of the pairwise contract: one line per family."""

from __future__ import annotations

import rows_anchored
import rows_core
import rows_divergences
import rows_reference_free
import rows_shaped
import rows_token_level
import rows_whole_step
from loss_contract import Row

ROWS: dict[str, Row] = {
    **rows_core.ROWS,
    **rows_anchored.ROWS,
    **rows_shaped.ROWS,
    **rows_divergences.ROWS,
    **rows_token_level.ROWS,
    **rows_reference_free.ROWS,
    **rows_whole_step.ROWS,
}
