"""The optimizer step: float32 arithmetic on float32 masters, whatever the model computes in.

A float32 (or float64) parameter is its own master. A bf16 parameter has a float32 master beside it: every
micro-batch's bf16 gradient is added to a float32 sum and freed, the step runs on the master, and the bf16
compute copy is drawn from it by stochastic rounding (`rounding.py` says why). That copy, not the master rounded to
nearest, is the trained bf16 model: nearest would throw the small updates away again. It lives in the model's
parameters, so saving the model saves it.

With `adamw_lean` there is no master: a bf16 weight and its bf16 moments are stepped in float32, one tensor at a time,
and drawn back. Of a sharded model (`sharding.py`) this rank has rows of every weight; the step is taken on them as on
a whole weight. Compute copies are then bf16 values in float32, drawn with the bits that the whole would be drawn with.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from preftune.engine.parallel import ALONE, World
from preftune.engine.rounding import stochastic_round_
from preftune.engine.sharding import Rows, free, own_part, weights_of
from preftune.engine.updates import LEAN, OPTIMIZERS, lean_adamw_
from preftune.errors import ConfigError, NotFinite, ResumeMismatch, RunError

__all__ = ["OPTIMIZERS", "Optimizer"]

ADDED = 1 << 18  # elements added at a time: their float32 copy stays in the processor's cache
NORM_PIECE = 1 << 12  # elements: one float32 norm of a whole embedding is off by 1e-3 on a CPU, in pieces by 4e-6


@dataclass(eq=False, slots=True)
class _Weight:
    """One trainable parameter, once however many modules share it, or this rank's rows of it."""

    name: str
    parameter: nn.Parameter
    """What the model computes with, or gathers."""
    compute: Tensor
    """Its numbers on this rank, sharing its memory."""
    master: Tensor
    """What the step is taken on: the parameter itself or its rows, or a float32 master; of a lean weight a float32
    tensor without memory of its own, which has the gradient."""
    rows: Rows | None = None
    """Which rows of the weight `compute` and `master` are; None: the whole weight."""
    lean: bool = False

    def collect(self, parameter: Tensor) -> None:
        """Add the bf16 gradient of one micro-batch to the float32 sum and free it.

        The sum is not kept from step to step: backward makes it where activations have just been freed.
        """
        assert parameter.grad is not None
        if self.master.grad is not None:
            _add(self.master.grad, parameter.grad)
        else:
            self.master.grad = parameter.grad.float()
        parameter.grad = None

    @property
    def kept(self) -> Tensor:
        """`compute` as a checkpoint holds it: in the dtype the model computes in, whatever this rank keeps it in."""
        return self.compute if self.rows is None or self.master is self.compute else self.compute.bfloat16()

    @property
    def has_master(self) -> bool:
        """Is there a float32 master beside the compute copy?"""
        return self.master is not self.compute and not self.lean

    def draw(self, out: Tensor, source: Tensor, seed: int, step: int, what: str = "") -> None:
        """Into `out` the bf16 neighbours of `source`: this weight's compute copy, or a moment that `what` names."""
        first = self.rows.first * self.compute[:1].numel() if self.rows else 0
        stochastic_round_(out, source, seed=seed, step=step, name=self.name + what, first=first)

    def take_part(self) -> None:
        """The gradient of these rows, which backward has summed over micro-batches and ranks, becomes the master's."""
        if self.rows is not None and self.parameter.grad is not None:
            self.master.grad, _ = own_part(self.parameter.grad)
            self.parameter.grad = None


