"""Answers lost, doubled or changed where memory gives out while they are drawn; a step of theirs foretold wrongly."""

from __future__ import annotations

from fault import Fault

_GENERATE = "src/preftune/models/generate.py"
_FITTING = "src/preftune/parts/fitting.py"
_OUTLOOK = "src/preftune/parts/outlook.py"
_TESTS = "tests/parts/test_drawing_memory.py -k"
_FORETOLD = "tests/parts/test_outlook.py -k"

FAULTS = [
    Fault(
        "drawing: the second half of a prompt's answers repeats the first",
        _GENERATE,
        "return [_Part(self.rows, which) for which in (self.which[:half], self.which[half:])]",
        "return [_Part(self.rows, which) for which in (self.which[:half], self.which[: len(self.which) - half])]",
        f'{_TESTS} "in_halves_and_is_the_same"',
    ),
    Fault(
        "drawing: halves change their order",
        _GENERATE,
        "left += reversed(part.halves())",
        "left += part.halves()",
        f'{_TESTS} "in_halves_and_is_the_same"',
    ),
    Fault(
        "drawing: batch_size does not reach below the answers to one prompt",
        _GENERATE,
        "_fitting(_Part(rows, range(n)), compute, batch_size, budget, called)",
        "_fitting(_Part(rows, range(n)), compute, max(batch_size, n), budget, called)",
        f"{_TESTS} setting_it_proposes",
    ),
    Fault(
        "drawing: every RuntimeError is taken for a lack of memory",
        _FITTING,
        "        return out_of_memory(error)\n",
        "        return True\n",
        f"{_TESTS} other_errors",
    ),
    Fault(
        "drawing: the length it proposes is one too long",
        _FITTING,
        "set --max_tokens {drawn}",
        "set --max_tokens {drawn + 1}",
        f"{_TESTS} one_answer_that",
    ),
    Fault(
        "outlook: PPO learns from a rollout once",
        _OUTLOOK,
        "(cfg.ppo_epochs, cfg.minibatches) if critic else (1, 1)",
        "(1, cfg.minibatches) if critic else (1, 1)",
        f"{_FORETOLD} flops_that_torch_counts",
    ),
    Fault(
        "outlook: the reference measures for nothing",
        _OUTLOOK,
        "for shape in (policy, reference, *critic))",
        "for shape in (policy, *critic))",
        f"{_FORETOLD} flops_that_torch_counts",
    ),
    Fault(
        "outlook: nobody counts the critic's optimizer",
        _OUTLOOK,
        "sum(one.masters + one.moments for one in held)",
        "held[0].masters + held[0].moments",
        f"{_FORETOLD} three_models",
    ),
    Fault(
        "outlook: every step says what the first one took",
        _OUTLOOK,
        "if first and left:",
        "if left:",
        f"{_FORETOLD} foretells",
    ),
]
