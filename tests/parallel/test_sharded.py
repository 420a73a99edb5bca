"""Weights in parts: the trajectory is that of one process, each rank holds its share, and any number resumes it.

Real processes over gloo on one machine; the oracle is the same recipe in one process, which other tests prove right.
One run passes through 1, 2, 4 and 1 processes; the other stages are trained beside it by the same two.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_stages import noted
from ranks import ends, rows, start, train_rows
from safetensors import safe_open
from safetensors.torch import load_file

from preftune.cli import main as cli
from preftune.config.stages import CONFIGS
from preftune.engine.checkpoint import Checkpoints
from preftune.engine.rounding import stochastic_round_
from preftune.parts.common import Loop

DRIVER = str(Path(__file__).with_name("rank_stages.py"))
PAIRS = {"batch_size": 7, "max_steps": 3, "max_length": 128, "tokens_per_batch": 256, "device": "cpu", "lr": 1e-4}
EXACT = {"dtype": "float32", "eval_every": 2}
LORA = {"lora_rank": 3, "lr": 1e-3}
OFFLOADED = {"shard": True, "offload": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {**EXACT, "activation_checkpointing": "full", "early_stop": 1}),
    "coupled": (
        "dpo",
        {"loss": "bco_pair", "dtype": "float32", "optimizer": "rmsprop", "activation_checkpointing": "selective"},
    ),
    "idle_rank": ("dpo", {"batch_size": 1, "dtype": "float32", "optimizer": "sgd", "lr": 0.1, **OFFLOADED}),
    "own_reference": ("dpo", {"reference": "model", "dtype": "float32", **OFFLOADED}),
    "bfloat16": ("dpo", {"dtype": "bfloat16"}),
    "lean": ("dpo", {"dtype": "bfloat16", "optimizer": "adamw_lean"}),
    "sft": ("sft", {**EXACT, "activation_checkpointing": "auto"}),
    "reward": ("reward", {**EXACT, "batch_size": 1, "loss": "plackett_luce"}),
    "moving": ("dpo", {**EXACT, "loss": "tdpo1", "reference_every": 1, "reference_mix": 0.5, "early_stop": 1}),
    "adapter": ("dpo", {**EXACT, **LORA, "early_stop": 1}),
    "adapter_moving": ("dpo", {**LORA, "reference_every": 2, "schedule": "constant", "dtype": "bfloat16"}),
    "dora": ("sft", {**LORA, "dora": True, "dtype": "bfloat16", "activation_checkpointing": "selective"}),
    "adapter_reward": ("reward", {**EXACT, **LORA, **OFFLOADED}),
}
CASES |= {
    "ppo": ("ppo", {**EXACT, "eval_every": 1, "early_stop": 1, "max_kl": 50.0, "schedule": "constant"}),
    "rloo_adapter": ("ppo", {**LORA, **OFFLOADED, "algorithm": "rloo", "standardise": True, "dtype": "float32"}),
}
RL = {"batch_size": 5, "n": 2, "max_tokens": 6, "missing_eos": "none", "reward": "rule:regex:[aeiou]"}
RL |= {"device": "cpu", "lr": 1e-4}
CONTINUED = {"adapter_moving": 2, "ppo": 1}
"""Case -> steps by two processes, before one process takes the next."""
ROUNDED = ("bfloat16", "lean", "adapter_moving", "dora")
"""Whose single numbers are; there ..."""
CONTINUOUS = {"loss", "logp_chosen", "length_chosen", "pairs", "tokens"}
"""... are compared, and not how often a rounded margin is above 0."""
CHAIN = {"schedule": "constant", "save_every": 1, "dtype": "bfloat16"}
"""Of the run that several numbers of processes do in turn, a step each."""
STEPS = 4
TOO_FAR = {**EXACT, "lr": 1.0, "eval_every": 1, "early_stop": 1, "max_steps": 4}
"""Of a run that is at its best after one step, and stops."""


@pytest.fixture(scope="module")
def inputs(tiny_model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    lines = pairs_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:24]))
    (folder / "eval.jsonl").write_text("".join(lines[36:]))
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "park", "with", "dog"]
    for name, part in (("asked", words[:9]), ("held", words[9:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"the {word}"}) + "\n" for word in part))
    data = {key: str(folder / f"{name}.jsonl") for key, name in (("data", "train"), ("eval_data", "eval"))}
    return data | {"model": str(tiny_model_folder)}


def settings(case: str, inputs: dict[str, str], out: Path) -> tuple[str, dict[str, Any]]:
    stage, own = CASES[case]
    own = {**own, "reference": inputs["model"]} if "reference" in own else own
    common = {**PAIRS, **inputs}
    if stage == "ppo":
        asked, held = (str(Path(inputs["data"]).with_name(f"{name}.jsonl")) for name in ("asked", "held"))
        common = {**RL, "model": inputs["model"], "prompts": asked, "eval_prompts": held}
    return stage, {**common, "out": str(out / case), **own}


def chained(inputs: dict[str, str], out: Path, steps: int, *, resume: bool) -> tuple[str, dict[str, Any]]:
    """The chain's run until `steps`."""
    return until(steps, ("dpo", {**PAIRS, **inputs, **CHAIN, "out": str(out / "chain")}), resume=resume)


