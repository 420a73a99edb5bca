"""How many tokens per CPU second does sampling write: ours, transformers' static-cache `generate`, or `generate_batch`?

    python benchmarks/sampling.py MODEL [--prompts 64] [--n 2] [--max_tokens 96]     adds to benchmarks/sampling.json

All write n responses at temperature 1 to the same prompts of unequal lengths, on this machine as it is; what does not
work is recorded with its message. Warmed up once, best of three; tokens are counted up to and with the end of sequence.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from preftune.engine.host import describe
from preftune.models.generate import sample
from preftune.models.load import LoadedModel, load

RESULTS = Path(__file__).with_suffix(".json")
BATCH = 64
SENTENCE = "Once upon a time there was a little girl who liked to read about the sea and about the stars ."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    for name, default in (("prompts", 64), ("n", 2), ("max_tokens", 96), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    loaded = load(asked.model, dtype=torch.float32)
    words = SENTENCE.split()
    prompts = [" ".join(words[: 2 + i % (len(words) - 2)]) for i in range(asked.prompts)]
    ways = {"preftune": ours, "generate, static cache": static, "generate_batch": continuous}
    rows = {name: measured(lambda way=way: way(loaded, prompts, asked)) for name, way in ways.items()}
    parameters = sum(p.numel() for p in loaded.model.parameters())
    entry = {
        "setting": {**vars(asked), "model": Path(asked.model).name, "parameters": parameters, "batch": BATCH},
        "tokens_per_cpu_second": rows,
        **describe(),
    }
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*earlier, entry], indent=1) + "\n")
    print(json.dumps(rows, indent=1))


def measured(write: Callable[[], int]) -> float | str:
    """Tokens per CPU second (all threads), best of three after a warm-up; the message where it does not work."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write()
            rates = []
            for _ in range(3):
                began = time.process_time()
                tokens = write()
                rates.append(tokens / (time.process_time() - began))
    except Exception as problem:
        return f"{type(problem).__name__}: {str(problem)[:300]}"
    return round(max(rates), 1)


def ours(loaded: LoadedModel, prompts: list[str], asked: Any) -> int:
    settings = {"n": asked.n, "max_tokens": asked.max_tokens, "batch_size": BATCH}
    answers = sample(loaded.model, loaded.tokenizer, prompts, **settings)
    return sum(int(a.provenance.rpartition("tokens=")[2]) for row in answers for a in row)


def static(loaded: LoadedModel, prompts: list[str], asked: Any) -> int:
    """Length-sorted, left-padded batches of one shape, the cache allocated once per batch."""
    tokenizer, end = loaded.tokenizer, loaded.tokenizer.eos_token_id
    rows = sorted((tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(asked.n)), key=len)
    tokens = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        with torch.no_grad():
            written = loaded.model.generate(
                ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=asked.max_tokens,
                pad_token_id=end, cache_implementation="static", disable_compile=True,
            )[:, width:]  # fmt: skip
        tokens += counted(written.tolist(), end)
    return tokens


def continuous(loaded: LoadedModel, prompts: list[str], asked: Any) -> int:
    """transformers' continuous batching with a paged cache."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    end = loaded.tokenizer.eos_token_id
    rows = [loaded.tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(asked.n)]
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=asked.max_tokens, eos_token_id=end)
    settings.pad_token_id = end
    # Left to itself it takes most of the machine's memory for its cache and spends minutes clearing it.
    pages = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=512)
    answers = loaded.model.generate_batch(
        rows, generation_config=settings, continuous_batching_config=pages, progress_bar=False
    )
    if len(answers) != len(rows):
        raise RuntimeError(f"{len(answers)} of {len(rows)} requests were answered")
    return counted([answer.generated_tokens for answer in answers.values()], end)


def counted(written: list[list[int]], end: int) -> int:
    return sum(row.index(end) + 1 if end in row else len(row) for row in written)


if __name__ == "__main__":
    main()
