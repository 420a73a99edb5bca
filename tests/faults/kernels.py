"""Keys gathered wrongly, masks aligned wrongly, steps counted twice after a lack of memory."""

from __future__ import annotations

from fault import Fault

_KERNELS = "src/preftune/models/kernels.py"
_ATTENTION = "src/preftune/models/attention.py"
_FITTING = "src/preftune/parts/fitting.py"
_CHECKPOINTING = "src/preftune/models/checkpointing.py"
_PLAN = "tests/models/test_kernels.py -k"
_GOES_ON = 'tests/parts/test_fitting.py -k "goes_on and sft and backward"'

_LAST = "src/preftune/models/last_layer.py"
_SAME = "tests/models/test_last_layer.py"

FAULTS = [
    Fault(
        "last layer: a prompt token that predicts for two responses counts twice",
        _LAST,
        "out[0] * counted[:, None])",
        "out[0])",
        _SAME,
    ),
    Fault(
        "last layer: what was read of one row is taken for the next",
        _LAST,
        'self.at = getattr(keywords.get(KEYWORD), "read", None)',
        'self.at = getattr(keywords.get(KEYWORD), "read", self.at)',
        _SAME,
    ),
    Fault(
        "last layer: nothing is ever left out",
        _LAST,
        "len(self.at) >= inputs[0].shape[:-1].numel()",
        "len(self.at) >= 0",
        _SAME,
    ),
    Fault(
        "varlen: a further response does not get its prompt's keys",
        _KERNELS,
        "(*range(s.prefix_start, s.prefix_end), *range(s.start, s.end))",
        "(*range(s.start, s.end),)",
        f"{_PLAN} drawn_row",
    ),
    Fault(
        "varlen: a window is one token too wide",
        _ATTENTION,
        "layout.varlen(query.device), scale, window)",
        "layout.varlen(query.device), scale, window and window + 1)",
        f"{_PLAN} bottom_right",
    ),
    Fault(
        "varlen: a torch that is not asked about grouped heads is told all the same",
        _KERNELS,
        " if asks else {}",
        "",
        f"{_PLAN} 2_11",
    ),
    Fault(
        "checkpointing: the output of torch's variable-length kernel is not held",
        _CHECKPOINTING,
        '"torch_attn::_varlen_attn",',
        '"torch_attn::varlen_attn",',
        "tests/models/test_checkpointing.py -k variable_length",
    ),
    Fault(
        "flex: a further response does not see its prompt",
        _ATTENTION,
        "((segment[q] == segment[k]) & (k <= q)) | ((first[q] <= k) & (k < last[q]))",
        "(segment[q] == segment[k]) & (k <= q)",
        f"{_PLAN} block_mask",
    ),
    Fault(
        "flex: the softcap is forgotten",
        _KERNELS,
        "score_mod=capped",
        "score_mod=None",
        f"{_PLAN} block_mask",
    ),
    Fault(
        "memory: large buffers go back to the kernel after every use",
        "src/preftune/engine/memory.py",
        "if any(mallopt(_MMAP_THRESHOLD, limit) for limit in _LIMITS):",
        "if True:",
        "tests/engine/test_freed_memory.py",
    ),
    Fault(
        "memory: the kernels of a thousand shapes stay",
        "src/preftune/engine/memory.py",
        "    keep_kernels(tokens)\n",
        "",
        "tests/engine/test_freed_memory.py -k past_shapes",
    ),
    Fault(
        "memory: ideep keeps what oneDNN lets go",
        "src/preftune/engine/memory.py",
        'os.environ.setdefault("LRU_CACHE_CAPACITY", "1")',
        'os.environ.setdefault("LRU_CACHE_CAPACITY", "1024")',
        "tests/engine/test_freed_memory.py -k past_shapes",
    ),
    Fault(
        "memory: a glibc that refuses the larger limit is left with its own",
        "src/preftune/engine/memory.py",
        "_LIMITS = 1 << 30, 1 << 25",
        "_LIMITS = (1 << 30,)",
        "tests/engine/test_freed_memory.py -k refuses",
    ),
    Fault(
        "memory: the gradients of a failed attempt stay",
        _FITTING,
        "        forget()\n        _release()",
        "        _release()",
        _GOES_ON,
    ),
    Fault(
        "memory: the proposed length forgets that a row has several responses",
        _FITTING,
        "length = fitted // len(row.responses)",
        "length = fitted",
        "tests/parts/test_fitting.py -k proposes",
    ),
    Fault(
        "memory: the proposed length of answers forgets the prompt",
        _FITTING,
        "(fitted - len(row.prompt)) // len(row.responses)",
        "fitted // len(row.responses)",
        "tests/parts/test_fitting.py -k answers",
    ),
    Fault(
        "memory: of several rows the shortest is named",
        _FITTING,
        "longest = max(rows,",
        "longest = min(rows,",
        "tests/parts/test_fitting.py -k together",
    ),
    Fault(
        "memory: ppo proposes a setting that it does not have",
        "src/preftune/parts/ppo_parts.py",
        "budget=Budget(run.own_note, shorter=shorter_answers)",
        "budget=Budget(run.own_note)",
        "tests/parts/test_policy_memory.py -k names",
    ),
    Fault(
        "checkpointing: selective recomputes everything",
        _CHECKPOINTING,
        'if what == "selective":',
        "if False:",
        "tests/models/test_checkpointing.py",
    ),
    Fault(
        "a transformers before 5.23 is asked by the newer name",
        _CHECKPOINTING,
        "if newer else model.gradient_checkpointing_enable",
        "if newer else model.activation_checkpointing_enable",
        "tests/models/test_checkpointing.py -k refused",
    ),
]
