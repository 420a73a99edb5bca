"""A small network, its data and its training loop, shared by the tests of the optimizer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preftune.engine.optim import Optimizer

NAMES = ("adamw", "rmsprop", "sgd")
DTYPES = (torch.float32, torch.bfloat16)


class Net(nn.Module):
    """Three layers whose weights are 0.02 to 0.08 in size and lie on the bf16 grid; computes in float32 or more."""

    def __init__(self, dtype: torch.dtype, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            size = 0.02 + 0.06 * torch.rand(*shape, generator=generator)
            return nn.Parameter((size * torch.randn(*shape, generator=generator).sign()).bfloat16().to(dtype))

        self.first, self.second = weight(width, width), weight(width // 4, width)
        self.bias, self.last = weight(width // 4), weight(1, width // 4)
        self.dtype = torch.promote_types(dtype, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        first, second, bias, last = (p.to(self.dtype) for p in (self.first, self.second, self.bias, self.last))
        return 8 * (torch.tanh(torch.tanh(x @ first.T) @ second.T + bias) @ last.T).squeeze(-1)


def data(rows: int = 8, width: int = 32, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features of the chosen and of the rejected responses, [rows, width] each."""
    chosen, rejected = torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return chosen, rejected


def backward(model: nn.Module, chosen: Tensor, rejected: Tensor, rows: int | None = None) -> float:
    """The sum over these pairs of -log sigmoid(margin), over `rows`: the step's global denominator."""
    loss = -F.logsigmoid(model(chosen) - model(rejected)).sum() / (rows or len(chosen))
    loss.backward()
    return float(loss.detach())


def train(model: nn.Module, optimizer: Optimizer, steps: range, lr: float = 1e-3) -> None:
    for step in steps:
        backward(model, *data(seed=step))
        optimizer.step(step, lr * (1 + step % 3))


def snapshot(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in optimizer.tensors().items()}


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        same = tensor.dtype == two[name].dtype and tensor.shape == two[name].shape
        assert same and torch.equal(tensor.view(-1).view(torch.uint8), two[name].view(-1).view(torch.uint8)), name
