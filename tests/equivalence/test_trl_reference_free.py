"""TRL's losses without a reference, called on the same log-probabilities: agreement, and one known disagreement."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.equations.losses import LOSSES
from preftune.tensors import PairLogps

pytest.importorskip("trl", reason="trl is a development dependency")

pytestmark = pytest.mark.filterwarnings("ignore")


def some_pairs() -> PairLogps:
    g = torch.Generator().manual_seed(0)
    n_w, n_l = torch.randint(1, 60, (2, 300), generator=g).double()
    p_w, p_l = -0.05 - 3 * torch.rand(2, 300, generator=g, dtype=torch.float64)
    nan = torch.full_like(p_w, torch.nan)
    return PairLogps(p_w * n_w, p_l * n_l, nan, nan, n_w, n_l, nan)


def means(data: PairLogps) -> tuple[Tensor, Tensor]:
    return data.chosen / data.chosen_length, data.rejected / data.rejected_length


def trl_cpo(logps: tuple[Tensor, Tensor], *, alpha: float = 0.0, **settings: Any) -> Tensor:
    """CPOTrainer's loss alone: it reads its settings from `self` and nothing else of the trainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    trainer = SimpleNamespace(alpha=alpha, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"), **settings)
    return CPOTrainer.cpo_loss(trainer, *logps)[0]


def test_cpo_simpo_and_alphapo_agree_with_trl() -> None:
    """On the same log-probabilities CPO's preference term, SimPO and AlphaPO are TRL's, to 1e-10."""
    data = some_pairs()
    ours = LOSSES["cpo"].bind(nll_weight=0.0).values(data)
    theirs = trl_cpo((data.chosen, data.rejected), beta=0.1, loss_type="sigmoid")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    for name, bend in (("simpo", {}), ("alphapo", {"alpha": 0.25})):
        ours = LOSSES[name].bind(beta=2.5, gamma=0.4, **bend).values(data)
        theirs = trl_cpo(means(data), beta=2.5, simpo_gamma=0.4, loss_type="simpo", **bend)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_orpos_odds_agree_with_trl() -> None:
    """TRL's odds term is ours to the rounding of its float32; the likelihood beside it is another, see `orpo`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    data = some_pairs()
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    odds_term = -ORPOTrainer.odds_ratio_loss(trainer, *means(data))[0].double()
    ours = LOSSES["orpo"].bind().values(data) - LOSSES["nll"].bind().values(data)
    torch.testing.assert_close(ours, odds_term, rtol=0, atol=1e-6)


def test_alphapo_is_finite_on_long_sums_where_trl_is_not() -> None:
    """TRL offers alpha with sums of log-probabilities too: e^l underflows and its loss is not a number."""
    sums = torch.tensor([-4000.0]).double(), torch.tensor([-3000.0]).double()
    assert torch.isnan(trl_cpo(sums, alpha=0.25, beta=0.1, loss_type="sigmoid")).all()
    one = torch.ones(1).double()
    data = PairLogps(*sums, one * torch.nan, one * torch.nan, one, one, one)
    assert torch.isfinite(LOSSES["alphapo"].bind().values(data)).all()