def until(steps: int, stage: tuple[str, dict[str, Any]], *, resume: bool = False) -> tuple[str, dict[str, Any]]:
    """That run until `steps`; resumed, the card says so too: a longer run cut short is the shorter one."""
    name, config = stage
    if resume:
        path = Path(config["out"]) / "run.json"
        card = json.loads(path.read_text())
        card["config"]["max_steps"] = steps
        path.write_text(json.dumps(card))
    return name, config | {"max_steps": steps, "resume": resume}


def here(stage: str, config: dict[str, Any]) -> None:
    """By this process, which keeps all of a model, sharded or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "finish", noted(Loop.finish, []))
        importlib.import_module(f"preftune.recipes.{stage}").main(CONFIGS[stage](**config))


def by(size: int, stages: list[tuple[str, dict[str, Any]]], out: Path) -> None:
    """By so many processes, sharded; what they tell is kept in `out`."""
    plan = out / f"plan-{size}.json"
    plan.write_text(json.dumps([[stage, config | {"shard": True}] for stage, config in stages]))
    cache = {rank: {"PREFTUNE_CACHE": str(out / "cache")} for rank in range(size)}
    found = ends(start([DRIVER, str(plan)], size, own=cache))
    assert [code for code, _ in found] == [0] * size, "\n".join(told for _, told in found)
    assert [told for _, told in found[1:]] == [""] * (size - 1), "only rank 0 speaks"


@pytest.fixture(scope="module")
def alone(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by one process, and the undisturbed run of the chain."""
    out = tmp_path_factory.mktemp("alone")
    for case in CASES:
        here(*settings(case, inputs, out))
    here(*chained(inputs, out, STEPS, resume=False))
    return out


