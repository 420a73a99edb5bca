"""A DPO step at 1.7B and 8B Llama shapes on one GPU: preftune as it would run there, TRL, or a plain padded loop.

    python benchmarks/gpu_step.py --out gpu_step.json        # one call, at most ten minutes, no data, no download
    python benchmarks/gpu_step.py --tiny                     # the same paths on a CPU, seconds

Needs torch, transformers and preftune's sources (this repository's `src`); TRL where it can be imported, else the peer
is a plain padded loop and labelled so. Models have random weights and are made on the device; token ids are drawn to
the length profiles (log-normal, seed 0), the same for everybody. To fit 8B with gradients into one device, everybody
takes plain bfloat16 SGD without momentum or masters: what is compared is forward and backward, not optimizers.

Contenders: `preftune`, the step of `preftune dpo --activation_checkpointing auto` with its own choice of attention,
recomputation and tokens at once, reference cached; `trl-default` (activation checkpointing, reference in the loop),
`trl-tuned` (cached reference, no checkpointing), or `padded-default`, `padded-tuned`. Peers that run out of memory are
run again with half the pairs per pass. Told are pairs per second, the limit's FLOP (`limit.py`) per second as a share
of the device's dense bfloat16 peak (MFU), peak memory, and what each contender did: `how`. The file holds every row
from the start, `not_run` until it is measured, and is replaced after each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_peers import BETA, WARM, Answer, Job, Pair, free, padded, sgd, trl
from limit import Shape, limit_flops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "B200": 2250.0}
"""Dense bfloat16, vendors' data sheets; another device has no MFU."""


SHAPES = {
    "1.7B": Shape(2048, 8192, 24, 32, 32, 49152),
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, head_size=128),
    "tiny": Shape(64, 128, 2, 4, 2, 512, head_size=16),
}
TIED = ("1.7B", "tiny")
# mean and coefficient of variation of prompt and response tokens; pairs of a step; TRL's and the padded loop's per pass
PROFILES = {
    "hh": ((130, 0.8), (70, 0.8), 32, 8),
    "ultrafeedback": ((175, 1.0), (350, 0.6), 8, 4),
    "tldr": ((300, 0.45), (35, 0.4), 16, 8),
    "long": ((4000, 0.3), (200, 0.5), 2, 1),
}


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("no CUDA device; `--tiny` runs the same paths on the CPU")
    has_trl = importlib.util.find_spec("trl") is not None and args.peer == "trl"
    contenders = ["preftune", *(("trl-tuned", "trl-default") if has_trl else ("padded-tuned", "padded-default"))]
    rows: list[dict[str, Any]] = [
        {"shape": shape, "profile": profile, "contender": name, "not_run": "not reached"}
        for shape in (["tiny"] if args.tiny else args.shapes)
        for profile in args.profiles
        for name in contenders
    ]
    started = time.monotonic()
    for row in rows:
        if time.monotonic() - started > args.minutes * 60:
            row["not_run"] = f"{args.minutes:g} minutes were over"
        else:
            del row["not_run"]
            row |= attempt(row["shape"], row["profile"], row["contender"], device, args)
        print(json.dumps(row), flush=True)
        write(args, device, rows)  # whatever comes later, this is kept
    print(markdown(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8B", "1.7B"], choices=["1.7B", "8B"])
    parser.add_argument("--profiles", nargs="+", default=list(PROFILES), choices=list(PROFILES))
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that warms up")
    parser.add_argument("--seconds", type=float, default=20, help="of a contender: no further step begins later")
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
    prompt, response, batch, per_pass = PROFILES[profile]
    batch = 2 if args.tiny else batch
    vocabulary, scale = SHAPES[shape].vocabulary, 16 if args.tiny else 1
    pairs = drawn(prompt, response, batch * (args.steps + WARM), vocabulary, scale)
    steps = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    run = {"preftune": preftune, "trl": trl, "padded": padded}[name.partition("-")[0]]
    free(device)
    begun = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            job = Job(model_of(shape, device), steps, args, min(batch, per_pass), name.endswith("-tuned"), folder)
            seconds, how = run(job)
    except torch.OutOfMemoryError:
        return {"not_run": "out of memory"}
    except Exception as error:  # the other contenders still count
        if args.tiny:
            raise
        return {"not_run": f"{type(error).__name__}: {str(error)[:300]}"}
    measured = seconds[WARM:]
    lengths = [(len(p), len(c), len(r)) for step in steps[WARM : len(seconds)] for p, c, r in step]
    flops = limit_flops(lengths, SHAPES[shape]) / sum(measured) / 1e12
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in device_name(device)), None)
    return {
        "pairs_per_second": batch * len(measured) / sum(measured),
        "limit_tflops": flops,
        "mfu": flops / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "batch": batch,
        "seconds": [round(each, 4) for each in seconds],
        "whole_seconds": round(time.perf_counter() - begun, 1),
        "how": how,
    }


# The work --------------------------------------------------------------------------------------------------------


def drawn(
    prompt: tuple[float, float], response: tuple[float, float], n: int, vocabulary: int, scale: int
) -> list[Pair]:
    """Token ids of (prompt, chosen, rejected), lengths log-normal; the first token of a response tells them apart."""
    rng = np.random.default_rng(0)

    def ids(mean: float, variation: float, first: int | None = None) -> np.ndarray:
        spread = math.log1p(variation**2)
        size = max(3, int(rng.lognormal(math.log(mean / scale) - spread / 2, spread**0.5)))
        tokens = rng.integers(10, vocabulary, size, dtype=np.int32)
        if first is not None:
            tokens[0] = first
        return tokens

    return [(ids(*prompt), ids(*response, 5), ids(*response, 6)) for _ in range(n)]


