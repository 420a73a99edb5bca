"""The work of `step.py`: a model folder of random weights and a file of pairs, for one length profile."""

from __future__ import annotations

import gzip
import json
import os
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from limit import Lengths, Shape

__all__ = ["PROFILES", "SHAPE", "SMALL", "WARM", "Profile", "Work", "prepare", "save_model"]

SHAPE = Shape(hidden=576, intermediate=1536, layers=10, heads=9, kv_heads=3, vocabulary=49152)
SMALL = Shape(hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, vocabulary=16384, head_size=32)
"""For float32 parity: the same pairs and code paths, a hundredth of the arithmetic."""
WARM = 2
"""Passes over the pairs before those that are measured: in them the heap grows, later ones touch few new pages."""


@dataclass(frozen=True)
class Profile:
    """Where pairs come from, and the lengths to draw without the data: mean tokens and coefficient of variation."""

    file: str | None
    prompt: tuple[float, float]
    response: tuple[float, float]
    batch: int
    """Pairs of a step."""
    pairs: int
    """Pairs measured, by default."""
    max_length: int


PROFILES = {
    "hh": Profile("hh_multi_turn/harmless-base.test.jsonl.gz", (130, 0.8), (70, 0.8), 8, 16, 512),
    "ultrafeedback": Profile("ultrafeedback/eval.jsonl.gz", (175, 1.0), (350, 0.6), 2, 4, 1024),
    "tldr": Profile("tldr/validation.jsonl.gz", (300, 0.45), (35, 0.4), 4, 8, 512),
    "long": Profile(None, (2000, 0.3), (120, 0.5), 1, 2, 4096),
}


@dataclass(frozen=True)
class Work:
    """What a contender is told; `work.json` in its folder."""

    batch: int
    pairs: int
    max_length: int
    dtype: str
    lr: float
    sequential: bool
    """Everyone takes the pairs in the file's order, so that losses can be compared; else TRL tuned groups by length."""
    passes: int
    """Over the pairs; all but the first WARM are measured."""

    def write(self, folder: Path) -> None:
        (folder / "work.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Work:
        return cls(**json.loads((folder / "work.json").read_text()))


def prepare(
    folder: Path, name: str, *, pairs: int | None, passes: int, dtype: str
) -> tuple[dict[str, Any], list[Lengths]]:
    """Write `timed/` and `parity/`, each with `model/`, `pairs.jsonl` and `work.json`; say what the pairs are."""
    profile = PROFILES[name]
    profile = replace(profile, pairs=pairs or profile.pairs)
    assert profile.pairs % profile.batch == 0, f"{name}: pairs must be a multiple of {profile.batch}"
    rows, source = _rows(profile)
    tokenizer = _tokenizer(rows)

    def lengths(row: dict[str, str]) -> Lengths:
        p, c, r = (len(tokenizer(row[key]).input_ids) for key in ("prompt", "chosen", "rejected"))
        return p, c + 1, r + 1  # the closing token

    def same_tokens(row: dict[str, str]) -> bool:
        """TRL tokenises prompt and response together, others apart: everybody is to see the same tokens."""
        prompt = tokenizer(row["prompt"]).input_ids
        return all(
            tokenizer(row["prompt"] + row[side]).input_ids == prompt + tokenizer(row[side]).input_ids
            for side in ("chosen", "rejected")
        )

    fitting = (row for row in rows if (n := lengths(row))[0] + max(n[1:]) < profile.max_length and same_tokens(row))
    chosen = [row for row, _ in zip(fitting, range(profile.pairs), strict=False)]
    assert len(chosen) == profile.pairs, f"{name}: only {len(chosen)} pairs fit"
    timed = Work(profile.batch, profile.pairs, profile.max_length, dtype, 1e-6, sequential=False, passes=passes)
    for part, shape, work in (
        ("timed", SHAPE, timed),
        ("parity", SMALL, replace(timed, dtype="float32", lr=1e-3, sequential=True)),
    ):
        (folder / part).mkdir(parents=True)
        save_model(folder / part / "model", shape, tokenizer)
        (folder / part / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        work.write(folder / part)
    measured = [lengths(row) for row in chosen]
    means = [round(statistics.mean(column), 1) for column in zip(*measured, strict=True)]
    facts = dict(zip(("prompt", "chosen", "rejected"), means, strict=True))
    return {"source": source, "pairs": profile.pairs, "batch": profile.batch, "mean_tokens": facts}, measured


def _tokenizer(rows: list[dict[str, str]]) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["chosen"] + row["rejected"] for row in rows]
    bpe.train_from_iterator(texts, vocab_size=16384, special_tokens=["<s>", "</s>"], show_progress=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special, model_max_length=4096)


def save_model(folder: Path, shape: Shape, tokenizer: Any) -> None:
    """Random weights on the bfloat16 grid, so that both dtypes start from the same model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rows(profile: Profile) -> tuple[list[dict[str, str]], str]:
    """Pairs as prompt/chosen/rejected; without the data, words drawn to the same length profile."""
    shared = Path(os.environ.get("PREFTUNE_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if profile.file is None or not (shared / profile.file).is_file():
        return _drawn(profile), "words drawn to the length profile (seed 0)"
    lines = gzip.decompress((shared / profile.file).read_bytes()).decode().splitlines()
    rows = [_split(json.loads(line)) for line in lines]
    return [row for row in rows if row["chosen"].strip() and row["rejected"].strip()], profile.file


def _split(row: dict[str, str]) -> dict[str, str]:
    """HH transcripts are cut after the last `Assistant:` they share; empty responses when they share none."""
    if "prompt" in row:
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    mark = "\n\nAssistant:"
    cut = row["chosen"].rfind(mark) + len(mark)
    same = row["chosen"][:cut] == row["rejected"][:cut] and row["chosen"] != row["rejected"]
    return {key: row[key][cut:] if same else "" for key in ("chosen", "rejected")} | {"prompt": row["chosen"][:cut]}


def _drawn(profile: Profile) -> list[dict[str, str]]:
    import numpy as np

    rng = np.random.default_rng(0)
    words = ["w" + "".join(rng.choice(list("abcdefghij"), 4)) for _ in range(3000)]

    def text(mean: float, variation: float) -> str:
        spread = np.log1p(variation**2)
        return " " + " ".join(rng.choice(words, max(3, int(rng.lognormal(np.log(mean) - spread / 2, spread**0.5)))))

    return [
        {"prompt": text(*profile.prompt), "chosen": text(*profile.response), "rejected": text(*profile.response)}
        for _ in range(200 if profile.prompt[0] > 1000 else 1000)
    ]
