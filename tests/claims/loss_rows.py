"""Every row of the pairwise contract: one line per family."""

from __future__ import annotations

import rows_core
from loss_contract import Row

ROWS: dict[str, Row] = {
    **rows_core.ROWS,
}
