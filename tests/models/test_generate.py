"""Sampling: the right distribution, reproducible, independent of the batch."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.errors import ConfigError, NotFinite
from preftune.models.attention import install
from preftune.models.fresh import tiny_llama, word_tokenizer
from preftune.models.generate import sample
from preftune.records import Message

EOS, VOCAB = 2, 6


class Ids:
    """A tokenizer whose text is the ids themselves, so that the law of the tokens can be read off the answers."""

    eos_token_id = EOS

    bos_token_id = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens):
        return "".join(f" {i}" for i in ids)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    """A tiny model with weights large enough to have opinions: relative positions, or absolute ones and dropout."""
    if request.param == "llama":
        model = tiny_llama(VOCAB, hidden=16, layers=2, heads=2, positions=24)
    else:
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=EOS
        )
        model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.double()


def law(model, prompt, *, tokens, temperature, top_p):
    """{answer: probability} over all answers of at most `tokens` tokens, by full forwards without cache or padding."""
    law = {}

    def extend(answer, probability):
        if len(answer) == tokens or answer[-1:] == (EOS,):
            law[answer] = probability
            return
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, -1]
        weights = {v: math.exp(x / temperature) for v, x in enumerate(logits.tolist())}
        total, kept, mass = sum(weights.values()), {}, 0.0
        for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
            kept[token] = weight
            mass += weight / total
            if mass >= top_p:
                break
        for token, weight in kept.items():
            extend((*answer, token), probability * weight / sum(kept.values()))

    extend((), 1.0)
    return law


def chi_square_excess(counts, law, n):
    """Chi-square statistic over its mean, in standard deviations (cells under 5 expected are pooled)."""
    big = {k: p for k, p in law.items() if n * p >= 5}
    cells = [(counts[k], n * p) for k, p in big.items()]
    rest = 1 - sum(big.values())
    if n * rest >= 5:
        cells.append((n - sum(counts[k] for k in big), n * rest))
    freedom = len(cells) - 1
    return (sum((o - e) ** 2 / e for o, e in cells) - freedom) / math.sqrt(2 * freedom)


def assert_same(these, those):
    """Equal answers; sums of log-probs may differ in the last digits when the batch had another shape."""
    flat = [list(itertools.chain(*answers)) for answers in (these, those)]
    assert [replace(a, logp=None) for a in flat[0]] == [replace(a, logp=None) for a in flat[1]]
    assert [a.logp for a in flat[0]] == pytest.approx([a.logp for a in flat[1]], abs=1e-9)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.6, 0.9)])
def test_samples_follow_the_models_distribution(model, temperature, top_p):
    """Frequencies of whole answers equal the enumerated law, and `logp` is its log, in a batch of unequal prompts."""
    n, prompts = 3000, ["1", "1 3 4 5 3"]
    answers = sample(
        model, Ids(), prompts, n=n, max_tokens=3, seed=0, batch_size=2 * n, temperature=temperature, top_p=top_p
    )
    for prompt, drawn in zip(prompts, answers, strict=True):
        exact = law(model, [int(i) for i in prompt.split()], tokens=3, temperature=temperature, top_p=top_p)
        assert sum(exact.values()) == pytest.approx(1)
        counts = Counter((*(int(i) for i in a.text.split()), *([EOS] if a.finished else [])) for a in drawn)
        assert set(counts) <= set(exact)
        for a in drawn:  # temperature 1 and top_p 1: the model's own log-prob
            ids = (*(int(i) for i in a.text.split()), *([EOS] if a.finished else []))
            assert a.logp == pytest.approx(math.log(exact[ids]), abs=1e-9)
            assert a.provenance.endswith(f" tokens={len(ids)}")
        assert chi_square_excess(counts, exact, n) < 4
        assert len(set(counts)) > 5


def test_temperature_zero_takes_the_most_likely_token(model):
    """At temperature 0 every token is the argmax of a plain forward, whatever the seed."""
    (answers,) = sample(model, Ids(), ["1 3"], n=2, temperature=0, max_tokens=8, seed=5)
    ids = [1, 3]
    for token in [int(i) for i in answers[0].text.split()]:
        with torch.no_grad():
            assert model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)
    assert answers[0] == answers[1] and answers[0].logp == 0.0 and len(ids) > 2


def test_the_same_seed_gives_the_same_answers_in_any_batch(model):
    """Answers depend on the seed, not on the batch size nor on the other prompts behind them."""
    prompts = ["1", "1 4", "1 3 5 3", "1 5", "1 3", "1 4 4"]
    whole = sample(model, Ids(), prompts, n=3, max_tokens=10, seed=7)
    assert_same(sample(model, Ids(), prompts, n=3, max_tokens=10, seed=7, batch_size=1), whole)
    assert_same(sample(model, Ids(), prompts[:2], n=3, max_tokens=10, seed=7), whole[:2])
    assert_same(sample(model, Ids(), prompts[::-1], n=3, max_tokens=10, seed=7), whole[::-1])
    assert sample(model, Ids(), prompts, n=3, max_tokens=10, seed=8) != whole
    assert len({a.text for a in itertools.chain(*whole)}) > 10


def test_answers_are_numbered_and_a_repeated_prompt_gets_further_ones(model):
    """Answers 2 to 4 asked alone, or by giving the prompt a second time, are answers 2 to 4 of five."""
    (five,) = sample(model, Ids(), ["1 3"], n=5, max_tokens=10, seed=7)
    assert_same(sample(model, Ids(), ["1 3"], n=3, first=2, max_tokens=10, seed=7), [five[2:]])
    assert_same(sample(model, Ids(), ["1 3", "1", "1 3"], n=2, max_tokens=10, seed=7)[::2], [five[:2], five[2:4]])


def test_the_provenance_is_words_of_key_and_value(model):
    """One line that tells model, settings and token count; a name with spaces stays one word."""
    ((answer,),) = sample(model, Ids(), ["1 3"], max_tokens=1, top_p=0.5, seed=3, writer="my model")
    words = dict(word.split("=") for word in answer.provenance.split())
    wanted = {"temperature": "1", "top_p": "0.5", "max_tokens": "1", "seed": "3", "engine": "local", "tokens": "1"}
    assert words == {"model": "my%20model", **wanted}


def test_the_global_random_numbers_are_neither_read_nor_moved(model):
    """Sampling gives the same answers whatever torch's and numpy's state, and leaves both as they were."""
    torch.manual_seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = sample(model, Ids(), ["1 3"], n=4, max_tokens=6, seed=0)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(2)
    assert sample(model, Ids(), ["1 3"], n=4, max_tokens=6, seed=0) == first


def test_an_answer_is_finished_only_by_an_end_of_sequence(model):
    """At the length limit `finished` is False and nothing is cut; before it the end mark is not part of the text."""
    answers = list(itertools.chain(*sample(model, Ids(), ["1", "1 3"], n=200, max_tokens=4, seed=0)))
    lengths = {finished: {len(a.text.split()) for a in answers if a.finished == finished} for finished in (True, False)}
    assert lengths[False] == {4} and max(lengths[True]) == 3 and 0 in lengths[True]
    assert all(str(EOS) not in a.text.split() for a in answers)


def test_texts_hold_no_special_tokens_and_keep_their_leading_space():
    """A word model's answers are text only, and prompt + answer reads without a lost space."""
    tokenizer = word_tokenizer(["The", " film", " was", " good", "."])
    answers = sample(
        tiny_llama(8, hidden=16, layers=1, heads=2), tokenizer, ["The film was"], n=50, max_tokens=5, seed=0
    )
    texts = [a.text for a in answers[0]]
    assert all("<" not in text for text in texts)
    assert any(text.startswith(" ") for text in texts)


