"""The run card: what a run records of itself, and what must be equal for it to be continued."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from preftune.engine.host import git_commit, host, versions
from preftune.errors import ArtifactError, ResumeMismatch
from preftune.records import RunCard, from_json

__all__ = ["continued", "jsonable", "new_card", "read_card", "refuse_other_inputs"]


def new_card(stage: str, config: Mapping[str, Any]) -> RunCard:
    """The card of a run that starts here and now."""
    return RunCard(
        stage=stage,
        status="running",
        config=jsonable(config),
        versions=versions(),
        host=host(),
        git_commit=git_commit(),
        times={"began": round(time.time(), 3)},
    )


def read_card(path: Path) -> RunCard:
    """The card stored at `path`. Raises ArtifactError when it is none."""
    try:
        card = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(card, RunCard):
            raise ValueError(f"it is a {type(card).__name__}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is no run card ({error}); choose another --out") from error
    return card


def continued(
    earlier: RunCard, new: RunCard, may_differ: frozenset[str], folder: Path
) -> tuple[RunCard, tuple[str, ...]]:
    """The earlier card brought up to date, and notes on what is new. Raises ResumeMismatch.

    Stage and config must be equal, the keys in `may_differ` excepted; other versions are allowed and noted.
    """
    keys = dict.fromkeys([*earlier.config, *new.config])
    changes = {key: _change(earlier.config, new.config, key) for key in keys}
    refused = [change for key, change in changes.items() if key not in may_differ]
    _refuse([_change({"stage": earlier.stage}, {"stage": new.stage}, "stage"), *refused], folder)
    notes = [f"resumed with {change}" for key, change in changes.items() if change and key != "resume"]
    for package in new.versions:
        if change := _change(earlier.versions, new.versions, package):
            notes.append(f"resumed under {change}: equality with an uninterrupted run is no longer certain")
    kept = {name: getattr(earlier, name) for name in ("hashes", "data", "results", "notes")}
    card = replace(new, **kept, times={**new.times, **earlier.times})
    return card, tuple(notes)


def refuse_other_inputs(earlier: RunCard, hashes: Mapping[str, str], data: Mapping[str, Any], folder: Path) -> None:
    """Raise ResumeMismatch when a hash, or the `sha256` of a data entry, is not the one the card holds."""
    before, now = _inputs(earlier.hashes, earlier.data), _inputs(hashes, data)
    _refuse([_change(before, now, name) for name in now if name in before], folder)


def jsonable(value: Any) -> Any:
    """`value` as JSON holds it: records become objects, paths strings, NaN and infinities "nan", "inf", "-inf".

    JSON has no such numbers and hiding them would be a lie; `float("nan")` reads the string back.
    Raises TypeError on anything else that is no number, text, list or mapping.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    raise TypeError(f"a {type(value).__name__} has no place in a run card: {value!r}")


def _inputs(hashes: Mapping[str, str], data: Mapping[str, Any]) -> dict[str, str]:
    """Everything that identifies what a run is made from, by a name for messages."""
    reports = {role: report for role, report in data.items() if isinstance(report, Mapping) and "sha256" in report}
    return {f"SHA-256 of {name}": value for name, value in hashes.items()} | {
        f"SHA-256 of {role} data": str(report["sha256"]) for role, report in reports.items()
    }


def _change(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> str:
    """`key: this (the run has that)`, empty when both are equal."""
    then, this = (json.dumps(side[key]) if key in side else "absent" for side in (before, now))
    return "" if then == this else f"{key}: {this} (the run has {then})"


def _refuse(changes: list[str], folder: Path) -> None:
    if any(changes):
        listed = "; ".join(filter(None, changes))
        raise ResumeMismatch(
            f"{folder} cannot be resumed with {listed}. Give what the run has, or choose another --out"
        )
