"""Responses that answer another prompt: what KTO measures its reference point z0 on (arXiv 2402.01306, section 4.1).

Every group receives one response of another group whose prompt differs. Who receives whose is decided once, for the
whole data set: groups are put in an order drawn from the seed and their content, equal prompts side by side and the
most frequent prompt in front, and each takes from the group one block further on. So

    - the draw is a function of seed and data, never of batches, epochs or the order of the file,
    - every group gives exactly once, unless one prompt holds more than half of the groups (then the others take turns),
    - no group receives a response to its own prompt.

In-batch rotations, which other implementations use, depend on the batch and pair equal prompts with one another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from preftune.errors import DataError
from preftune.tensors import Ids, TokenGroup

__all__ = ["with_mismatched"]


def with_mismatched(groups: Sequence[TokenGroup], *, seed: int, max_length: int) -> tuple[list[TokenGroup], int]:
    """(the groups, each with one more response, which answers another prompt; how many of those had to be cut).

    The response stands last, `mismatched` says so; it loses tokens on its right, end mark first, where prompt +
    response would exceed `max_length` tokens. Which of a group's responses is given away is drawn too.
    Raises DataError when there are no two different prompts, or a prompt leaves no room for a single token.
    """
    assert not any(group.mismatched for group in groups), "the groups have mismatched responses already"
    prompts = [_hash(seed, group.prompt) for group in groups]
    count = Counter(prompts)
    if len(count) < 2:
        raise DataError(
            f"responses to another prompt are needed, but all {len(groups)} rows have the same one; "
            "give data with at least two different prompts, or choose a loss that needs no mismatched responses"
        )
    contents = [_hash(seed, group.prompt, *group.responses) for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-count[prompts[i]], prompts[i], contents[i]))
    largest, n = max(count.values()), len(groups)
    result, cut = list(groups), 0
    for place, i in enumerate(order):
        giver = order[largest + place % (n - largest) if place < largest else (place + largest) % n]
        given = groups[giver].responses[int.from_bytes(contents[giver]) % len(groups[giver].responses)]
        room = max_length - len(groups[i].prompt)
        if room < 1:
            raise DataError(f"{groups[i].origin}: the prompt alone fills max_length {max_length}; raise it")
        cut += len(given) > room
        result[i] = replace(groups[i], responses=(*groups[i].responses, given[:room]), mismatched=1)
    return result, cut


def _hash(seed: int, *texts: Ids) -> bytes:
    """A key that is the same wherever the ids are, and another one under another seed."""
    state = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for ids in texts:
        state.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
    return state.digest()
