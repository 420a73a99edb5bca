"""Claims about model folders: read whole, without running code, or refused in one line; written whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from preftune.data.packing import pack
from preftune.errors import ArtifactError, RunError
from preftune.models.attention import install
from preftune.models.folder import find
from preftune.models.load import active_dropouts, load, save, weights_sha256
from preftune.models.logprobs import check_packing, score
from preftune.models.outline import read_configuration
from preftune.tensors import TokenGroup

FLOAT32 = torch.float32


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "policy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: str | Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(folder, dtype=FLOAT32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_without_network_ready_to_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation mode, the asked dtype, every parameter trainable, and no socket is opened."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("opened a connection"))
    loaded = load(folder, dtype=torch.bfloat16)
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.tokenizer("the cat")["input_ids"]
    assert loaded.notes == ("no pad token: not needed",)


def test_weights_are_those_of_the_file(folder: Path) -> None:
    on_disk = load_file(folder / "model.safetensors")
    state = load(folder, dtype=FLOAT32).model.state_dict()
    assert state.keys() == on_disk.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in on_disk.items())


def test_hashes_name_content_not_place(folder: Path, tmp_path: Path) -> None:
    """A copy has equal hashes; one changed weight, another dtype or another chat template has not."""
    first = load(folder, dtype=FLOAT32)
    copy = load(shutil.copytree(folder, tmp_path / "elsewhere"), dtype=FLOAT32)
    assert (first.weights_sha256, first.tokenizer_sha256) == (copy.weights_sha256, copy.tokenizer_sha256)
    assert load(folder, dtype=torch.bfloat16).weights_sha256 != first.weights_sha256
    edit_weights(folder, lambda t: t["model.norm.weight"].mul_(1 + 2**-20))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    changed = load(folder, dtype=FLOAT32)
    assert changed.weights_sha256 != first.weights_sha256
    assert changed.tokenizer_sha256 != first.tokenizer_sha256


def test_a_hash_tells_apart_what_has_equal_bytes() -> None:
    """Zeros of two dtypes, two shapes and two names."""
    modules = (
        torch.nn.Linear(2, 3, bias=False, dtype=torch.float16),
        torch.nn.Linear(2, 3, bias=False, dtype=torch.bfloat16),
        torch.nn.Linear(3, 2, bias=False, dtype=torch.float16),
        torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False, dtype=torch.float16)),
    )
    for module in modules:
        torch.nn.init.zeros_(next(module.parameters()))
    assert len({weights_sha256(module) for module in modules}) == 4


@pytest.mark.parametrize("by", ["configuration", "modules"])
def test_every_dropout_is_off_even_in_training_mode(
    by: str, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's default of 0.1 in three places: two passes in training mode agree to the bit, and a note says so.

    In modules too, where a model takes a probability from elsewhere than its configuration.
    """
    if by == "modules":
        monkeypatch.setattr("preftune.models.load._without_dropout", lambda config: [])
    shutil.copytree(tiny_model_folder, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    config = transformers.GPT2Config(
        vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    loaded = load(tmp_path / "gpt2", dtype=FLOAT32)
    assert any("dropout 0.1 set to 0" in note for note in loaded.notes)
    assert not list(active_dropouts(loaded.model))
    assert loaded.model.config.attn_pdrop == (0 if by == "configuration" else 0.1)
    loaded.model.train()
    ids = torch.arange(12)[None]
    assert torch.equal(loaded.model(ids).logits, loaded.model(ids).logits)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_an_absent_folder_names_its_neighbours(folder: Path) -> None:
    assert refusal(folder.parent / "polcy") == (
        f"no folder {folder.parent / 'polcy'}; near names there: {folder.parent / 'policy'}"
    )


def test_a_hub_name_that_cannot_be_had_says_so() -> None:
    """The tests run offline."""
    assert refusal("nobody/nothing").startswith("no folder nobody/nothing, and the hub gives no model of that name (")


def test_a_run_is_its_model(folder: Path, tmp_path: Path) -> None:
    """Whoever names `runs/sft` means `runs/sft/model`: not a folder that is a model itself."""
    shutil.copytree(folder, tmp_path / "run" / "model")
    inside, run = load(tmp_path / "run" / "model", dtype=FLOAT32), load(tmp_path / "run", dtype=FLOAT32)
    assert (run.weights_sha256, run.tokenizer_sha256) == (inside.weights_sha256, inside.tokenizer_sha256)
    assert read_configuration(str(tmp_path / "run")).hidden_size == inside.model.config.hidden_size
    shutil.copytree(folder, folder / "model")
    assert find(folder) == folder and find(tmp_path / "run") == tmp_path / "run" / "model"


def test_a_folder_above_models_names_one(folder: Path) -> None:
    assert refusal(folder.parent) == (
        f"{folder.parent} has no config.json and so is not a model folder; {folder} has one"
    )


def test_a_file_is_no_model(folder: Path) -> None:
    assert "is a file; a model is the folder that holds config.json" in refusal(folder / "config.json")


CONFIGS = {
    "code of its own": ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map asks for code"),
    "a nested flag": ({"text_config": {"trust_remote_code": True}}, "text_config.trust_remote_code asks for code"),
    "a private field": ({"_attn_implementation_internal": "x/y"}, "_attn_implementation_internal sets a private"),
    "a foreign kernel": ({"attn_implementation": "some/kernel"}, "asks for a kernel from a repository (some/kernel)"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
    "an unknown type": ({"model_type": "frobnicator"}, "the model cannot be read"),
    "an encoder-decoder": ({"model_type": "t5"}, "the model cannot be read"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_refused_that_asks_for(case: str, folder: Path) -> None:
    changes, reason = CONFIGS[case]
    edit(folder / "config.json", **changes)
    assert reason in refusal(folder)


def test_a_tokenizer_configuration_that_asks_for_code_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert "tokenizer_config.json: auto_map asks for code" in refusal(folder)


def test_opening_a_hostile_folder_runs_nothing(folder: Path, tmp_path: Path) -> None:
    """A pickle and a module that would each leave a mark: neither is touched, beside safetensors or without them."""
    mark = tmp_path / "mark"

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (mark,))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
    load(folder, dtype=FLOAT32)
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin, a pickle that runs code when opened: convert it once" in refusal(folder)
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.Config"})
    refusal(folder)
    assert not mark.exists()


def damage(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "an adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds an adapter, not a model: merge it"),
    "half a configuration": (lambda f: damage(f / "config.json", 40), "config.json cannot be read as JSON"),
    "a list for a configuration": (lambda f: (f / "config.json").write_text("[]"), "holds a list, not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "half the weights": (lambda f: damage(f / "model.safetensors", 9000), "the model cannot be read"),
    "a missing weight": (
        lambda f: edit_weights(f, lambda t: t.pop("model.norm.weight")),
        "weights are missing and would be drawn at random: model.norm.weight"),
    "a missing head": (
        lambda f: edit_weights(f, lambda t: t.pop("lm_head.weight")), "drawn at random: lm_head.weight"),
    "a weight too many": (
        lambda f: edit_weights(f, lambda t: t.update({"score.weight": torch.zeros(1, 32)})),
        "weights fit nowhere in this architecture and would be dropped: score.weight"),
    "another shape": (
        lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.zeros(31)})),
        "weights have another shape than config.json says"),
    "a missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}'),
        "the index names one.safetensors, which is not there"),
    "a shard elsewhere": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../policy/config.json"}}'),
        "the index names ../policy/config.json, which is not there"),
    "a damaged tokenizer": (lambda f: damage(f / "tokenizer.json", 500), "the tokenizer cannot be read"),
    "more tokens than embeddings": (
        lambda f: (edit(f / "config.json", vocab_size=300),
                   edit_weights(f, lambda t: t.update({n: t[n][:300].clone() for n in t if t[n].shape[0] == 320}))),
        "the tokenizer knows 320 tokens but the model embeds 300"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_folder_is_refused_that_has(case: str, folder: Path) -> None:
    do, reason = DAMAGES[case]
    do(folder)
    assert reason in refusal(folder)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_loads_again_equal(folder: Path, tmp_path: Path) -> None:
    """By us and by transformers; a plain folder with a card, no pickle, no trace of packed attention or of the save."""
    loaded = load(folder, dtype=FLOAT32)
    assert install(loaded.model) is None
    save(loaded.model, loaded.tokenizer, tmp_path / "out" / "model", state=None, card="# A card\n")
    again = load(tmp_path / "out" / "model", dtype=FLOAT32)
    assert (again.weights_sha256, again.tokenizer_sha256) == (loaded.weights_sha256, loaded.tokenizer_sha256)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype="auto")
    assert weights_sha256(plain) == loaded.weights_sha256
    assert (tmp_path / "out" / "model" / "README.md").read_text() == "# A card\n"
    files = {p.name for p in (tmp_path / "out" / "model").iterdir()}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}
    assert "preftune" not in (tmp_path / "out" / "model" / "config.json").read_text()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]


