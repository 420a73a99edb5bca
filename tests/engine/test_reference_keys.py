"""A claim about what the cache of reference log-probs takes for the same response."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from preftune.engine.reference_cache import ReferenceCache
from preftune.tensors import TokenGroup


def test_one_response_to_two_prompts_of_one_length_is_two_entries(tmp_path: Path) -> None:
    """Only the ids of the prompts differ, not their number: each answer keeps its own log-probs."""
    response = np.array([5, 6, 7], dtype=np.int32)
    groups = [TokenGroup(np.array(prompt, dtype=np.int32), (response,)) for prompt in ([1, 2], [1, 3])]
    cache = ReferenceCache({"weights": "w"}, tmp_path)
    cache.append(groups[:1], torch.tensor([-1.0, -2.0, -3.0]))
    assert cache.missing(groups) == groups[1:]
    cache.append(groups[1:], torch.tensor([-4.0, -5.0, -6.0]))
    assert cache.lookup(groups).tolist() == [-1, -2, -3, -4, -5, -6]
