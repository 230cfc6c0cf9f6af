"""What each of two processes does in ``test_processes.py``. Imports no transformers: starting is quick."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loftq.errors import UsageError
from loftq.nn.layers import LoftQEmbedding, LoftQLinear
from loftq.numerics import encode, quantize
from loftq.spec import QuantSpec

WIDTH, WORDS = 72, 31  # an odd number of rows does not split evenly


class Adapted(nn.Module):
    """A packed layer with trainable factors beside it."""

    def __init__(self, spec):
        super().__init__()
        self.base = LoftQLinear(WIDTH, WIDTH, True, spec)
        self.base.load_stored(encode(quantize(torch.randn(WIDTH, WIDTH), spec), spec))
        nn.init.normal_(self.base.bias).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.b(self.a(x)))


def model(spec):
    torch.manual_seed(0)
    of_table = spec if spec.codebook.form == "blocks" else QuantSpec(bits=2)
    table = LoftQEmbedding(WORDS, WIDTH, of_table)
    table.load_stored(encode(quantize(torch.randn(WORDS, WIDTH), of_table), of_table))
    return nn.Sequential(table, Adapted(spec), Adapted(spec))


def step(built, words):
    loss = built(words).square().mean()
    loss.backward()
    whole = {n: p.grad for n, p in built.named_parameters() if p.grad is not None}
    return loss.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in whole.items()}


def shard(built, **options):
    for layer in built[1:]:
        fully_shard(layer, **options)
    return fully_shard(built, **options)


def check_fsdp(rank, spec):
    words = torch.arange(6).view(2, 3)
    loss, gradients = step(model(spec), words)
    built = shard(model(spec))
    stored = dict(built.named_parameters())["1.base.weight"]
    assert isinstance(stored, DTensor)
    rows = stored.shape[0]  # of a trellis one: the other process has none
    assert stored.to_local().shape[0] == (rows // 2 if rows > 1 else 1 - rank)
    built.to("cpu")
    for _ in range(2):
        built.zero_grad()
        got, sharded = step(built, words)
        assert torch.equal(got, loss)
        assert sharded.keys() == gradients.keys()
        assert all(torch.equal(sharded[n], g) for n, g in gradients.items())
    plain = model(spec).state_dict()
    state = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in built.state_dict().items()}
    assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in plain.items()}
    assert all(torch.equal(state[n], t) for n, t in plain.items())


def check_mixed_precision(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    words = torch.arange(6).view(2, 3)
    exact, _ = step(model(QuantSpec(bits=2)), words)
    rounded, _ = step(shard(model(QuantSpec(bits=2)), mp_policy=policy), words)
    assert abs(rounded - exact) < 0.02 * exact
    with pytest.raises(UsageError, match="something rounded it, such as a mixed precision policy of FSDP"):
        step(shard(model(QuantSpec(bits=2, double_quant=True)), mp_policy=policy), words)


def check_ddp(rank):
    spec = QuantSpec(bits=3)
    words = torch.arange(12).view(4, 3)
    _, gradients = step(model(spec), words)
    built = DistributedDataParallel(model(spec))
    _, shared = step(built, words[2 * rank : 2 * rank + 2])
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared[f"module.{name}"], gradient, rtol=1e-4, atol=1e-6)


def work(rank, rendezvous):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    nested = QuantSpec(bits=3, code="lloyd", double_quant=True)
    for spec in (QuantSpec(bits=2), nested, QuantSpec(bits=4, code="affine"), QuantSpec(bits=1.5, code="trellis")):
        check_fsdp(rank, spec)
    check_mixed_precision(rank)
    check_ddp(rank)
    dist.destroy_process_group()
    os._exit(0)  # FSDP keeps threads of gloo; one that drops a tensor while Python ends aborts (pytorch issue 190489)
