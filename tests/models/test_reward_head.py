"""Claims about the reward head: where it looks, what it starts from, and that transformers reads the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preftune.data.packing import pack, pad
from preftune.errors import ArtifactError, ConfigError, RunError
from preftune.models.attention import install
from preftune.models.fresh import letter_tokenizer, tiny_llama
from preftune.models.load import save
from preftune.models.reward_head import OFFSET, check_ends, check_rewards, load_reward_model, reward
from preftune.tensors import TokenGroup


def group(prompt: int, *lengths: int, seed: int = 0) -> TokenGroup:
    """Random responses that end with </s>; the second one, where there is one, begins like the first."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> Any:
        return rng.integers(2, 300, n).astype(np.int32)

    responses = [np.append(ids(n - 1), np.int32(1)) for n in lengths]
    if len(responses) > 1:
        shared = min(lengths[:2]) // 2
        responses[1][:shared] = responses[0][:shared]
    return TokenGroup(np.append(np.int32(0), ids(prompt)), tuple(responses), ((0, 1),) if len(lengths) > 1 else ())


GROUPS = [group(6, 5, 9), group(3, 4, seed=1), group(9, 7, 3, 6, seed=2)]


def one_by_one(model: Any, groups: list[TokenGroup]) -> Tensor:
    """[R] what transformers' classifier says of each sequence by itself."""
    rows = [torch.from_numpy(np.concatenate([g.prompt, r]).astype(np.int64))[None] for g in groups for r in g.responses]
    with torch.no_grad():
        return torch.cat([model(row).logits[0] for row in rows])


def random_lm(kind: str, folder: Path, tokenizer: Path) -> Path:
    from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, MistralConfig

    small = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "GPT2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **small),
        "GPTNeoX": lambda: GPTNeoXConfig(max_position_embeddings=64, **wide, **small),
        "Mistral": lambda: MistralConfig(num_key_value_heads=2, tie_word_embeddings=True, **wide, **small),
        "Gemma2": lambda: Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=8, **wide, **small),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Mistral", "Gemma2", "Llama"])
