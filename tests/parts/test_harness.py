"""Benchmarks by lm-evaluation-harness: what is asked of it, what becomes of its numbers, and where it is missing.

A stub stands in for it, with the names and result keys of 0.4.13; the last test runs the real one where there is one.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from preftune.config.comparison import EvaluateConfig
from preftune.errors import ConfigError, RunError
from preftune.parts.harness import harness, run_tasks
from preftune.recipes import evaluate

RESULTS = {
    "tiny": {"alias": "tiny", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1, "exact,strict": 0.25},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stub was asked, by the name of what was called."""
    calls: dict[str, Any] = {}

    def simple_evaluate(**settings: Any) -> dict[str, Any]:
        calls["simple_evaluate"] = settings
        if settings["tasks"] == ["broken"]:
            raise ValueError("no data")
        if settings["tasks"] in (["large"], ["odd"]):
            raise RuntimeError("CUDA out of memory" if settings["tasks"] == ["large"] else "shapes do not match")
        return {"results": RESULTS, "n-samples": {"tiny": {"original": 5, "effective": 3}}}

    def manager(**settings: Any) -> SimpleNamespace:
        calls["TaskManager"] = settings
        return SimpleNamespace(all_tasks=["tiny", "broken", "large", "odd"])

    def model(**settings: Any) -> str:
        calls["HFLM"] = settings
        return "model"

    root, models, face, tasks = (ModuleType(n) for n in ("lm_eval", "lm_eval.models", "hf", "lm_eval.tasks"))
    root.__dict__.update(simple_evaluate=simple_evaluate, models=models, tasks=tasks)
    models.__dict__.update(huggingface=face)
    face.__dict__.update(HFLM=model)
    tasks.__dict__.update(TaskManager=manager)
    for name, module in (("", root), (".models", models), (".models.huggingface", face), (".tasks", tasks)):
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    return calls


SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "batch_size": 4, "seed": 7}


def test_values_come_with_intervals_from_its_standard_errors(asked: dict[str, Any], tmp_path: Path) -> None:
    """0.5 +- 1.96 x 0.1 of three documents; a value without standard error has an infinite interval; no other entry."""
    found = run_tasks("folder", f"tiny,{tmp_path}", **SETTINGS)["tiny"]
    acc, exact = found["acc"], found["exact,strict"]
    assert (acc.estimate, acc.n) == (0.5, 3) and acc.low == pytest.approx(0.304, abs=1e-3)
    assert exact.estimate == 0.25 and (exact.low, exact.high) == (-math.inf, math.inf) and len(found) == 2
    assert asked["TaskManager"] == {"include_path": [str(tmp_path)]}
    assert asked["HFLM"] == {
        "pretrained": "folder", "dtype": "float32", "device": "cpu", "batch_size": 4, "trust_remote_code": False,
    }  # fmt: skip
    assert asked["simple_evaluate"]["tasks"] == ["tiny"] and asked["simple_evaluate"]["random_seed"] == 7


def test_the_stage_asks_it_about_every_model(asked: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    """Results of each model under its name, in the run card."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a good"}\n')
    card = evaluate.main(
        EvaluateConfig(
            model=f"one={tiny_model_folder}",
            reference=f"base={tiny_model_folder}",
            prompts=str(prompts),
            max_tokens=4,
            dtype="float32",
            lm_eval="tiny",
            out=str(tmp_path / "run"),
        )
    )
    assert list(card.results["lm_eval"]) == ["base", "one"]
    assert card.results["lm_eval"]["one"]["tiny"]["acc"]["estimate"] == 0.5


def test_what_it_cannot_run_is_refused_by_name(asked: dict[str, Any], tmp_path: Path) -> None:
    """An unknown task, a folder without a task, and its own trouble with a task."""
    with pytest.raises(ConfigError, match="knows no task tinny"):
        run_tasks("folder", "tinny,tiny", **SETTINGS)
    with pytest.raises(ConfigError, match="names no task but only folders"):
        run_tasks("folder", str(tmp_path), **SETTINGS)
    with pytest.raises(ConfigError, match="cannot run broken: no data"):
        run_tasks("folder", "broken", **SETTINGS)


def test_a_task_without_memory_is_named_with_a_setting(asked: dict[str, Any]) -> None:
    """Half of the rows, or what makes one row smaller; another RuntimeError is left alone."""
    with pytest.raises(RunError, match=r"harness ran large, 4 rows at once; set --batch_size 2$"):
        run_tasks("folder", "large", **SETTINGS)
    with pytest.raises(RunError, match=r"harness ran large, 1 rows at once; set --dtype bfloat16, or leave it out$"):
        run_tasks("folder", "large", **SETTINGS | {"batch_size": 1})
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_tasks("folder", "odd", **SETTINGS)


def test_where_it_is_missing_the_run_ends_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """With what to install; nothing was sampled by then."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'preftune\[eval\]'"):
        harness()
    cfg = EvaluateConfig(
        model=f"one={tiny_model_folder}", reference="base", prompts="p", lm_eval="tiny", out=str(tmp_path / "run")
    )
    with pytest.raises(ConfigError, match="which is not installed"):
        evaluate.main(cfg)
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.filterwarnings("ignore")
def test_the_real_one_answers_a_task_of_our_own(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Three questions in a file, no network: a share with its interval, of three documents."""
    pytest.importorskip("lm_eval", reason="the optional extra preftune[eval] is not installed")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"q": f"the cat {i}", "c": [" sat", " ran"], "a": i % 2}) + "\n" for i in range(3))
    )
    (tmp_path / "own.yaml").write_text(
        f"task: preftune_own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    found = run_tasks(tiny_model_folder, f"preftune_own,{tmp_path}", **SETTINGS)
    acc = found["preftune_own"]["acc"]
    assert acc.estimate in (0, 1 / 3, 2 / 3, 1) and acc.n == 3
