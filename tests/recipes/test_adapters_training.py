"""Claims about training an adapter: its trajectory, reference and checkpoints, and what every stage makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune.cli import main
from preftune.engine.run import Run
from preftune.errors import ConfigError
from preftune.models.load import load, quiet
from preftune.recipes import dpo, merge, ppo, reward, sft
from preftune.worlds.enumerable import write_model

RATE, RANK, SCALE = 0.5, 4, 2.0


@pytest.fixture(scope="module")
def few(pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pairs: few enough for a step to hold them all."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    path.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:12]))
    return path


def settings(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    common = {"batch_size": 4, "lr": 5e-3, "max_length": 128, "dtype": "float32", "device": "cpu"}
    return {"model": str(model), "data": str(data), "out": str(out), **common, **more}


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "adapter_model.safetensors")


def rows(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def imitated(tiny_model_folder: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT that trained an adapter away from its base."""
    out = tmp_path_factory.mktemp("sft") / "run"
    sft.main(sft.SftConfig(**settings(tiny_model_folder, few, out, lora_rank=RANK, epochs=3, lr=2e-2)))
    return out


# -- the trajectory ---------------------------------------------------------------------------------------------------


def by_hand(folder: Path, data: Path, start: dict[str, torch.Tensor], steps: int) -> dict[str, torch.Tensor]:
    """LoRA written out, float64: W + s B A put into transformers' model, one sequence at a time, gradient descent."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    base = dict(model.named_parameters())
    change = {name: tensor.double().requires_grad_() for name, tensor in start.items()}

    def sequence_logp(weights: dict[str, torch.Tensor], row: dict[str, str], side: str) -> torch.Tensor:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([[*tokenizer(row["prompt"] + row[side]).input_ids, tokenizer.eos_token_id]])
        logits = torch.func.functional_call(model, weights, (ids,)).logits
        return logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    def margins(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = [json.loads(line) for line in data.read_text().splitlines()]
        return torch.stack([sequence_logp(weights, r, "chosen") - sequence_logp(weights, r, "rejected") for r in pairs])

    with torch.no_grad():
        reference = margins(base)
    for _ in range(steps):
        weights = dict(base)
        for name in change:
            if "lora_A" in name:
                layer = name.removeprefix("base_model.model.").removesuffix("lora_A.weight")
                a, b = change[name], change[name.replace("lora_A", "lora_B")]
                weights[f"{layer}weight"] = base[f"{layer}weight"] + SCALE * b @ a
        loss = -torch.nn.functional.logsigmoid(0.1 * (margins(weights) - reference)).mean()
        gradients = torch.autograd.grad(loss, list(change.values()))
        for tensor, gradient in zip(change.values(), gradients, strict=True):
            tensor.data -= RATE * gradient
    return {name: tensor.detach() for name, tensor in change.items()}


def test_the_trajectory_is_that_of_lora_written_out(tiny_model_folder: Path, few: Path, tmp_path: Path) -> None:
    """Four steps of gradient descent on DPO, packed, in float32: the factors of a float64 loop that shares nothing."""
    common = {"optimizer": "sgd", "schedule": "constant", "max_grad_norm": 0, "batch_size": 12, "lora_rank": RANK}
    for steps, lr in ((1, 1e-30), (4, RATE)):
        cfg = settings(tiny_model_folder, few, tmp_path / str(steps), epochs=steps, **{**common, "lr": lr})
        dpo.main(dpo.DpoConfig(**cfg))
    begun, found = tensors(tmp_path / "1"), tensors(tmp_path / "4")
    expected = by_hand(tiny_model_folder, few, begun, steps=4)
    assert found.keys() == expected.keys()
    moved = {name: float((expected[name] - begun[name]).abs().max()) for name in found}
    assert min(moved.values()) > 1e-7 and max(moved.values()) > 1e-3
    for name, tensor in found.items():
        assert float((tensor - expected[name]).abs().max()) < 1e-3 * moved[name] + 1e-6, name


# -- the reference ----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_uses_what_is_cached_of_its_base(tiny_model_folder: Path, few: Path, tmp_path: Path) -> None:
    """It is the base: same hash, no reference log-prob computed again, log-ratios of exactly 0 at the first step."""
    dpo.main(dpo.DpoConfig(**settings(tiny_model_folder, few, tmp_path / "full", max_steps=1)))
    card = dpo.main(dpo.DpoConfig(**settings(tiny_model_folder, few, tmp_path / "run", lora_rank=RANK)))
    assert "reference log-probs: 12 groups cached, 0 to compute" in card.notes
    assert card.hashes["model_weights"] == load(tiny_model_folder, dtype=torch.float32).weights_sha256
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("loss", ["dpo", "tdpo1"])
def test_an_adapter_that_goes_on_is_held_to_where_it_starts(
    loss: str, imitated: Path, few: Path, tmp_path: Path
) -> None:
    """Cached or in memory, the reference is base and adapter together: the certificate holds, and not by chance."""
    card = dpo.main(dpo.DpoConfig(**settings(imitated / "model", few, tmp_path / "run", loss=loss)))
    assert any("step-0 certificate: loss 0.693147" in note for note in card.notes)
    assert card.hashes["model_weights"] == load(imitated / "model", dtype=torch.float32).weights_sha256
    begun, ended = tensors(imitated), tensors(tmp_path / "run")
    assert begun.keys() == ended.keys() and not torch.equal(*(next(iter(t.values())) for t in (begun, ended)))
    base = json.loads((imitated / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    other = dpo.main(dpo.DpoConfig(**settings(imitated / "model", few, tmp_path / "b", loss=loss, reference=base)))
    assert any("does not start at --reference" in note for note in other.notes)
    assert rows(tmp_path / "b")[0]["loss"] != pytest.approx(0.693147, abs=1e-3)


def test_a_reference_in_memory_moves_with_the_adapter(tiny_model_folder: Path, few: Path, tmp_path: Path) -> None:
    """Replaced after every step: each step but the first begins at log-ratio 0, so at the loss of a start."""
    cfg = settings(tiny_model_folder, few, tmp_path / "run", lora_rank=RANK, reference_every=1, lr=2e-2)
    dpo.main(dpo.DpoConfig(**cfg))
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx([0.693147] * 3, abs=1e-5)


def test_a_share_of_an_adapter_is_no_reference(
    tiny_model_folder: Path, imitated: Path, few: Path, tmp_path: Path
) -> None:
    """Refused when it is asked for, and when the model turns out to be an adapter."""
    moves = {"reference_every": 1, "reference_mix": 0.5}
    with pytest.raises(ConfigError, match="a share of two adapters is no share of two models"):
        dpo.DpoConfig(**settings(tiny_model_folder, few, tmp_path / "a", lora_rank=RANK, **moves))
    with pytest.raises(ConfigError, match="a share of two adapters is no share of two models"):
        dpo.main(dpo.DpoConfig(**settings(imitated / "model", few, tmp_path / "b", **moves)))


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"dtype": "bfloat16", "dora": True, "reference_every": 2}], ids=["lora", "dora"])
def test_a_run_that_breaks_off_resumes_to_the_same_bits(
    more: dict[str, Any], tiny_model_folder: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its checkpoints hold the adapter, masters and moments, no frozen weight."""
    same = {"lora_rank": RANK, "epochs": 2, "save_every": 2, **more}
    dpo.main(dpo.DpoConfig(**settings(tiny_model_folder, few, tmp_path / "whole", **same)))
    told = Run.after_step

    def breaks_off(run: Run, step: int, metrics: Any) -> None:
        told(run, step, metrics)
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "after_step", breaks_off)
    cfg = settings(tiny_model_folder, few, tmp_path / "broken", **same)
    with pytest.raises(KeyboardInterrupt):
        dpo.main(dpo.DpoConfig(**cfg))
    monkeypatch.undo()
    held = load_file(tmp_path / "broken" / "checkpoints" / "step-4" / "tensors.safetensors")
    assert held and all(".lora_" in name for name in held)
    card = dpo.main(dpo.DpoConfig(**cfg, resume=True))
    assert any("continuing from the checkpoint of step 4" in note for note in card.notes)
    found, expected = tensors(tmp_path / "broken"), tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# -- the stages -------------------------------------------------------------------------------------------------------


