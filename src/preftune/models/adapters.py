"""LoRA and DoRA (arXiv 2106.09685, 2402.09353) by peft: frozen weights W, a trained change of rank r in each layer.

    LoRA    W x + (alpha / r) B A x                        A drawn, B = 0: at first the base, bit for bit
    DoRA    m (W + (alpha / r) B A) / |W + ...|  x         m = |W| per output: at first the base, up to rounding

peft's layers are put into the transformers model itself, so it stays that model: packing, vocabulary head, generation
and gradients are those of any other, and what is frozen costs no weight gradient. Adapter weights have the dtype of
the model's: in bfloat16 they get float32 masters and stochastic rounding like every trained weight, and what is saved
is what was trained, no float32 product slows the forward. There is no dropout on adapters: log-probs are exact.

A folder holds adapter_model.safetensors, whose metadata names the base by content, and adapter_config.json; peft,
transformers and vLLM (LoRA only) read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from preftune.errors import ArtifactError, ConfigError
from preftune.models.folder import ADAPTER, base_of, read_json

__all__ = [
    "Adapter",
    "AdapterSpec",
    "Base",
    "SavedAdapter",
    "adapter_of",
    "adapter_sha256",
    "attach",
    "attach_saved",
    "copy_beside",
    "merged_state",
    "read_adapter",
    "write_adapter",
]

TENSORS = "adapter_model.safetensors"
_NAME = "default"
_PREFIX = "base_model.model."  # peft's, before every name in the file
# Keys of adapter_config.json that say where and how strongly the change acts.
_SETTINGS = (
    "r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
    "layers_to_transform", "layers_pattern", "exclude_modules",
)  # fmt: skip
# Keys without influence on a trained adapter. Any other key that is set is refused: it would change the function.
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "task_type", "runtime_config",
})  # fmt: skip
# First values that leave the base as it is; the others (pissa, olora, ...) train beside a changed base.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A change of weights to be trained."""

    rank: int
    alpha: float
    """The change is B A times alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of the linear layers to change; none: all of the decoder."""
    dora: bool = False


@dataclass(frozen=True, slots=True)
class Base:
    """The frozen model below an adapter."""

    name: str
    """Absolute folder, or hub name."""
    weights_sha256: str
    """Of its tensors as loaded; empty where it is not known."""
    dtype: str
    """In which they were loaded: the hash is that of one dtype."""
    quantize: str = "none"


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """What a model with an adapter carries: its base and peft's settings."""

    base: Base
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class SavedAdapter:
    """An adapter folder as read."""

    folder: Path
    adapter: Adapter
    tensors: Mapping[str, Tensor]
    """By their names in the file."""


