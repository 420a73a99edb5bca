"""A folder or hub name <-> a model and its tokenizer: complete or refused, the same bytes every time.

Nothing is guessed: a weight that is missing is not drawn at random, one that fits nowhere is not dropped, and what
was loaded is named by its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from preftune.errors import ArtifactError, RunError
from preftune.models.adapters import (
    adapter_of,
    adapter_sha256,
    attach_saved,
    merged_state,
    read_adapter,
    write_adapter,
)
from preftune.models.folder import find, is_adapter, locate
from preftune.models.products import use_onednn
from preftune.models.quantize import loading_options
from preftune.models.tokenizer import load_tokenizer, tokenizer_sha256

__all__ = ["LoadedModel", "active_dropouts", "load", "quiet", "save", "saved_as_adapter", "weights_sha256"]


@dataclass(frozen=True, eq=False, slots=True)
class LoadedModel:
    """A causal LM ready to train: every dropout 0, evaluation mode, all parameters of one dtype on one device.

    With an adapter, only that is trained (`requires_grad`), and a quantised base has weights of its own kind.
    """

    model: Any
    """transformers' PreTrainedModel with a language-model head."""
    tokenizer: Any
    """transformers' PreTrainedTokenizer."""
    weights_sha256: str
    """Of all tensors as loaded, dtype included: two names with equal content have equal hashes."""
    tokenizer_sha256: str
    """Of vocabulary, merges, normalisation, special tokens and chat template."""
    notes: tuple[str, ...]
    """What was decided or is worth knowing, one line each."""


def load(
    name: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    kind: Any = AutoModelForCausalLM,
    settings: Mapping[str, Any] = MappingProxyType({}),
    may_miss: frozenset[str] = frozenset(),
    may_drop: frozenset[str] = frozenset(),
    quantize: str = "none",
) -> LoadedModel:
    """The model and tokenizer of a folder, or of a hub repository; works offline for folders.

    An adapter folder gives its base with the adapter on it, base and adapter checked and hashed together, the base
    rounded (`quantize`, for CUDA) exactly when the adapter was trained so.

    Another `kind` of head than a language model's is one of transformers' auto classes, with `settings` of its
    configuration; the weights of `may_miss` may then be absent (the caller draws them), those of `may_drop` left over.
    Raises ArtifactError, one line, when something is absent, unsafe, of another architecture, has weights that are
    missing, left over or of another shape, or a tokenizer with more entries than the model has embeddings.
    """
    if is_adapter(found := find(name)):
        expected: dict[str, Any] = {"settings": settings, "may_miss": may_miss, "may_drop": may_drop}
        return _with_adapter(found, partial(load, dtype=dtype, device=device, kind=kind, **expected), kind, quantize)
    folder, options = locate(name), loading_options(quantize, dtype, device)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
            dropouts = _without_dropout(config)
            model, info = kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # listed in `info` with both shapes, and refused below
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: the model cannot be read: {_first_line(error)}") from error
        tokenizer = load_tokenizer(folder)
    known = {"missing_keys": may_miss, "unexpected_keys": may_drop}
    _refuse_incomplete(folder, {what: set(found) - known.get(what, set()) for what, found in info.items()})
    _refuse_foreign_tokenizer(folder, tokenizer, model)
    for module, attribute, p in active_dropouts(model):
        setattr(module, attribute, 0.0)
        dropouts.append(p)
    highest = f"dropout {max(dropouts, default=0):g} set to 0: preference losses compare exact log-probabilities"
    padless = tokenizer.pad_token is None and kind is AutoModelForCausalLM
    width = getattr(config.get_text_config(), "hidden_size", 0)
    products = use_onednn(width) if (torch.device(device).type, dtype) == ("cpu", torch.float32) else ""
    return LoadedModel(
        model=model.eval() if options else model.eval().to(device),
        tokenizer=tokenizer,
        weights_sha256=weights_sha256(model),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        notes=(highest,) * bool(dropouts) + ("no pad token: not needed",) * padless + (products,) * bool(products),
    )


