"""Packed rows through an unmodified Hugging Face decoder: one attention function that is told who sees whom.

transformers hands every keyword of a forward down to the attention function, and builds no mask for a function that
has no entry among its mask functions. So `score` passes a `Layout` and each layer attends as the layout says.

Legend of shapes: N tokens in the row, H query heads, D head size, Q queries and K keys of one tile.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from preftune.errors import ConfigError, RunError
from preftune.models.blocks import Part, attend_in_parts, parts_of
from preftune.models.kernels import VarlenPlan, flex_attention, varlen_attention, varlen_plan
from preftune.models.load import active_dropouts, quiet
from preftune.tensors import AttentionPlan, Segment

__all__ = [
    "BACKENDS",
    "KEYWORD",
    "Layout",
    "decoder",
    "install",
    "layout_for",
    "own_attention",
    "use_backend",
]

NAME = "preftune"
KEYWORD = "packed_layout"

# CPU: up to this many tokens a group is a block of matrix products instead of one SDPA call per segment: in bfloat16
# twice as fast or more at any length, in float32 up to here. Short groups are merged into blocks of about MERGED
# tokens: fewer calls. Measured: benchmarks/LOG.md.
_BLOCK = {torch.bfloat16: math.inf, torch.float16: math.inf}
_BLOCK_ELSE, MERGED = 1024, 128


@dataclass(frozen=True, eq=False, slots=True)
class Tile:
    """Queries `[start, end)` of the row attend to keys `[prefix_start, prefix_end)` and to their own range."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0
    is_block: bool = False
    """True: whole groups, by matrix products. False: one segment, by SDPA."""
    parts: tuple[Part, ...] = ()
    """Of a block."""
    mask: Tensor | None = None
    """[Q, K] added to the scores of a segment; None means causal."""