def test_a_conversation_goes_through_the_chat_template():
    """Messages are rendered by the tokenizer's template, the assistant's turn opened."""
    tokenizer = word_tokenizer(["The", " film", " was", " good", "."])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} was{% endif %}"
    )
    model = tiny_llama(8, hidden=16, layers=1, heads=2)
    plain = sample(model, tokenizer, ["The film was"], n=5, max_tokens=5, seed=0)
    template = tokenizer("The film was")["input_ids"][0]
    assert template == tokenizer.bos_token_id
    tokenizer.chat_template = "<s>" + tokenizer.chat_template
    assert sample(model, tokenizer, [(Message(role="user", content="The film"),)], n=5, max_tokens=5, seed=0) == plain


def test_the_mode_of_the_model_is_restored_and_dropout_is_off(model):
    """A model in training mode is sampled as in evaluation and handed back in training mode."""
    before = sample(model, Ids(), ["1 3"], n=300, max_tokens=5, seed=0)
    model.train()
    try:
        assert sample(model, Ids(), ["1 3"], n=300, max_tokens=5, seed=0) == before
        assert model.training
    finally:
        model.eval()


def test_a_tokenizer_that_ends_its_texts_does_not_end_the_prompt():
    """What encoding puts in front of a prompt stays, what it puts behind is left out; an empty prompt starts at BOS."""
    tokenizer = word_tokenizer(["The", " film", " was", " good", "."])
    model = tiny_llama(8, hidden=16, layers=1, heads=2)
    expected = sample(model, tokenizer, ["The film", ""], n=9, max_tokens=5, seed=0)
    assert len({answer.text for answer in expected[0]}) > 4
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert sample(model, tokenizer, ["The film", ""], n=9, max_tokens=5, seed=0) == expected


def test_a_model_prepared_for_packed_rows_answers_as_it_came():
    """The packed attention is set aside while sampling and is back afterwards."""
    tokenizer = word_tokenizer(["The", " film", " was", " good", "."])
    model = tiny_llama(8, hidden=16, layers=1, heads=2)
    plain = sample(model, tokenizer, ["The film"], n=9, max_tokens=5, seed=0)
    assert install(model) is None
    packed = model.config._attn_implementation
    assert sample(model, tokenizer, ["The film"], n=9, max_tokens=5, seed=0) == plain
    assert model.config._attn_implementation == packed


def test_progress_counts_every_prompt_once(model):
    """The numbers told to `progress` sum to the number of prompts."""
    told = []
    sample(model, Ids(), ["1", "1 3", "1 4", "1 5", "3"], n=2, max_tokens=2, batch_size=4, progress=told.append)
    assert told == [2, 2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_p": 0.9}], ids=["whole", "greedy", "cut"])
def test_a_model_that_gives_no_law_is_an_error_and_no_token(model, value, settings):
    """NaN or infinite weights: the error says so, at any temperature and cut, before an answer is made of it."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(value)
    with pytest.raises(NotFinite, match="where token 1 of an answer is drawn: there is no law to draw from"):
        sample(broken, Ids(), ["1 3"], max_tokens=2, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be 0"),
        ({"temperature": math.nan}, "temperature=nan must be 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_tokens": 23}, r"the longest prompt \(2 tokens\) and max_tokens=23 exceed the model's 24 positions"),
    ],
)
def test_impossible_settings_are_refused(model, settings, message):
    """A value out of range names itself and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        sample(model, Ids(), ["1 3"], **settings)