def _with_adapter(folder: Path, load_base: Callable[..., LoadedModel], kind: Any, quantize: str) -> LoadedModel:
    """The base model of an adapter folder with the adapter on it; the folder's own tokenizer where it has one."""
    saved = read_adapter(folder)
    base = saved.adapter.base
    if quantize not in ("none", base.quantize):
        raise ArtifactError(
            f"{folder}: the adapter was trained on base weights quantised as {base.quantize}, not {quantize}; leave "
            "quantize out, the folder decides"
        )
    try:
        if is_adapter(find(base.name)):
            raise ArtifactError("it is an adapter itself, merge it first")
        loaded = load_base(base.name, quantize=base.quantize)
    except ArtifactError as problem:
        raise ArtifactError(f"{folder} is an adapter whose base {base.name} cannot be used: {problem}") from problem
    comparable = loaded.weights_sha256 if kind is AutoModelForCausalLM else None  # another head, another hash
    notes = attach_saved(loaded.model, saved, base_sha256=comparable)
    with_own = replace(loaded, weights_sha256=adapter_sha256(loaded.model), notes=(*loaded.notes, *notes))
    with quiet():
        tokenizer = load_tokenizer(folder)
    _refuse_foreign_tokenizer(folder, tokenizer, loaded.model)
    return replace(with_own, tokenizer=tokenizer, tokenizer_sha256=tokenizer_sha256(tokenizer))


def save(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None,
    card: str,
    merge: bool = False,
) -> None:
    """Write a plain Hugging Face folder with `card` as its README.md: whole or not at all.

    A language model with an adapter becomes an adapter folder, or a plain one with `merge`; a classifier with one is
    always merged, because its head and its configuration have no place in an adapter folder.
    `state` replaces weights by name (float32 masters for bf16 weights; a tied weight once), of a sharded model all that
    are written, and the configuration's dtype follows. Everything is written and fsynced beside `folder` and then
    renamed; a folder already there is replaced. Raises RunError when it cannot be written; what was there before is
    then still there.
    """
    folder = Path(folder)
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if saved_as_adapter(model) and not merge:
            write_adapter(model, temporary, state)
        else:
            weights = merged_state(model, state) if adapter_of(model) else _replaced(model.state_dict(), state or {})
            with quiet():  # save_pretrained empties what it gets
                model.save_pretrained(temporary, state_dict=dict(weights), max_shard_size="5GB")
            _write_dtype(temporary / "config.json", weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _sync(folder.parent)
    except (OSError, ValueError, SafetensorError) as error:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        raise RunError(f"the model cannot be written to {folder}: {_first_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def saved_as_adapter(model: Any) -> bool:
    """Does `save` write an adapter folder for this model, without its frozen weights?"""
    return adapter_of(model) is not None and model.get_output_embeddings() is not None


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over every tensor of the state, sorted by name: name, shape, dtype, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def active_dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """(module, attribute, probability) of every dropout above 0, in layers and in attributes attention reads."""
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.Dropout) else [n for n in vars(module) if "drop" in n]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, float) and value > 0:
                yield module, name, value


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bar and logs errors only: what matters is refused or noted by us."""
    log = transformers.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _without_dropout(config: Any) -> list[float]:
    """Sets every dropout of the configuration to 0, before modules copy it; what was there above 0."""
    found = []
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float) and value > 0:
            setattr(config, name, 0.0)
            found.append(value)
    return found


def _refuse_incomplete(folder: Path, info: Any) -> None:
    for kind, what in (
        ("missing_keys", "weights are missing and would be drawn at random"),
        ("unexpected_keys", "weights fit nowhere in this architecture and would be dropped"),
        ("mismatched_keys", "weights have another shape than config.json says"),
        ("error_msgs", "errors while loading"),
    ):
        items = sorted(map(str, info.get(kind, ())))
        if items:
            more = f" and {len(items) - 3} more" if len(items) > 3 else ""
            raise ArtifactError(f"{folder}: {what}: {', '.join(items[:3])}{more}; is this a causal language model?")


def _refuse_foreign_tokenizer(folder: Path, tokenizer: Any, model: Any) -> None:
    rows, entries = len(model.get_input_embeddings().weight), max(tokenizer.get_vocab().values(), default=-1) + 1
    if entries > rows:
        raise ArtifactError(
            f"{folder}: the tokenizer knows {entries} tokens but the model embeds {rows}; "
            "they do not belong together, or tokens were added without resizing the model"
        )


def _replaced(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with replacements; names that share memory (tied weights) are replaced together."""
    if state.keys() == own.keys():  # a sharded model's own are parts
        return dict(state)
    unknown = sorted(set(state) - set(own)) or [n for n, t in state.items() if t.shape != own[n].shape]
    if unknown:
        raise ValueError(f"{unknown[0]} is no weight of this model, or of another shape")
    by_memory = {own[name].data_ptr(): tensor for name, tensor in state.items()}
    return {name: by_memory.get(tensor.data_ptr(), tensor) for name, tensor in own.items()}


def _write_dtype(path: Path, weights: Mapping[str, Tensor]) -> None:
    """transformers writes the module's dtype; what counts is that of the tensors beside it."""
    widest = max((t.dtype for t in weights.values() if t.is_floating_point()), key=lambda d: d.itemsize)
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(widest).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
