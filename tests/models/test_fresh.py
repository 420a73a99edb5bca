"""Fresh models and word tokenizers."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.errors import ConfigError
from preftune.models.fresh import letter_tokenizer, tiny_llama, word_tokenizer

WORDS = ["The", " the", " film", " was", " good", ".", ","]


def test_weights_are_a_function_of_the_seed_and_leave_the_global_random_numbers_alone():
    """Equal seeds give equal weights, other seeds others, and torch's generator does not move."""
    torch.manual_seed(11)
    state = torch.get_rng_state()
    a, b, c = (tiny_llama(10, hidden=16, layers=1, heads=2, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    d = tiny_llama(10, hidden=16, layers=1, heads=2, seed=0).state_dict()
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], d[k]) for k in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])


def test_a_saved_folder_loads_with_the_auto_classes(tmp_path):
    """transformers reads model and tokenizer back: equal logits, equal ids, BOS 1 and EOS 2 on both sides."""
    model, tokenizer = tiny_llama(10, hidden=16, layers=1, heads=2), word_tokenizer(WORDS)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = words("The film was good.", return_tensors="pt")["input_ids"]
    assert ids.tolist() == [tokenizer("The film was good.")["input_ids"]] == [[1, 3, 5, 6, 7, 8]]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (words.bos_token_id, words.eos_token_id) == (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)


def test_decoding_gives_the_text_back_without_spurious_spaces():
    """Spaces belong to words: full stops and commas stay attached, a leading space is kept."""
    tokenizer = word_tokenizer(WORDS)
    for text in ("The film, the film was good.", " good.", " was good, the film."):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_any_sequence_of_pieces_is_read_back_as_it_was_written():
    """ids -> text -> ids is the identity, whatever a model strings together."""
    tokenizer = word_tokenizer(WORDS)
    for ids in itertools.product(range(3, 3 + len(WORDS)), repeat=3):
        assert tokenizer(tokenizer.decode(ids))["input_ids"] == [1, *ids]


def test_an_unknown_piece_becomes_unk_and_its_neighbours_stay():
    """A word outside the vocabulary costs one UNK, nothing more."""
    assert word_tokenizer(WORDS)("The zebra was good.")["input_ids"] == [1, 3, 0, 6, 7, 8]


def test_a_letter_is_a_token_and_there_is_nothing_else(tmp_path):
    """n letters and one mark are the whole vocabulary, ids -> text -> ids is the identity, and a folder keeps both."""
    model = tiny_llama(4, hidden=16, layers=1, heads=2, bos_id=3, eos_id=3)
    model.save_pretrained(tmp_path)
    letter_tokenizer(3).save_pretrained(tmp_path)
    loaded, letters = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(letters) == 4 and letters.bos_token_id == letters.eos_token_id == 3
    assert loaded.config.bos_token_id == loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 3
    for ids in itertools.product(range(3), repeat=3):
        assert letters(letters.decode(ids))["input_ids"] == [3, *ids]
    assert letters("c?\nb")["input_ids"] == [3, 2, 3, 3, 1]


def test_impossible_requests_are_refused():
    """An odd head width and a repeated word are refused with the numbers that clash."""
    with pytest.raises(ConfigError, match="hidden=20 must be a multiple of 2 \\* heads = 8"):
        tiny_llama(10, hidden=20, heads=4)
    with pytest.raises(ConfigError, match="4 words give 6 tokens"):
        word_tokenizer(["a", "b", "b", "c"])
    with pytest.raises(ConfigError, match="count=27 must be from 1 to 26"):
        letter_tokenizer(27)
