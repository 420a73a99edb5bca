"""Does `torch.compile` pay in a DPO step: seconds with and without, in turn, and what compiling costs.

    python benchmarks/compile_step.py                             # 64M parameters, HH lengths, bfloat16, CPU
    python benchmarks/compile_step.py --static                    # no padding, no second length: the most it can give
    python benchmarks/compile_step.py --shape 1.7B --batch 32     # on a GPU, which is asked first
    python benchmarks/compile_step.py --shape tiny --rounds 2     # the same paths in seconds

One model, one step of drawn HH lengths, taken over and over: plain, then compiled in each way, then the
other way round, so that a slow spell of the machine hits everybody. Told are ratios of forward, backward and SGD, not
seconds: CPU seconds of the process on a CPU, wall seconds on a GPU. What the attention does is ours in each way.

`layer`    every decoder layer: what lies before, between and after attention is one graph each, products included
`pieces`   norms, rotary embedding and gate, one graph each; matrix products stay as they are

Ends with exit status 1 when values or gradients are not the plain ones.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from limit import Shape
from preftune.data.packing import micro_batches
from preftune.models import attention, last_layer
from preftune.models.backends import choose_backend
from preftune.models.checkpointing import recompute_activations
from preftune.models.logprobs import score
from preftune.models.norms import lighten_norms
from preftune.tensors import PackedBatch, TokenGroup
from step_work import PROFILES, SHAPE

SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, head_size=16),
    "64M": SHAPE,
    "1.7B": Shape(hidden=2048, intermediate=8192, layers=24, heads=32, kv_heads=32, vocabulary=49152, head_size=64),
}
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""Largest relative difference (root mean square) of log-probs' gradients, and of log-probs, to the plain step's."""
Swap = tuple[Any, str, Any]
"""(object, attribute, what stands there when compiled)."""


