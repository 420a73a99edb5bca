"""Claims about adapter folders: complete or refused, read by other tools, merged into what they compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapted_models import BASE, DORA, IDS, KINDS, LORA, adapted, build, logits, moved
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.errors import ArtifactError, ConfigError
from preftune.models import quantize
from preftune.models.adapters import AdapterSpec, Base, adapter_of, attach, merged_state
from preftune.models.attention import install
from preftune.models.load import load, quiet, save
from preftune.models.reward_head import load_reward_model
from preftune.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=[LORA, DORA], ids=["lora", "dora"])
def written(request: Any, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """(an adapter folder, the logits it should give)."""
    loaded = adapted(tiny_model_folder, request.param)
    folder = tmp_path_factory.mktemp("adapter") / "model"
    save(moved(loaded.model), loaded.tokenizer, folder, state=None, card="card\n")
    return folder, logits(loaded.model)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_the_folder_gives_the_trained_function_back(written: tuple[Path, Tensor], tiny_model_folder: Path) -> None:
    """Equal logits to the bit, only the adapter trainable, and a hash that is neither the base's nor another's."""
    folder, expected = written
    loaded = load(folder, dtype=torch.float32)
    assert torch.equal(logits(loaded.model), expected)
    assert loaded.weights_sha256 == load(folder, dtype=torch.float32).weights_sha256
    assert loaded.weights_sha256 != load(tiny_model_folder, dtype=torch.float32).weights_sha256
    assert all((".lora_" in n) == p.requires_grad for n, p in loaded.model.named_parameters())
    assert any(f"adapter of {folder}, rank 4" in note for note in loaded.notes)
    assert (folder / "README.md").read_text() == "card\n"
    assert load_tokenizer(folder).get_vocab() == loaded.tokenizer.get_vocab()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_reads_it(written: tuple[Path, Tensor]) -> None:
    """peft alone finds the base, gives equal logits, and would write tensors of the same names."""
    from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict

    with quiet():
        theirs = AutoPeftModelForCausalLM.from_pretrained(str(written[0])).eval()
    assert torch.equal(logits(theirs), written[1])
    names = set(get_peft_model_state_dict(theirs, save_embedding_layers=False))
    assert names == set(load_file(written[0] / "adapter_model.safetensors"))


def test_transformers_reads_it(written: tuple[Path, Tensor]) -> None:
    """AutoModelForCausalLM of the adapter folder gives equal logits."""
    if json.loads((written[0] / "adapter_config.json").read_text())["use_dora"]:
        pytest.skip("transformers alone drops DoRA's magnitudes; peft reads them")
    with quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(written[0]).eval()
    assert torch.equal(logits(theirs), written[1])


def test_vllm_would_take_it(written: tuple[Path, Tensor]) -> None:
    """What vLLM asks of a LoRA: no bias, no further modules, suffixes as targets, a small rank, peft's names."""
    config = json.loads((written[0] / "adapter_config.json").read_text())
    assert (config["peft_type"], config["bias"], config["modules_to_save"]) == ("LORA", "none", None)
    assert config["r"] <= 16 and Path(config["base_model_name_or_path"]).is_absolute()
    assert config["target_modules"] == sorted(config["target_modules"]) and "q_proj" in config["target_modules"]
    names = set(load_file(written[0] / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert not any("default" in name or "base_layer" in name for name in names)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
def test_a_folder_of_peft_is_read_here(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Made by peft alone, with dropout, which is set to 0: equal logits, and its base said to be unchecked."""
    import peft

    with quiet(), torch.random.fork_rng(devices=[]):
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=r".*\.(q_proj|up_proj)", lora_dropout=0.5, init_lora_weights=False,
            use_rslora=True, task_type="CAUSAL_LM",
        )  # fmt: skip
        theirs = peft.get_peft_model(base, config).eval()
        theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded = load(tmp_path / "theirs", dtype=torch.float32)
    assert torch.equal(logits(loaded.model), logits(theirs))
    assert install(loaded.model) is None
    assert any("is not checked" in note for note in loaded.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LORA, DORA], ids=["lora", "dora"])
def test_merged_weights_give_the_adapters_logits(
    spec: AdapterSpec, dtype: torch.dtype, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """A plain folder, complete for any tool, equal within the rounding of the dtype; every change added in float32."""
    loaded = adapted(tiny_model_folder, spec, dtype)
    moved(loaded.model)
    save(loaded.model, loaded.tokenizer, tmp_path / "plain", state=None, card="", merge=True)
    merged = load(tmp_path / "plain", dtype=dtype)
    assert adapter_of(merged.model) is None
    assert float((logits(merged.model) - logits(loaded.model)).abs().max()) < (1e-4 if dtype == torch.float32 else 1.0)
    layer = loaded.model.requires_grad_(False).model.layers[0].mlp.up_proj
    change = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float() * 2
    whole = layer.base_layer.weight.float() + change
    if spec.dora:
        whole *= layer.lora_magnitude_vector["default"].weight.float()[:, None] / whole.norm(dim=1, keepdim=True)
    found = merged.model.requires_grad_(False).model.layers[0].mlp.up_proj.weight.float()
    off = float(((found - whole).abs() / whole.abs()).max())
    assert off < (1e-3 if dtype == torch.float32 else 2**-8 * 1.01)  # near zero float32 sums lose digits too


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_any_architecture_is_its_adapter(kind: str) -> None:
    """float64: transposed weights, tied embeddings, softcaps: equal logits, the state of a plain model."""
    model = build(kind)
    attach(model, LORA, BASE, seed=0)
    moved(model)
    plain = build(kind)
    plain.load_state_dict(merged_state(model))
    assert torch.allclose(logits(plain), logits(model), rtol=0, atol=1e-10)


def test_a_reward_model_is_written_merged(tiny_model_folder: Path, tmp_path: Path) -> None:
    """A classifier's head has no place in an adapter folder: transformers reads a whole classifier of equal scores."""
    loaded = load_reward_model(tiny_model_folder, dtype=torch.float32)
    attach(loaded.model, LORA, Base(str(tiny_model_folder), "", "float32"), seed=0)
    moved(loaded.model)
    save(loaded.model, loaded.tokenizer, tmp_path / "reward", state=None, card="")
    back = load_reward_model(tmp_path / "reward", dtype=torch.float32, trained=True)
    with torch.no_grad():
        found, expected = (m.model(IDS).logits for m in (back, loaded))
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)


def test_a_reward_model_may_start_from_an_adapter(written: tuple[Path, Tensor]) -> None:
    """The classifier's body is the adapted one: final hidden states equal those of the language model."""
    loaded = load_reward_model(written[0], dtype=torch.float32)
    language = load(written[0], dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (m.model.model(IDS).last_hidden_state for m in (loaded, language))
    assert torch.equal(ours, theirs)


# -- refusals ---------------------------------------------------------------------------------------------------------


def edited(**changes: Any) -> Callable[[Path], Any]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no base": (edited(base_model_name_or_path=None), "base_model_name_or_path does not name the adapter's base"),
    "base gone": (edited(base_model_name_or_path="/nowhere/base"), "whose base /nowhere/base cannot be used"),
    "another method": (edited(peft_type="IA3"), "peft_type 'IA3' is not served, only LORA is"),
    "changed base": (edited(init_lora_weights="pissa"), "init_lora_weights 'pissa' changed the base under it"),
    "biases": (edited(bias="all"), "bias is not served; merge it"),
    "modules": (edited(modules_to_save=["lm_head"]), "modules_to_save is not served; merge it"),
    "the head": (edited(target_modules=["lm_head"]), "adapter changes lm_head, which is no linear layer"),
    "the embedding": (edited(target_modules=["embed_tokens"]), "changes model.embed_tokens, which is no linear layer"),
    "nothing": (edited(target_modules=["query"]), "the adapter does not fit this model"),
    "a lost tensor": (without_a_tensor, "1 adapter weights are missing"),
    "further tensors": (edited(target_modules=["q_proj"]), "adapter weights fit nowhere"),
    "another rank": (edited(r=5), "adapter weights have another shape"),
    "pickled": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "a pickled adapter is"),
    "torn": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "safetensors cannot be read"),
    "code": (edited(auto_map={"AutoModel": "x.y"}), "auto_map is not served"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_be_the_trained_function_is_refused(what: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    """One line that names the file and what is wrong with it."""
    damage, sentence = REFUSED[what]
    loaded = adapted(tiny_model_folder)
    save(loaded.model, loaded.tokenizer, tmp_path / "adapter", state=None, card="")
    damage(tmp_path / "adapter")
    with pytest.raises(ArtifactError) as caught:
        load(tmp_path / "adapter", dtype=torch.float32)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_on_another_base_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    """One weight of the base changed: refused in the dtype of training, told to be unchecked in another."""
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    loaded = adapted(base)
    save(loaded.model, loaded.tokenizer, tmp_path / "adapter", state=None, card="")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="does not hold the weights this adapter was trained on any more"):
        load(tmp_path / "adapter", dtype=torch.float32)
    assert any(
        "as trained (float32) is not checked" in n for n in load(tmp_path / "adapter", dtype=torch.bfloat16).notes
    )


def test_an_adapter_of_an_adapter_is_refused(written: tuple[Path, Tensor], tmp_path: Path) -> None:
    """The base must be a whole model."""
    folder = Path(shutil.copytree(written[0], tmp_path / "second"))
    edited(base_model_name_or_path=str(written[0]))(folder)
    with pytest.raises(ArtifactError, match="it is an adapter itself, merge it first"):
        load(folder, dtype=torch.float32)


def test_quantised_bases_say_what_they_need(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nf4 on a CPU, and nf4 without bitsandbytes: a refusal that names what is missing and how to get it."""
    with pytest.raises(ConfigError, match="quantize nf4 needs a CUDA device, found cpu"):
        load(tiny_model_folder, dtype=torch.float32, quantize="nf4")
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, which is not installed: pip install 'preftune\[quant\]'"
    ):
        quantize.loading_options("nf4", torch.bfloat16, "cuda")


def test_an_adapter_trained_on_nf4_asks_for_nf4_and_does_not_merge(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Its folder says so: on a CPU it is refused instead of meeting other base weights, and so is a merge."""
    loaded = load(tiny_model_folder, dtype=torch.float32)
    attach(loaded.model, LORA, Base(str(tiny_model_folder), loaded.weights_sha256, "float32", "nf4"), seed=0)
    save(loaded.model, loaded.tokenizer, tmp_path / "adapter", state=None, card="")
    with pytest.raises(ConfigError, match="quantize nf4 needs a CUDA device"):
        load(tmp_path / "adapter", dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"trained on nf4 weights of .* write the dequantised base"):
        merged_state(loaded.model)
