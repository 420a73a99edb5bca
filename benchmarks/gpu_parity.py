"""Is what runs on a GPU what was proven on the CPU? Every attention backend, the head, the rounding, one tiny DPO run.

    python benchmarks/gpu_parity.py --out gpu_parity.json        # one call, under ten minutes, no download

Told for each check: the error found, the error allowed, or why it did not run. Exit code 1 when one is exceeded.
On a machine without CUDA the checks of kernels are left out and said so; the rest runs, which tests this file.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from preftune.engine.rounding import stochastic_round_
from preftune.models.backends import DISAGREEMENT, choose_backend, disagreement
from preftune.models.fresh import tiny_llama, word_tokenizer
from preftune.models.head import token_logprobs
from preftune.recipes import dpo

WORDS = [f"w{i}" for i in range(60)]
SHAPES = [(8, 8, 64), (8, 2, 128), (6, 1, 64)]  # query heads, key/value heads, head size
Check = tuple[str, Callable[[], float], float]


def attention(device: str) -> Iterator[Check]:
    """Value and gradients, queries shorter than keys, heads in groups, windows, softcap, against float64 products."""
    backends = ("sdpa", "varlen", "flex", "dense") if device == "cuda" else ("sdpa", "dense")
    for name in backends:
        for shape in SHAPES:
            for window in (None, 1, 48):
                for softcap in (None, 20.0):
                    if softcap is not None and name == "varlen":
                        continue  # the kernel knows none
                    title = f"attention {name} heads {shape} window {window} softcap {softcap}"
                    arguments = (name, device, torch.bfloat16, shape, window, softcap)
                    yield title, lambda a=arguments: disagreement(*a), DISAGREEMENT[torch.bfloat16]


def head(device: str) -> float:
    """Largest relative error of log-probs and gradients in bfloat16 against float64."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=draw) / s for n, s in ((300, 1.0), (32000, 16.0)))
    targets = torch.randint(0, 32000, (300,), generator=draw).to(device)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        h, w = (x.to(device, torch.bfloat16).to(dtype).requires_grad_() for x in (hidden, weight))
        own = token_logprobs(h, w, targets)
        logps = own if dtype == torch.bfloat16 else torch.log_softmax(h @ w.T, -1).gather(1, targets[:, None])[:, 0]
        found.append((logps.detach(), *torch.autograd.grad(logps.sum(), (h, w))))
    return max(float((ours.double() - true).norm() / true.norm()) for ours, true in zip(*found, strict=True))


def rounding(device: str) -> float:
    """|mean of 2^22 roundings - x| in standard errors; infinite when a draw repeats or is no neighbour of x."""
    x = torch.full((1 << 22,), 1.0 + 0.3 / 128, device=device)
    first, again, other = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(3))
    for out, step in ((first, 1), (again, 1), (other, 2)):
        stochastic_round_(out, x, seed=0, step=step, name="w")
    values = sorted(first.unique().tolist())
    if values != [1.0, 1.0 + 1 / 128] or not torch.equal(first, again) or torch.equal(first, other):
        return math.inf
    error = abs(float(first.double().mean()) - float(x[0].double()))
    return error / (math.sqrt(0.3 * 0.7 / x.numel()) / 128)


def training(device: str) -> float:
    """Largest difference of the loss, nats, over 8 steps of DPO in float32 between this device and the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        tokenizer = word_tokenizer(WORDS)
        tiny_llama(len(tokenizer), hidden=64, layers=2).save_pretrained(base / "model")
        tokenizer.save_pretrained(base / "model")
        draw = torch.Generator().manual_seed(0)

        def words(n: int) -> str:
            return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=draw).tolist())

        rows = [{"prompt": words(9), "chosen": " " + words(6), "rejected": " " + words(5)} for _ in range(32)]
        (base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        losses = []
        for where in ("cpu", device):
            out = base / f"on-{where}-{len(losses)}"
            dpo.train(
                dpo.DpoConfig(
                    model=str(base / "model"), data=str(base / "pairs.jsonl"), out=str(out), device=where, lr=1e-3,
                    dtype="float32", max_length=64, batch_size=8, epochs=2, schedule="constant",
                )
            )  # fmt: skip
            lines = (out / "metrics.jsonl").read_text().splitlines()
            losses.append([json.loads(line)["metrics"]["loss"] for line in lines])
    return max(abs(a - b) for a, b in zip(*losses, strict=True))


def choice(device: str) -> dict[str, str]:
    """What `--attention auto` takes for a Llama shape here, and why."""
    from preftune.models.attention import install

    model = tiny_llama(100, hidden=512, heads=8).to(device, torch.bfloat16)
    install(model)
    name, why = choose_backend(model)
    return {"attention": name, "why": why}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", default="gpu_parity.json")
    out = Path(options.parse_args().out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checks: list[Check] = [
        *attention(device),
        ("head in bfloat16", lambda: head(device), 2e-2),
        ("stochastic rounding, standard errors", lambda: rounding(device), 5.0),
        ("DPO against the CPU, nats", lambda: training(device), 2e-3),
    ]
    found: list[dict[str, Any]] = []
    for name, check, allowed in checks:
        begun = time.perf_counter()
        try:
            told: dict[str, Any] = {"error": check()}
            told["passed"] = told["error"] <= allowed
        except Exception as problem:  # every check is told, whatever became of the one before
            told = {"passed": False, "problem": f"{type(problem).__name__}: {problem}"[:400]}
        found.append({"check": name, "allowed": allowed, **told, "seconds": round(time.perf_counter() - begun, 2)})
        print(json.dumps(found[-1]), flush=True)
    hardware = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "cuda": torch.version.cuda}
    out.write_text(json.dumps({"hardware": hardware, **versions, "chosen": choice(device), "checks": found}, indent=1))
    return 0 if all(each["passed"] for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
