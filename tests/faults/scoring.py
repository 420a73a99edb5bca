"""Log-probabilities of another precision, another function, or another model than they should be."""

from __future__ import annotations

from fault import Fault

_HEAD = "src/preftune/models/head.py"
_LOGPROBS = "src/preftune/models/logprobs.py"
_LOAD = "src/preftune/models/load.py"
_REFERENCE = "src/preftune/parts/reference.py"
_CACHE = "src/preftune/engine/reference_cache.py"
_TESTS = "tests/models/test_head.py"
_SCORES = "tests/models/test_token_scores.py"

FAULTS = [
    Fault(
        "head: log-softmax in bfloat16",
        _HEAD,
        "self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32",
        "self.dtype = weight.dtype",
        f"{_TESTS} -k bf16",
    ),
    Fault(
        "head: the softcap is not differentiated",
        _HEAD,
        "                if slope is not None:\n                    logits.mul_(slope)\n                _put",
        "                _put",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "head: the softcap of kept blocks is not differentiated",
        _HEAD,
        "pull = logits if slope is None else logits.mul_(slope)",
        "pull = logits",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "head: kept blocks are scaled by the last maximum, not their own",
        _HEAD,
        "kept.blocks.append((pull if room is pull else room.copy_(pull), higher))",
        "kept.blocks.append((pull if room is pull else room.copy_(pull), maximum))\n"
        "        kept.blocks = [(pull, maximum) for pull, _ in kept.blocks]",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "head: the factor of a kept block overflows",
        _HEAD,
        "_FARTHEST = 40.0",
        '_FARTHEST = float("inf")',
        f"{_TESTS} -k no_probability",
    ),
    Fault(
        "head: 1 is taken from a probability that was rounded to bfloat16",
        _HEAD,
        "_put_at_targets(pull, targets, low, miss / f)",
        "_put_at_targets(pull, targets, low, at_targets(pull, targets, low, miss) - (1 / f).to(pull.dtype))",
        f"{_TESTS} -k nearly_certain",
    ),
    Fault(
        "head: what was kept is not used",
        _HEAD,
        "for i, (pull, maximum) in enumerate(kept.blocks):",
        "kept.blocks = []\n            for i, (pull, maximum) in enumerate(kept.blocks):",
        f"{_TESTS} -k is_used",
    ),
    Fault(
        "head: the scale of the logits is missing in the gradient",
        _HEAD,
        "factor = (blocks.scale * upstream_C)",
        "factor = upstream_C",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "head: the bias is forgotten",
        _HEAD,
        "            if self.bias is not None:\n                logits.add_",
        "            if False:\n                logits.add_",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "head: exponentials without their maximum overflow",
        _HEAD,
        "higher = torch.maximum(maximum, logits.amax(1))",
        "higher = torch.zeros_like(maximum)",
        f"{_TESTS} -k overflow",
    ),
    Fault(
        "head: the running sum is not rescaled when a larger logit comes",
        _HEAD,
        "total.mul_((maximum - higher).exp_()).add_(",
        "total.add_(",
        f"{_TESTS} -k equal_log_softmax",
    ),
    Fault(
        "scores: the softcap of the logits is not known",
        _LOGPROBS,
        'return getattr(config, "final_logit_softcapping", None), scale / divisor',
        "return None, scale / divisor",
        f"{_SCORES} -k plain_logits",
    ),
    Fault(
        "scores: Granite's divisor is not known",
        _LOGPROBS,
        'return getattr(config, "final_logit_softcapping", None), scale / divisor',
        'return getattr(config, "final_logit_softcapping", None), scale',
        "tests/equivalence/test_packing_parity.py -k 'in_float32 and granite'",
    ),
    Fault(
        "scores: packed rows are scored without their positions",
        _LOGPROBS,
        "position_ids=batch.position_ids, use_cache=False, **packed",
        "use_cache=False, **packed",
        f"{_SCORES} -k plain_logits",
    ),
    Fault(
        "check of the packing: NaN passes",
        _LOGPROBS,
        "if not rms <= tolerance:",
        "if rms > tolerance:",
        "tests/models/test_attention.py -k nan",
    ),
    Fault(
        "load: dropout stays on, so log-ratios are noise",
        _LOAD,
        "setattr(module, attribute, 0.0)",
        "pass",
        "tests/models/test_load.py -k dropout",
    ),
    Fault(
        "load: dropout of the configuration stays on",
        _LOAD,
        "            setattr(config, name, 0.0)\n",
        "            pass\n",
        "tests/models/test_load.py -k dropout",
    ),
    Fault(
        "load: weights that are missing are drawn at random",
        _LOAD,
        '("missing_keys", "weights are missing and would be drawn at random"),',
        "",
        "tests/models/test_load.py -k folder_is_refused",
    ),
    Fault(
        "reference: log-probs of other weights are found in the cache",
        _REFERENCE,
        '"weights": loaded.weights_sha256',
        '"weights": ""',
        "tests/recipes/test_dpo.py -k share_a_cache",
    ),
    Fault(
        "load: weights of equal bytes and other shapes or dtypes have one hash",
        _LOAD,
        'f"{name} {tuple(tensor.shape)} {tensor.dtype}\\n".encode()',
        'f"{name}\\n".encode()',
        "tests/models/test_load.py -k equal_bytes",
    ),
    Fault(
        "reference: no certificate at step 0",
        _REFERENCE,
        "    elif worst > tolerance:",
        "    elif False:",
        "tests/recipes/test_dpo.py -k stopped_at_step_0",
    ),
    Fault(
        "reference: it moves away from the policy",
        _REFERENCE,
        "torch.lerp(old.float(), new.float(), mix)",
        "torch.lerp(new.float(), old.float(), mix)",
        "tests/recipes/test_objectives.py -k by_its_share",
    ),
    Fault(
        "reference: it moves at every step",
        _REFERENCE,
        "if self.moves is None or step % self.moves[0]:",
        "if self.moves is None:",
        "tests/recipes/test_objectives.py -k by_its_share",
    ),
    Fault(
        "reference: one that moves is read from the cache and never does",
        "src/preftune/recipes/dpo.py",
        'if "divergence" in objective.needs or cfg.reference_moves():',
        'if "divergence" in objective.needs:',
        "tests/recipes/test_objectives.py -k follows_every_step",
    ),
    Fault(
        "cache: the key leaves out the prompt",
        _CACHE,
        '    prompt.update(group.prompt.astype("<i4").tobytes())\n',
        "",
        "tests/engine/test_reference_keys.py",
    ),
    Fault(
        "cache: prompt and response run into each other",
        _CACHE,
        'len(group.prompt).to_bytes(8, "little")',
        'b""',
        "tests/engine/test_reference_cache.py -k run_into",
    ),
    Fault(
        "cache: values are not checked as they are read",
        _CACHE,
        "if crc32(values.data) != check:",
        "if False:",
        "tests/engine/test_reference_cache.py -k flipped",
    ),
    Fault(
        "cache: log-probs are kept in bfloat16",
        _CACHE,
        'logps_C.detach().to("cpu", torch.float32).numpy()',
        'logps_C.detach().to("cpu", torch.bfloat16).float().numpy()',
        "tests/engine/test_reference_cache.py -k bit_for_bit",
    ),
    Fault(
        "cache: log-probs that are not finite are kept",
        _CACHE,
        "        if bad:\n",
        "        if False:\n",
        "tests/engine/test_reference_cache.py -k not_finite",
    ),
]