class Layout:
    """An AttentionPlan made ready for the layers of one forward: tiles and masks are built once, not per layer."""

    def __init__(self, plan: AttentionPlan, backend: str = "sdpa") -> None:
        self.plan = plan
        self.backend = BACKENDS[backend]
        self.calls: list[tuple[int, int | None]] = []
        """(layer's identity, its window) of every call; `install` counts them."""
        self.read: Tensor | None = None
        """Positions whose last hidden states are read; None: all."""
        self._tiles: dict[Any, list[Tile]] = {}
        self._varlen: VarlenPlan | None = None
        self._masks: dict[int | None, Any] = {}
        # Per token [N]: its segment, the keys it sees before its own segment, and its position in the sequence.
        starts, before = [s.start for s in plan.segments], [0] * len(plan.segments)
        for i, s in enumerate(plan.segments):
            if s.prefix_end > s.prefix_start:
                holder = bisect_left(starts, s.prefix_end) - 1
                before[i] = before[holder] + s.prefix_end - starts[holder]
        of_segments = torch.tensor(
            [(i, s.prefix_start, s.prefix_end, before[i] - s.start) for i, s in enumerate(plan.segments)]
        )
        tokens = torch.tensor([s.end - s.start for s in plan.segments])
        self._segment, self._from, self._to, offset = of_segments.T.repeat_interleave(tokens, 1)
        self._position = torch.arange(plan.length) + offset
        self.longest = int(self._position.max()) + 1

    def tiles(self, query: Tensor, window: int | None, block: float) -> list[Tile]:
        """The tiling in which groups of up to `block` tokens are blocks, with masks like `query`."""
        window = self._cutting(window)
        key = (window, block)
        if key not in self._tiles:
            self._tiles[key] = [self._with_mask(tile, query, window) for tile in self._cut(block)]
        return self._tiles[key]

    def varlen(self, device: torch.device) -> VarlenPlan:
        """The row as sequences of a variable-length kernel."""
        if self._varlen is None:
            self._varlen = varlen_plan(self.plan, device)
        return self._varlen

    def block_mask(self, device: torch.device, window: int | None) -> Any:
        """`visible` as a block mask of FlexAttention."""
        window = self._cutting(window)
        if window not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            segment, first, last, position = (
                each.to(device) for each in (self._segment, self._from, self._to, self._position)
            )

            def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                seen = ((segment[q] == segment[k]) & (k <= q)) | ((first[q] <= k) & (k < last[q]))
                return seen if window is None else seen & (position[q] - position[k] < window)

            n = self.plan.length
            self._masks[window] = create_block_mask(visible, None, None, n, n, device, _compile=device.type == "cuda")
        return self._masks[window]

    def _cutting(self, window: int | None) -> int | None:
        """None where a window cuts nothing off: then a sliding layer is a full one, and shares its tiles."""
        return None if window is None or window >= self.longest else window

    def _cut(self, block: float) -> list[Tile]:
        starts = [s.start for s in self.plan.segments if s.prefix_end <= s.prefix_start]
        tiles: list[Tile] = []
        for start, end in pairwise([*starts, self.plan.length]):
            if end - start > block:
                inside = (s for s in self.plan.segments if start <= s.start < end)
                tiles += [Tile(s.start, s.end, s.prefix_start, s.prefix_end) for s in inside]
            elif tiles and tiles[-1].is_block and end - tiles[-1].start <= min(block, MERGED):
                tiles[-1] = Tile(tiles[-1].start, end, is_block=True)
            else:
                tiles.append(Tile(start, end, is_block=True))
        return tiles

    def _with_mask(self, tile: Tile, query: Tensor, window: int | None) -> Tile:
        first = tile.start
        if tile.is_block:
            seen = lambda rows, columns: self.visible(first + rows, first + columns, window)  # noqa: E731
            return replace(tile, parts=parts_of(tile.end - first, seen, query))
        if tile.prefix_end <= tile.prefix_start and (window is None or tile.end - first <= window):
            return tile
        rows = torch.arange(first, tile.end)
        columns = torch.cat((torch.arange(tile.prefix_start, tile.prefix_end), rows))
        hidden = ~self.visible(rows, columns, window).to(query.device)
        return replace(tile, mask=query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf")))

    def visible(self, rows: Tensor, columns: Tensor, window: int | None = None) -> Tensor:
        """[Q, K] bool: does token `rows[i]` see token `columns[j]`? `window` counts positions, its own included."""
        q, k = rows[:, None], columns[None, :]
        own = (self._segment[q] == self._segment[k]) & (k <= q)
        seen = own | ((self._from[q] <= k) & (k < self._to[q]))
        return seen if window is None else seen & (self._position[q] - self._position[k] < window)


Backend = Callable[[Tensor, Tensor, Tensor, Layout, float, "int | None", "float | None"], Tensor]


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Segment by segment through torch's SDPA, on any device; groups on a CPU, and under a softcap, as blocks."""
    if softcap is not None:
        block = math.inf  # SDPA knows no softcap
    else:
        block = _BLOCK.get(query.dtype, _BLOCK_ELSE) if query.device.type == "cpu" else 0
    tiles = layout.tiles(query, window, block)
    sizes = [tile.end - tile.start for tile in tiles]
    out = []
    # split, not slices: its backward writes each gradient once instead of adding full-size zeros per slice.
    for tile, q, k, v in zip(tiles, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True):
        if tile.prefix_end > tile.prefix_start:
            prefix = slice(tile.prefix_start, tile.prefix_end)
            k, v = torch.cat((key[:, :, prefix], k), 2), torch.cat((value[:, :, prefix], v), 2)
        if tile.is_block:
            out.append(attend_in_parts(q, k, v, tile.parts, scale, softcap))
        else:
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=tile.mask, is_causal=tile.mask is None, scale=scale,
                enable_gqa=query.shape[1] > key.shape[1],
            )  # fmt: skip
            out.append(o.transpose(1, 2))
    return torch.cat(out, 1)