class Optimizer:
    """`loss.backward()` any number of times, then `step`: the gradients of all micro-batches are one sum.

    `weight_decay` acts on weights with two or more dimensions (matrices, embeddings), never on biases and norm
    gains. `max_grad_norm` rescales the whole gradient to that length when it is longer; 0 or None leaves it alone.
    `seed` drives the stochastic rounding of bf16 weights and nothing else. The gradients of all ranks of `world` are
    one sum too, whose norm is clipped: every rank takes the same step to the last bit, on its rows of a sharded model.

    Raises ConfigError on an unknown name, an impossible value, a model without trainable parameters or with
    trainable parameters of another dtype than float32, float64 and bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        if name not in OPTIMIZERS:
            raise ConfigError(f"optimizer {name!r} is unknown; allowed: {', '.join(OPTIMIZERS)}")
        for knob, value in (("weight_decay", weight_decay), ("max_grad_norm", max_grad_norm or 0.0)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"{knob} {value} is impossible; it must be a finite number >= 0")
        self.name, self.seed, self._longest, self._world = name, seed, max_grad_norm or math.inf, world
        self._model = model
        self._decay = weight_decay
        self._weights = [_own(n, p, model, name == LEAN) for n, p in weights_of(model) if p.requires_grad]
        if not self._weights:
            raise ConfigError("the model has no trainable parameter: every one has requires_grad=False")
        self._sharded = any(weight.rows for weight in self._weights)
        for weight in self._weights:
            if weight.master is not weight.compute and not weight.rows:
                handle = weight.parameter.register_post_accumulate_grad_hook(weight.collect)
                weakref.finalize(self, handle.remove)  # a later optimizer on the same model starts clean
        decayed = [w.master for w in self._weights if w.master.ndim >= 2]
        others = [w.master for w in self._weights if w.master.ndim < 2]
        build, self._moments = OPTIMIZERS[name]
        self._torch = build(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        )

    @torch.no_grad()
    def step(self, step: int, lr: float) -> float:
        """Take step `step` (counted from 1) at rate `lr`, forget the gradients, return their norm before clipping.

        The norm is the Euclidean one over all parameters, right to 1e-5. A parameter that no gradient reached keeps
        its value, its moments and its step counter.
        Raises NotFinite, before anything is written, when a gradient is NaN or infinite; RunError when no gradient
        reached any parameter.
        """
        assert step >= 1 and 0 <= lr < math.inf, (step, lr)
        self._add_up_ranks(step)
        moved = [w for w in self._weights if w.master.grad is not None]
        norm = self._gradient_norm(step, moved)
        if norm > self._longest:
            for weight in moved:
                _gradient(weight).mul_(self._longest / (norm + 1e-6))  # 1e-6 as torch's clip_grad_norm_ has it
        for group in self._torch.param_groups:
            group["lr"] = lr
        if self.name != LEAN:
            self._torch.step()
        for weight in moved:
            if weight.has_master:
                weight.draw(weight.compute.data, weight.master, self.seed, step)
            elif weight.lean:
                lean_adamw_(
                    weight.compute.data, _gradient(weight), self._torch.state[weight.master], lr=lr,
                    weight_decay=self._decay if weight.compute.ndim >= 2 else 0.0,
                    draw=partial(weight.draw, seed=self.seed, step=step),
                )  # fmt: skip
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients collected so far."""
        for weight in self._weights:
            weight.master.grad = weight.parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that resuming bit for bit needs, as `kind/parameter`; live tensors, which change with every step.

        Of a sharded model this rank's `rows`. Kinds: `weights` (what the model computes with), `masters` (bf16
        parameters only) and, for parameters that have taken a step, the optimizer's moments and `step` counter.
        """
        kept: dict[str, Tensor] = {}
        for weight in self._weights:
            kept[f"weights/{weight.name}"] = weight.kept.detach()
            if weight.has_master:
                kept[f"masters/{weight.name}"] = weight.master
            moments = self._torch.state.get(weight.master, {})
            kinds = [kind for kind in self._moments(weight.master) if kind in moments]
            kept |= {f"{kind}/{weight.name}": torch.as_tensor(moments[kind]) for kind in kinds}
        return kept

    def rows(self) -> dict[str, Rows]:
        """Which rows each of `tensors` is, step counters aside; empty unless the model is sharded."""
        kinds = ("weights", "masters")
        return {
            f"{kind}/{weight.name}": weight.rows
            for weight in self._weights
            for kind in (*kinds, *self._moments(weight.master).keys() - {"step"})
            if weight.rows
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what `tensors` returned, in this process or another: copies, nothing is shared.

        Raises ResumeMismatch, before anything is written, when a name, a shape or a dtype does not fit this model
        and this optimizer.
        """
        self._check(tensors)
        self.zero_grad()
        free(self._model)
        for weight in self._weights:
            weight.compute.data.copy_(tensors[f"weights/{weight.name}"])
            if weight.has_master:
                weight.master.copy_(tensors[f"masters/{weight.name}"])
            self._torch.state.pop(weight.master, None)
            kinds = [kind for kind in self._moments(weight.master) if f"{kind}/{weight.name}" in tensors]
            if kinds:
                saved = {kind: tensors[f"{kind}/{weight.name}"] for kind in kinds}
                self._torch.state[weight.master] = {
                    kind: int(tensor) if tensor.dtype == torch.int64 else tensor.to(weight.master.device, copy=True)
                    for kind, tensor in saved.items()  # bitsandbytes counts steps in an int
                }

    @property
    def checkpoint_bytes(self) -> int:
        """Size of `tensors()` once every parameter has taken a step: what a checkpoint will need on disk."""
        kept = [like for w in self._weights for kind, like in self._moments(w.master).items() if kind != "step"]
        masters = [w.master for w in self._weights if w.has_master]
        return sum(tensor.nbytes for tensor in (*kept, *masters, *(w.kept for w in self._weights)))

    def fingerprint(self) -> str:
        """A hash of the sums of the bits of weights and masters: equal on every rank that trains the same model.

        Of a sharded one the ranks have nothing in common, and it is that of no weights.
        """
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        whole = [w for w in self._weights if w.rows is None]
        held = [t.detach().view(words[t.element_size()]) for w in whole for t in (w.compute, w.master)]
        if not held:
            return ""
        sums = torch.stack([bits.sum(dtype=torch.int64) for bits in held])
        return hashlib.sha256(sums.cpu().numpy().tobytes()).hexdigest()[:16]

    def _add_up_ranks(self, step: int) -> None:
        """One gradient on all ranks. Where a rank had no micro-batch, or none that reached a weight, it adds zeros."""
        for weight in self._weights:
            weight.take_part()
        if self._world.size == 1 or self._sharded:
            return
        reached = torch.tensor([float(w.master.grad is not None) for w in self._weights])
        self._world.add_up([reached], f"the gradients of step {step}")
        moved = [w for w, count in zip(self._weights, reached.tolist(), strict=True) if count]
        for weight in moved:
            if weight.master.grad is None:
                weight.master.grad = torch.zeros_like(weight.master)
        self._world.add_up([_gradient(w) for w in moved], f"the gradients of step {step}")

    def _gradient_norm(self, step: int, moved: list[_Weight]) -> float:
        if not moved:
            raise RunError(
                f"step {step}: no gradient reached any of the {len(self._weights)} trainable parameters; "
                "the loss does not depend on them, or backward() was not called"
            )
        gradients = [_gradient(w) for w in moved]
        pieces = [piece for gradient in gradients for piece in _pieces(gradient)]
        (total,) = self._of_all_rows([float(nn.utils.get_total_norm(pieces))], step)
        if math.isfinite(total):
            return total
        # Squares overflow float32 long before values do: float64 tells a large gradient from an infinite one.
        norms = [float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in gradients]
        norms = self._of_all_rows(norms, step)
        bad = [w.name for w, norm in zip(moved, norms, strict=True) if not math.isfinite(norm)]
        if bad:
            raise NotFinite(
                f"step {step}: the gradient is NaN or infinite in {len(bad)} of {len(moved)} parameters, "
                f"first in {bad[0]}; weights, moments and step counters were not touched. "
                "Look at the rows of this step, or lower the learning rate"
            )
        return math.hypot(*norms)

    def _of_all_rows(self, norms: list[float], step: int) -> list[float]:
        """Norms of whole weights from those of this rank's rows."""
        if not self._sharded:
            return norms
        squares = torch.tensor(norms, dtype=torch.float64).square_()
        self._world.add_up([squares], f"the gradient norm of step {step}")
        return squares.sqrt_().tolist()

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        expected: dict[str, Tensor] = {}
        for weight in self._weights:
            expected[f"weights/{weight.name}"] = weight.kept
            if weight.has_master:
                expected[f"masters/{weight.name}"] = weight.master
            kept = {f"{kind}/{weight.name}": like for kind, like in self._moments(weight.master).items()}
            if kept.keys() & tensors.keys():
                expected |= kept
        missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
        if missing or unknown:
            raise ResumeMismatch(
                f"the checkpoint does not belong to this model trained by {self.name}: "
                f"{len(missing)} tensors are missing{_first(missing)}, {len(unknown)} are unknown{_first(unknown)}"
            )
        for name, like in expected.items():
            found = tensors[name]
            if found.shape != like.shape or (found.dtype != like.dtype and not name.startswith("step/")):
                raise ResumeMismatch(
                    f"the checkpoint's {name} is {found.dtype} {list(found.shape)}; "
                    f"this run needs {like.dtype} {list(like.shape)}"
                )


