"""Threads, forks and the compiler's cache of the CPU back end."""

import os
import select
import signal
import threading
import warnings

import pytest
import torch
from backends import stored

from loftq.kernels import cpu, products, reference
from loftq.kernels import threads as kernel_threads
from loftq.numerics.codebooks import levels, midpoints
from loftq.spec import BITS, QuantSpec


@pytest.fixture(params=["PyTorch's threads", "a pool"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "a pool":
        monkeypatch.setattr(kernel_threads, "_openmp", lambda: None)


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("threads_of")
@pytest.mark.parametrize("bits", BITS)
def test_bits_do_not_depend_on_threads(bits: int) -> None:
    spec = QuantSpec(bits=bits, block_size=24)
    weight, x, tensors = torch.randn(130, 200), torch.randn(3, 200), stored(spec, 130, 200)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        quantized, residual = cpu.quantize_residual(weight, weight, spec)
        results.append(
            [
                *(quantized.codes, residual, *quantized.scales.values()),
                cpu.pack(quantized.codes, bits),
                cpu.dequantize(tensors, spec, 200, torch.float32),
                cpu.dequantize(tensors, spec, 200, torch.bfloat16),
                cpu.linear(x, tensors, spec, 200),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("threads_of")
@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_is_worked_on_once_and_errors_come_back(threads: int) -> None:
    torch.set_num_threads(threads)
    for rows in (0, 1, 15, 16, 47, 48, 1000):
        done = torch.zeros(rows, dtype=torch.int64)
        kernel_threads.over_rows(lambda start, stop, done=done: done[start:stop].add_(1), rows)
        assert done.eq(1).all()

    def fails(start: int, stop: int) -> None:
        raise ZeroDivisionError(f"rows {start} to {stop}")

    with pytest.raises(ZeroDivisionError, match="rows"):
        kernel_threads.over_rows(fails, 1000)


@pytest.mark.parametrize("code", ["nf", "uniform", "affine"])
def test_codes_change_exactly_at_the_gaps(code: str) -> None:
    """At 8 bits a table says near which gap a value lies: tried at every gap, and next to it on both sides."""
    gaps = midpoints(code, 8)
    values = torch.cat([gaps, gaps.nextafter(gaps - 1), gaps.nextafter(gaps + 1), torch.tensor([-9.0, 0.0, 9e9])])
    wanted = torch.bucketize(values, gaps).to(torch.uint8)
    codes, residual = torch.empty(1, len(values), dtype=torch.uint8), torch.empty(1, len(values))
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    args = values[None], values[None], one, none, *cpu._cells(code, 8), levels(code, 8), len(values), codes, residual
    cpu.run_over_rows(cpu._quantize_by_cells, 1, *args)
    assert torch.equal(codes[0], wanted)


@pytest.mark.parametrize("product", ["linear", "linear_grad_input"])
def test_products_in_parts_of_the_weight(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts decoded into memory that is used again: by larger and smaller weights, in and out of inference mode."""
    monkeypatch.setattr(products, "PART", 1000)
    monkeypatch.setattr(products, "_scratch", threading.local())
    spec, results = QuantSpec(bits=3, code="affine", block_size=24), []
    for i, (rows, columns) in enumerate([(37, 72), (16, 200), (130, 200), (1, 1), (50, 7)]):
        tensors = stored(spec, rows, columns)
        x = torch.randn(9, columns if product == "linear" else rows)
        wanted = getattr(reference, product)(x, tensors, spec, columns)
        with torch.inference_mode(i % 2 == 0):
            results.append((getattr(cpu, product)(x, tensors, spec, columns), wanted))
    for got, wanted in results:  # none shares memory with a later one
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_threads_after_a_fork() -> None:
    """A child has none of its parent's threads: work handed to them would never be done."""
    spec = QuantSpec(bits=2)
    tensors = stored(spec, 64, 72)
    wanted = reference.dequantize(tensors, spec, 72, torch.float32)
    torch.set_num_threads(2)
    assert torch.equal(cpu.dequantize(tensors, spec, 72, torch.float32), wanted)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of what is tested here
        child = os.fork()
    if child == 0:
        equal = torch.equal(cpu.dequantize(tensors, spec, 72, torch.float32), wanted)
        os.write(writer, b"equal" if equal else b"differ")
        os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], 30)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answer = os.read(reader, 16) if ready else b"no answer"
    os.close(reader)
    assert answer == b"equal"
    assert torch.equal(cpu.dequantize(tensors, spec, 72, torch.float32), wanted)  # the parent keeps its threads


def test_compiled_kernels_are_found_in_the_cache_again() -> None:
    """Numba's key holds what a kernel closes over; a function in it has a new identity in every process."""
    for kernel in (cpu._decoder(2), cpu._product(2, 1)):
        closed_over = [cell.cell_contents for cell in kernel.py_func.__closure__]  # type: ignore[attr-defined]
        assert closed_over
        assert all(isinstance(value, bool | int) for value in closed_over)
