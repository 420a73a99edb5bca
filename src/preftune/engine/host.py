"""What a run ran on: versions, hardware and the state of the source, for run cards and bug reports.

No host name, user name or path is read: a run card may be published.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

__all__ = ["describe", "git_commit", "host", "versions"]

PACKAGES = ("preftune", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Python's version and each package's, read from its metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def host() -> dict[str, Any]:
    """Operating system, processor, usable cores, memory in GiB, accelerators with their memory in GiB.

    Accelerators are looked for only when torch is already imported: importing it takes seconds.
    """
    return {
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": _usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": _accelerators() if "torch" in sys.modules else [],
    }


def git_commit() -> str:
    """The commit of the working directory, `-dirty` when tracked files differ from it, "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """Everything above in one JSON-able dict, accelerators included (imports torch): what a bug report needs."""
    importlib.import_module("torch")
    return {"versions": versions(), "host": host(), "git_commit": git_commit()}


def _processor() -> str:
    """The processor's name; Linux tells it in a file only."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _usable_cores() -> int:
    """Cores this process may use: a container or a scheduler often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerators() -> list[str]:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in devices]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [] if accelerator is None else [accelerator.type]
