"""Adapters that begin elsewhere, share what they must not, are saved under other names or merged as something else."""

from __future__ import annotations

from fault import Fault

_ADAPTERS = "src/preftune/models/adapters.py"
_LOAD = "src/preftune/models/load.py"
_HEAD = "src/preftune/models/value_head.py"
_REFERENCE = "src/preftune/parts/reference.py"
_SECTIONS = "src/preftune/config/sections.py"
_MODEL = "tests/models/test_adapters.py -k"
_FOLDERS = "tests/models/test_adapter_folders.py -k"
_TRAINING = "tests/recipes/test_adapters_training.py -k"

FAULTS = [
    Fault(
        "adapter: both factors drawn, so a fresh one is not its base",
        _ADAPTERS,
        'if ".lora_A." in name:',
        'if ".lora_" in name:',
        f'{_MODEL} "fresh and Llama"',
    ),
    Fault(
        "adapter: weights stay in float32 on a bfloat16 model",
        _ADAPTERS,
        "parameter.data = parameter.data.to(model.dtype)",
        "parameter.data = parameter.data.float()",
        f'{_MODEL} "to_the_bit and Llama"',
    ),
    Fault(
        "adapter: a copy beside the policy moves with it",
        _ADAPTERS,
        "if not p.requires_grad] if adapter_of(model) else []",
        "] if adapter_of(model) else []",
        f"{_MODEL} copy_beside",
    ),
    Fault(
        "adapter: the critic trains the frozen weights too",
        _HEAD,
        "if adapter_of(critic) is None:",
        "if True:",
        f"{_MODEL} critic",
    ),
    Fault(
        "adapter: magnitudes under a name that peft does not read",
        _ADAPTERS,
        'bare.removesuffix(".weight") if ".lora_magnitude_vector." in name else bare',
        "bare",
        f'{_FOLDERS} "peft_reads_it and dora"',
    ),
    Fault(
        "merge: the change is left out",
        _ADAPTERS,
        "        alone.merge()\n",
        "",
        f"{_FOLDERS} merged_weights",
    ),
    Fault(
        "merge: added in bfloat16",
        _ADAPTERS,
        "torch.promote_types(dtype, torch.float32)",
        "dtype",
        f"{_FOLDERS} merged_weights",
    ),
    Fault(
        "adapter: put on whatever its base has become",
        _ADAPTERS,
        "if comparable and base_sha256 != base.weights_sha256:",
        "if False:",
        f"{_FOLDERS} another_base",
    ),
    Fault(
        "adapter: hashed as its base, so that the reference is the base's cached one",
        _LOAD,
        "weights_sha256=adapter_sha256(loaded.model)",
        "weights_sha256=loaded.weights_sha256",
        f'{_TRAINING} "where_it_starts and dpo"',
    ),
    Fault(
        "adapter: checkpoints of a moving reference hold the frozen weights",
        _REFERENCE,
        'if ".lora_" in name)',
        "if name)",
        f'{_TRAINING} "same_bits and dora"',
    ),
    Fault(
        "adapter: another strength than the one described",
        _SECTIONS,
        "2.0 * self.lora_rank if",
        "1.0 * self.lora_rank if",
        f"{_TRAINING} trajectory",
    ),
]