def dense(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The whole row under one [N, N] mask: the oracle, quadratic in N."""
    rows = torch.arange(layout.plan.length)
    hidden = ~layout.visible(rows, rows, window).to(query.device)
    mask = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    keys, values = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return (torch.softmax(scores + mask, -1) @ values).transpose(1, 2)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """All segments in one call of a variable-length kernel, on CUDA in bfloat16."""
    assert softcap is None, "no kernel of this kind knows a softcap"
    return varlen_attention(query, key, value, layout.varlen(query.device), scale, window)


def flex(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """FlexAttention under a block mask, on CUDA."""
    return flex_attention(query, key, value, layout.block_mask(query.device, window), scale, softcap)


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "dense": dense, "varlen": varlen, "flex": flex}


class _NoLayout(RunError):
    """The attention function was reached, the keyword was not handed down to it."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_layout: Layout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **further: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [1, H, N, D] queries, unrepeated keys and values -> [1, N, H, D]."""
    if packed_layout is None:
        raise _NoLayout(
            "the model is prepared for packed rows and was called without a layout: "
            "use models.logprobs.score, or models.attention.own_attention around generation"
        )
    unknown = [name for name in ("s_aux", "position_bias") if further.get(name) is not None]
    if unknown or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        what = unknown or [
            "dropout" if dropout else "a mask of its own" if attention_mask is not None else "no causality"
        ]
        raise RunError(f"its attention uses {what[0]}, which packed rows do not serve")
    packed_layout.calls.append((id(module), sliding_window))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_layout.backend(query, key, value, packed_layout, scale, sliding_window, softcap), None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


@dataclass
class _Installed:
    own: str
    """The attention implementation the model came with."""
    backend: str = "sdpa"


def install(model: Any) -> str | None:
    """Let `model` take packed rows: None when it does, else the reason why only padded rows are exact for it.

    The model is asked, not a list of names: what is known to break packing is looked for in its configuration and
    modules, then a probe row of four tokens must pass every layer through `packed_attention`. (Falcon, BLOOM and
    Mamba 2 accept the keyword and ignore it.) A model that is not served is left as it was.
    """
    reason = _mixes_tokens(model)
    if reason is not None:
        return reason
    own = model.config._attn_implementation
    with quiet():
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return "its attention does not go through transformers' attention interface"
    model.preftune_attention = _Installed(own)
    reason = _probe(model)
    if reason is not None:
        model.set_attn_implementation(own)
        del model.preftune_attention
    return reason


def use_backend(model: Any, name: str) -> None:
    """Attend by `BACKENDS[name]` from now on. Raises ConfigError on an unknown name or a model without `install`."""
    if name not in BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; allowed: {', '.join(BACKENDS)}")
    if not hasattr(model, "preftune_attention"):
        raise ConfigError("the model takes no packed rows; call install first")
    model.preftune_attention.backend = name


def layout_for(model: Any, plan: AttentionPlan) -> Layout:
    """The layout of `plan` under the model's chosen backend."""
    chosen = getattr(model, "preftune_attention", None)
    return Layout(plan, chosen.backend if chosen else "sdpa")


def decoder(model: Any) -> Any:
    """The module below the vocabulary projection: token ids -> hidden states."""
    found = model.get_decoder()
    return model.model if found is model else found


@contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """Inside, the model attends as it came: for generation, padded rows, and as an oracle."""
    installed = getattr(model, "preftune_attention", None)
    if installed is not None:
        model.set_attn_implementation(installed.own)
    try:
        yield
    finally:
        if installed is not None:
            model.set_attn_implementation(NAME)


def _mixes_tokens(model: Any) -> str | None:
    """What in the model lets tokens meet other than through attention with a layout, as far as it is declared."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if any(getattr(c, "is_prompt_learning", False) for c in getattr(model, "peft_config", {}).values()):
        return "prompt tuning puts tokens of its own before every row"
    for module, name, p in active_dropouts(model):
        return f"dropout is active ({type(module).__name__}.{name} = {p}): responses would share one mask"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "ALiBi adds a bias by distance in the row, not in the sequence"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "a convolution (state-space or hybrid layers) mixes neighbouring tokens of the row"
    return None


def _probe(model: Any) -> str | None:
    """Every layer must be called with the layout, and every sliding layer must say so."""
    config = model.config.get_text_config()
    device = next(model.parameters()).device
    layout = Layout(AttentionPlan((Segment(0, 3), Segment(3, 4, 0, 2)), 4))
    try:
        with torch.no_grad():
            decoder(model)(
                input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device),
                position_ids=torch.tensor([[0, 1, 2, 2]], device=device),
                use_cache=False,
                **{KEYWORD: layout},
            )
    except _NoLayout:
        return "it does not hand keywords down to its attention"
    except RunError as error:
        return str(error)
    except TypeError as error:
        return f"its forward takes no keyword for its attention ({error})"
    layers, reached = config.num_hidden_layers, len({module for module, _ in layout.calls})
    if reached != layers:
        return f"{reached} of its {layers} layers hand the layout to their attention"
    kinds = list(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    sliding = kinds.count("sliding_attention") if kinds else layers * windowed
    told = sum(window is not None for _, window in layout.calls)
    if told < sliding:
        return f"{told} of its {sliding} sliding-window layers tell their attention the window"
    return None
