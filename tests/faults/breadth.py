"""PPO on conversations and on padded rows, done as if they were plain texts and packed ones."""

from __future__ import annotations

from fault import Fault

_TESTS = "tests/recipes/test_ppo_breadth.py -k"

FAULTS = [
    Fault(
        "breadth: a conversation is asked without opening the assistant's turn",
        "src/preftune/models/generate.py",
        "add_generation_prompt=True",
        "add_generation_prompt=False",
        f"{_TESTS} through_the_template",
    ),
    Fault(
        "breadth: PPO packs rows for a model that cannot read them",
        "src/preftune/parts/ppo_parts.py",
        "replace(batching, packed=packed,",
        "replace(batching, packed=True,",
        f"{_TESTS} 'plain_model and padded_only and texts and rloo'",
    ),
]