def main() -> None:
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    model = model_of(SHAPES[args.shape], dtype, device)
    groups = drawn(args.profile, args.batch, SHAPES[args.shape].vocabulary, 16 if args.shape == "tiny" else 1)
    made = list(micro_batches(groups, tokens_per_batch=args.tokens_per_batch, packed=True))
    batches = [batch.to(device) for batch in made]
    step = partial(dpo_step, model, batches)
    recompute_activations(model, args.activation_checkpointing)
    ways = {how: WAYS[how](model, dynamic=not args.static) for how in args.how}
    switch = partial(put, ways, as_it_came(ways))
    rows = {"plain": {"first": cost(step, device), **facts(model, batches[0])}}
    own = rows["plain"].pop("numbers")
    for how in ways:
        switch(how)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        rows[how] = {"first": cost(step, device), **facts(model, batches[0])}
        rows[how]["off"] = [apart(*both) for both in zip(own, rows[how].pop("numbers"), strict=True)]
        rows[how]["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    seconds: dict[str, list[float]] = {how: [] for how in rows}
    for i in range(args.rounds):
        for how in list(rows) if i % 2 else reversed(rows):
            switch(how)
            seconds[how].append(cost(step, device))
    switch("plain")
    for how, row in rows.items():
        row |= told(row, seconds[how], seconds["plain"], rows["plain"]["first"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    settings = vars(args) | {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings |= {"tokens": [batch.input_ids.numel() for batch in batches], "load": os.getloadavg()[0]}
    print(json.dumps({"settings": settings, "ways": rows}, indent=1))
    if any(max(row.get("off", [0.0])) > ALLOWED[dtype] for row in rows.values()):
        sys.exit("compiled numbers are not the plain ones")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="64M", choices=list(SHAPES))
    parser.add_argument("--profile", default="hh", choices=list(PROFILES))
    parser.add_argument("--batch", type=int, default=8, help="pairs of the step")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--how", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--static", action="store_true", help="compile for this number of tokens only")
    parser.add_argument("--activation_checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--tokens_per_batch", type=int, default=8192)
    return parser.parse_args()


# The step --------------------------------------------------------------------------------------------------------


def model_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """Random weights, ready for packed rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size, max_position_embeddings=16384, tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        model = LlamaForCausalLM(config).to(dtype).eval()
    reason = attention.install(model)
    assert reason is None, reason
    attention.use_backend(model, choose_backend(model)[0])
    lighten_norms(model)
    return model


def drawn(profile: str, n: int, vocabulary: int, scale: int) -> list[TokenGroup]:
    """Pairs of random ids, lengths log-normal; the first token of a response tells the two apart."""
    rng = np.random.default_rng(0)

    def ids(mean: float, variation: float, first: int) -> np.ndarray:
        spread = np.log1p(variation**2)
        size = max(3, int(rng.lognormal(np.log(mean / scale) - spread / 2, spread**0.5)))
        return np.concatenate(([first], rng.integers(10, vocabulary, size - 1))).astype(np.int32)

    of = PROFILES[profile]
    return [TokenGroup(ids(*of.prompt, 4), (ids(*of.response, 5), ids(*of.response, 6)), ((0, 1),)) for _ in range(n)]


def dpo_step(model: Any, batches: list[PackedBatch]) -> None:
    """Forward, backward and SGD at rate 0, which leaves the weights; a reference of zeros, as cheap as a cached one."""
    pairs = sum(len(batch.groups) for batch in batches)
    for batch in batches:
        of = torch.repeat_interleave(batch.lengths).to(model.device)
        logps = torch.zeros(len(batch.lengths), device=model.device).index_add(0, of, score(model, batch))
        (-F.logsigmoid(0.1 * (logps[::2] - logps[1::2])).sum() / pairs).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=0.0)
            parameter.grad = None


# What is compiled ------------------------------------------------------------------------------------------------


def layer(model: Any, dynamic: bool) -> list[Swap]:
    """Attention and what leaves unread tokens out take another plan every micro-batch: the graphs break there."""
    attention.ALL_ATTENTION_FUNCTIONS.register(attention.NAME, torch.compiler.disable(attention.packed_attention))
    for name in ("enter", "narrow", "widen"):
        setattr(last_layer._Reads, name, torch.compiler.disable(getattr(last_layer._Reads, name)))
    inner = torch.compile(modeling_llama.LlamaDecoderLayer.forward.__wrapped__, dynamic=dynamic)

    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        """Checkpointing stays outside: a graph that breaks inside a checkpoint is not compiled at all."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(inner, self, **keywords), *args)
        return inner(self, *args, **keywords)

    swaps: list[Swap] = [(each, "forward", MethodType(forward, each)) for each in attention.decoder(model).layers]
    norms = [module for module in model.modules() if isinstance(module, modeling_llama.LlamaRMSNorm)]
    return swaps + [(norm, "forward", MethodType(modeling_llama.LlamaRMSNorm.forward, norm)) for norm in norms]


def pieces(model: Any, dynamic: bool) -> list[Swap]:
    compiled = partial(torch.compile, dynamic=dynamic)
    norm, gate = compiled(modeling_llama.LlamaRMSNorm.forward), compiled(lambda gate, up: F.silu(gate) * up)

    def feed_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(gate(self.gate_proj(x), self.up_proj(x)))
        return out

    rotary = "apply_rotary_pos_emb"
    swaps: list[Swap] = [(modeling_llama, rotary, compiled(getattr(modeling_llama, rotary)))]
    for module in attention.decoder(model).modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            swaps.append((module, "forward", MethodType(norm, module)))
        elif isinstance(module, modeling_llama.LlamaMLP):
            swaps.append((module, "forward", MethodType(feed_forward, module)))
    return swaps


WAYS: dict[str, Callable[..., list[Swap]]] = {"layer": layer, "pieces": pieces}


def as_it_came(ways: dict[str, list[Swap]]) -> list[Swap]:
    """What stands where something is to be swapped; None where a module's class has it."""
    places = [(where, name) for swaps in ways.values() for where, name, _ in swaps]
    return [
        (where, name, where.__dict__.get(name) if isinstance(where, torch.nn.Module) else getattr(where, name))
        for where, name in places
    ]


def put(ways: dict[str, list[Swap]], plain: list[Swap], how: str) -> None:
    """All as it came, then what `how` compiles."""
    for where, name, new in [*plain, *ways.get(how, [])]:
        if new is None:
            where.__dict__.pop(name, None)  # the class's own shows again
        else:
            setattr(where, name, new)


# What is measured ------------------------------------------------------------------------------------------------


def cost(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of one step: wall on a GPU, else CPU, compilers that it starts included."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(each.ru_utime + each.ru_stime for each in used)

    before = now()
    step()
    return now() - before


def facts(model: Any, batch: PackedBatch) -> dict[str, Any]:
    """Log-probs and gradients of one micro-batch (`numbers`), and what its forward holds for its backward."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = score(model, batch)
    gradients = torch.autograd.grad(logps.mean(), list(model.parameters()))
    whole = torch.cat([gradient.float().flatten() for gradient in gradients])
    return {"numbers": (logps.detach(), whole), "held_mb": sum(held.values()) / 2**20}


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / ours.double().norm())


def told(row: dict[str, Any], seconds: list[float], plain: list[float], first: float) -> dict[str, Any]:
    """Median and fastest step; the mean ratio to the plain step of the same round, its standard error; costs."""
    found: dict[str, Any] = {"median": statistics.median(seconds), "fastest": min(seconds)}
    if seconds is plain:
        return found
    ratios = [ours / theirs for ours, theirs in zip(seconds, plain, strict=True)]
    ratio, saved = statistics.mean(ratios), (1 - statistics.mean(ratios)) * statistics.median(plain)
    found |= {"ratio": ratio, "error": statistics.stdev(ratios) / len(ratios) ** 0.5, "compiling": row["first"] - first}
    return found | {"pays_after_steps": found["compiling"] / saved if saved > 0 else None}


if __name__ == "__main__":
    main()