def test_float32_masters_replace_bf16_weights_tied_ones_too(folder: Path, tmp_path: Path) -> None:
    """A master given once stands for both ends of a tied weight, and the configuration says float32."""
    edit(folder / "config.json", tie_word_embeddings=True)
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    loaded = load(folder, dtype=torch.bfloat16)
    masters = {name: p.detach().float() * 1.001 for name, p in loaded.model.named_parameters()}
    assert "lm_head.weight" not in masters
    save(loaded.model, loaded.tokenizer, tmp_path / "out", state=masters, card="")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == FLOAT32
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(p, masters[name]) for name, p in again.named_parameters())
    load(tmp_path / "out", dtype=torch.bfloat16)


def test_a_state_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, dtype=FLOAT32)
    for state in ({"model.nothing": torch.zeros(1)}, {"model.norm.weight": torch.zeros(3)}):
        with pytest.raises(RunError, match="is no weight of this model, or of another shape"):
            save(loaded.model, loaded.tokenizer, tmp_path / "out", state=state, card="")
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_the_old_folder_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the tokenizer, at the card's fsync, at the last rename: the old model is still there, and nothing else."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    loaded = load(folder, dtype=FLOAT32)
    with torch.no_grad():
        loaded.model.model.norm.weight.zero_()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    rename = Path.rename
    failures = (
        (type(loaded.tokenizer), "save_pretrained", full),
        (__import__("os"), "fsync", full),
        (Path, "rename", lambda path, to: full() if path.suffix == ".tmp" else rename(path, to)),
    )
    for owner, name, fail in failures:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(RunError, match=f"the model cannot be written to {folder}: .*No space left on device"):
                save(loaded.model, loaded.tokenizer, folder, state=None, card="")
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert [p.name for p in folder.parent.iterdir()] == ["policy"]


def test_a_save_replaces_the_folder_as_a_whole(folder: Path) -> None:
    """A file of the older model that the newer one does not have is gone."""
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "left-over.json").write_text("{}")
    loaded = load(folder, dtype=FLOAT32)
    loaded.tokenizer.chat_template = None
    save(loaded.model, loaded.tokenizer, folder, state=None, card="new")
    assert (folder / "README.md").read_text() == "new"
    assert not (folder / "left-over.json").exists()
    assert load(folder, dtype=FLOAT32).tokenizer.chat_template is None


def test_a_real_checkpoint_knows_its_language(shared: Path) -> None:
    """Trained by others on children's stories: below 2 nats per token on one, packed as alone; far above, shuffled."""
    loaded = load(shared / "models" / "stories260k", dtype=FLOAT32)
    assert install(loaded.model) is None
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = np.array(loaded.tokenizer(text)["input_ids"], dtype=np.int32)
    mixed = np.random.default_rng(0).permutation(ids[4:])
    batch = pack([TokenGroup(ids[:4], (ids[4:], mixed))])
    check_packing(loaded.model, batch)
    with torch.no_grad():
        story, nonsense = score(loaded.model, batch).chunk(2)
    assert story.mean() > -2 and nonsense.mean() < -4
