"""What every test runs under, and what several folders share: a tiny model, and the real data where there is some.

Strict: warnings are errors (pyproject.toml), one thread per process, no network, a private cache.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch, tokenizers or huggingface_hub is imported anywhere: each reads its variable once.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
)

ROOT = Path(__file__).resolve().parents[1]

# What the tiny tokenizer learns its merges from: enough letters to merge, nothing to memorise.
_CORPUS = (
    "the cat sat on the mat and the dog ran to the park",
    "a good answer is short and true, a bad answer is long and wrong",
    "Human: what is the best film? Assistant: the best film is the one with the good ending.",
    "once upon a time there was a little girl who liked to read",
)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder PREFTUNE_CACHE points to: empty when the session starts, so no test sees an older run's work."""
    folder = tmp_path_factory.mktemp("preftune_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFTUNE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def products_as_they_come() -> Iterator[None]:
    """A wide model asks oneDNN for the process's float32 products: what is opened after it would round otherwise than
    in a process of its own."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and real small models; the test is skipped, visibly, where there is none."""
    folder = Path(os.environ.get("PREFTUNE_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("no real data: PREFTUNE_SHARED names no folder and ../shared does not exist")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, read-only by convention: a random 2-layer Llama (float32, 39 thousand parameters) and
    a byte-level BPE tokenizer with <s> (0, put before every text) and </s> (1), no pad token, no chat template.

    The same bytes in every session. Copy it before changing it.
    """
    folder = tmp_path_factory.mktemp("tiny_model")
    save_tiny_tokenizer(folder)
    save_tiny_llama(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    wrapped.save_pretrained(folder)


def save_tiny_llama(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # far enough from uniform that a misplaced token shows
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 preference rows of unequal lengths in TRL's explicit-prompt layout; the same rows in every session."""
    rng, words = random.Random(0), sorted({word for text in _CORPUS for word in text.split()})

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    rows = [{"prompt": text(2, 20), "chosen": " " + text(1, 12), "rejected": " " + text(1, 12)} for _ in range(48)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