def test_rewards_and_rl_train_adapters_too(tiny_model_folder: Path, imitated: Path, few: Path, tmp_path: Path) -> None:
    """A reward model is written whole, with the head it learned; PPO writes the policy's adapter, held to its start."""
    learned = tmp_path / "reward"
    reward.main(reward.RewardConfig(**settings(tiny_model_folder, few, learned, lora_rank=RANK)))
    assert (learned / "model" / "model.safetensors").exists() and not (
        learned / "model" / "adapter_config.json"
    ).exists()
    cfg = {
        "model": str(imitated / "model"), "reward": f"reward:{learned}", "prompts": str(few),
        "out": str(tmp_path / "ppo"),
        "n": 2, "max_tokens": 6, "batch_size": 4, "max_steps": 2, "lr": 1e-3, "max_kl": 50, "lora_rank": RANK,
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    ppo.main(ppo.PpoConfig(**cfg))
    assert rows(tmp_path / "ppo")[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows(tmp_path / "ppo")[1]["kl"] != pytest.approx(0, abs=1e-7)
    begun, ended = tensors(imitated), tensors(tmp_path / "ppo")
    assert begun.keys() == ended.keys() and any(not torch.equal(begun[name], ended[name]) for name in begun)


def test_online_rounds_go_on_with_the_adapter(tmp_path: Path) -> None:
    """Round 2 starts from the adapter of round 1, and the result is an adapter on the base."""
    base = tmp_path / "base"
    write_model(base, hidden=16, layers=1)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("ca", "fe", "ab")))
    cfg = {
        "online": True, "model": str(base), "prompts": str(tmp_path / "prompts.jsonl"), "out": str(tmp_path / "run"),
        "judge": "rule:enumerable:0", "rounds": 2, "n": 4, "max_tokens": 9, "max_length": 12, "lr": 3e-3,
        "batch_size": 4, "device": "cpu", "tokens_per_batch": 512, "lora_rank": RANK,
    }  # fmt: skip
    dpo.main(dpo.DpoConfig(**cfg))
    second = json.loads((tmp_path / "run" / "round-2" / "dpo" / "run.json").read_text())
    assert second["config"]["model"].endswith("round-1/dpo/model")
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base.resolve())