def test_packed_padded_and_single_sequences_have_one_reward(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Within 1e-5, of any architecture: rows that share prompts, padded rows of any pad id, transformers one by one."""
    folder = tiny_model_folder if kind == "Llama" else random_lm(kind, tmp_path, tiny_model_folder)
    model = load_reward_model(folder, dtype=torch.float32).model
    alone = one_by_one(model, GROUPS)
    assert install(model) is None
    with torch.no_grad():
        for batch in (pack(GROUPS, feed_last=True), *(pad(GROUPS, pad_id=i, feed_last=True) for i in (0, 7))):
            torch.testing.assert_close(reward(model, batch), alone.flatten(), rtol=0, atol=1e-5)
            assert check_rewards(model, batch) < 1e-5
    assert float(alone.std()) > 0.1, "equal rewards would prove nothing"


def test_the_reward_is_read_at_the_end_mark(tiny_model_folder: Path) -> None:
    """Without its end mark a response has another reward: the mark is fed, and the reward is read there."""
    model = load_reward_model(tiny_model_folder, dtype=torch.float32).model
    whole = GROUPS[1]
    cut = TokenGroup(whole.prompt, (whole.responses[0][:-1],))
    install(model)
    with torch.no_grad():
        rewards = [float(reward(model, pack([g], feed_last=True))) for g in (whole, cut)]
    assert abs(rewards[0] - rewards[1]) > 0.01


def test_transformers_reads_the_saved_folder_and_says_the_same(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Plain from_pretrained, right-padded by the saved tokenizer or single: our reward plus the offset, within 1e-5."""
    loaded = load_reward_model(tiny_model_folder, dtype=torch.float32)
    loaded.model.config.reward_offset = 0.75
    save(loaded.model, loaded.tokenizer, tmp_path / "rm", state=None, card="")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert theirs.config.num_labels == 1 and getattr(theirs.config, OFFSET) == 0.75
    assert not any(info.values()), "nothing missing, nothing left over"

    texts = ["the cat", "a good answer is short and true, a bad answer", "once upon a time", "<s> </s>"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm", padding_side="right")
    ended = [text + "</s>" for text in texts]
    batch = tokenizer(ended, return_tensors="pt", padding=True)
    with torch.no_grad():
        padded = theirs.eval()(**batch).logits[:, 0]
        single = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits[0] for text in ended])
    groups = [
        TokenGroup(np.array(ids[:1], np.int32), (np.array(ids[1:], np.int32),)) for ids in tokenizer(ended).input_ids
    ]
    again = load_reward_model(tmp_path / "rm", dtype=torch.float32, trained=True)
    install(again.model)
    with torch.no_grad():
        ours = reward(again.model, pack(groups, feed_last=True), centred=True)
    torch.testing.assert_close(padded - 0.75, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(single - 0.75, ours, rtol=0, atol=1e-5)
    assert again.weights_sha256 == loaded.weights_sha256


def test_a_new_head_is_small_seeded_and_all_that_is_new(tmp_path: Path) -> None:
    """N(0, 1 / (d + 1)) from the seed; the backbone is the language model's, the global random numbers stay."""
    lm = tiny_llama(40, hidden=256, layers=1)
    lm.save_pretrained(tmp_path)
    letter_tokenizer(20).save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (load_reward_model(tmp_path, dtype=torch.float32, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    head = first.model.score.weight.detach()
    assert head.shape == (1, 256)
    assert float(head.std()) == pytest.approx(257**-0.5, rel=0.15) and abs(float(head.mean())) < 0.02
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(first.model.model.state_dict()[name][: len(tensor)], tensor), name


def test_a_pad_token_is_found_or_made_and_ends_no_response(tiny_model_folder: Path, tmp_path: Path) -> None:
    """BOS where it is not EOS, else a new token with a row of zeros; it is trained like any other token."""
    found = load_reward_model(tiny_model_folder, dtype=torch.float32)
    assert found.tokenizer.pad_token == "<s>" and found.model.config.pad_token_id == 0
    install(found.model)
    reward(found.model, pack(GROUPS, feed_last=True)).sum().backward()
    assert float(found.model.get_input_embeddings().weight.grad[0].norm()) > 0, "BOS is read, so it is trained"

    tiny_llama(9, hidden=8, layers=1, heads=2, bos_id=8, eos_id=8).save_pretrained(tmp_path)
    letter_tokenizer(8).save_pretrained(tmp_path)
    made = load_reward_model(tmp_path, dtype=torch.float32)
    assert made.tokenizer.pad_token_id == made.model.config.pad_token_id == 9 != made.tokenizer.eos_token_id
    assert made.model.get_input_embeddings().weight[9].tolist() == [0.0] * 8 and made.model.config.vocab_size == 10


def test_a_response_that_ends_with_the_pad_token_is_refused(tiny_model_folder: Path) -> None:
    model = load_reward_model(tiny_model_folder, dtype=torch.float32).model
    row = TokenGroup(np.array([5], np.int32), (np.array([6, 0], np.int32),), origin="a.jsonl:3")
    check_ends(model, GROUPS)
    with pytest.raises(ConfigError, match=r"a\.jsonl:3: it ends with the tokenizer's pad token 0"):
        check_ends(model, [row])


def test_rewards_that_differ_from_single_sequences_stop_the_run(tiny_model_folder: Path) -> None:
    """A batch that looks one token to the left is found, with the row that differs most."""
    model = load_reward_model(tiny_model_folder, dtype=torch.float32).model
    install(model)
    batch = pack(GROUPS, feed_last=True)
    assert batch.last_at is not None
    batch.last_at.sub_(1)
    with pytest.raises(RunError, match="rewards of packed rows differ from each sequence alone"):
        check_rewards(model, batch)


def test_gradients_reach_the_head_and_every_layer(tiny_model_folder: Path) -> None:
    """Packed rows give the gradients of padded ones, for all parameters of backbone and head."""
    found = []
    for make in (lambda: pack(GROUPS, feed_last=True), lambda: pad(GROUPS, pad_id=3, feed_last=True)):
        model = load_reward_model(tiny_model_folder, dtype=torch.float64).model
        install(model)
        (reward(model, make()) * torch.arange(1.0, 7.0, dtype=torch.float64)).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    packed, padded = found
    for name, gradient in packed.items():
        assert gradient is not None and float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(gradient, padded[name], rtol=1e-4, atol=1e-5)  # norms are float32


def test_what_is_no_reward_model_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Several labels, no head where one is needed, rows without their last token: each in one line."""
    with pytest.raises(ArtifactError, match=r"is no reward model, its config\.json names no classifier"):
        load_reward_model(tiny_model_folder, dtype=torch.float32, trained=True)
    several = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=3)
    several.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="a classifier with several labels"):
        load_reward_model(tmp_path, dtype=torch.float32)
    model = load_reward_model(tiny_model_folder, dtype=torch.float32).model
    with pytest.raises(RunError, match="make the batch with feed_last=True"):
        reward(model, pack(GROUPS))


def test_a_damaged_head_is_refused_as_any_weight_is(tiny_model_folder: Path, tmp_path: Path) -> None:
    """A reward model without its score.weight is not given a random one."""
    from safetensors.torch import load_file, save_file

    loaded = load_reward_model(tiny_model_folder, dtype=torch.float32)
    save(loaded.model, loaded.tokenizer, tmp_path / "rm", state=None, card="")
    weights = load_file(tmp_path / "rm" / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"missing and would be drawn at random: score\.weight"):
        load_reward_model(tmp_path / "rm", dtype=torch.float32)


def test_bfloat16_keeps_close_rewards_apart(tiny_model_folder: Path) -> None:
    """The head works in float32: a hundred rewards of a bfloat16 model are a hundred numbers."""
    model = load_reward_model(tiny_model_folder, dtype=torch.bfloat16).model
    install(model)
    with torch.no_grad():
        rewards = reward(model, pack([group(5, 6, seed=s) for s in range(100)], feed_last=True))
    assert rewards.dtype == torch.float32 and len(rewards.unique()) == 100