def _own(name: str, parameter: nn.Parameter, model: Any, lean: bool) -> _Weight:
    """The parameter, or this rank's rows of it, with its master: itself, or a float32 copy, or its stand-in."""
    if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ConfigError(
            f"parameter {name} is {parameter.dtype}; training needs float32, float64 or bfloat16: "
            "load the model in one of them"
        )
    part, rows = own_part(parameter)
    computed_in = parameter.dtype if rows is None else model.dtype
    compute = parameter if rows is None else part
    if computed_in != torch.bfloat16:
        if lean:
            raise ConfigError(f"optimizer {LEAN} is for bfloat16 weights, {name} is {computed_in}; choose adamw")
        return _Weight(name, parameter, compute, compute, rows)
    if lean:
        nothing = torch.zeros((), device=part.device).expand(part.shape)
        return _Weight(name, parameter, compute, nothing, rows, lean)
    return _Weight(name, parameter, compute, part.to(torch.float32, copy=True), rows)


def _add(total: Tensor, gradient: Tensor) -> None:
    """total += gradient, float32 and bfloat16: on a CPU six times faster than one addition across the two."""
    if not total.is_cpu:
        total.add_(gradient)
        return
    for sums, values in zip(total.view(-1).split(ADDED), gradient.reshape(-1).split(ADDED), strict=True):
        sums.add_(values.float())


def _pieces(gradient: Tensor) -> list[Tensor]:
    """Tensors that together are as long as the gradient: on a CPU the norms of NORM_PIECE elements, and the rest."""
    if not gradient.is_cpu:
        return [gradient]
    flat = gradient.reshape(-1)
    whole = len(flat) // NORM_PIECE * NORM_PIECE
    return [torch.linalg.vector_norm(flat[:whole].view(-1, NORM_PIECE), dim=1), flat[whole:]]


def _gradient(weight: _Weight) -> Tensor:
    assert weight.master.grad is not None
    return weight.master.grad


def _first(names: set[str]) -> str:
    return f" (first {min(names)})" if names else ""