def model_of(name: str, device: torch.device) -> Any:
    shape = SHAPES[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, max_position_embeddings=16384, tie_word_embeddings=name in TIED, bos_token_id=0,
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


# The contenders --------------------------------------------------------------------------------------------------


def preftune(job: Job) -> Answer:
    """`preftune dpo` but for its optimizer: rows, kernels, planner, reference cache, step and numbers are its own."""
    from preftune.data.packing import pack
    from preftune.engine.clock import Clock
    from preftune.engine.parallel import ALONE
    from preftune.engine.reference_cache import ReferenceCache
    from preftune.equations.losses import LOSSES
    from preftune.equations.objective import Objective, Term
    from preftune.models.attention import install, use_backend
    from preftune.models.backends import choose_backend
    from preftune.models.logprobs import check_packing, score
    from preftune.models.norms import lighten_norms
    from preftune.parts.common import Batching
    from preftune.parts.reference import Reference
    from preftune.parts.step import Scorer
    from preftune.recipes.dpo import one_step
    from preftune.tensors import TokenGroup

    model = job.model
    reason = install(model)
    assert reason is None, reason
    lighten_norms(model)
    attention, why = choose_backend(model)
    use_backend(model, attention)
    groups = {id(pairs): [TokenGroup(p, (c, r), ((0, 1),)) for p, c, r in pairs] for pairs in job.steps}
    every = [group for some in groups.values() for group in some]
    how = {"attention": f"{attention}: {why}", "reference": "cached"} | planned(job, every)
    batching = Batching(how["tokens_at_once"], True, 0, model.device)
    how["packing_rms_nats"] = check_packing(model, pack(every[:2]).to(model.device))

    cache, clock = ReferenceCache({"weights": "random"}, Path(job.folder)), Clock()
    with torch.no_grad():
        batching.fit(every, lambda batches: [cache.append(batch.groups, score(model, batch)) for batch in batches])
    cache.flush()
    scorer = Scorer(model, Objective((Term(1.0, LOSSES["dpo"].bind(beta=BETA)),)), Reference(cache, True))

    def step(pairs: list[Pair]) -> None:
        some = groups[id(pairs)]

        def work(batches: Any) -> Any:
            how["micro_batches"] = [batch.input_ids.numel() for batch in batches]
            how["most_scored"] = max(len(batch.targets) for batch in batches)
            return one_step(scorer, {}, some, clock, ALONE, batches)

        _, meter = batching.fit(batching.share(some), work, model.zero_grad)
        meter.refuse_not_finite()
        sgd(model)
        how["loss"] = meter.metrics(clock)["loss"]

    seconds = job.timed(step)
    how["head"] = kept_by_the_head(model, how["most_scored"])
    if batching.budget.limit:
        how["tokens_at_once"] = batching.budget.limit  # memory gave out above it
    return seconds, how


def planned(job: Job, groups: list[Any]) -> dict[str, Any]:
    """What `--activation_checkpointing auto` takes here; plain SGD holds bfloat16 gradients and nothing else."""
    from preftune.data.packing import fed_tokens
    from preftune.engine.memory import free_memory
    from preftune.models.checkpointing import recompute_activations
    from preftune.models.cost import Shape as Counted
    from preftune.models.cost import Work, memory
    from preftune.parts.recomputing import choose

    model, tokens = job.model, job.args.tokens_per_batch
    counted = Counted.of(model.config, model.dtype)

    def held(what: Any, tokens: int) -> float:
        parts = memory(counted, Work(tokens, tokens), device=model.device.type, recomputed=what)
        return counted.parameters * counted.size + parts.activations + parts.head

    there = free_memory(model.device)
    what, at_once = choose(there, tokens, max(map(fed_tokens, groups)), held) if there else ("none", tokens)
    recompute_activations(model, what)
    return {
        "checkpointing": what, "tokens_at_once": at_once, "foreseen_gb": held(what, at_once) / 2**30,
        "free_gb": there and there / 2**30,
    }  # fmt: skip


def kept_by_the_head(model: Any, scored: int) -> str:
    """How much of the logits' exponentials the head keeps for its backward, of so many scored tokens."""
    from preftune.models import head

    weight = model.get_output_embeddings().weight
    states = weight.new_empty(scored, weight.shape[1])
    chunk = head.block_entries(states)
    share = min(1.0, head._kept_blocks(states, weight, chunk) * chunk / len(weight))
    return f"{share:.0%} of {scored} x {len(weight)} kept"


# The answer ------------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace, device: torch.device, rows: list[dict[str, Any]]) -> None:
    facts = {
        "hardware": device_name(device),
        "versions": {name: versioned(name) for name in ("preftune", "transformers", "trl")}
        | {"torch": torch.__version__},  # names the build, too: +cu132
        "settings": {"steps": args.steps, "tokens_per_batch": args.tokens_per_batch, "optimizer": "bfloat16 SGD"},
        "results": rows,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(facts, indent=1) + "\n")
    new.replace(out)  # killed at any instant, there is a whole file


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per row; `times` is preftune's rate over that row's."""
    ours = {
        (row["shape"], row["profile"]): row.get("pairs_per_second") for row in rows if row["contender"] == "preftune"
    }
    lines = ["| shape | profile | contender | pairs / s | times | MFU | peak memory, GB |", "|---" * 7 + "|"]
    for row in rows:
        rate, mfu, peak = row.get("pairs_per_second"), row.get("mfu"), row.get("peak_gb")
        best = ours[row["shape"], row["profile"]]
        cells = [row["shape"], row["profile"], row["contender"], f"{rate:.3g}" if rate else row["not_run"],
                 f"{best / rate:.3g}" if best and rate else "", f"{mfu:.0%}" if mfu else "",
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


if __name__ == "__main__":
    main()
