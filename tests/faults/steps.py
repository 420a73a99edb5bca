"""Steps whose gradient depends on how they are cut, runs that do not continue, weights that do not move."""

from __future__ import annotations

from fault import Fault

_STEP = "src/preftune/parts/step.py"
_OBJECTIVE = "src/preftune/equations/objective.py"
_COMMON = "src/preftune/parts/common.py"
_OPTIM = "src/preftune/engine/optim.py"
_ROUNDING = "src/preftune/engine/rounding.py"
_CHECKPOINT = "src/preftune/engine/checkpoint.py"
_SPLIT = "tests/parts/test_step.py -k"
_MEMORY = "tests/recipes/test_objectives.py -k"
_WEIGHTS = "tests/engine/test_optim.py -k"
_BITS = "tests/engine/test_rounding.py -k"

FAULTS = [
    Fault(
        "step: the denominator is that of the micro-batch",
        _STEP,
        "share = objective.share(found, totals)",
        "share = objective.share(found, objective.totals(batch.groups)) / len(batches)",
        f'{_SPLIT} "any_split and hinge"',
    ),
    Fault(
        "step: micro-batches are added up instead of averaged",
        _STEP,
        "share = objective.share(found, totals)",
        "share = objective.share(found, objective.totals(batch.groups))",
        f'{_SPLIT} "any_split and hinge"',
    ),
    Fault(
        "step: sorted per micro-batch",
        _STEP,
        "if objective.coupled and (len(batches) > 1 or world.size > 1):",
        "if False:",
        f'{_SPLIT} "any_split and aot_unpaired"',
    ),
    Fault(
        "step: z0 per micro-batch",
        _STEP,
        "if objective.coupled and (len(batches) > 1 or world.size > 1):",
        "if False:",
        f'{_SPLIT} "any_split and kto"',
    ),
    Fault(
        "step: in two passes every micro-batch gets the gradients of the first",
        _STEP,
        "ends[unit] = starts[unit] + len(part)",
        "ends[unit], starts[unit] = len(part), 0",
        f'{_SPLIT} "any_split and aot_unpaired"',
    ),
    Fault(
        "step: in two passes the running mean is a step late",
        _STEP,
        "    state = objective.updated(whole, groups, state)\n    found = objective.evaluate(whole, groups, state)\n",
        "    found = objective.evaluate(whole, groups, state)\n    state = objective.updated(whole, groups, state)\n",
        f'{_SPLIT} "any_split and bco_pair"',
    ),
    Fault(
        "objective: the update per micro-batch lets later ones see more than earlier ones",
        _OBJECTIVE,
        "return any(term.loss.loss.coupled or term.loss.loss.update for term in self.terms)",
        "return any(term.loss.loss.coupled for term in self.terms)",
        f'{_SPLIT} "any_split and bco_pair"',
    ),
    Fault(
        "objective: coefficients are ignored",
        _OBJECTIVE,
        "return self.term.coefficient * (self.values * self.inputs.weight).sum() / total",
        "return (self.values * self.inputs.weight).sum() / total",
        f"{_SPLIT} written_out",
    ),
    Fault(
        "objective: weights of the rows are ignored",
        _OBJECTIVE,
        "return self.term.coefficient * (self.values * self.inputs.weight).sum() / total",
        "return self.term.coefficient * self.values.sum() / total",
        f"{_SPLIT} written_out",
    ),
    Fault(
        "objective: rankings and labels are divided by the number of pairs",
        _OBJECTIVE,
        "return float(sum(groups[i].weight for i in self.owners(groups)))",
        "return total_weight(groups)",
        f"{_SPLIT} written_out",
    ),
    Fault(
        "objective: only the leading term is trained",
        _OBJECTIVE,
        "zip(found, totals, strict=True)]).sum()",
        "zip(found, totals, strict=True)])[0]",
        f"{_SPLIT} sum_of_its_terms",
    ),
    Fault(
        "sft: the mean over tokens is taken per micro-batch",
        "src/preftune/recipes/sft.py",
        "(values_C * token_weights(batch)).sum() / step_tokens",
        "(values_C * token_weights(batch)).sum() / len(values_C)",
        "tests/recipes/test_sft_split.py",
    ),
    Fault(
        "evaluation: what a loss remembers moves with held-out rows",
        "src/preftune/recipes/dpo.py",
        "        meter.add(ordered, logps, objective.evaluate(logps, ordered, state), state)\n",
        "        for name, memory in objective.updated(logps, ordered, state).items():\n"
        "            state[name].update(memory)\n"
        "        meter.add(ordered, logps, objective.evaluate(logps, ordered, state), state)\n",
        "tests/recipes/test_memory.py",
    ),
    Fault(
        "resume: what a loss remembers is not in the checkpoint",
        _COMMON,
        '"memory": dict(self.memory)',
        '"memory": {name: dict.fromkeys(of, 0.0) for name, of in self.memory.items()}',
        f'{_MEMORY} "remembers and bco_pair"',
    ),
    Fault(
        "resume: a moved reference starts again where it stood at first",
        _COMMON,
        "            tensor.copy_(checkpoint.tensors[name])\n",
        "            pass\n",
        f'{_MEMORY} "remembers and that_moves"',
    ),
    Fault(
        "resume: the rows of the first steps are seen again",
        _COMMON,
        "epoch, position = divmod(self.step, self.plan.steps_per_epoch)",
        "epoch, position = divmod(self.step - saved, self.plan.steps_per_epoch)",
        f'{_MEMORY} "remembers and bco_pair"',
    ),
    Fault(
        "resume: the optimizer's moments are forgotten",
        _OPTIM,
        "            if kinds:\n",
        "            if False:\n",
        "tests/engine/test_optim_resume.py",
    ),
    Fault(
        "resume: masters are taken from the rounded weights",
        _OPTIM,
        'weight.master.copy_(tensors[f"masters/{weight.name}"])',
        'weight.master.copy_(tensors[f"weights/{weight.name}"])',
        "tests/engine/test_optim_resume.py",
    ),
    Fault(
        "optimizer: bf16 weights are rounded to nearest and do not move",
        _OPTIM,
        "stochastic_round_(out, source, seed=seed, step=step, name=self.name + what, first=first)",
        "out.copy_(source)",
        f"{_WEIGHTS} stochastic_rounding",
    ),
    Fault(
        "optimizer: only the last micro-batch of a bf16 model counts",
        _OPTIM,
        "_add(self.master.grad, parameter.grad)",
        "self.master.grad.copy_(parameter.grad)",
        f"{_WEIGHTS} many_micro_batches",
    ),
    Fault(
        "optimizer: gradients are kept from step to step",
        _OPTIM,
        "        self.zero_grad()\n        return norm\n",
        "        return norm\n",
        f"{_WEIGHTS} forgotten",
    ),
    Fault(
        "optimizer: biases and norms decay too",
        _OPTIM,
        '{"params": others, "weight_decay": 0.0}',
        '{"params": others, "weight_decay": weight_decay}',
        f"{_WEIGHTS} plain_optimizer",
    ),
    Fault(
        "optimizer: a gradient that is not finite is applied",
        _OPTIM,
        "        if bad:\n            raise NotFinite(",
        "        if False:\n            raise NotFinite(",
        f"{_WEIGHTS} not_finite",
    ),
    Fault(
        "rounding: to nearest",
        _ROUNDING,
        "bits.add_(values.view(torch.int32))",
        "bits.fill_(32768).add_(values.view(torch.int32))",
        f"{_BITS} own_probability",
    ),
    Fault(
        "rounding: towards zero",
        _ROUNDING,
        "bits.add_(values.view(torch.int32))",
        "bits.fill_(0).add_(values.view(torch.int32))",
        f"{_BITS} own_probability",
    ),
    Fault(
        "rounding: the same bits at every step",
        _ROUNDING,
        "SeedSequence((seed % 2**64, step, _hash(name)))",
        "SeedSequence((seed % 2**64, 0, _hash(name)))",
        f"{_BITS} repeated_and_differ",
    ),
    Fault(
        "rounding: the same bits for every parameter",
        _ROUNDING,
        "SeedSequence((seed % 2**64, step, _hash(name)))",
        "SeedSequence((seed % 2**64, step, 0))",
        f"{_BITS} repeated_and_differ",
    ),
    Fault(
        "rounding: NaN may become a number",
        _ROUNDING,
        "rounded.masked_fill_(values.isnan(), torch.nan)",
        "pass",
        f"{_BITS} nan_and_infinity",
    ),
    Fault(
        "checkpoint: altered bytes are not noticed",
        _CHECKPOINT,
        'if hashlib.file_digest(file, "sha256").hexdigest() != wanted["sha256"]:',
        "if False:",
        "tests/engine/test_checkpoint.py -k damaged_checkpoint",
    ),
    Fault(
        "optimizer: what is left after whole pieces does not count in the norm",
        _OPTIM,
        "dim=1), flat[whole:]]",
        "dim=1)]",
        f"{_WEIGHTS} every_element",
    ),
    Fault(
        "checkpoint: a manifest of another step is taken",
        _CHECKPOINT,
        'if manifest["step"] != step:',
        "if False:",
        "tests/engine/test_checkpoint.py -k another_step",
    ),
    Fault(
        "checkpoint: the oldest whole one is used",
        _CHECKPOINT,
        "for step, name in reversed(names):",
        "for step, name in names:",
        "tests/engine/test_checkpoint.py -k newest",
    ),
    Fault(
        "checkpoint: torch's random numbers start anew",
        _CHECKPOINT,
        '    torch.set_rng_state(_from_text(state["torch"]))\n',
        "",
        "tests/engine/test_checkpoint.py -k random_states",
    ),
    Fault(
        "run: a stage inside of another one tells its own way to go on",
        "src/preftune/engine/run.py",
        'if "resume" in self.card.config and Run._open == 1 else',
        'if "resume" in self.card.config else',
        "tests/recipes/test_quickstart.py -k called_again",
    ),
]
