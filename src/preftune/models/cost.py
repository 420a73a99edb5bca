"""FLOPs, bytes and seconds of a preference step, from a configuration alone: no weight is read, no data is needed.

For one prompt of P tokens with responses of L_1 ... L_K, the last token of each not fed:

    U = P + sum (L_r - 1)       tokens fed, each unique one once
    C = sum L_r                 tokens scored
    X = P^2/2 + sum (P L_r + L_r^2/2)      (query, key) pairs attended

With N weights in the linear layers of the decoder, H = V d in the head, and A = 4 sum_layers (heads * head size):

    forward    2 N U + 2 H C +     A X
    training   6 N U + 6 H C + 3.5 A X     the limit: nothing computed twice, the reference read from its cache
               8 N U + 6 H C + 4.5 A X     with activation checkpointing
               4 N U + 4 H C + 3.5 A X     frozen under an adapter: no weight gradient
               + one forward               for a reference in the loop
             - 6 M max(U - C, 0)           the last layer's feed-forward, M weights, where nobody reads it
                                           (2 in a forward, 4 frozen, 8 with checkpointing: `last_layer.py`)

3.5 A X is flash attention's: one forward, 2.5 of it backward. Layers with a sliding window are counted as if they saw
everything. N, A and what autograd keeps of a token are read off the model itself, laid out on torch's meta device,
where shapes are computed and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from preftune.errors import ArtifactError, ConfigError, PreftuneError
from preftune.models.blocks import KEPT_BYTES, PART
from preftune.models.checkpointing import Recomputed
from preftune.models.head import room_of
from preftune.models.last_layer import last_feed_forward
from preftune.models.norms import lighten_norms

__all__ = ["MOMENTS", "Memory", "Shape", "Traffic", "Work", "flops", "forward_flops", "memory", "traffic"]

MOMENTS = {"adamw": 2.0, "adamw8bit": 0.5, "adamw_lean": 0.0, "rmsprop": 1.0, "sgd": 0.0}
"""float32 numbers that an optimizer keeps of a trained weight; adamw_lean two of bfloat16, in place of a master."""
_COUNTING = "preftune-counting"
_PROBE = 64  # tokens laid out to see what is kept of each


@dataclass(frozen=True, slots=True)
class Work:
    """What a step feeds, scores and attends; sums over groups."""

    fed: float = 0.0
    """U, tokens."""
    scored: float = 0.0
    """C, tokens."""
    attended: float = 0.0
    """X, (query, key) pairs."""

    @property
    def unread(self) -> float:
        """max(U - C, 0), tokens whose last hidden state nobody reads."""
        return max(self.fed - self.scored, 0.0)

    @classmethod
    def of(cls, prompt: float, responses: Sequence[float]) -> Self:
        """Of one packed group: lengths in tokens, end marks included."""
        attended = prompt**2 / 2 + sum(prompt * length + length**2 / 2 for length in responses)
        return cls(prompt + sum(length - 1 for length in responses), sum(responses), attended)

    @classmethod
    def total(cls, works: Iterable[Work]) -> Self:
        """The sum."""
        return cls(*map(sum, zip(*map(astuple, works), strict=True)))

    def times(self, factor: float) -> Work:
        """`factor` such groups."""
        return Work(self.fed * factor, self.scored * factor, self.attended * factor)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the cost of a model depends on."""

    parameters: int
    """All of them, tied ones once."""
    body: int
    """N: weights of the decoder's linear layers."""
    edges: int
    """Sum of (inputs + outputs) of those layers: an adapter of rank r on all of them has r times as many weights."""
    written: int
    """Sum of their outputs."""
    last: int
    """M: those of `body` in the last layer's feed-forward."""
    last_edges: int
    """Those of `edges` there."""
    vocabulary: int
    hidden: int
    layers: int
    attention: int
    """A / 4: query heads times head size, summed over layers."""
    heads: int
    """Query heads, summed over layers."""
    largest: int
    """Elements of the largest parameter."""
    kept: int
    """Bytes that autograd keeps of every fed token, head excluded, without activation checkpointing."""
    size: int
    """Bytes of a compute weight: 2 in bfloat16, 4 in float32."""

    @property
    def head(self) -> int:
        """H = V d."""
        return self.vocabulary * self.hidden

    @property
    def outside(self) -> int:
        """Parameters outside of decoder layers, embedding and head, once where they are tied; and all norms."""
        return self.parameters - self.body

    @property
    def tied(self) -> bool:
        """Embedding and head are one weight."""
        return self.outside < 2 * self.head

    def kept_with(self, recomputed: Recomputed) -> float:
        """Bytes kept per fed token: all; inputs of layers, outputs of linear layers and attention; inputs of layers.

        Where something is recomputed, the layer in hand is there as a whole.
        """
        if recomputed == "none":
            return self.kept
        held = self.layers * self.hidden + (self.written + self.attention if recomputed == "selective" else 0)
        return held * self.size + self.kept / self.layers

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Self:
        """Of a transformers configuration, or of a folder that holds one.

        Raises ArtifactError when transformers cannot lay it out, ConfigError for what this cost model does not count.
        """
        counted: list[tuple[int, int]] = []

        def attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> tuple[Any, None]:
            counted.append((query.shape[1], query.shape[1] * (query.shape[-1] + value.shape[-1]) // 2))
            return _Attended.apply(query, key, value), None  # type: ignore[no-untyped-call]

        try:
            if not hasattr(config, "to_dict"):
                config = AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=False)
            config = deepcopy(config)  # transformers writes dtype and attention into it
            ALL_ATTENTION_FUNCTIONS.register(_COUNTING, attend)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_COUNTING).eval()
            _refuse_uncounted(model)
            lighten_norms(model)
            kept = _kept(model)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise ArtifactError(f"no causal language model can be laid out: {str(error).splitlines()[0]}") from error
        if not counted:
            raise ConfigError(f"{model.config.model_type} does not take an attention function, so its is not counted")
        head = model.get_output_embeddings()
        linear = [w for m in model.base_model.modules() if m is not head for w in _weights(m)]
        last = [w for m in getattr(last_feed_forward(model), "modules", tuple)() for w in _weights(m)]
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            body=sum(w.numel() for w in linear),
            edges=sum(sum(w.shape) for w in linear),
            last=sum(w.numel() for w in last),
            last_edges=sum(sum(w.shape) for w in last),
            written=sum(_outputs(m) for m in model.base_model.modules() if m is not head),
            vocabulary=head.weight.shape[0],
            hidden=head.weight.shape[1],
            layers=model.config.get_text_config().num_hidden_layers,
            attention=sum(width for _, width in counted),
            heads=sum(heads for heads, _ in counted),
            largest=max(p.numel() for p in model.parameters()),
            kept=kept,
            size=dtype.itemsize,
        )

    @classmethod
    def counted(cls, model: Any) -> Self | None:
        """Of a loaded model; None where its cost is not counted."""
        try:
            return cls.of(model.config, model.dtype)
        except PreftuneError:
            return None

    def trained(self, rank: int = 0) -> int:
        """Parameters that are trained: all, or those of an adapter of `rank` on every linear layer."""
        return rank * self.edges or self.parameters


