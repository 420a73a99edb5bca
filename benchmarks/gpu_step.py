"""A DPO step at 1.7B and 8B Llama shapes on one GPU: preftune's packed rows against TRL, or a plain padded loop.

    python benchmarks/gpu_step.py --out gpu_step.json        # one file, one call, at most ten minutes
    python benchmarks/gpu_step.py --tiny                     # the same paths on a CPU, seconds

Needs torch, transformers and preftune's sources (this repository's `src`); TRL where it can be imported, else the peer
is a plain padded loop and labelled so. Models have random weights and are made on the device; token ids are drawn to
the length profiles (log-normal, seed 0), the same for everybody. To fit 8B with gradients into one device, everybody
takes plain bfloat16 SGD without momentum or masters: what is compared is forward and backward, not optimizers.

Contenders: `preftune` (packed, shared prompts, cached reference, no checkpointing unless memory asks for it),
`trl-default` (activation checkpointing, reference in the loop), `trl-tuned` (cached reference, no checkpointing) or
`padded-default`, `padded-tuned`. Told are pairs per second, the limit's FLOP (`limit.py`, repeated here) per second as
a share of the device's dense bfloat16 peak (MFU), and peak memory. A contender that does not fit says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

BETA, LR, WARM = 0.1, 1e-6, 1
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bfloat16, vendors' data sheets; another device has no MFU."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool


SHAPES = {
    "1.7B": Shape(2048, 8192, 24, 32, 32, 64, 49152, True),
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, False),
    "tiny": Shape(64, 128, 2, 4, 2, 16, 512, True),
}
# mean and coefficient of variation of prompt and response tokens; pairs of a step; TRL's and the padded loop's per pass
PROFILES = {
    "hh": ((130, 0.8), (70, 0.8), 32, 8),
    "ultrafeedback": ((175, 1.0), (350, 0.6), 8, 4),
    "tldr": ((300, 0.45), (35, 0.4), 16, 8),
    "long": ((4000, 0.3), (200, 0.5), 2, 1),
}
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("no CUDA device; `--tiny` runs the same paths on the CPU")
    started, rows = time.monotonic(), []
    has_trl = importlib.util.find_spec("trl") is not None and args.peer == "trl"
    contenders = ["preftune", *(("trl-tuned", "trl-default") if has_trl else ("padded-tuned", "padded-default"))]
    for shape in ["tiny"] if args.tiny else args.shapes:
        for profile in args.profiles:
            for name in contenders:
                if time.monotonic() - started > args.minutes * 60:
                    row: dict[str, Any] = {"not_run": f"{args.minutes:g} minutes were over"}
                else:
                    row = attempt(shape, profile, name, device, args)
                rows.append({"shape": shape, "profile": profile, "contender": name, **row})
                print(json.dumps(rows[-1]), flush=True)
                write(args, device, rows)  # whatever comes later, this is kept
    print(markdown(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8B", "1.7B"], choices=["1.7B", "8B"])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    parser.add_argument("--steps", type=int, default=2, help="measured, after one that warms up")
    parser.add_argument("--minutes", type=float, default=8.5, help="no contender starts later")
    parser.add_argument("--tokens_per_batch", type=int, default=8192)
    parser.add_argument("--peer", default="trl", choices=("trl", "padded"), help="trl falls back to padded without TRL")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny shape on the CPU: tests the paths, measures nothing"
    )
    parser.add_argument("--out", default=str(Path(__file__).resolve().parent / "results/gpu_step.json"))
    return parser.parse_args()


def attempt(shape: str, profile: str, name: str, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One contender; out of memory is an answer, and so is any other failure."""
    scale = 16 if args.tiny else 1
    prompt, response, batch, per_pass = PROFILES[profile]
    batch = 2 if args.tiny else batch
    pairs = drawn(prompt, response, batch * (args.steps + WARM), SHAPES[shape].vocabulary, scale)
    steps = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    free(device)
    try:
        if name.startswith("trl"):
            seconds = trl(model_of(SHAPES[shape], device), pairs, batch, min(batch, per_pass), name == "trl-tuned")
        else:
            build = preftune if name == "preftune" else lambda *a: padded(*a, per_pass, name == "padded-tuned")
            step = build(model_of(SHAPES[shape], device), steps, args.tokens_per_batch)
            seconds = list(timed(step, steps, device))
        measured = seconds[WARM:]
        flops = statistics.mean(limit_flops(step, SHAPES[shape]) for step in steps[WARM:])
        rate = batch / statistics.median(measured)
        answer = {"pairs_per_second": rate, "limit_tflops": flops / batch * rate / 1e12, "batch": batch}
        peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in device_name(device)), None)
        answer["mfu"] = answer["limit_tflops"] / peak if peak else None
        answer["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
        return answer
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:  # the other contenders still count
        if args.tiny:
            raise
        return {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        free(device)


def timed(step: Callable[[list[Pair]], Any], steps: list[list[Pair]], device: torch.device) -> Iterator[float]:
    for pairs in steps:
        wait(device)
        start = time.perf_counter()
        step(pairs)
        wait(device)
        yield time.perf_counter() - start


# The work --------------------------------------------------------------------------------------------------------


def drawn(
    prompt: tuple[float, float], response: tuple[float, float], n: int, vocabulary: int, scale: int
) -> list[Pair]:
    """Token ids of (prompt, chosen, rejected), lengths log-normal; the first token of a response tells them apart."""
    rng = np.random.default_rng(0)

    def ids(mean: float, variation: float, first: int | None = None) -> np.ndarray:
        spread = math.log1p(variation**2)
        size = max(3, int(rng.lognormal(math.log(mean / scale) - spread / 2, spread**0.5)))
        tokens = rng.integers(10, vocabulary, size)
        if first is not None:
            tokens[0] = first
        return tokens

    return [(ids(*prompt), ids(*response, 5), ids(*response, 6)) for _ in range(n)]


def model_of(shape: Shape, device: torch.device) -> Any:
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, max_position_embeddings=16384, tie_word_embeddings=shape.tied, bos_token_id=0,
        eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def limit_flops(pairs: list[Pair], shape: Shape) -> float:
    """6 N_b U + 6 H T + 3.5 A (P^2 / 2 + P (C + R) + (C^2 + R^2) / 2), summed: the formula of `limit.py`."""
    attention = shape.hidden * shape.head_size * (2 * shape.heads + 2 * shape.kv_heads)
    body = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    per_attended = 4 * shape.layers * shape.heads * shape.head_size
    total = 0.0
    for p, c, r in (map(len, pair) for pair in pairs):
        attended = p * p / 2 + p * (c + r) + (c * c + r * r) / 2
        total += 6 * body * (p + c + r - 2) + 6 * shape.vocabulary * shape.hidden * (c + r)
        total += 3.5 * per_attended * attended
    return total


# The contenders --------------------------------------------------------------------------------------------------


def sgd(model: Any) -> None:
    """Plain bfloat16 SGD: not a way to train, the cheapest step there is, and the same for everybody."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-LR)
                parameter.grad = None


def preftune(model: Any, steps: list[list[Pair]], tokens_per_batch: int) -> Callable[[list[Pair]], Any]:
    """Packed rows through the package's own data, attention and head; the reference's log-probs are made before."""
    from preftune.data.packing import micro_batches
    from preftune.models.attention import install
    from preftune.models.logprobs import score
    from preftune.tensors import TokenGroup

    reason = install(model)
    assert reason is None, reason

    def batches(pairs: list[Pair]) -> list[Any]:
        groups = [TokenGroup(p.astype(np.int32), (c.astype(np.int32), r.astype(np.int32)), ((0, 1),))
                  for p, c, r in pairs]  # fmt: skip
        made = micro_batches(groups, tokens_per_batch=tokens_per_batch, packed=True)
        return [batch.to(model.device) for batch in made]

    def responses(batch: Any) -> torch.Tensor:
        tokens, lengths = score(model, batch), batch.lengths.to(model.device)
        of = torch.repeat_interleave(torch.arange(len(lengths), device=model.device), lengths)
        return torch.zeros(len(lengths), device=model.device).index_add_(0, of, tokens)

    with torch.no_grad():
        kept = {id(pairs): [responses(batch) for batch in batches(pairs)] for pairs in steps}

    def step(pairs: list[Pair]) -> None:
        for batch, reference in zip(batches(pairs), kept[id(pairs)], strict=True):
            ratio = responses(batch) - reference
            (-F.logsigmoid(BETA * (ratio[::2] - ratio[1::2])).sum() / len(pairs)).backward()
        sgd(model)

    return step


def padded(
    model: Any, steps: list[list[Pair]], tokens_per_batch: int, per_pass: int, tuned: bool
) -> Callable[[list[Pair]], Any]:
    """A plain loop: padded rows and all logits; `tuned` caches the reference and checkpoints nothing."""
    device = model.device

    def responses(policy: Any, pairs: list[Pair]) -> torch.Tensor:
        sequences = [(p, a) for i in (1, 2) for p, a in ((pair[0], pair[i]) for pair in pairs)]
        ids = torch.full((len(sequences), max(len(p) + len(a) for p, a in sequences)), 2)
        mask, scored = torch.zeros_like(ids), torch.zeros(ids.shape)
        for i, (p, a) in enumerate(sequences):
            end = len(p) + len(a)
            ids[i, :end], mask[i, :end], scored[i, len(p) : end] = torch.from_numpy(np.concatenate((p, a))), 1, 1.0
        ids, mask, scored = (t.to(device) for t in (ids, mask, scored))
        logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        tokens = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        return (tokens * scored[:, 1:]).sum(1)

    def passes(pairs: list[Pair]) -> list[list[Pair]]:
        return [pairs[i : i + per_pass] for i in range(0, len(pairs), per_pass)]

    if tuned:
        with torch.no_grad():
            kept = {id(pairs): [responses(model, part) for part in passes(pairs)] for pairs in steps}
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def step(pairs: list[Pair]) -> None:
        for i, part in enumerate(passes(pairs)):
            with torch.no_grad():
                theirs = kept[id(pairs)][i] if tuned else responses(reference, part)
            chosen, rejected = (responses(model, part) - theirs).chunk(2)
            (-F.logsigmoid(BETA * (chosen - rejected)).sum() / len(pairs)).backward()
        sgd(model)

    return step


def trl(model: Any, pairs: list[Pair], batch: int, per_pass: int, tuned: bool) -> list[float]:
    """TRL's DPOTrainer; seconds between the ends of optimizer steps. Its rows are text: one word, one token id."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w9"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2", "unk_token": "w9"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    text = [[" ".join(f"w{i}" for i in ids) + " " * (k == 0) for k, ids in enumerate(pair)] for pair in pairs]
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in text]
    device, marks = model.device, []

    class Mark(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            wait(device)
            marks.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            wait(device)
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, use_cpu=device.type == "cpu", bf16=False, per_device_train_batch_size=per_pass,
            gradient_accumulation_steps=batch // per_pass, num_train_epochs=1, learning_rate=LR, optim="sgd",
            lr_scheduler_type="constant", max_length=None, report_to=[], save_strategy="no", disable_tqdm=True,
            seed=0, gradient_checkpointing=not tuned, precompute_ref_log_probs=tuned, max_grad_norm=0.0,
            train_sampling_strategy="sequential", logging_strategy="no",
        )  # fmt: skip
        DPOTrainer(
            model=model, ref_model=None if tuned else copy.deepcopy(model), args=config,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Mark()],
        ).train()  # fmt: skip
    return [later - earlier for earlier, later in pairwise(marks)]


# The answer ------------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace, device: torch.device, rows: list[dict[str, Any]]) -> None:
    facts = {
        "hardware": device_name(device),
        "versions": {name: versioned(name) for name in ("preftune", "torch", "transformers", "trl")},
        "settings": {"steps": args.steps, "tokens_per_batch": args.tokens_per_batch, "optimizer": "bfloat16 SGD"},
        "results": rows,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| shape | profile | contender | pairs / s | MFU | peak memory, GB |", "|---|---|---|---|---|---|"]
    for row in rows:
        told = row.get("not_run") or f"{row['pairs_per_second']:.3g}"
        mfu, peak = row.get("mfu"), row.get("peak_gb")
        cells = [row["shape"], row["profile"], row["contender"], told, f"{mfu:.0%}" if mfu else "",
                 f"{peak:.1f}" if peak else ""]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versioned(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {platform.machine()}"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
