"""Likelihood losses, one value per token. The caller sums and divides by the tokens of the whole optimizer step."""

from __future__ import annotations

from torch import Tensor

__all__ = ["negative_log_likelihood"]


def negative_log_likelihood(logps_C: Tensor) -> Tensor:
    """L_t = -log pi(y_t | x, y_<t): supervised fine-tuning; [C] nats per completion token.

    `logps_C`: [C] log-probabilities of the completion tokens, end-of-sequence included, prompt tokens excluded.
    Nothing is averaged here: a mean per micro-batch would weight a token by how the step happened to be split.
    """
    return -logps_C