def forward_flops(shape: Shape, work: Work) -> float:
    """2 N U - 2 M max(U - C, 0) + 2 H C + A X."""
    body = shape.body * work.fed - shape.last * work.unread
    return 2 * body + 2 * shape.head * work.scored + 4 * shape.attention * work.attended


def flops(
    shape: Shape, work: Work, *, checkpointing: bool = False, reference_in_loop: bool = False, rank: int = 0
) -> float:
    """FLOPs of forward and backward (the formulas above); with `rank`, of frozen weights under an adapter."""
    again = 1 if checkpointing else 0
    trains = 4 if rank else 6
    body = (trains + 2 * again) * (shape.body * work.fed - shape.last * work.unread)
    body += (6 + 2 * again) * rank * (shape.edges * work.fed - shape.last_edges * work.unread)
    total = body + trains * shape.head * work.scored + (3.5 + again) * 4 * shape.attention * work.attended
    return total + (forward_flops(shape, work) if reference_in_loop else 0)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the fullest moment of a step."""

    weights: float
    """What the model computes with; with shards, also what is gathered: two layers, all that is outside of layers."""
    masters: float
    """float32 copies of trained bfloat16 weights."""
    moments: float
    """What the optimizer keeps."""
    gradients: float
    """The float32 sum of a step, and a micro-batch's gradient of the largest weight; with shards, if that is more than
    activations leave room for, those of all that is outside of layers, and the float32 copy that is sent."""
    activations: float
    head: float
    """Blocks of the vocabulary that are held, and hidden states of scored tokens."""
    reference: float
    """A second model; with shards, also all that is outside of its layers. 0 for a cached reference."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def memory(
    shape: Shape,
    work: Work,
    *,
    device: str = "cuda",
    recomputed: Recomputed = "none",
    reference_in_loop: bool = False,
    rank: int = 0,
    shards: int = 1,
    moments: float = 2,
) -> Memory:
    """Bytes of training, `work` being that of one micro-batch, everything in `shards` equal parts.

    `moments`: float32 numbers that the optimizer keeps of a trained weight, 2 of AdamW.

    What the program itself occupies (libraries, CUDA context, fragments) is not in it.
    """
    trained, size = shape.trained(rank), shape.size
    # Backward: a layer and the next one, and what is outside of layers. A reference has run: of it the latter is left.
    layers, outside = (2 * shape.body / shape.layers * size, shape.outside * size) if shards > 1 else (0.0, 0.0)
    frozen = shape.parameters if rank else 0
    kept = max(size, 4) if shards > 1 else size  # a part is kept in float32, for its gradient to be
    activations = shape.kept_with(recomputed) * work.fed
    if device == "cpu":
        activations += _probabilities(shape, work) / (1 if recomputed == "none" else shape.layers)
    head = room_of(work.scored, shape.vocabulary, shape.hidden, size, device)
    largest = shape.edges * rank / shape.layers if rank else shape.largest
    apart = size * largest if size < 4 or shards > 1 else 0.0
    if shards > 1 and not rank:  # The end of the backward: a tied weight, two gradients and their sum; a layer is sent.
        ending = (4 * size if shape.tied else size + 4) * shape.outside + 4 * shape.body / shape.layers
        apart = max(apart, ending - activations - head - layers - outside)
    return Memory(
        weights=(frozen * size + trained * kept) / shards + layers + outside,
        masters=4 * trained / shards if size < 4 else 0.0,
        moments=4 * moments * trained / shards,
        gradients=4 * trained / shards + apart,
        activations=activations,
        head=head,
        reference=shape.parameters * size / shards + outside if reference_in_loop else 0.0,
    )