@pytest.fixture(scope="module")
def together(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case by two processes, and the first two steps of the chain by one, then two."""
    out = tmp_path_factory.mktemp("together")
    here(*chained(inputs, out, 1, resume=False))
    stage, config = settings("bfloat16", inputs, out)
    further = [
        ("sft", {**PAIRS, **inputs, **TOO_FAR, "out": str(out / "too-far")}),
        (stage, config | {"offload": True, "out": str(out / "offloaded")}),
        *(until(steps, settings(case, inputs, out / "continued")) for case, steps in CONTINUED.items()),
    ]
    stage, config = chained(inputs, out, 2, resume=True)
    first = stage, config | {"offload": True}
    by(2, [first, *(settings(case, inputs, out) for case in CASES), *further], out)
    return out


@pytest.fixture(scope="module", params=[(1, 1), pytest.param((4, 1), marks=pytest.mark.slow)])
def chain(request: pytest.FixtureRequest, inputs: dict[str, str], together: Path, tmp_path_factory: Any) -> Path:
    """The chain's run, after two processes continued by these numbers of them, a step each."""
    out = tmp_path_factory.mktemp("chain")
    shutil.copytree(together / "chain", out / "chain")
    for step, size in enumerate(request.param, start=3):
        stage, config = chained(inputs, out, step, resume=True)
        here(stage, config | OFFLOADED) if size == 1 else by(size, [(stage, config)], out)
    return out / "chain"


@pytest.mark.parametrize("case", CASES)
def test_the_sharded_trajectory_is_that_of_one_process(case: str, alone: Path, together: Path) -> None:
    """Every metric of every step and evaluation is that of one process: in float32 to 1e-4, without a bias."""
    one, many = rows(alone / case), rows(together / case)
    assert len(one) == len(many) >= 3
    tolerance = 2e-2 if case in ROUNDED else 1e-4
    for mine, theirs in zip(one, many, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() & CONTINUOUS if case in ROUNDED else mine:
            assert theirs[name] == pytest.approx(mine[name], rel=10 * tolerance, abs=tolerance, nan_ok=True), name
    residual = [theirs.get("loss", 0) - mine.get("loss", 0) for mine, theirs in zip(one, many, strict=True)]
    assert max(map(abs, residual)) < tolerance
    assert abs(sum(residual) / len(residual)) < (2e-3 if case in ROUNDED else 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_gathered_model_is_that_of_one_process(case: str, alone: Path, together: Path) -> None:
    """The folder that rank 0 writes has the files, names, dtypes and, but for rounding, the weights of one process."""
    one, many = (folder / case / "model" for folder in (alone, together))
    assert {path.name for path in one.iterdir()} == {path.name for path in many.iterdir()}
    assert far(one, many) < (3e-4 if case in ROUNDED else 3e-6)


def test_the_adapter_folder_is_that_of_one_process(alone: Path, together: Path) -> None:
    """Settings to the byte, metadata and names of tensors; a reward model is merged as ever."""
    for case in ("adapter", "adapter_moving", "dora"):
        one, many = (folder / case / "model" for folder in (alone, together))
        config = "adapter_config.json"
        assert (one / config).read_bytes() == (many / config).read_bytes()
        first, second = (safe_open(folder / "adapter_model.safetensors", framework="pt") for folder in (one, many))
        assert first.metadata() == second.metadata() and sorted(first.keys()) == sorted(second.keys())
    merged = load_file(together / "adapter_reward" / "model" / "model.safetensors")
    assert "score.weight" in merged and not any("lora" in name for name in merged)


def test_a_moved_reference_is_saved_as_what_it_moved_to(together: Path) -> None:
    """Parts of an adapter's copy, frozen and so in bfloat16: after the step that moves it the policy's, bit for bit."""
    out = together / "continued"
    saved = Checkpoints(out / "adapter_moving" / "checkpoints").latest(pytest.fail)
    moved = {name: t for name, t in saved.tensors.items() if name.startswith("reference.")} if saved else {}
    assert len(moved) == 2 * 2 * 7 and {t.dtype for t in moved.values()} == {torch.bfloat16}
    assert all(torch.equal(t, saved.tensors[name.replace("reference.", "weights/")]) for name, t in moved.items())


@pytest.mark.parametrize("case", CONTINUED)
def test_what_two_processes_began_one_process_ends(
    case: str, inputs: dict[str, str], alone: Path, together: Path, tmp_path: Path
) -> None:
    """From the parts of adapter and moving reference, or of policy, critic and the last policy within max_kl."""
    shutil.copytree(together / "continued" / case, tmp_path / case)
    here(*until(CONTINUED[case] + 1, settings(case, inputs, tmp_path), resume=True))
    one, many = (train_rows(folder / case) for folder in (alone, tmp_path))
    assert len(one) == len(many) == CONTINUED[case] + 1
    for mine, theirs in zip(one, many, strict=True):
        for name in mine.keys() & {"loss", "reward", "kl", "value_mean", "grad_norm"}:
            assert theirs[name] == pytest.approx(mine[name], rel=5e-2, abs=2e-2 if case in ROUNDED else 1e-4), name
    assert far(alone / case / "model", tmp_path / case / "model") < (3e-4 if case in ROUNDED else 3e-6)


def test_each_rank_holds_its_share(alone: Path, together: Path) -> None:
    """Of weights, masters and moments every rank holds half, and together they hold what one process holds."""
    (whole,) = held(alone / "dpo")
    halves = held(together / "dpo")
    assert sum(halves) == pytest.approx(whole, rel=1e-3) and max(halves) == pytest.approx(whole / 2, rel=0.01)
    one, two = held(alone / "bfloat16")[0], held(together / "bfloat16")[0]
    assert two == pytest.approx(one * (16 / 14) / 2, rel=0.01), "bf16 values are kept in float32: 16 bytes, not 14"
    one, two = held(alone / "lean")[0], held(together / "lean")[0]
    assert two == pytest.approx(one * (8 / 6) / 2, rel=0.02)
    trained = sum(t.numel() for t in load_file(alone / "dora" / "model" / "adapter_model.safetensors").values())
    one, two = held(alone / "dora")[0], sum(held(together / "dora"))
    assert two == pytest.approx(one + 2 * trained, rel=2e-3), "what is frozen stays in bfloat16"


def test_auto_recomputes_what_it_says(together: Path) -> None:
    """Of a model in parts too: the setting is chosen once for all ranks, and said once."""
    notes = json.loads((together / "sft" / "run.json").read_text())["notes"]
    (told,) = [note for note in notes if note.startswith("activation_checkpointing auto: ")]
    assert "at most 256 tokens at once" in told


def test_the_best_weights_are_gathered_anew_when_they_are_put_back(together: Path) -> None:
    """Found worse and put back to step 1: what is evaluated last is step 1, not what was gathered before."""
    losses = [row["loss"] for row in rows(together / "too-far", "eval")]
    assert len(losses) == 3 and losses[1] > losses[0] == pytest.approx(losses[2], rel=1e-6)


def test_offloaded_parts_train_to_the_same_bits(together: Path) -> None:
    """On CPUs: metrics, parts, masters, moments and the gathered model are those of parts that are not offloaded."""
    one, other = together / "bfloat16", together / "offloaded"
    assert rows(one) == rows(other)
    names = ("checkpoints/step-3/tensors-0-of-2", "checkpoints/step-3/tensors-1-of-2", "model/model")
    for name in (*(f"{name}.safetensors" for name in names), "weights-of-0.txt", "weights-of-1.txt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_offload_holds_for_every_unit_and_only_when_asked(together: Path) -> None:
    """Every unit of a rank, two layers and the root, leaves its parts in the computer's memory; else none does."""
    for rank in range(2):
        for name, policy in (("bfloat16", "OffloadPolicy()"), ("offloaded", "CPUOffloadPolicy(pin_memory=False)")):
            kept = json.loads((together / name / f"kept-by-{rank}.json").read_text())
            assert kept == [policy] * 3
    notes = json.loads((together / "offloaded" / "run.json").read_text())["notes"]
    assert any(note.endswith("in the computer's memory") for note in notes)


def test_resumed_by_other_numbers_of_processes_a_run_is_that_of_one(alone: Path, chain: Path) -> None:
    """By 1, 2, (4) and 1 processes in turn, in bfloat16: the losses and weights of one process, undisturbed."""
    one, many = train_rows(alone / "chain"), train_rows(chain)
    assert len(one) == len(many) == STEPS
    assert max(abs(mine["loss"] - theirs["loss"]) for mine, theirs in zip(one, many, strict=True)) < 2e-2
    assert far(alone / "chain" / "model", chain / "model") < 3e-4
    notes = json.loads((chain / "run.json").read_text())["notes"]
    assert {f"continuing from the checkpoint of step {step}" for step in (1, 2, 3)} <= set(notes)


def test_the_compute_copies_of_two_ranks_are_the_draws_of_one_process(together: Path) -> None:
    """Drawn in parts by two ranks, written in parts, read by one: each weight is the draw from its whole master."""
    names = {path.name for path in (together / "chain" / "checkpoints" / "step-2").iterdir()}
    assert names == {"manifest.json", "state.json", "tensors-0-of-2.safetensors", "tensors-1-of-2.safetensors"}
    checkpoint = Checkpoints(together / "chain" / "checkpoints").latest(pytest.fail)
    assert checkpoint is not None
    masters = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("masters/")}
    assert len(masters) == 21
    for name, master in masters.items():
        weight, drawn = checkpoint.tensors[name.replace("masters", "weights")], torch.empty_like(master).bfloat16()
        stochastic_round_(drawn, master, seed=0, step=2, name=name.removeprefix("masters/"))
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, drawn), name


def test_a_part_that_is_missing_or_altered_makes_the_checkpoint_unusable(together: Path, tmp_path: Path) -> None:
    """One byte of one rank's part, or that part gone: the checkpoint is not used, and it is said which part."""
    for number, (harm, told) in enumerate([(flip, "the SHA-256 of"), (Path.unlink, "is missing")]):
        folder = tmp_path / str(number)
        shutil.copytree(together / "chain" / "checkpoints" / "step-2", folder / "step-2")
        harm(folder / "step-2" / "tensors-1-of-2.safetensors")
        said: list[str] = []
        assert Checkpoints(folder).latest(said.append) is None
        assert told in said[0] and "tensors-1-of-2.safetensors" in said[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are named there by Linux alone")
def test_no_thread_of_the_group_outlives_it(together: Path) -> None:
    """One that still held a tensor when the interpreter went aborted a rank whose work was done, now and then."""
    for rank in (0, 1):
        threads = json.loads((together / f"threads-of-{rank}.json").read_text())
        assert threads and not [name for name in threads if "gloo" in name]


def test_no_pickle_is_written(together: Path) -> None:
    """Whatever two ranks wrote is JSON, text or safetensors: no file of DCP, whose description is a pickle."""
    written = [path for path in (together / "chain").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {path.suffix for path in written} <= {".json", ".jsonl", ".safetensors", ".md", ".html", ".txt"}
    assert not any(path.read_bytes().startswith((b"\x80", b"PK")) for path in written)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("dpo --data d --lora_rank 4 --quantize nf4", "scaled in blocks"),
        ("dpo --data d --optimizer adamw8bit", "scales its moments in blocks"),
    ],
)
def test_what_cannot_be_sharded_says_why(
    stage: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No stage takes the option and ignores it."""
    assert cli([*stage.split(), "--model", "m", "--out", str(tmp_path / "o"), "--shard"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["sft --data d", "dpo --data d", "ppo --reward rule:length --prompts p"])
def test_offload_without_shard_is_refused(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole weights are not offloaded, and no stage takes the option and ignores it."""
    assert cli([*stage.split(), "--model", "m", "--out", str(tmp_path / "o"), "--offload"]) == 2
    assert "set shard too" in capsys.readouterr().err


def far(one: Path, many: Path) -> float:
    """Root mean square of the differences of two models' weights."""
    first, second = (load_file(next(folder.glob("*model.safetensors"))) for folder in (one, many))
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in second.items()}
    apart = torch.cat([(first[name].float() - second[name].float()).flatten() for name in first])
    return float(apart.square().mean().sqrt())


def held(folder: Path) -> list[int]:
    """Bytes of weights, masters and moments on every rank of a run."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("held-by-*.json"))]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
