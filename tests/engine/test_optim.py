"""The step is torch's on float32 masters; bf16 follows float32; NaN touches nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_net import DTYPES, NAMES, Net, assert_same_bits, backward, data, snapshot, train
from torch import Tensor, nn

from preftune.engine import optim
from preftune.engine.optim import Optimizer
from preftune.errors import ConfigError, NotFinite, RunError

# --- the arithmetic ---------------------------------------------------------------------------------------------------

REFERENCES = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, foreach=False, fused=False),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_equal_the_plain_optimizer_of_torch(name: str, weight_decay: float) -> None:
    """float64: weights after 10 steps with a changing rate, clipping and decay on matrices equal torch's loops."""
    model, reference = Net(torch.float64), Net(torch.float64)
    ours = Optimizer(model, name=name, weight_decay=weight_decay, max_grad_norm=2.0)
    matrices, vectors = [reference.first, reference.second, reference.last], [reference.bias]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0}]
    theirs = REFERENCES[name](groups)
    norms = []
    for step in range(1, 11):
        (chosen, rejected), lr = data(seed=step, dtype=torch.float64), 1e-3 / step
        for net in (model, reference):
            backward(net, chosen, rejected, rows=8 if step % 2 else 2)  # every other gradient is four times as long
        norms.append(float(nn.utils.clip_grad_norm_(reference.parameters(), 2.0)))
        for group in theirs.param_groups:
            group["lr"] = lr
        theirs.step()
        theirs.zero_grad()
        assert ours.step(step, lr) == pytest.approx(norms[-1], rel=1e-12)
    assert min(norms) < 2.0 < max(norms)
    for one, two in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_clipping_is_off_at_zero_and_none(off: float | None) -> None:
    """SGD at rate 1 moves by the gradient itself, however long, and the norm returned is that movement's."""
    model = Net(torch.float64)
    before = copy.deepcopy(model)
    optimizer = Optimizer(model, name="sgd", max_grad_norm=off)
    backward(model, *(1000 * x for x in data(dtype=torch.float64)), rows=1)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = optimizer.step(1, 1.0)
    moved = [(q - p).detach() for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    for movement, gradient in zip(moved, gradients, strict=True):
        torch.testing.assert_close(movement, gradient, rtol=1e-9, atol=1e-12)
    assert norm == pytest.approx(math.sqrt(sum(float((m**2).sum()) for m in moved)), rel=1e-9)
    assert norm > 10


def test_the_norm_of_many_small_gradients_is_exact() -> None:
    """One float32 norm over 8 million equal elements is off by 1e-4 or more; the norm returned is right to 1e-5."""
    model = nn.Linear(2**12, 2**11, bias=False)
    model.weight.grad = torch.full_like(model.weight, 1e-3)
    exact = float(model.weight.grad[0, 0].double()) * 2**11.5
    assert float(model.weight.grad.norm()) != pytest.approx(exact, rel=1e-4)
    assert Optimizer(model, name="sgd").step(1, 0.0) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("elements", [1, optim.NORM_PIECE - 1, optim.NORM_PIECE, 3 * optim.NORM_PIECE + 5])
def test_every_element_counts_in_the_norm(elements: int) -> None:
    """Fewer than a piece, whole pieces, pieces and a rest: the norm is that of all elements."""
    model = nn.Linear(elements, 1, bias=False)
    model.weight.grad = torch.randn(1, elements, generator=torch.Generator().manual_seed(0))
    exact = float(model.weight.grad.double().norm())
    assert Optimizer(model, name="sgd").step(1, 0.0) == pytest.approx(exact, rel=1e-6)


def test_a_large_finite_gradient_is_not_taken_for_an_infinite_one() -> None:
    """1e30 squared does not fit float32; such a gradient is clipped, not refused."""
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(model.weight, 1e30)
    assert Optimizer(model, name="sgd", max_grad_norm=1.0).step(1, 1.0) == pytest.approx(4e30)
    torch.testing.assert_close(before - model.weight, torch.full_like(before, 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_parameter_is_stepped_and_decayed_once(dtype: torch.dtype) -> None:
    """Input and output embedding in one tensor: one master, gradients of both uses summed, one decay."""
    embedding, head = nn.Embedding(5, 4, dtype=dtype), nn.Linear(4, 5, bias=False, dtype=dtype)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    optimizer = Optimizer(model, name="sgd", weight_decay=0.5)
    weights = {"weights/0.weight"} if dtype == torch.float32 else {"weights/0.weight", "masters/0.weight"}
    assert optimizer.tensors().keys() == weights
    before = embedding.weight.detach().float().clone()
    ((embedding(torch.tensor([1])) * 2).sum() + head(torch.full((1, 4), 3.0, dtype=dtype)).sum()).backward()
    optimizer.step(1, 0.25)
    gradient = torch.full((5, 4), 3.0)
    gradient[1] += 2.0
    after = optimizer.tensors()["weights/0.weight" if dtype == torch.float32 else "masters/0.weight"]
    torch.testing.assert_close(after, before - 0.25 * (gradient + 0.5 * before))


def test_gradients_are_forgotten_after_the_step() -> None:
    """The second step sees the second batch alone."""
    for dtype in DTYPES:
        model = Net(dtype)
        optimizer = Optimizer(model, name="sgd")
        backward(model, *data())
        first = optimizer.step(1, 0.0)
        backward(model, *data())
        assert optimizer.step(2, 0.0) == first
        backward(model, *data(seed=5))
        optimizer.zero_grad()
        with pytest.raises(RunError, match="no gradient reached any of the 4 trainable parameters"):
            optimizer.step(3, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_keeps_its_bits_and_its_counter(name: str, dtype: torch.dtype) -> None:
    """Frozen parameters are not owned; unused ones are not decayed, not stepped and not rounded anew."""
    model = Net(dtype)
    model.first.requires_grad_(False)
    optimizer = Optimizer(model, name=name, weight_decay=0.1)
    train(model, optimizer, range(1, 3))
    before = snapshot(optimizer)
    assert not any("first" in key for key in before)
    (model.last.float() ** 2).sum().backward()
    optimizer.step(3, 1e-2)
    after = optimizer.tensors()
    untouched = [key for key in before if not key.endswith("/last")]
    assert_same_bits({k: before[k] for k in untouched}, {k: after[k] for k in untouched})
    assert not torch.equal(before["weights/last"], after["weights/last"])
    if name != "sgd":
        assert [float(after[f"step/{p}"]) for p in ("second", "bias", "last")] == [2.0, 2.0, 3.0]


# --- micro-batches and bf16 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 8, 64])
def test_micro_batches_give_the_step_of_one_batch(parts: int) -> None:
    """float64: weights after one step agree to 1e-13 however the 64 pairs are split, float32: to 1e-6."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        whole, split = (one_step(dtype, pieces) for pieces in (1, parts))
        assert float((whole - split).norm() / whole.norm()) < tolerance


def one_step(dtype: torch.dtype, pieces: int) -> Tensor:
    """Where SGD at rate 1 goes with the gradient of 64 pairs in so many micro-batches: minus the gradient."""
    model = Net(dtype)
    start = torch.cat([p.detach().clone().view(-1) for p in model.parameters()])
    optimizer = Optimizer(model, name="sgd")
    for chosen, rejected in zip(*(x.chunk(pieces) for x in data(64, dtype=model.dtype)), strict=True):
        backward(model, chosen, rejected, rows=64)
    optimizer.step(1, 1.0)
    return torch.cat([p.detach().view(-1) for p in model.parameters()]) - start


def test_bf16_gradients_of_many_micro_batches_are_summed_in_float32() -> None:
    """512 bf16 micro-gradients: our sum is within 2e-3 of the float32 one, a bf16 `.grad` is off by ten times that."""
    rows, reference = 512, Net(torch.float32)
    backward(reference, *data(rows))
    exact = torch.cat([p.grad.view(-1) for p in reference.parameters() if p.grad is not None])

    def error(sums: list[Tensor]) -> float:
        return float((torch.cat([s.float().view(-1) for s in sums]) - exact).norm() / exact.norm())

    model, plain = Net(torch.bfloat16), Net(torch.bfloat16)
    optimizer = Optimizer(model, name="sgd")
    start = {name: tensor.clone() for name, tensor in optimizer.tensors().items() if name.startswith("masters/")}
    for chosen, rejected in zip(*(x.chunk(rows) for x in data(rows)), strict=True):
        backward(model, chosen, rejected, rows=rows)
        backward(plain, chosen, rejected, rows=rows)
        assert all(p.grad is None for p in model.parameters())
    optimizer.step(1, 1.0)
    ours = error([start[name] - tensor for name, tensor in optimizer.tensors().items() if name in start])
    naive = error([p.grad for p in plain.parameters() if p.grad is not None])
    assert ours < 2e-3 < 2e-2 < naive, (ours, naive)


@pytest.mark.parametrize("piece", [1, 5, 64, optim.ADDED])
def test_a_sum_made_piece_by_piece_has_the_bits_of_one_addition(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 += bfloat16, whatever the size of a piece and whether it divides the tensor, of a turned gradient too."""
    monkeypatch.setattr(optim, "ADDED", piece)
    draw = torch.Generator().manual_seed(0)
    for shape in ((1,), (64,), (13, 11), (3, 4, 5)):
        total = torch.randn(shape, generator=draw)
        gradient = torch.randn(shape[::-1], generator=draw).bfloat16().permute(*reversed(range(len(shape))))
        plain, ours = total.clone().add_(gradient), total.clone()
        optim._add(ours, gradient)
        assert torch.equal(ours, plain) and not torch.equal(ours, total)


def ten_losses(dtype: torch.dtype, lr: float = 1e-6, seed: int = 3) -> tuple[list[float], Net]:
    """DPO with beta = 1 on one batch of 8 pairs: the model against its own start."""
    model, (chosen, rejected) = Net(dtype, width=256), data(width=256)
    with torch.no_grad():
        start = model(chosen) - model(rejected)
    optimizer, losses = Optimizer(model, name="adamw", seed=seed), []
    for step in range(1, 11):
        loss = -F.logsigmoid(model(chosen) - model(rejected) - start).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(step, lr)
    return losses, model


def test_bf16_follows_float32_at_dpo_learning_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """lr 1e-6, weights on the bf16 grid: 10 losses within 3e-3 of float32's, which falls by 0.016, on any seed.

    The control: rounded to nearest, not one of 80 thousand weights moves and the loss stays at ln 2.
    """
    exact, _ = ten_losses(torch.float32)
    assert exact[0] == pytest.approx(math.log(2), abs=1e-7) and exact[0] - exact[-1] > 0.015
    away = torch.tensor([ten_losses(torch.bfloat16, seed=seed)[0] for seed in range(10)]).double() - torch.tensor(exact)
    assert away[:, 0].tolist() == [0.0] * 10
    assert float(away.abs().max()) < 3e-3 and float(away.abs().amax(1).mean()) < 1.2e-3
    assert abs(float(away[:, -1].mean())) < 3 * float(away[:, -1].std()) / 10**0.5

    monkeypatch.setattr(optim, "stochastic_round_", lambda out, source, **_: out.copy_(source))
    nearest, model = ten_losses(torch.bfloat16)
    assert nearest == [exact[0]] * 10
    for weight, start in zip(model.parameters(), Net(torch.bfloat16, width=256).parameters(), strict=True):
        assert torch.equal(weight, start)


def test_the_compute_copy_is_the_masters_stochastic_rounding() -> None:
    """Each compute weight is one of its master's two bf16 neighbours, and it is what the model saves."""
    model = Net(torch.bfloat16)
    optimizer = Optimizer(model, name="adamw", seed=7)
    train(model, optimizer, range(1, 4), lr=1e-4)
    tensors = optimizer.tensors()
    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == tensors[f"weights/{name}"].data_ptr()
        master = tensors[f"masters/{name}"]
        spacing = torch.exp2(torch.floor(torch.log2(master.abs())) - 7)
        assert bool(((weight.float() - master).abs() < spacing).all())
    nearest = {name: tensors[f"masters/{name}"].bfloat16() for name in model.state_dict()}
    assert any(not torch.equal(nearest[name], weight) for name, weight in model.state_dict().items())


def test_two_parameters_with_equal_masters_are_rounded_apart() -> None:
    """The random bits depend on the parameter: equal masters get different compute copies, and anew every step."""
    model = nn.ModuleList([nn.Linear(64, 64, bias=False, dtype=torch.bfloat16) for _ in range(2)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.03)
    optimizer, seen = Optimizer(model, name="sgd"), []
    for step in (1, 2):
        for parameter in model.parameters():
            (parameter.sum() * (step == 1)).backward()
        optimizer.step(step, 3e-5)
        tensors = optimizer.tensors()
        assert torch.equal(tensors["masters/0.weight"], tensors["masters/1.weight"])
        seen += [p.detach().clone() for p in model.parameters()]
    for i, one in enumerate(seen):
        assert all(0.2 < float((one != two).double().mean()) < 0.6 for two in seen[:i])


def test_a_later_optimizer_on_the_same_model_starts_clean() -> None:
    """An optimizer that is gone no longer collects the model's gradients."""
    model = Net(torch.bfloat16)
    first = Optimizer(model, name="sgd")
    del first
    backward(model, *data())
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    second = Optimizer(model, name="sgd")
    backward(model, *data())
    assert second.step(1, 0.0) > 0


# --- never NaN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, dtype: torch.dtype, bad: float) -> None:
    """One NaN or infinity in one of three micro-batches: weights, masters, moments, counters keep every bit."""
    for micro_batch in range(3):
        model = Net(dtype)
        optimizer = Optimizer(model, name=name, weight_decay=0.1, max_grad_norm=1.0)
        train(model, optimizer, range(1, 3))
        before = snapshot(optimizer)
        for i in range(3):
            chosen, rejected = data(seed=i)
            loss = -F.logsigmoid(model(chosen) - model(rejected)).sum()
            if i == micro_batch:
                loss = loss + (model.bias.float() * torch.tensor([0.0] * 7 + [bad])).sum()
            loss.backward()
        expected = "step 3: the gradient is NaN or infinite in 1 of 4 parameters, first in bias; .* not touched"
        with pytest.raises(NotFinite, match=expected):
            optimizer.step(3, 1e-2)
        assert_same_bits(before, snapshot(optimizer))


def test_after_a_refused_step_the_run_can_go_on_as_if_it_had_not_been() -> None:
    """Dropping the bad gradients and taking the step again gives the run that never saw them."""
    for dtype in DTYPES:
        model, twin = Net(dtype), Net(dtype)
        optimizer, other = Optimizer(model, name="adamw"), Optimizer(twin, name="adamw")
        (model.bias * math.nan).sum().backward()
        with pytest.raises(NotFinite):
            optimizer.step(1, 1e-3)
        optimizer.zero_grad()
        train(model, optimizer, range(1, 4))
        train(twin, other, range(1, 4))
        assert_same_bits(optimizer.tensors(), other.tensors())


# --- refusals ---------------------------------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {"name": "adam"}, "'adam' is unknown; allowed: adamw, adamw8bit, adamw_lean, rmsprop, sgd"),
        (nn.Linear(2, 2), {"name": "adamw_lean"}, "adamw_lean is for bfloat16 weights, weight is torch.float32"),
        (nn.Linear(2, 2), {"name": "sgd", "weight_decay": -0.1}, "weight_decay -0.1 is impossible"),
        (nn.Linear(2, 2), {"name": "sgd", "max_grad_norm": -1.0}, "max_grad_norm -1.0 is impossible"),
        (nn.Linear(2, 2), {"name": "sgd", "max_grad_norm": math.nan}, "max_grad_norm nan is impossible"),
        (frozen(), {"name": "sgd"}, "no trainable parameter: every one has requires_grad=False"),
        (nn.Linear(2, 2).half(), {"name": "sgd"}, "weight is torch.float16; training needs float32, float64 or bf"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(model: nn.Module, options: dict[str, Any], message: str) -> None:
    """The message says what was found and what is allowed."""
    with pytest.raises(ConfigError, match=message):
        Optimizer(model, **options)


def test_a_step_that_no_gradient_reached_is_an_error_and_a_zero_gradient_is_not() -> None:
    """Training that trains nothing is caught; a batch whose gradient happens to be 0 is a step."""
    model = nn.Linear(2, 2)
    optimizer = Optimizer(model, name="adamw", max_grad_norm=1.0)
    with pytest.raises(RunError, match="step 1: no gradient reached any of the 2 trainable parameters"):
        optimizer.step(1, 1e-3)
    (model(torch.ones(1, 2)) * 0).sum().backward()
    assert optimizer.step(1, 1e-3) == 0.0
