"""A name -> a folder whose files may be opened: found, complete, and unable to run code.

Everything here is refused before transformers sees it. Weights are read from safetensors only, and a configuration
that would fetch or import code is refused instead of ignored: the user believes the author's code ran.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from preftune.errors import ArtifactError

__all__ = ["ADAPTER", "base_of", "find", "is_adapter", "locate", "of_run", "read_json", "tokenizer_folder"]

ADAPTER = "adapter_config.json"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What a causal LM needs; pickles are not even downloaded, nor a second copy of the weights in another layout.
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def locate(name: str | Path) -> Path:
    """The folder of a model, checked: a local folder, else a download from the hub of Hugging Face.

    Raises ArtifactError: nothing of that name (with near names), a file is missing or no JSON, the weights are
    pickled or quantised, or the configuration asks for code.
    """
    folder = find(name)
    config = _config(folder)
    _refuse_unsafe(folder)
    if config.get("quantization_config"):
        raise ArtifactError(
            f"{folder}: the weights are quantised and cannot be trained in full; use the original model"
        )
    _check_weights(folder)
    return folder


def find(name: str | Path) -> Path:
    """The folder of that name: local (of a run its `model/`), or a download from the hub. Raises ArtifactError."""
    local = Path(name).expanduser()
    folder = of_run(local) if local.exists() else _download(str(name), local)
    if not folder.is_dir():
        raise ArtifactError(f"{name} is a file; a model is the folder that holds config.json and model.safetensors")
    return folder


def of_run(folder: Path) -> Path:
    """The model of a run folder, `RUN/model`; any other folder is itself."""
    inside = folder / "model"
    return inside if not _is_model(folder) and _is_model(inside) else folder


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", ADAPTER))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    whole = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return (folder / ADAPTER).is_file() and not any(path.is_file() for path in whole)


def base_of(folder: Path) -> str:
    """Name of the base model of an adapter folder. Raises ArtifactError."""
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ArtifactError(f"{folder / ADAPTER}: base_model_name_or_path does not name the adapter's base model")
    return name


def tokenizer_folder(name: str | Path) -> Path:
    """Where the tokenizer of a model is, checked: an adapter without one of its own has that of its base."""
    folder = find(name)
    if not is_adapter(folder):
        return locate(folder)
    if not (folder / "tokenizer_config.json").exists():
        return locate(base_of(folder))
    _refuse_unsafe(folder)
    return folder


def _refuse_unsafe(folder: Path) -> None:
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", ADAPTER):
        for key, reason in _unsafe(read_json(folder / file) if (folder / file).exists() else {}):
            raise ArtifactError(f"{folder / file}: {key} {reason}")


def _download(name: str, local: Path) -> Path:
    beside = [p.name for p in local.parent.iterdir() if p.is_dir()] if local.parent.is_dir() else []
    near = difflib.get_close_matches(local.name, beside, n=3, cutoff=0.5)
    hint = f"; near names there: {', '.join(str(local.parent / n) for n in near)}" if near else ""
    is_hub_name = _HUB_NAME.fullmatch(name) and not ("/" in name and local.parent.is_dir())
    if not is_hub_name:
        raise ArtifactError(f"no folder {name}{hint or f', {local.parent} has no model'}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"no folder {name}, and the hub gives no model of that name ({why}){hint}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ArtifactError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    if (folder / ADAPTER).exists():
        raise ArtifactError(f"{folder} holds an adapter, not a model: merge it into its base model first")
    inside = [p.parent.name for p in sorted(folder.glob("*/config.json"))]
    hint = f"; {folder / inside[0]} has one" if inside else ""
    raise ArtifactError(f"{folder} has no config.json and so is not a model folder{hint}")


def _unsafe(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """(key, why it is refused) of everything in a configuration that names code or a foreign repository."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _unsafe(item, f"{where}[{i}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        path = f"{where}.{key}" if where else key
        if not item:
            continue
        if key in ("auto_map", "custom_pipelines", "trust_remote_code"):
            yield (
                path,
                "asks for code from its repository, which is never run; remove it if transformers knows the type",
            )
        elif key.endswith("_internal"):
            yield path, "sets a private field of transformers and has no place in a file; remove it"
        elif key.endswith("attn_implementation") and "/" in str(item):
            yield path, f"asks for a kernel from a repository ({item}); remove it"
        else:
            yield from _unsafe(item, path)


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
        if missing or not shards:
            raise ArtifactError(f"{folder}: the index names {', '.join(missing) or 'no shard'}, which is not there")
    elif not (folder / "model.safetensors").is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if not pickles:
            raise ArtifactError(f"{folder} has no model.safetensors")
        raise ArtifactError(
            f"{folder} has no model.safetensors but {pickles[0]}, a pickle that runs code when opened: convert it "
            "once, where you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
