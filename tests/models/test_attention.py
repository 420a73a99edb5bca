"""Claims about who sees whom in a packed row, and about models that cannot be told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from preftune.data.packing import pack, pad
from preftune.errors import ConfigError, RunError
from preftune.models import attention
from preftune.models.attention import Layout, install, own_attention, use_backend
from preftune.models.logprobs import check_packing, score
from preftune.tensors import AttentionPlan, Segment, TokenGroup

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
LLAMA = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def build(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=dtype).eval()


def group(prompt: int, *lengths: int, seed: int = 0) -> TokenGroup:
    draw = np.random.default_rng(seed)
    return TokenGroup(
        draw.integers(3, 97, prompt).astype(np.int32),
        tuple(draw.integers(3, 97, n).astype(np.int32) for n in lengths),
        ((0, 1),),
        origin=f"pairs.jsonl:{seed}",
    )


GROUPS = [group(9, 6, 11, seed=1), group(4, 3, 7, 5, seed=2), group(12, 8, 2, seed=3)]


def changed(row: TokenGroup, response: int) -> TokenGroup:
    """The group with every token of one response replaced."""
    responses = tuple(3 + (r + 5) % 94 if i == response else r for i, r in enumerate(row.responses))
    return TokenGroup(row.prompt, responses, row.pairs)


# -- who sees whom ----------------------------------------------------------------------------------------------------


def test_visibility_is_the_plan_read_token_by_token() -> None:
    """[prompt p p p | first f f | second s s]: a drawing, with and without a window of two positions."""
    layout = Layout(AttentionPlan((Segment(0, 5), Segment(5, 7, 0, 3), Segment(7, 9)), 9))
    rows = torch.arange(9)
    drawing = ["x", "xx", "xxx", "xxxx", "xxxxx", "xxx..x", "xxx..xx", ".......x", ".......xx"]
    assert layout.visible(rows, rows).tolist() == [[i < len(d) and d[i] == "x" for i in range(9)] for d in drawing]
    window = ["x", "xx", ".xx", "..xx", "...xx", "..x..x", ".....xx", ".......x", ".......xx"]
    assert layout.visible(rows, rows, 2).tolist() == [[i < len(d) and d[i] == "x" for i in range(9)] for d in window]


@pytest.mark.parametrize("block", [0, 192])
def test_groups_are_blind_to_each_other(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace all responses of one group: the log-probs of the others stay equal to the bit."""
    monkeypatch.setattr(attention, "_BLOCK_ELSE", block)
    model = build("Llama", **LLAMA)
    assert install(model) is None
    other = changed(changed(GROUPS[1], 0), 1)
    with torch.no_grad():
        before, after = (score(model, pack([GROUPS[0], g, GROUPS[2]])) for g in (GROUPS[1], other))
    same = [*range(17), *range(32, 42)]
    assert torch.equal(before[same], after[same])
    assert not torch.isclose(before[17:27], after[17:27]).any()


