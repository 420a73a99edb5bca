"""Claims about fused attention kernels: their arguments mean what the plan says, and what is wrong is not used."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.data.packing import pack
from preftune.errors import ConfigError
from preftune.models import backends, kernels
from preftune.models.attention import BACKENDS, Layout, install
from preftune.models.backends import choose_backend, disagreement
from preftune.models.kernels import VarlenPlan, unsuited, varlen_plan
from preftune.tensors import AttentionPlan, Segment, TokenGroup

SHAPES = [(4, 4, 8), (6, 2, 16), (3, 1, 8)]
WINDOWS = [None, 1, 7, 48]
VARLEN = pytest.mark.skipif(kernels._torchs_own() is None, reason="torch 2.10 has no variable-length attention to use")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def in_words(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, window: int | None) -> Tensor:
    """What a variable-length kernel is documented to do: one sequence after the other, causal from the bottom right."""
    out = []
    for s in range(len(plan.q_ends) - 1):
        mine = slice(int(plan.q_ends[s]), int(plan.q_ends[s + 1]))
        theirs = slice(int(plan.k_ends[s]), int(plan.k_ends[s + 1]))
        queries, keys, values = q[mine], k[theirs], v[theirs]
        repeat = q.shape[1] // k.shape[1]
        keys, values = (each.repeat_interleave(repeat, 1) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        ahead = len(keys) - len(queries)
        for i in range(len(queries)):
            scores[:, i, i + ahead + 1 :] = -torch.inf
            if window is not None:
                scores[:, i, : max(0, i + ahead - (window - 1))] = -torch.inf
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        assert len(queries) <= plan.longest_q and len(keys) <= plan.longest_k
    return torch.cat(out)


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kernel", lambda: in_words)


def test_the_plan_of_a_drawn_row() -> None:
    """[p p p f f | s s | other other]: lengths, ends, and which token each key is."""
    plan = varlen_plan(AttentionPlan((Segment(0, 5), Segment(5, 7, 0, 3), Segment(7, 9)), 9))
    assert plan.q_ends.tolist() == [0, 5, 7, 9]
    assert plan.k_ends.tolist() == [0, 5, 10, 12]
    assert plan.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert (plan.longest_q, plan.longest_k) == (5, 5)
    assert plan.q_ends.dtype == plan.k_ends.dtype == torch.int32


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bottom_right_causality_over_gathered_keys_is_the_plan(
    shape: tuple[int, int, int], window: int | None, spoken: None
) -> None:
    """Value and gradients of the documented semantics equal the masked product to float64's rounding."""
    assert disagreement("varlen", "cpu", torch.float64, shape, window) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_for_the_rows_that_packing_makes(seed: int, spoken: None) -> None:
    """Groups of one to four responses, some with a common beginning, one the beginning of another."""
    draw = np.random.default_rng(seed)
    groups = []
    for _ in range(4):
        prompt, common = (draw.integers(3, 9, draw.integers(1, 6)).astype(np.int32) for _ in range(2))
        tails = [draw.integers(3, 9, draw.integers(1, 7)).astype(np.int32) for _ in range(draw.integers(1, 5))]
        responses = [np.concatenate((common, tail)) for tail in tails] + [common]
        groups.append(TokenGroup(prompt, tuple(responses), ((0, 1),)))
    plan = pack(groups).plan
    assert plan is not None
    q, k, v = (torch.randn(1, n, plan.length, 4, dtype=torch.float64) for n in (4, 2, 2))
    for window in (None, 3):
        ours, oracle = (BACKENDS[n](q, k, v, Layout(plan, n), 0.5, window, None) for n in ("varlen", "dense"))
        assert torch.allclose(ours, oracle, rtol=0, atol=1e-12)


