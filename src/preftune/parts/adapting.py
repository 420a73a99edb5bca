"""What is trained: all weights of a model, or an adapter on its frozen weights, fresh or continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preftune.config.sections import Adapting
from preftune.errors import ConfigError
from preftune.models.adapters import Adapter, AdapterSpec, Base, adapter_of, attach
from preftune.models.folder import of_run
from preftune.models.load import LoadedModel, load

__all__ = ["to_train"]


def to_train(cfg: Adapting, seed: int, read: Callable[..., LoadedModel] | None = None) -> Callable[..., LoadedModel]:
    """`read` for `open_model` (`models.load.load` by default), which also gives the model the adapter of `cfg`.

    A fresh adapter changes nothing yet, so the model keeps its hash: cached reference log-probs of the base serve it.
    A model that comes with an adapter goes on with it, whatever `cfg` leaves open. The head of a classifier is trained
    beside an adapter. Raises ConfigError when `cfg` asks for another adapter than the model has.
    """
    opened = read or partial(load, quantize=cfg.quantize)

    def prepared(name: str | Path, *, dtype: torch.dtype, device: torch.device | str) -> LoadedModel:
        loaded = opened(name, dtype=dtype, device=device)
        model, carried = loaded.model, adapter_of(loaded.model)
        if carried:
            _refuse_another(name, carried, cfg)
        elif cfg.lora_rank == 0:
            return loaded
        else:
            spec = AdapterSpec(cfg.lora_rank, cfg.alpha_of_lora(), cfg.target_names(), cfg.dora)
            base = Base(_lasting(name), loaded.weights_sha256, str(dtype).removeprefix("torch."), cfg.quantize)
            layers = attach(model, spec, base, seed=seed)
            kind = f"{'DoRA' if cfg.dora else 'LoRA'} of rank {spec.rank}, alpha {spec.alpha:g}"
            loaded = replace(loaded, notes=(*loaded.notes, f"a fresh adapter, {kind}, in {layers} layers"))
        if isinstance(getattr(model, "score", None), nn.Linear):
            model.score.requires_grad_(True)
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        trained, whole = sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)
        note = (
            f"{trained} of {whole} weights are trained; adapters want about ten times the learning rate of all weights"
        )
        return replace(loaded, notes=(*loaded.notes, note))

    return prepared


def _refuse_another(name: str | Path, carried: Adapter, cfg: Adapting) -> None:
    if cfg.lora_rank == 0:
        return
    has = carried.settings
    asked: dict[str, tuple[Any, Any]] = {
        "lora_rank": (cfg.lora_rank, has["r"]),
        "lora_alpha": (cfg.alpha_of_lora(), has.get("lora_alpha")),
        "dora": (cfg.dora, bool(has.get("use_dora"))),
        "quantize": (cfg.quantize, carried.base.quantize),
    }
    if cfg.target_names():
        asked["lora_targets"] = (sorted(cfg.target_names()), sorted(has.get("target_modules", ())))
    for key, (wanted, found) in asked.items():
        if wanted != found:
            raise ConfigError(
                f"{key}: model {name} goes on with its own adapter, which has {found}, not {wanted}; leave the "
                "adapter's keys out, or merge it first (preftune merge) to begin another"
            )


def _lasting(name: str | Path) -> str:
    """A name that finds the model from any working folder."""
    folder = of_run(Path(name).expanduser())
    return str(folder.resolve()) if folder.exists() else str(name)
