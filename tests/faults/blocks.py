"""Attention in parts and norms differentiated by hand: a part too far, a factor left out, another module's norm."""

from __future__ import annotations

from fault import Fault

_BLOCKS, _NORMS = "src/preftune/models/blocks.py", "src/preftune/models/norms.py"
_PARTS = "tests/models/test_blocks.py -k"
_DEFINITION, _GRADIENT = f"{_PARTS} definition", "tests/models/test_norms.py -k 'close_to_float64 or by_rounding'"

FAULTS = [
    Fault(
        "blocks: every part has all keys",
        _BLOCKS,
        "hidden = ~visible(torch.arange(start, end), torch.arange(end)).to(like.device)",
        "hidden = ~visible(torch.arange(start, end), torch.arange(n)).to(like.device)",
        f"{_PARTS} every_query",
    ),
    Fault(
        "blocks: softcap has no slope",
        _BLOCKS,
        "pull.mul_(slope)",
        "pull.mul_(1)",
        _DEFINITION,
    ),
    Fault(
        "blocks: softcap's slope is that of the capped score",
        _BLOCKS,
        "slope = 1 - scores.square()\n        masked.mul_(softcap)",
        "masked.mul_(softcap)\n        slope = 1 - scores.square()",
        _DEFINITION,
    ),
    Fault(
        "blocks: keys do not get the scale",
        _BLOCKS,
        "to_key.mul_(ctx.scale)",
        "to_key",
        _DEFINITION,
    ),
    Fault(
        "blocks: the last part alone reaches the values",
        _BLOCKS,
        "to_value[:, : part.end] += torch.bmm",
        "to_value[:, : part.end] = torch.bmm",
        _DEFINITION,
    ),
    Fault(
        "blocks: probabilities are always kept",
        _BLOCKS,
        "keep = size <= KEPT_BYTES and softcap is None",
        "keep = softcap is None",
        f"{_PARTS} up_to_their_limit",
    ),
    Fault(
        "blocks: sums over parts are rounded to bfloat16",
        _BLOCKS,
        "wide = torch.promote_types(k.dtype, torch.float32)",
        "wide = k.dtype",
        f"{_PARTS} flash",
    ),
    Fault(
        "norms: the input gets what its own direction takes back",
        _NORMS,
        "addcmul_(normed, along, value=-1)",
        "addcmul_(normed, along, value=-0.9)",
        _GRADIENT,
    ),
    Fault(
        "norms: eps is forgotten",
        _NORMS,
        "torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)",
        "torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-12)",
        "tests/models/test_norms.py -k by_rounding",
    ),
    Fault(
        "norms: a product that is rounded late is rounded early",
        _NORMS,
        "_Norm(eps, 0.0, False), _Norm(eps, 1.0, False)",
        "_Norm(eps, 1.0, False)",
        "tests/models/test_norms.py -k by_rounding",
    ),
    Fault(
        "norms: the incoming gradient is written over",
        _NORMS,
        "upstream = _times(wide, gain, unless=slope)",
        "upstream = _times(wide, gain, unless=x)",
        "tests/models/test_norms.py -k somebody_elses",
    ),
    Fault(
        "norms: what differs on a probe is taken for the same",
        _NORMS,
        "own.dtype == ours.dtype and torch.equal(own, ours)",
        "own.dtype == ours.dtype",
        "tests/models/test_norms.py -k stay",
    ),
    Fault(
        "norms: a second argument is dropped",
        _NORMS,
        "if further or keywords or not torch.is_grad_enabled()",
        "if not torch.is_grad_enabled()",
        "tests/models/test_norms.py -k beside_hidden_states",
    ),
]
