"""A model without its weights: configuration and tokenizer, all that planning needs. Code in a folder is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer

from preftune.errors import ArtifactError
from preftune.models.folder import of_run

__all__ = ["read_configuration", "read_tokenizer"]

_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]


def read_configuration(name: str) -> Any:
    """transformers' configuration of a folder or hub name; only small files are downloaded. Raises ArtifactError."""
    return _read(name, AutoConfig, "configuration")


def read_tokenizer(name: str) -> Any:
    """transformers' tokenizer of a folder or hub name that need hold no weights. Raises ArtifactError."""
    return _read(name, AutoTokenizer, "tokenizer")


def _read(name: str, kind: Any, what: str) -> Any:
    try:
        local = of_run(Path(name).expanduser())
        folder = (
            local if local.exists() else Path(snapshot_download(name, allow_patterns=_SMALL, ignore_patterns="*/*"))
        )
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of three libraries; the tokenizers library raises bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(f"{name} has no {what} that can be read: {reason[:300]}") from error
