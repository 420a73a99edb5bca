"""What is larger than a step: held-out sets in parts, numbers of several ranks, rollouts that do not fit, forecasts."""

from __future__ import annotations

from fault import Fault

FAULTS = [
    Fault(
        "held-out: the parts after the first are left out",
        "src/preftune/parts/common.py",
        "for start in range(0, len(groups), AT_ONCE):",
        "for start in range(0, min(len(groups), AT_ONCE), AT_ONCE):",
        "tests/parts/test_held_out.py -k sft",
    ),
    Fault(
        "metrics: the groups of all ranks count from the first",
        "src/preftune/parts/meters.py",
        "starts = [sum(count for _, count, _ in told[:rank]) for rank in range(world.size)]",
        "starts = [0] * world.size",
        "tests/parts/test_meters.py -k 'one_message and preferences'",
    ),
    Fault(
        "metrics: tokens are those of this rank",
        "src/preftune/parts/meters.py",
        "self._held = summed(joined(world, [self._collected], held(batches)))",
        "self._held = held(batches)\n        joined(world, [self._collected], [])",
        "tests/parts/test_meters.py -k 'one_message and demonstrations'",
    ),
    Fault(
        "ppo: gradients of an attempt without memory stay",
        "src/preftune/parts/policy_step.py",
        "partial(_forget, policy, critic)",
        "lambda: None",
        "tests/parts/test_policy_memory.py -k 'done_anew and ppo'",
    ),
    Fault(
        "outlook: the time of a step is told as that of the run",
        "src/preftune/parts/outlook.py",
        "a step, {spoken(seconds, steps)} for {steps} steps",
        "a step, {spoken(seconds)} for {steps} steps",
        "tests/parts/test_outlook.py -k dpo",
    ),
    Fault(
        "outlook: a reward model is said to meet the vocabulary",
        "src/preftune/parts/outlook.py",
        "shape = replace(shape, vocabulary=1)",
        "pass",
        "tests/parts/test_outlook.py -k reward",
    ),
    Fault(
        "columns: pages of the tokens stay mapped",
        "src/preftune/data/token_file.py",
        "self._mapped.madvise(mmap.MADV_DONTNEED)",
        "pass",
        "tests/data/test_token_file.py -k no_page",
    ),
    Fault(
        "shares: a scored token costs what a fed one does",
        "src/preftune/parts/common.py",
        "return flops(self.shape, Work(fed, 0 if self.feed_last else work.scored, work.attended))",
        "return flops(self.shape, Work(fed, 0, work.attended))",
        "tests/parts/test_shares.py -k weighs_what",
    ),
]