def test_what_takes_a_model_takes_an_adapter(
    tiny_model_folder: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DPO, then sample, label by its implicit reward, evaluate, inspect and merge, from the command line."""
    run, merged = str(tmp_path / "run"), tmp_path / "merged"
    dpo.main(dpo.DpoConfig(**settings(tiny_model_folder, few, tmp_path / "run", lora_rank=RANK, dora=True)))
    model, data, short = f"{run}/model", str(few), ["--max_tokens", "4", "--device", "cpu"]
    for argv in (
        ["sample", "--model", model, "--prompts", data, "--n", "1", "--out", str(tmp_path / "s.jsonl"), *short],
        ["label", "--samples", data, "--judge", f"policy:{run}", "--out", str(tmp_path / "label")],
        ["evaluate", "--model", run, "--reference", str(tiny_model_folder), "--prompts", data, "--max_prompts", "4",
         "--out", str(tmp_path / "evaluation"), *short],
        ["inspect", "--model", model, "--data", data],
        ["merge", "--model", model, "--out", str(merged)],
    ):  # fmt: skip
        assert main(argv) == 0, argv
    assert "float32 weights with the adapter merged" in capsys.readouterr().out
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        one, other = (load(folder, dtype=torch.float32).model(ids).logits for folder in (model, merged))
    assert float((one - other).abs().max()) < 1e-4
    assert "sha256 of base and adapter" in (merged / "README.md").read_text()


def test_what_cannot_be_merged_is_refused(tiny_model_folder: Path, imitated: Path, tmp_path: Path) -> None:
    """A plain model, and a folder that is there."""
    with pytest.raises(ConfigError, match="is no adapter folder; there is nothing to merge"):
        merge.main(merge.MergeConfig(model=str(tiny_model_folder), out=str(tmp_path / "new")))
    with pytest.raises(ConfigError, match="exists; name a new folder"):
        merge.main(merge.MergeConfig(model=str(imitated / "model"), out=str(tmp_path)))


# -- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lora_alpha": 8}, "lora_alpha belongs to an adapter: set lora_rank, or leave it out"),
    ({"lora_targets": "q_proj"}, "lora_targets belongs to an adapter"),
    ({"dora": True}, "dora belongs to an adapter"),
    ({"quantize": "nf4"}, "quantize belongs to an adapter"),
    ({"quantize": "nf4", "lora_rank": 8, "device": "cpu"}, "quantize nf4 needs a CUDA device, not cpu"),
    ({"lora_rank": 8, "lora_targets": " , "}, "lora_targets ' , ' names no layer"),
]


@pytest.mark.parametrize(("more", "sentence"), REFUSED, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_keys_without_meaning_are_refused(more: dict[str, Any], sentence: str) -> None:
    """In every stage that trains, before a file is opened."""
    for config in (sft.SftConfig, dpo.DpoConfig, reward.RewardConfig):
        with pytest.raises(ConfigError, match=sentence):
            config(model="m", data="d", out="o", **more)
    with pytest.raises(ConfigError, match=sentence):
        ppo.PpoConfig(model="m", prompts="p", reward="rule:length", out="o", **more)


def test_a_reward_model_is_not_quantised() -> None:
    with pytest.raises(ConfigError, match="a reward model is written merged, which quantized weights cannot be"):
        reward.RewardConfig(model="m", data="d", out="o", lora_rank=4, quantize="nf4")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"lora_rank": 5}, "lora_rank: model .* goes on with its own adapter, which has 4, not 5"),
        ({"lora_rank": RANK, "lora_alpha": 1}, "lora_alpha: model .* which has 8, not 1"),
        ({"lora_rank": RANK, "dora": True}, "dora: model .* which has False, not True"),
        ({"lora_rank": RANK, "lora_targets": "q_proj"}, "lora_targets: model"),
    ],
)
def test_another_adapter_than_the_model_has_is_refused(
    more: dict[str, Any], sentence: str, imitated: Path, few: Path, tmp_path: Path
) -> None:
    """A model that comes with an adapter goes on with that one."""
    with pytest.raises(ConfigError, match=sentence):
        sft.main(sft.SftConfig(**settings(imitated / "model", few, tmp_path / "run", **more)))


def test_eight_bit_moments_need_cuda(tiny_model_folder: Path, few: Path, tmp_path: Path) -> None:
    """On a CPU the optimizer is refused by name, and the one that works is named."""
    with pytest.raises(ConfigError, match="optimizer adamw8bit needs a CUDA device, found cpu; choose adamw"):
        sft.main(sft.SftConfig(**settings(tiny_model_folder, few, tmp_path / "run", optimizer="adamw8bit")))