class _Told(TorchDispatchMode):
    """Arguments of torch's variable-length kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.options: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.torch_attn._varlen_attn.default:
            self.options.append((*args[5:10], len(args) > 10 and args[10]))  # defaults at the end are not told
        return func(*args, **(kwargs or {}))


@VARLEN
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_own_kernel_takes_these_arguments(shape: tuple[int, int, int], window: int | None) -> None:
    """Its own function, on the meta device, where shapes are checked and nothing is computed; forward and backward."""
    heads, kv_heads, size = shape
    plan = backends._ROW
    q, k, v = (
        torch.empty(1, n, plan.length, size, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    kernels._kernel.cache_clear()
    kernels._kernel()  # torch's operation exists once it is imported
    with _Told() as told:
        out = BACKENDS["varlen"](q, k, v, Layout(plan, "varlen"), 0.3, window, None)
    assert out.shape == (1, plan.length, heads, size)
    left = -1 if window is None else window - 1
    assert told.options == [(150, 150, window is None, 0.3, [left, 0], heads > kv_heads)]
    for x, gradient in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.empty_like(out)), strict=True):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attn_takes_these_arguments(
    shape: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no kernel: a module with flash-attn's signature that does what its documentation says."""

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal and window_size[1] == 0 and softmax_scale is not None and dropout_p == 0
        plan = VarlenPlan(cu_seqlens_q, cu_seqlens_k, torch.empty(0), max_seqlen_q, max_seqlen_k)
        return in_words(q, k, v, plan, softmax_scale, None if window_size[0] < 0 else window_size[0] + 1)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(kernels, "_torchs_own", lambda: None)
    monkeypatch.setattr(kernels, "_kernel", kernels._kernel.__wrapped__)
    assert disagreement("varlen", "cpu", torch.float64, shape, window) < 1e-12


def of_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    raise AssertionError("it knows neither scale nor window")


