"""Sharded weights that are summed, drawn, gathered or saved otherwise than the weights of one process."""

from __future__ import annotations

from fault import Fault

_SHARDING = "src/preftune/engine/sharding.py"
_OPTIM = "src/preftune/engine/optim.py"
_ROUNDING = "src/preftune/engine/rounding.py"
_CHECKPOINT = "src/preftune/engine/checkpoint.py"
_COMMON = "src/preftune/parts/common.py"
_BITS = "tests/engine/test_rounding.py -k"
_SHARDED = 'tests/parallel/test_sharded.py -m "not slow" -x -k'

FAULTS = [
    Fault(
        "sharded: the mesh, which torch keeps, keeps the group and its threads",
        _SHARDING,
        'getattr(mesh, "_pg_registry", {}).clear()',
        "pass",
        f"{_SHARDED} no_thread",
    ),
    Fault(
        "sharded: what is left of a model keeps the group and its threads",
        "src/preftune/engine/parallel.py",
        "        gc.collect()  # what is left of a sharded model holds the group, whose threads end with it\n",
        "",
        f"{_SHARDED} no_thread",
    ),
    Fault(
        "sharded: gradients are the mean of the ranks'",
        _SHARDING,
        "        sharded.set_gradient_divide_factor(1.0)  # a sum: denominators belong to the step\n",
        "",
        f'{_SHARDED} "trajectory and sft"',
    ),
    Fault(
        "sharded: the norm is that of a rank's own rows",
        _OPTIM,
        'self._world.add_up([squares], f"the gradient norm of step {step}")',
        "pass",
        f'{_SHARDED} "trajectory and sft"',
    ),
    Fault(
        "sharded: every part is drawn with the bits of the first",
        _OPTIM,
        "first = self.rows.first * self.compute[:1].numel() if self.rows else 0",
        "first = 0",
        f"{_SHARDED} compute_copies",
    ),
    Fault(
        "rounding: a part begins at the next whole word of bits",
        _ROUNDING,
        "raw.view(np.uint16)[skip : skip + len(bits)]",
        "raw.view(np.uint16)[: len(bits)]",
        f"{_BITS} parts_of_a_tensor",
    ),
    Fault(
        "sharded: what was gathered before a checkpoint was read is computed with",
        _OPTIM,
        "        free(self._model)\n",
        "",
        f"{_SHARDED} gathered_anew",
    ),
    Fault(
        "sharded: a rank without rows does not take part",
        _COMMON,
        "* (most - len(batches))",
        "* 0",
        f'{_SHARDED} "trajectory and idle_rank"',
    ),
    Fault(
        "sharded: the saved parts are read one after the other, wherever they belong",
        _CHECKPOINT,
        "first, of = parts.get(name, (0, count))",
        "first, of = 0, parts.get(name, (0, count))[1]",
        f"{_SHARDED} compute_copies",
    ),
    Fault(
        "sharded: rank 0 alone looks whether the parts are whole",
        _CHECKPOINT,
        "if i % self._world.size != self._world.rank:",
        "if i != self._world.rank:",
        f"{_SHARDED} missing_or_altered",
    ),
    Fault(
        "sharded: the model folder holds rank 0's rows",
        _SHARDING,
        "full_tensor()",
        "to_local()",
        f'{_SHARDED} "gathered and sft"',
    ),
    Fault(
        "offload: the parts stay on the device",
        _SHARDING,
        'CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()',
        "OffloadPolicy()",
        f"{_SHARDED} offload_holds",
    ),
    Fault(
        "offload: taken without shard, and ignored",
        "src/preftune/config/sections.py",
        "if self.offload and not self.shard:",
        "if False:",
        f"{_SHARDED} offload_without_shard",
    ),
    Fault(
        "offload: a resumed run must not change it",
        _COMMON,
        '"shard", "offload"}',
        '"shard"}',
        f"{_SHARDED} numbers_of_processes",
    ),
    Fault(
        "sharded: what is frozen is kept in float32 as if it were trained",
        _SHARDING,
        "if parameter.requires_grad and parameter.dtype == torch.bfloat16:",
        "if parameter.dtype == torch.bfloat16:",
        f"{_SHARDED} holds_its_share",
    ),
    Fault(
        "sharded: a reference is kept as if it learned",
        _COMMON,
        'if role not in ("model", "critic"):',
        "if False:",
        f"{_SHARDED} moved_reference",
    ),
    Fault(
        "sharded: of a moving reference rank 0's rows are saved as all",
        _COMMON,
        "self.optimizer.rows() | rows",
        "self.optimizer.rows()",
        f"{_SHARDED} one_process_ends",
    ),
    Fault(
        "sharded: of a critic rank 0's rows are saved as all",
        _COMMON,
        'rows |= {f"{name}/{key}": part for key, part in other.rows().items()}',
        "pass",
        f"{_SHARDED} one_process_ends",
    ),
    Fault(
        "sharded: an adapter folder is written from parts",
        "src/preftune/models/adapters.py",
        "save_file(_tensors(model, state)",
        "save_file(_tensors(model)",
        f"{_SHARDED} adapter_folder",
    ),
    Fault(
        "merge: into the model itself",
        "src/preftune/models/adapters.py",
        ".to(wide, copy=True)",
        ".to(wide)",
        "tests/models/test_adapters.py -k projected",
    ),
    Fault(
        "sharded: 4-bit weights are cut",
        "src/preftune/config/sections.py",
        'if self.shard and getattr(self, "quantize", "none") != "none":',
        "if False:",
        f"{_SHARDED} cannot_be_sharded",
    ),
    Fault(
        "sharded: a lean update draws every part with the bits of the first",
        _OPTIM,
        "first = self.rows.first * self.compute[:1].numel() if self.rows else 0",
        "first = 0",
        "tests/parallel/test_sharded_updates.py",
    ),
    Fault(
        "lean: the second moment is rounded to nearest and stands still",
        "src/preftune/engine/updates.py",
        'draw(state["exp_avg_sq"], square, what="/exp_avg_sq")',
        'state["exp_avg_sq"].copy_(square)',
        "tests/engine/test_updates.py -k second_moment",
    ),
    Fault(
        "lean: the step is added in bfloat16",
        "src/preftune/engine/updates.py",
        "    draw(weight, stepped)\n",
        "    weight.copy_(stepped)\n",
        "tests/engine/test_updates.py -k mean_of_lean",
    ),
]
