"""Work on threads: order, bounds, errors, and the same bits for any number of workers."""

import threading
import time

import pytest
import torch

from loftq.solver import ordered_map, solve
from loftq.spec import QuantSpec, SolveSpec


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_order(workers: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * (7 - i % 7))
        return i * i

    assert list(ordered_map(work, range(20), workers)) == [i * i for i in range(20)]


def test_threads_work_on_the_callers_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's own would be the first one. There is no device here: what is asked of PyTorch is looked at."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream of cuda:1")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: asked.append((stream, threading.current_thread())))
    assert list(ordered_map(lambda i: i, range(3), 1)) == [0, 1, 2]
    assert [stream for stream, _ in asked] == ["a stream of cuda:1"]
    assert asked[0][1] is not threading.current_thread()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_same_bits_for_any_number_of_workers(svd: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {f"layer.{i}": torch.randn(200, 160 + 8 * i, generator=generator) for i in range(6)}

    def work(name: str):
        return solve(matrices[name], QuantSpec(bits=2), 4, SolveSpec(svd=svd, steps=3), name)

    alone = [work(name) for name in matrices]
    for workers in (1, 2, 4):
        for order in (list(matrices), list(matrices)[::-1]):
            got = dict(zip(order, ordered_map(work, order, workers), strict=True))
            for name, expected in zip(matrices, alone, strict=True):
                assert got[name].errors == expected.errors
                assert torch.equal(got[name].a, expected.a)
                assert torch.equal(got[name].b, expected.b)
                assert torch.equal(got[name].quantized.codes, expected.quantized.codes)


def test_each_item_has_one_lapack_thread_and_the_caller_keeps_its_own() -> None:
    torch.set_num_threads(2)
    assert set(ordered_map(lambda _: torch.get_num_threads(), range(8), 2)) == {1}
    assert torch.get_num_threads() == 2


def test_items_are_taken_only_a_little_ahead() -> None:
    taken = 0

    def items():
        nonlocal taken
        for i in range(100):
            taken += 1
            yield i

    results = ordered_map(lambda i: i, items(), 2)
    assert taken == 0
    for _ in range(3):
        next(results)
    assert taken <= 3 + 2 * 2 + 1
    results.close()


def test_an_error_arrives_in_its_place_and_stops_the_work() -> None:
    started = []

    def work(i: int) -> int:
        started.append(i)
        if i == 5:
            raise ValueError("five")
        return i

    results = ordered_map(work, range(1000), 2)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)
    assert max(started) < 20


def test_closing_early_ends_the_threads() -> None:
    results = ordered_map(lambda i: i, range(100), 3)
    next(results)
    results.close()
    deadline = time.monotonic() + 60

    def workers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("loftq_")]

    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not workers()


def test_what_is_finished_is_told_before_its_turn() -> None:
    """A slow first item keeps nothing of the others back but their order; all is told in the caller's thread."""
    told: list[int] = []
    gate = threading.Event()

    def finished(result: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append(result)
        if len(told) == 2:
            gate.set()

    def work(i: int) -> int:
        assert i or gate.wait(30)
        return i

    assert list(ordered_map(work, range(6), 2, finished)) == list(range(6))
    assert told[:2] == [1, 2]
    assert sorted(told) == list(range(6))


def test_what_has_failed_is_not_told() -> None:
    told: list[int] = []
    results = ordered_map(lambda i: 1 // (i - 1), range(3), 1, told.append)
    assert next(results) == -1
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert told == [-1]
