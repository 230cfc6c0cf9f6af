"""The search of the trellis code: what it finds are paths, and no others are better."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq.kernels import trellis_cpu


def offsets(rate: int, rows: int) -> list[int]:
    return [j * rate // 16 for j in range(rows + 1)]


def matrix(rows: int, columns: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    levels = torch.randn(1 << window, generator=generator)
    return torch.randn(rows, columns, generator=generator), torch.rand(rows, 1, generator=generator) + 0.5, levels


def rates_of(columns: int, *rates: int) -> Tensor:
    return torch.tensor(list(itertools.islice(itertools.cycle(rates), columns)), dtype=torch.uint8)


@pytest.mark.parametrize("window", [8, 10])
def test_neighbours_share_bits_at_every_rate(window: int) -> None:
    target, scale, levels = matrix(96, 64, window)
    rates = torch.arange(1, 65, dtype=torch.uint8)
    windows = trellis_cpu.best_windows(target, scale, rates, levels, 96).numpy().astype(int)
    assert windows.min() >= 0
    assert windows.max() < 1 << window
    for i, rate in enumerate(rates.tolist()):
        if rate * 6 < window:  # a string must have as many bits as a window
            continue
        at = offsets(rate, 96)
        for j in range(96):
            k = at[j + 1] - at[j]
            assert windows[j, i] >> k == windows[(j + 1) % 96, i] & ((1 << (window - k)) - 1)
    error = (target - scale * levels[windows]).square().mean(0).sqrt()
    assert error[63] < error[31] < error[15] < 1


@pytest.mark.parametrize("rate", [16, 23, 35, 51, 64])
def test_no_path_through_the_seam_is_better(rate: int) -> None:
    rows, window = 16, 8
    target, scale, levels = matrix(rows, 1, window)
    found = trellis_cpu.best_windows(target, scale, rates_of(1, rate), levels, rows)[:, 0].numpy().astype(int)
    at = offsets(rate, rows)
    seam = found[-1] >> (at[rows] - at[rows - 1])
    costs = (target - scale * levels).double().square().numpy()
    every = np.arange(1 << window)
    least = np.where(every & ((1 << (window - at[rows] + at[rows - 1])) - 1) == seam, costs[0], np.inf)
    for j in range(1, rows):
        k = at[j] - at[j - 1]
        before = least.reshape(-1, 1 << k).min(1)
        least = costs[j] + before[every & ((1 << (window - k)) - 1)]
    best = least[every >> (at[rows] - at[rows - 1]) == seam].min()
    assert costs[np.arange(rows), found].sum() == pytest.approx(best, rel=1e-5)


def test_earlier_windows_stay_where_they_are_better() -> None:
    """Tried with windows that are better than any path: each weight's best one for itself."""
    target, scale, levels = matrix(200, 9, 8)
    rates = rates_of(9, 32, 35, 0)
    found = trellis_cpu.best_windows(target, scale, rates, levels, 112)
    assert found[:, rates == 0].eq(0).all()
    nearest = (target[..., None] - scale[..., None] * levels).abs().argmin(-1).to(torch.int16)
    assert torch.equal(trellis_cpu.best_windows(target, scale, rates, levels, 112, found), found)
    assert torch.equal(trellis_cpu.best_windows(target, scale, rates, levels, 112, found.flip(0)), found)
    mixed = torch.cat([nearest[:112], found[112:].flip(0)])
    kept = trellis_cpu.best_windows(target, scale, rates, levels, 112, mixed)
    assert torch.equal(kept[:, rates > 0], torch.cat([nearest[:112], found[112:]])[:, rates > 0])
    assert kept[:, rates == 0].eq(0).all()


def test_windows_do_not_depend_on_threads_or_on_the_unit() -> None:
    target, scale, levels = matrix(96, 40, 8)
    rates = rates_of(40, 32, 35, 20)
    torch.set_num_threads(1)
    wanted = trellis_cpu.best_windows(target, scale, rates, levels, 96)
    torch.set_num_threads(3)
    for unit in (1.0, 2.0**-70, 2.0**70):
        assert torch.equal(trellis_cpu.best_windows(target * unit, scale * unit, rates, levels, 96), wanted)


def test_missing_rows_and_zero_rows() -> None:
    """Rows beyond the matrix count nothing, nor do rows whose scale is zero; choices that cost the same are zeros."""
    target, scale, levels = matrix(96, 8, 8)
    target[50:], scale[50:] = 0, 0
    rates = rates_of(8, 32, 40)
    short = trellis_cpu.best_windows(target[:50], scale[:50], rates, levels, 96)
    assert torch.equal(trellis_cpu.best_windows(target, scale, rates, levels, 96)[:50], short)
    assert trellis_cpu.best_windows(0 * target, 0 * scale, rates, levels, 96).eq(0).all()