def attach(model: Any, spec: AdapterSpec, base: Base, *, seed: int) -> int:
    """Freeze `model`, change its linear layers by a fresh adapter, return the number of layers.

    A is uniform in +-1 / sqrt(its inputs), drawn in float32 from `seed` alone whatever the device. Raises ConfigError
    when a target is no linear layer of the decoder.
    """
    layers = {name: module for name, module in _linear_layers(model)}
    there = sorted({name.rpartition(".")[2] for name in layers})
    unknown = sorted(set(spec.targets) - set(there))
    if unknown:
        raise ConfigError(f"lora_targets: {unknown[0]} is no linear layer of this model; it has {', '.join(there)}")
    targets = sorted(set(spec.targets)) or there  # a set in peft, and in no fixed order in its file
    chosen = [module for name, module in layers.items() if name.rpartition(".")[2] in targets]
    settings = {
        "r": spec.rank, "lora_alpha": int(spec.alpha) if spec.alpha.is_integer() else spec.alpha,
        "target_modules": targets, "use_dora": spec.dora,
        "fan_in_fan_out": all(isinstance(module, Conv1D) for module in chosen),
    }  # fmt: skip
    _inject(model, Adapter(base, settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in _parameters(model):
        if ".lora_A." in name:
            drawn = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).mul_(parameter.shape[1] ** -0.5)
            parameter.data.copy_(drawn)
    return len(chosen)


def attach_saved(model: Any, saved: SavedAdapter, *, base_sha256: str | None) -> tuple[str, ...]:
    """Freeze `model` and give it the saved adapter, trainable; what is worth knowing, one line each.

    `base_sha256` is the hash of the model's weights as loaded, None where it cannot be compared.
    Raises ArtifactError when the base is another one than the adapter was trained on, or tensors do not fit.
    """
    base, dtype = saved.adapter.base, _dtype_name(model)
    comparable = base_sha256 is not None and base.weights_sha256 and base.dtype == dtype
    if comparable and base_sha256 != base.weights_sha256:
        raise ArtifactError(
            f"{saved.folder}: {base.name} does not hold the weights this adapter was trained on any more "
            f"(sha256 {base_sha256 or ''!s:.12} instead of {base.weights_sha256:.12}); restore them, or train again"
        )
    # Names are kept; what the hash is of is the base as it is now.
    now = Base(base.name, base_sha256 or base.weights_sha256, dtype, base.quantize)
    _inject(model, Adapter(now, saved.adapter.settings))
    own = {_in_file(name): parameter for name, parameter in _parameters(model)}
    missing, unknown = sorted(own.keys() - saved.tensors.keys()), sorted(saved.tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & saved.tensors.keys() if own[n].shape != saved.tensors[n].shape]
    for what, names in (("are missing", missing), ("fit nowhere", unknown), ("have another shape", shapes)):
        if names:
            raise ArtifactError(f"{saved.folder}: {len(names)} adapter weights {what} in {base.name}: {min(names)}")
    for name, parameter in own.items():
        parameter.data.copy_(saved.tensors[name])
    unproven = (
        "" if comparable else f"; that {base.name} is its base as trained ({base.dtype or 'unknown'}) is not checked"
    )
    return (f"adapter of {saved.folder}, rank {saved.adapter.settings['r']}, base {base.name}{unproven}",)


def adapter_of(model: Any) -> Adapter | None:
    """The adapter `model` carries."""
    return getattr(model, "preftune_adapter", None)


def adapter_sha256(model: Any) -> str:
    """Of base, settings and every adapter weight: names the function that an adapted model computes."""
    adapter = adapter_of(model)
    assert adapter is not None
    facts = [adapter.base.weights_sha256, dict(adapter.settings)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def copy_beside(model: nn.Module) -> Any:
    """A copy of `model` as it is now; of an adapted model only what is trained is new, the frozen weights are shared.

    So a reference or a critic beside an adapted policy costs no second base, and the reference is the exact starting
    weights whether the adapter was fresh or not: no adapter is ever switched off.
    """
    shared = [p for p in model.parameters() if not p.requires_grad] if adapter_of(model) else []
    return deepcopy(model, {id(p): p for p in shared})


def merged_state(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of the plain model with the same function: every change added to its weight in float32, then rounded.

    `state` replaces what the model itself holds, where that is parts. Raises ConfigError when the frozen weights are
    quantised.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    if adapter.base.quantize != "none":
        raise ConfigError(
            f"the adapter was trained on {adapter.base.quantize} weights of {adapter.base.name}, and a merge would "
            "round it away or change the model: write the dequantised base to a folder (transformers: "
            "model.dequantize().save_pretrained), name it in adapter_config.json, then merge"
        )
    state = model.state_dict() if state is None else state
    changed: dict[str, Tensor] = {}
    for name, layer in _adapted_layers(model):
        dtype = layer.get_base_layer().weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        whole = {id(p): state[f"{name}.{key}"].to(wide, copy=True) for key, p in layer.named_parameters()}
        alone = deepcopy(layer, {key: nn.Parameter(weight, requires_grad=False) for key, weight in whole.items()})
        alone.merge()
        changed |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in alone.get_base_layer().state_dict().items()}
    plain = {name.replace(".base_layer.", "."): t for name, t in state.items() if ".lora_" not in name}
    return {**plain, **changed}


def read_adapter(folder: Path) -> SavedAdapter:
    """An adapter folder, ours or another tool's. Raises ArtifactError for what would not give the trained function."""
    config, path = read_json(folder / ADAPTER), folder / TENSORS
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{folder / ADAPTER}: peft_type {config.get('peft_type')!r} is not served, only LORA is")
    if config.get("init_lora_weights", True) not in _BEGINNINGS:
        raise ArtifactError(
            f"{folder / ADAPTER}: init_lora_weights {config['init_lora_weights']!r} changed the base under it; "
            "merge it with the tool that made it"
        )
    further = config.keys() - {*_SETTINGS, *_WITHOUT_EFFECT, "init_lora_weights", "bias"}
    set_keys = sorted(key for key in further if config[key]) + (
        ["bias"] if config.get("bias", "none") != "none" else []
    )
    if set_keys:
        raise ArtifactError(f"{folder / ADAPTER}: {set_keys[0]} is not served; merge it with the tool that made it")
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {TENSORS}; a pickled adapter is not read")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    base = Base(
        base_of(folder),
        facts.get("base_weights_sha256", ""),
        facts.get("base_dtype", ""),
        facts.get("base_quantize", "none"),
    )
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    return SavedAdapter(folder, Adapter(base, settings), tensors)


def write_adapter(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapter of `model` into `folder`, which need not be there; `state` as in `merged_state`."""
    adapter = adapter_of(model)
    assert adapter is not None
    folder.mkdir(parents=True, exist_ok=True)
    config = _peft().LoraConfig(
        **adapter.settings,
        base_model_name_or_path=adapter.base.name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    content = {k: sorted(v) if k == "target_modules" else v for k, v in read_json(folder / ADAPTER).items()}
    (folder / ADAPTER).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    base = adapter.base
    facts = {"base_weights_sha256": base.weights_sha256, "base_dtype": base.dtype, "base_quantize": base.quantize}
    save_file(_tensors(model, state), folder / TENSORS, metadata={"format": "pt", **facts})


def _inject(model: Any, adapter: Adapter) -> None:
    """peft's layers into `model`: trainable, of its dtype, everything else frozen."""
    peft = _peft()
    config = peft.LoraConfig(**adapter.settings, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):  # peft draws what is overwritten here
        try:
            peft.inject_adapter_in_model(config, model, _NAME)
        except ValueError as error:
            raise ArtifactError(f"the adapter does not fit this model: {str(error).splitlines()[0]}") from error
    inside = {id(module) for _, module in _linear_layers(model)}
    for name, layer in _adapted_layers(model):
        if id(layer) not in inside and id(layer.get_base_layer()) not in inside:
            raise ArtifactError(f"the adapter changes {name}, which is no linear layer of the decoder: merge it first")
    model.requires_grad_(False)
    for _, parameter in _parameters(model):
        parameter.data = parameter.data.to(model.dtype)
        parameter.requires_grad_(True)
    model.preftune_adapter = adapter


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer below the head, by its name in the whole model; inside peft's layers, their base layer."""
    inside = {id(module) for module in model.base_model.modules()}
    heads = {id(model.get_output_embeddings())}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside - heads and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's own."""
    return ((name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name)


def _tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    own = dict(_parameters(model))
    return {_in_file(name): (state or own)[name].detach().cpu().contiguous() for name in own}


def _in_file(name: str) -> str:
    """model.layers.0.x.lora_A.default.weight -> base_model.model.model.layers.0.x.lora_A.weight, as peft has it."""
    bare = name.replace(f".{_NAME}.", ".")
    return _PREFIX + (bare.removesuffix(".weight") if ".lora_magnitude_vector." in name else bare)


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"adapters need peft, which cannot be imported ({error}): pip install 'preftune[peft]'"
        ) from None
    return peft
