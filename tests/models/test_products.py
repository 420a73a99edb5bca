"""Claims about float32 products by oneDNN: chosen where they are float32 inside, left alone elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from preftune.models import products
from preftune.models.load import load
from preftune.models.products import ALLOWED, WIDTH, product_error, use_onednn


@pytest.mark.parametrize(("error", "precision"), [(4e-7, "medium"), (3e-4, "highest"), (3e-3, "highest")])
def test_what_rounds_inside_is_not_used(error: float, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 inside is kept, TF32 or bfloat16 inside is put back; what is said is what was done."""
    monkeypatch.setattr(products, "product_error", lambda: error)
    assert bool(use_onednn(WIDTH)) == (precision == "medium")
    assert torch.get_float32_matmul_precision() == precision


def test_the_error_tells_float32_from_what_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch multiplies it passes by a factor of four; factors rounded to bfloat16, or to 11 bits, do not."""
    assert product_error() < ALLOWED / 4
    plain = torch.Tensor.__matmul__
    for rounded in (lambda x: x.bfloat16().float(), lambda x: x * 2049 - (x * 2049 - x)):

        def less(one: torch.Tensor, other: torch.Tensor, rounded=rounded) -> torch.Tensor:  # type: ignore[no-untyped-def]
            narrow = one.dtype == torch.float32
            return plain(rounded(one), rounded(other)) if narrow else plain(one, other)

        monkeypatch.setattr(torch.Tensor, "__matmul__", less)
        assert product_error() > 10 * ALLOWED
    monkeypatch.undo()


@pytest.mark.parametrize("width", [WIDTH, WIDTH // 4])
def test_wide_float32_models_on_a_cpu_ask_for_it(
    width: int, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is loaded: a model of WIDTH, not a narrow one, not in bfloat16; once is enough."""
    monkeypatch.setattr(products, "product_error", lambda: 4e-7)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    load(tmp_path, dtype=torch.bfloat16)
    assert torch.get_float32_matmul_precision() == "highest"
    told = [sum("oneDNN" in note for note in load(tmp_path, dtype=torch.float32).notes) for _ in range(2)]
    assert told == ([1, 0] if width == WIDTH else [0, 0])
    assert torch.get_float32_matmul_precision() == ("medium" if width == WIDTH else "highest")


def test_values_and_gradients_are_those_of_plain_products() -> None:
    """A layer's product, forward and backward: to a few float32 roundings of what BLAS gives."""
    draw = torch.Generator().manual_seed(1)
    x, weight, pull = (torch.randn(*shape, generator=draw) for shape in ((300, 256), (700, 256), (300, 700)))

    def everything() -> list[torch.Tensor]:
        inputs = [each.clone().requires_grad_() for each in (x, weight)]
        out = torch.nn.functional.linear(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, pull)]

    plain = everything()
    use_onednn(WIDTH)
    for ours, theirs in zip(everything(), plain, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 2e-6