@pytest.mark.parametrize("block", [0, 192])
def test_responses_are_blind_to_each_other(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace one response of a group: its siblings' log-probs stay equal to the bit."""
    monkeypatch.setattr(attention, "_BLOCK_ELSE", block)
    model = build("Llama", **LLAMA)
    assert install(model) is None
    for response, own in ((0, slice(0, 3)), (1, slice(3, 10)), (2, slice(10, 15))):
        with torch.no_grad():
            before, after = (score(model, pack([g])) for g in (GROUPS[1], changed(GROUPS[1], response)))
        kept = torch.ones(15, dtype=torch.bool)
        kept[own] = False
        assert torch.equal(before[kept], after[kept])
        assert not torch.equal(before[own], after[own])


def test_padding_never_changes_a_log_prob() -> None:
    """Neither the id used for padding, nor how much of it a longer neighbour causes, and no prompt token is scored."""
    model = build("Llama", torch.float64, **LLAMA)
    with torch.no_grad():
        alone, other_id = (score(model, pad([GROUPS[0]], pad_id=i)) for i in (0, 41))
        beside_long = score(model, pad([GROUPS[0], group(60, 50, 5)], pad_id=0))[: len(alone)]
    assert torch.equal(alone, other_id)
    assert torch.allclose(alone, beside_long, rtol=0, atol=1e-7)
    assert len(alone) == 6 + 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_groups_go_segment_by_segment_and_agree_with_the_oracle(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups beyond a block's size, short ones merged beside them, under a window that cuts: `sdpa` equals `dense`."""
    monkeypatch.setattr(attention, "_BLOCK", {})
    monkeypatch.setattr(attention, "_BLOCK_ELSE", 192)
    model = build("Mistral", dtype, **LLAMA, sliding_window=300)
    assert install(model) is None
    batch = pack([GROUPS[0], GROUPS[1], group(800, 90, 260), GROUPS[2], group(350, 2, 40)])
    assert batch.plan is not None
    kinds = [tile.is_block for tile in Layout(batch.plan).tiles(torch.zeros(1), None, 192)]
    assert kinds == [True, False, False, True, False, False]
    with torch.no_grad():
        ours = score(model, batch)
        use_backend(model, "dense")
        oracle = score(model, batch)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (ours - oracle).square().mean().sqrt() < tolerance
    assert not torch.equal(ours, oracle)


# -- models that are and are not served -------------------------------------------------------------------------------

MAMBA2 = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_heads": 8, "state_size": 8,
          "n_groups": 1, "initializer_range": 0.2}  # fmt: skip
REFUSED = {
    "Falcon": (SMALL, "its attention does not go through transformers' attention interface"),
    "Bloom": (SMALL | {"n_layer": 2, "n_head": 4}, "ALiBi adds a bias by distance"),
    "Mamba2": (MAMBA2, "linear_attention|convolution"),
    "FalconH1": (LLAMA, "hybrid|convolution"),
    "StableLm": (LLAMA, "does not hand keywords down to its attention"),
    "GptOss": (LLAMA, "its attention uses s_aux"),
    "Llama4Text": (LLAMA, "layers of type chunked_attention"),
    "GPTNeoXJapanese": (SMALL, "dropout is active"),
    "T5": ({"vocab_size": 97, "d_model": 32, "num_layers": 2, "num_heads": 4}, "it is an encoder-decoder"),
    # Declares windows that its attention is never told.
    "Llama": (LLAMA | {"layer_types": ["sliding_attention", "full_attention"]}, "0 of its 1 sliding-window layers"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_packed_says_why_and_stays_as_it_was(kind: str) -> None:
    settings, reason = REFUSED[kind]
    model = build(kind, **settings)
    own = model.config._attn_implementation
    found = install(model)
    assert found is not None
    assert any(part in found for part in reason.split("|")), found
    assert model.config._attn_implementation == own
    assert not hasattr(model, "preftune_attention")


def test_a_layer_that_mixes_tokens_in_another_way_is_noticed() -> None:
    """One of two layers does not attend: half of the model would not know who sees whom."""
    model = build("Llama", **LLAMA)
    model.model.layers[1].forward = lambda hidden, **kwargs: hidden.roll(1, 1)
    assert install(model) == "1 of its 2 layers hand the layout to their attention"


def test_prompt_tuning_is_refused() -> None:
    model = build("Llama", **LLAMA)
    model.peft_config = {"default": SimpleNamespace(is_prompt_learning=True)}
    assert "prompt tuning" in str(install(model))


@pytest.mark.parametrize("kind", ["Falcon", "Bloom", "Mamba2", "StableLm"])
def test_models_that_ignore_the_plan_are_caught_on_the_first_batch(kind: str) -> None:
    """They accept the keyword and drop it. Packed rows raise; padded rows, the fall-back, are exact."""
    model = build(kind, **REFUSED[kind][0])
    with pytest.raises(RunError, match="ignored who sees whom in a packed row"):
        check_packing(model, pack(GROUPS))
    assert check_packing(model, pad(GROUPS, pad_id=0)) < 1e-5


def test_served_models_pass_the_check_packed_and_padded() -> None:
    model = build("Llama", **LLAMA)
    assert install(model) is None
    assert 0 < check_packing(model, pack(GROUPS)) < 1e-6
    assert check_packing(model, pad(GROUPS, pad_id=0)) < 1e-6


def test_the_check_catches_tokens_that_meet_where_they_should_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every token of the row see all before it: the run stops and names the row."""
    model = build("Llama", **LLAMA)
    assert install(model) is None
    monkeypatch.setattr(Layout, "visible", lambda self, rows, columns, window=None: columns[None] <= rows[:, None])
    message = r"packed rows differ from each sequence alone by .* at most 0.0001 allowed .*response 2 of pairs.jsonl:1"
    with pytest.raises(RunError, match=message):
        check_packing(model, pack(GROUPS[:1]))


@pytest.mark.parametrize("make", [pack, lambda groups: pad(groups, pad_id=0)])
def test_the_check_catches_a_vocabulary_projection_of_another_kind(make: Any) -> None:
    """A head that adds something of its own to its logits would be scored as if it did not."""

    class Sharpened(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.1

    model = build("Llama", **LLAMA)
    head = Sharpened(32, 97, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert install(model) is None
    with pytest.raises(RunError, match="rows differ from each sequence alone"):
        check_packing(model, make(GROUPS))
    model.lm_head = torch.nn.Sequential(head)
    with pytest.raises(RunError, match="no linear vocabulary projection but Sequential"):
        score(model, pack(GROUPS))


def test_a_nan_does_not_pass_the_check() -> None:
    model = build("Llama", **LLAMA)
    assert install(model) is None
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="by nan nats"):
        check_packing(model, pack(GROUPS))


# -- living with an installed model -----------------------------------------------------------------------------------


def test_an_installed_model_refuses_to_attend_without_a_plan_and_generates_with_its_own_attention() -> None:
    """A left-padded batch would silently lose its mask; inside `own_attention` everything is as before `install`."""
    model, untouched = build("Llama", **LLAMA), build("Llama", **LLAMA)
    assert install(model) is None
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    with pytest.raises(RunError, match=r"called without a layout: use models.logprobs.score, or .*own_attention"):
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad():
        expected = untouched(input_ids=ids, attention_mask=mask).logits
        with own_attention(model):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert score(model, pack(GROUPS)).isfinite().all()


def test_dropout_that_is_switched_on_later_stops_the_run() -> None:
    model = build("Llama", **LLAMA)
    assert install(model) is None
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(RunError, match="its attention uses dropout, which packed rows do not serve"):
        score(model, pack(GROUPS))


def test_an_unknown_backend_is_refused() -> None:
    model = build("Llama", **LLAMA)
    with pytest.raises(ConfigError, match="call install first"):
        use_backend(model, "dense")
    assert install(model) is None
    with pytest.raises(ConfigError, match="attention backend 'flash' is unknown; allowed: sdpa, dense"):
        use_backend(model, "flash")