def _probabilities(shape: Shape, work: Work) -> float:
    """Bytes of P that `blocks.py` keeps in all layers: of a row of n tokens size H (n^2 + PART n) / 2, up to a limit.

    Rows have the mean length; longer ones than those of which P is kept count as these.
    """
    number = shape.size * shape.heads / shape.layers
    longest = (PART**2 / 4 + 2 * KEPT_BYTES / number) ** 0.5 - PART / 2
    row = min(2 * work.attended / max(work.fed, 1), longest)
    return shape.layers * number * (row + PART) / 2 * work.fed


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one device sends during an optimizer step, and reads or writes to take it."""

    gathered: float
    """All-gather of sharded weights, once forward and once backward per micro-batch; a reference: layers, once."""
    reduced: float
    """Replicas: all-reduce of the float32 gradients once a step. Shards: reduce-scatter of them per micro-batch."""
    optimizer: float
    """AdamW in memory: gradient read; master, two moments read and written; the compute copy written."""

    @property
    def sent(self) -> float:
        return self.gathered + self.reduced


def traffic(
    shape: Shape, *, devices: int, shard: bool, micro_batches: int = 1, rank: int = 0, reference_in_loop: bool = False
) -> Traffic:
    """A ring sends (n - 1) / n of the whole per gather or scatter, twice that per all-reduce."""
    trained, others = shape.trained(rank), (devices - 1) / devices
    gathered = 2 * (shape.parameters + (trained if rank else 0)) + (shape.body if reference_in_loop else 0)
    own = trained / (devices if shard else 1)
    return Traffic(
        gathered=others * micro_batches * gathered * shape.size if shard else 0.0,
        reduced=others * 4 * trained * (micro_batches if shard else 2),
        optimizer=own * (28 + (shape.size if shape.size < 4 else 0)),
    )


class _Attended(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, output and one float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only laid out, never run")


def _refuse_uncounted(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2:
            raise ConfigError(
                f"the cost model counts vectors and matrices; {name} has {parameter.ndim} dimensions, as experts have, "
                "of which a token meets only some"
            )


def _weights(module: nn.Module) -> list[Tensor]:
    return [module.weight] if isinstance(module, nn.Linear | Conv1D) else []


def _outputs(module: nn.Module) -> int:
    return module.nf if isinstance(module, Conv1D) else sum(len(weight) for weight in _weights(module))


def _kept(model: Any) -> int:
    """Bytes that autograd keeps of a token, weights excluded: those of a forward on the meta device."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    ids = torch.zeros(1, _PROBE, dtype=torch.int64, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values()) // _PROBE