def of_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    assert scale is not None and window_size[1] == 0
    plan = VarlenPlan(cu_seq_q, cu_seq_k, torch.empty(0), max_q, max_k)
    return in_words(query, key, value, plan, scale, None if window_size[0] < 0 else window_size[0] + 1)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_2_11_takes_these_arguments(
    shape: tuple[int, int, int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its documented signature, which is not told of grouped heads: 2.12 asks for that, as the installed one does."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_11)
    monkeypatch.setattr(kernels, "_kernel", kernels._kernel.__wrapped__)
    assert disagreement("varlen", "cpu", torch.float64, shape, window) < 1e-12


def test_the_kernel_of_torch_2_10_is_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented signature has no scale and no window: sdpa, unless there is flash-attn."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_10)
    assert "needs torch 2.11 or flash-attn" in str(unsuited("varlen", "cuda", torch.bfloat16, None))
    assert choose_backend(_OnCuda())[0] == "sdpa"
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    assert unsuited("varlen", "cuda", torch.bfloat16, None) is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_block_mask_is_the_plan(shape: tuple[int, int, int], window: int | None, softcap: float | None) -> None:
    """FlexAttention's forward, which a CPU has, equals the masked product: heads in groups, windows, softcap."""
    heads, kv_heads, size = shape
    draw = torch.Generator().manual_seed(1)
    plan = backends._ROW
    q, k, v = (torch.randn(1, n, plan.length, size, generator=draw) for n in (heads, kv_heads, kv_heads))
    with torch.no_grad():
        ours, oracle = (BACKENDS[n](q, k, v, Layout(plan, n), 0.3, window, softcap) for n in ("flex", "dense"))
    assert ours.shape == oracle.shape
    assert torch.allclose(ours, oracle, rtol=0, atol=1e-5)


UNSUITED = [
    ("varlen", "cpu", torch.bfloat16, None, "needs a CUDA device, not cpu"),
    ("flex", "mps", torch.bfloat16, None, "needs a CUDA device, not mps"),
    ("varlen", "cuda", torch.float32, None, "computes in bfloat16, not float32"),
    ("varlen", "cuda", torch.bfloat16, 30.0, "knows no softcap"),
    pytest.param("varlen", "cuda", torch.bfloat16, None, None, marks=VARLEN),
    ("flex", "cuda", torch.float32, 30.0, None),
    ("sdpa", "cpu", torch.float32, 30.0, None),
    ("dense", "cuda", torch.float32, None, None),
]


@pytest.mark.parametrize(("name", "device", "dtype", "softcap", "problem"), UNSUITED)
def test_what_a_kernel_cannot_do_is_known(
    name: str, device: str, dtype: torch.dtype, softcap: float | None, problem: str | None
) -> None:
    found = unsuited(name, device, dtype, softcap)
    assert found is None if problem is None else problem in str(found)


def test_without_torch_2_11_and_flash_attn_there_is_no_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_torchs_own", lambda: None)
    assert "needs torch 2.11 or flash-attn" in str(unsuited("varlen", "cuda", torch.bfloat16, None))
    with pytest.raises(ConfigError, match=r"varlen attention needs torch 2\.11 or flash-attn"):
        kernels._kernel.__wrapped__()


class _Config:
    num_attention_heads, num_key_value_heads, hidden_size = 4, 2, 32
    head_dim = None
    attn_logit_softcapping: float | None = None

    def get_text_config(self) -> _Config:
        return self


class _OnCuda:
    """As much of a model as the choice looks at; its numbers are computed where the tests run."""

    dtype, config = torch.bfloat16, _Config()

    class device:
        type = "cuda"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(name: str, device: Any, *args: Any) -> float:
        return disagreement(name, "cpu", *args)

    monkeypatch.setattr(backends, "disagreement", on_the_cpu)


@VARLEN
def test_on_cuda_a_kernel_that_agrees_is_chosen(spoken: None, here: None) -> None:
    assert choose_backend(_OnCuda()) == ("varlen", "one fused kernel, equal to plain products here")
    assert choose_backend(_OnCuda(), "dense") == ("dense", "asked for")


@VARLEN
def test_a_kernel_that_aligns_to_the_top_left_is_not_used(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    """Same shapes, no error, wrong numbers: auto says so and takes sdpa, and a kernel asked for by name is refused."""

    def top_left(q: Tensor, k: Tensor, v: Tensor, plan: VarlenPlan, scale: float, window: int | None) -> Tensor:
        out = []
        for s in range(len(plan.q_ends) - 1):
            mine = slice(int(plan.q_ends[s]), int(plan.q_ends[s + 1]))
            theirs = slice(int(plan.k_ends[s]), int(plan.k_ends[s + 1]))
            each = (q[mine], k[theirs].repeat_interleave(2, 1), v[theirs].repeat_interleave(2, 1))
            heads = (x.transpose(0, 1) for x in each)
            out.append(torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=scale))
        return torch.cat([o.transpose(0, 1) for o in out])

    monkeypatch.setattr(kernels, "_kernel", lambda: top_left)
    name, why = choose_backend(_OnCuda())
    assert name == "sdpa"
    assert why.startswith("varlen attention is off by ")
    with pytest.raises(ConfigError, match=r"varlen attention is off by .* at most 0.03 allowed; set --attention auto"):
        choose_backend(_OnCuda(), "varlen")


def test_a_kernel_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, here: None) -> None:
    """Whatever it raises; here FlexAttention, which has no backward on a CPU, for a model with a softcap."""
    monkeypatch.setattr(_Config, "attn_logit_softcapping", 30.0)
    name, why = choose_backend(_OnCuda())
    assert name == "sdpa"
    assert why.startswith("flex attention does not run here (")


def test_on_a_cpu_it_is_sdpa_and_a_kernel_asked_for_is_refused(tiny_model_folder: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert install(model) is None
    assert choose_backend(model) == ("sdpa", "fused kernels need CUDA, not cpu")
    for name in ("varlen", "flex"):
        with pytest.raises(ConfigError, match=f"{name} attention needs a CUDA device, not cpu; set --attention auto"):
            choose_backend(model, name)


@CUDA
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 2, 128)])
@pytest.mark.parametrize("name", ["sdpa", "varlen", "flex"])
def test_on_the_device_every_backend_equals_plain_products(
    name: str, shape: tuple[int, int, int], window: int | None
) -> None:
    assert disagreement(name, "cuda", torch.bfloat16, shape, window) < backends.DISAGREEMENT[torch.bfloat16]


@CUDA
@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_on_the_device_a_softcap_equals_plain_products(name: str) -> None:
    found = disagreement(name, "cuda", torch.bfloat16, (6, 2, 128), 48, 20.0)
    assert found < backends.DISAGREEMENT[torch.bfloat16]
