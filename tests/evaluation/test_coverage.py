"""Every interval covers as often as is claimed of it, on samples whose truth is known (`benchmarks/coverage.py`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = Path(__file__).parents[2] / "docs/statistics.md"
SAMPLES = 400


def cases() -> ModuleType:
    """`benchmarks/coverage.py` as a module."""
    spec = importlib.util.spec_from_file_location("coverage_cases", BENCHMARKS / "coverage.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_cases"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


COVERAGE = cases()


@pytest.mark.parametrize("case", COVERAGE.CASES, ids=lambda case: f"{case.interval}: {case.sample}")
def test_the_interval_covers_as_often_as_claimed(case: Any) -> None:
    """400 samples: coverage within 3.5 standard errors of the range claimed, 0.95 where nothing else is."""
    covers = COVERAGE.coverage(case, SAMPLES, seed=1)
    low = case.least - 3.5 * COVERAGE.noise(case.least, SAMPLES)
    high = case.most + 3.5 * COVERAGE.noise(case.most, SAMPLES)
    assert low <= covers <= high, f"{covers:.3f} of {SAMPLES}"


def test_whatever_departs_from_its_level_says_why() -> None:
    """A range that leaves out the level, or reaches far from it, comes with a reason."""
    departs = [case for case in COVERAGE.CASES if case.least < case.level - 0.02 or case.most > case.level + 0.02]
    assert len(departs) >= 5 and all(case.because for case in departs)


def test_clusters_told_cover_where_independence_assumed_does_not() -> None:
    """Correlated samples of one prompt: shares, means and bootstraps, each told of its clusters and not."""
    told = [case for case in COVERAGE.CASES if case.interval.endswith("clusters") and "not told" not in case.interval]
    for name in ("share", "mean_interval", "paired_bootstrap"):
        (naive,) = [case for case in COVERAGE.CASES if case.interval.startswith(f"{name}, not told")]
        assert naive.most < min(case.least for case in told if case.interval == f"{name}, clusters")


def test_every_case_is_on_the_page() -> None:
    """docs/statistics.md has a row for each, with the claim that is tested here."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    shown = {(row[0].removeprefix("| "), row[1], row[4]) for row in rows if len(row) > 5}
    assert {(case.interval, case.sample, COVERAGE.claim(case)) for case in COVERAGE.CASES} <= shown
