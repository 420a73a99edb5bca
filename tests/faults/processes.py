"""Several processes that train something else than one would, or wait for somebody who is gone."""

from __future__ import annotations

from fault import Fault

_PARALLEL = "src/preftune/engine/parallel.py"
_WATCH = "src/preftune/engine/watch.py"
_OPTIM = "src/preftune/engine/optim.py"
_STEP = "src/preftune/parts/step.py"
_METERS = "src/preftune/parts/meters.py"
_SHARES = "tests/engine/test_parallel.py -k"
_TOGETHER = 'tests/parallel/test_trajectories.py -m "not slow" -x -k'
_ENDS = 'tests/parallel/test_ends.py -m "not slow" -k'

FAULTS = [
    Fault(
        "processes: every rank computes the whole reference",
        "src/preftune/parts/reference.py",
        "        mine = batching.share(some)\n",
        "        mine = list(some)\n",
        f"{_TOGETHER} part_of_the_reference",
    ),
    Fault(
        "processes: every rank does all of the work",
        _PARALLEL,
        "            if rank == self.rank:\n",
        "            if True:\n",
        f"{_SHARES} partition",
    ),
    Fault(
        "processes: items are dealt out without regard to their cost",
        _PARALLEL,
        "(load + costs[i], rank))",
        "(load + 1, rank))",
        f"{_SHARES} equal_in_cost_and",
    ),
    Fault(
        "processes: a rank without gradient leaves the sum to the others",
        _OPTIM,
        "moved = [w for w, count in zip(self._weights, reached.tolist(), strict=True) if count]\n        for",
        "moved = [w for w in self._weights if w.master.grad is not None]\n        for",
        f'{_TOGETHER} "one_pair_a_step"',
    ),
    Fault(
        "processes: gradients stay each rank's own",
        _OPTIM,
        'self._world.add_up([_gradient(w) for w in moved], f"the gradients of step {step}")',
        "pass",
        f'{_TOGETHER} "sft"',
    ),
    Fault(
        "processes: the denominator is that of the rank's share",
        _STEP,
        "totals = objective.totals(groups if step is None else step)",
        "totals = objective.totals(groups)",
        f'{_TOGETHER} "dpo"',
    ),
    Fault(
        "processes: a coupled loss sees its own rank's rows in another order",
        _STEP,
        "before = [groups[i] for _, order in parts[: world.rank] for i in order]",
        "before: list[TokenGroup] = []",
        f'{_TOGETHER} "coupled"',
    ),
    Fault(
        "processes: metrics are those of rank 0's rows",
        _METERS,
        "self._parts, self.rows = [table.T], len(table)",
        "self.rows = len(table)",
        f'{_TOGETHER} "sft"',
    ),
    Fault(
        "processes: the last failure is told instead of the first",
        _WATCH,
        'self._store.compare_set(_FAILED, "-", mine)',
        "(self._store.set(_FAILED, mine), mine.encode())[1]",
        f"{_SHARES} first_failure",
    ),
    Fault(
        "processes: what one rank did for lack of memory stays its own",
        "src/preftune/engine/run.py",
        "self._untold.append(text)",
        "pass",
        "tests/parallel/test_little_memory.py -k said_and_kept",
    ),
    Fault(
        "processes: what one rank did in the last step stays its own",
        "src/preftune/engine/run.py",
        '            self._share("the end of the run")\n',
        "            pass\n",
        "tests/engine/test_run.py -k its_last_step",
    ),
    Fault(
        "processes: a broken connection is known to its two ends alone",
        _WATCH,
        "LOST_AFTER if self._store.check([_BROKEN]) else DEAD_AFTER",
        "DEAD_AFTER",
        f"{_SHARES} rank_0_noticed_nothing",
    ),
    Fault(
        "processes: who waits suspects those that arrived",
        _WATCH,
        "int(entered) < self._entered:",
        "int(entered) >= self._entered:",
        f"{_SHARES} does_not_come",
    ),
    Fault(
        "processes: a signal to one rank stops that rank alone",
        "src/preftune/engine/run.py",
        'max(self._share(f"the end of step {self._step}"))',
        'self._share(f"the end of step {self._step}")[0]',
        f"{_ENDS} continued",
    ),
]
