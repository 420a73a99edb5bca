"""Stochastic rounding is unbiased, exact on the grid, and a function of (seed, step, name, position)."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.engine import rounding
from preftune.engine.rounding import stochastic_round_


def rounded(source: Tensor, *, seed: int = 0, step: int = 1, name: str = "w") -> Tensor:
    out = torch.empty_like(source, dtype=torch.bfloat16)
    stochastic_round_(out, source, seed=seed, step=step, name=name)
    return out


def neighbours(value: float) -> tuple[float, float]:
    """The two bf16 values around a float32, by truncating and by counting one up: arithmetic of its own."""
    pattern = int(np.float32(value).view(np.uint32)) >> 16
    low, high = (float(np.uint32(p << 16).view(np.float32)) for p in (pattern, pattern + 1))
    return low, high


@pytest.fixture(params=["pcg", "hashed"])
def any_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sources of random bits: the CPU's, and the accelerator's run here on the CPU."""
    if request.param == "hashed":

        def fill(seed: int, step: int, name: str, first: int) -> Callable[[Tensor], None]:
            return rounding._hashed_bits(rounding._hash(f"{seed}/{step}/{name}"), first)

        monkeypatch.setattr(rounding, "_pcg_bits", fill)


@pytest.mark.usefixtures("any_bits")
@pytest.mark.parametrize("value", [0.0200123, -0.0200123, 1.0039, -3.3e-5, 1e-40, 65504.7])
def test_the_mean_of_a_million_draws_is_the_value(value: float) -> None:
    """Unbiased: the mean lies within 5 standard errors of the value; only its two neighbours ever appear."""
    draws = 1_000_000
    source = torch.full((draws,), value)
    exact, (low, high) = float(source[0]), neighbours(value)
    results = rounded(source).double()
    assert set(results.unique().tolist()) == {low, high}
    share = (exact - low) / (high - low)
    standard_error = abs(high - low) * (share * (1 - share) / draws) ** 0.5
    assert abs(float(results.mean()) - exact) < 5 * standard_error


@pytest.mark.usefixtures("any_bits")
def test_every_fraction_is_drawn_with_its_own_probability() -> None:
    """Over 64 fractions between two neighbours, the carry rate follows the fraction (chi-square, 5 sigma)."""
    draws, fractions = 20_000, torch.arange(512, 65536, 1024)
    pattern = (0x3CA40000 + fractions).to(torch.int32)  # 0.02 and a little more
    source = pattern.view(torch.float32).repeat_interleave(draws)
    up = (rounded(source).view(torch.int16) != 0x3CA4).view(len(fractions), draws).double().sum(1)
    p = fractions / 65536
    chi_square = float(((up - draws * p) ** 2 / (draws * p * (1 - p))).sum())
    assert abs(chi_square - len(fractions)) < 5 * (2 * len(fractions)) ** 0.5


@pytest.mark.usefixtures("any_bits")
def test_a_value_on_the_grid_is_never_moved() -> None:
    """Every one of the 65,536 bf16 patterns comes back as itself; a NaN comes back as a NaN."""
    grid = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for step in (1, 2, 3):
        result = rounded(grid.float(), step=step)
        number = ~grid.isnan()
        assert torch.equal(result[number].view(torch.int16), grid[number].view(torch.int16))
        assert bool(result[~number].isnan().all())


def test_nan_and_infinity_stay_what_they_are_whatever_their_bits() -> None:
    """A NaN whose bits would carry into the sign or be truncated to infinity stays a NaN, its neighbours theirs."""
    patterns = [0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x007FFFFF, 0x7F800000, -0x00800000, 0x3F800000]
    source = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for step in range(1, 40):
        result = rounded(source, step=step)
        assert bool(result[:5].isnan().all())
        assert result[5:].tolist() == [float("inf"), float("-inf"), 1.0]


@pytest.mark.usefixtures("any_bits")
def test_the_bits_are_repeated_and_differ_by_seed_step_and_name() -> None:
    """The same (seed, step, name) gives the same weights again; any other key gives others."""
    source = torch.rand(5000) * 0.01 + 0.02
    base = rounded(source)
    assert torch.equal(base, rounded(source))
    others = [rounded(source, seed=1), rounded(source, seed=-1), rounded(source, step=2), rounded(source, name="v")]
    for i, one in enumerate(others):
        for two in [base, *others[:i]]:
            assert 0.2 < float((one != two).double().mean()) < 0.5  # 1/3 for independent draws: mean of 2 p (1 - p)


def test_the_bits_of_an_element_depend_on_its_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU neither the length of the tensor, nor its shape, nor the chunk size changes an element's bits."""
    source = torch.rand(10_001) * 0.01 + 0.02
    whole = rounded(source)
    assert torch.equal(rounded(source[:4999]), whole[:4999])
    assert torch.equal(rounded(source[:10_000].view(100, 100)).view(-1), whole[:10_000])
    monkeypatch.setattr(rounding, "CPU_CHUNK", 1024)
    assert torch.equal(rounded(source), whole)


@pytest.mark.usefixtures("any_bits")
@pytest.mark.parametrize("cut", [1, 4, 16, 700, 2049])
def test_parts_of_a_tensor_get_the_bits_of_the_whole(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut anywhere and rounded part by part, each told where it begins: the weights of one process, in any chunks."""
    source = torch.rand(5000) * 0.01 + 0.02
    whole, parts = rounded(source), torch.empty(5000, dtype=torch.bfloat16)
    monkeypatch.setattr(rounding, "CPU_CHUNK", 512)
    for first, end in ((0, cut), (cut, 3001), (3001, 5000)):
        stochastic_round_(parts[first:end], source[first:end], seed=0, step=1, name="w", first=first)
    assert torch.equal(parts, whole)


@pytest.mark.usefixtures("any_bits")
def test_float32_may_hold_the_rounded_weights() -> None:
    """Written into float32, the same values: what a process keeps of a weight that is computed with in bfloat16."""
    source = torch.cat((torch.randn(3000), torch.tensor([float("nan"), float("inf"), 0.0, -1e-40])))
    held = torch.empty_like(source)
    stochastic_round_(held, source, seed=3, step=2, name="w")
    expected = rounded(source, seed=3, step=2).float()
    assert torch.equal(held[:3000], expected[:3000]) and bool(held[3000].isnan())
    assert torch.equal(held[3001:], expected[3001:])


def test_the_hash_of_the_accelerators_bits_is_splitmix64() -> None:
    """From key 0 and from key 1234567 the first numbers are those its author publishes."""
    published = {0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4], 1234567: [6457827717110365317, 3203168211198807973]}
    for key, numbers in published.items():
        bits = torch.empty(8, dtype=torch.int32)
        rounding._hashed_bits(key, 0)(bits)
        words = np.array(bits.tolist(), dtype=np.uint16).view(np.uint64)
        assert words.tolist() == numbers


@pytest.mark.usefixtures("any_bits")
def test_rounding_reads_and_advances_no_global_random_state() -> None:
    """Seeding the global generators changes nothing, and they are where they were."""
    source = torch.rand(1000)
    before = rounded(source)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(rounded(source), before)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    assert torch.equal(states[0], after[0]) and states[1:] == after[1:]


def test_an_empty_and_a_scalar_tensor_are_rounded_too() -> None:
    """Parameters of 0 and of 1 element have nothing special."""
    assert rounded(torch.empty(0, 3)).shape == (0, 3)
    assert float(rounded(torch.tensor(0.5))) == 0.5
