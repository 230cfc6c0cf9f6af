"""What CUDA devices ask of the kernels' callers, tried without one: threads, graphs, registers and shared memory."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import compiled, compiled_only, interpreted, stored
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from loftq.kernels import gpu_products
from loftq.nn import ops
from loftq.nn.experts import pack_experts
from loftq.nn.layers import LoftQLinear
from loftq.numerics import encode, quantize
from loftq.spec import QuantSpec

SMALLEST = 99 * 1024  # bytes of shared memory that a program can have on devices of compute capability 8.6 to 12


def test_tables_outlive_their_first_use() -> None:
    """What is cached while CUDA graphs warm up, or in inference mode, serves later calls outside of these."""
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            seen.extend([function] if result.is_meta else [])
            return result

    meta = torch.device("meta")
    gpu_products.levels.cache_clear()
    interpreted()._dynamic.cache_clear()
    with torch.inference_mode(), Watch():
        tables = [gpu_products.levels("nf", 3, meta), interpreted()._dynamic(meta)]
    assert not seen, "memory of this thread, which may belong to a graph"
    assert not any(table.is_inference() for table in tables)
    gpu_products.levels.cache_clear()
    interpreted()._dynamic.cache_clear()


def test_products_of_threads_are_tuned_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, inside, most = interpreted(), [], []

    class Tuner:
        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            inside.append(None)
            time.sleep(0.02)
            most.append(len(inside))
            inside.pop()

    spec = QuantSpec(bits=2)
    tensors, x = stored(spec, 37, 72), torch.randn(2, 72)
    monkeypatch.setattr(gpu, "_product", Tuner())
    threads = [threading.Thread(target=gpu.linear, args=(x, tensors, spec, 72)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "capability", "most"),
    [
        (torch.bfloat16, (9, 0), 64),
        (torch.float16, (8, 9), 64),
        (torch.float32, (9, 0), 16),
        (torch.float16, (7, 5), 16),
    ],
    ids=str,
)
def test_tokens_whose_sums_fit_the_registers(
    dtype: torch.dtype, capability: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for tokens in (most, most + 1):
        x: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, numel=lambda tokens=tokens: 72 * tokens)
        assert gpu_products._few(x, 72) == (tokens == most)


def test_products_fit_the_smallest_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The deepest pipeline with the most tokens of either size of numbers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    spec = QuantSpec(bits=8, code="uniform")
    tensors = stored(spec, 128, 256)
    with compiled_only(monkeypatch, 89) as kernels:
        for dtype in (torch.float32, torch.bfloat16):
            compiled().linear(torch.randn(gpu_products.FEW_TOKENS, 256).to(dtype), tensors, spec, 256)
        compiled().linear(torch.randn(gpu_products.FEW_ON_CORES, 256), tensors, spec, 256)
    assert [kernel.name for kernel in kernels] == ["_decode", "_product", "_product"]
    assert all(kernel.metadata.shared <= SMALLEST for kernel in kernels)


@pytest.mark.parametrize(
    "architecture", [100, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 89, 120))]
)
def test_products_compile_for_every_generation(
    architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In both directions, with and without tensor cores. A compiler may fail for a single one of these."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    gpu = compiled()
    with compiled_only(monkeypatch, architecture) as kernels:
        for spec in (QuantSpec(bits=2), QuantSpec(bits=8, code="uniform")):
            tensors = stored(spec, 256, 512)
            for dtype in (torch.float32, torch.bfloat16):
                gpu.linear(torch.randn(1, 512).to(dtype), tensors, spec, 512)
                gpu.linear_grad_input(torch.randn(1, 256).to(dtype), tensors, spec, 512)
    assert [kernel.name for kernel in kernels] == ["_product"] * 8


def test_a_pipeline_is_tuned_for_each_direction() -> None:
    """They need different amounts of shared memory: what one can have is no choice for the other."""
    assert "BY_ROWS" in compiled()._product.keys


def test_operators_that_look_at_values_stay_out_of_cuda_graphs() -> None:
    looking = (ops.experts, ops.experts_grad_input, ops.grouped_mm, ops.grouped_outer)
    for name in vars(torch.ops.loftq):
        operator = getattr(getattr(torch.ops.loftq, name), "default", None)
        if operator is not None:
            assert (torch.Tag.cudagraph_unsafe in operator.tags) == (operator in looking), name


def test_experts_wait_once_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products of a forward and its backward look at the ends of the experts' rows where :func:`known` put them."""
    seen: list[int] = []
    told: list[Tensor] = []

    def known(ends: Tensor) -> Tensor:
        told.append(ends.clone())
        return told[-1]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (ops.experts, ops.experts_grad_input):
                seen.append(args[1].data_ptr())
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(ops, "known", known)
    spec = QuantSpec(bits=2)
    module: Any = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=96, num_local_experts=4))
    for name in ("gate_up_proj", "down_proj"):
        bank = pack_experts(module, name, spec).banks[name]
        for e in range(bank.experts):
            module.load_expert(name, e, encode(quantize(torch.randn(bank.rows, bank.columns), spec), spec))
    x = torch.randn(6, 64, requires_grad=True)
    with Watch():
        module(x, torch.randint(4, (6, 2)), torch.rand(6, 2)).sum().backward()
    assert len(told) == 1
    assert seen == [told[0].data_ptr()] * 4
    assert x.grad is not None


def test_known_ends_are_on_the_cpu() -> None:
    assert ops.known(torch.arange(3)).device.type == "cpu"
    assert ops.known(torch.arange(3, device="meta")).is_meta


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_from_the_first_call_on() -> None:
    """The kernels' tables are made while PyTorch warms up for them."""
    gpu_products.levels.cache_clear()
    spec = QuantSpec(bits=2)
    layer = LoftQLinear(256, 128, True, spec, dtype=torch.bfloat16)
    layer.load_stored(stored(spec, 128, 256))
    assert layer.bias is not None
    torch.nn.init.normal_(layer.bias)
    layer.to("cuda")
    graphed = torch.compile(layer, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(3, 256, dtype=torch.bfloat16, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(graphed(x).clone(), layer(x))
