"""Mixtures of experts: stacks are packed, of every class that transformers marks; plain PEFT reads their start."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch.nn import functional
from transformers.models.llama4 import modeling_llama4
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

import loftq
import reader
from loftq.errors import InputError, UsageError
from loftq.formats.source import Checkpoint
from loftq.nn.experts import PackedExperts, StackFactors, pack_experts
from loftq.numerics import encode, quantize
from loftq.spec import QuantSpec
from models import MIXTURES, close, inputs, outputs, same, substituted, tensors, tiny, written
from models import quantize as quantize_checkpoint

WIDTHS = [
    {"bits": 2},
    {"bits": 3, "code": "affine"},
    {"bits": 4, "double_quant": True},
    {"bits": 8},
    {"bits": 2.1875, "code": "trellis"},
]


def gradients(model):
    outputs(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MIXTURES)
def test_all_experts_are_packed_and_nothing_that_routes(made, name):
    checkpoint = made(name)
    matrices = checkpoint.manifest["plan"]["matrices"]
    assert checkpoint.manifest["totals"]["coverage"] == 1
    assert len(matrices) == checkpoint.family.matrices
    assert not {m["name"] for m in matrices} & {"gate", "router"}
    model = checkpoint.load()
    stacks = {f"{n}.{s}" for n, m in model.named_modules() if isinstance(m, PackedExperts) for s in m.stacks}
    assert stacks == {m["module"] for m in matrices if m.get("experts")}
    assert stacks
    assert model.hf_quantizer.new_modules == ()
    dense, kept = checkpoint.dense.state_dict(), model.state_dict()
    routers = [n for n in dense if {"router", "gate"} & set(n.split("."))]
    assert routers
    assert all(torch.equal(kept[n], dense[n]) for n in routers)
    reports = [m for m in checkpoint.manifest["matrices"] if "experts" in m]
    assert all(len(m["experts"]) == 4 and 0 < m["errors"][-1] < m["errors"][0] < 1 for m in reports)
    assert loftq.verify(checkpoint.output)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(options, name, id=f"{options['bits']}-bit-{name}")
        for options in WIDTHS
        for name in (MIXTURES if options["bits"] == 2 else ("mixtral", "gpt-oss", "llama4"))  # of each orientation
    ],
)
def test_packed_and_started_they_compute_what_the_files_say(made, name, options):
    checkpoint = made(name, **options)
    model = checkpoint.load()
    with torch.no_grad():
        assert close(outputs(model), outputs(checkpoint.backbone()), 1e-6)
        assert close(outputs(checkpoint.start(model)), outputs(checkpoint.started()))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MIXTURES)
def test_plain_peft_on_the_dequantized_model_gives_the_same_outputs_and_gradients(made, name):
    """The initialization is an ordinary adapter: PEFT's own layers put it on the dense stacks."""
    checkpoint = made(name)
    start = checkpoint.start().eval()
    plain = PeftModel.from_pretrained(
        checkpoint.backbone(), checkpoint.output, subfolder="loftq_init", is_trainable=True
    ).eval()
    assert {type(m) for m in plain.modules()} & {peft.tuners.lora.layer.ParamWrapper}
    assert not any(isinstance(m, PackedExperts) for m in plain.modules())
    with torch.no_grad():
        assert close(outputs(start), outputs(plain))
    found, wanted = gradients(start), gradients(plain)
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        assert close(found[parameter], gradient, 1e-4) or gradient.abs().max() == 0, parameter
    moved = [p for n, p in start.named_parameters() if p.requires_grad and "lora_" not in n]
    assert not moved


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MIXTURES)
def test_saved_again_merged_and_made_dense(made, name, tmp_path):
    checkpoint = made(name)
    model = checkpoint.load()
    with torch.no_grad():
        wanted = outputs(model)
        model.save_pretrained(tmp_path / "again")
        again = type(model).from_pretrained(tmp_path / "again")
        assert same(dict(again.state_dict()), dict(model.state_dict()))
        assert torch.equal(outputs(again), wanted)
        start = checkpoint.start(again).eval()
        start.save_pretrained(tmp_path / "adapter")
        reloaded = PeftModel.from_pretrained(checkpoint.load(), tmp_path / "adapter")
        assert torch.equal(outputs(reloaded), outputs(start))
        trained = outputs(start)
        start.merge_adapter()
        assert close(outputs(start), trained)
        start.unmerge_adapter()
        assert torch.equal(outputs(start), trained)
        with start.disable_adapter():
            assert torch.equal(outputs(start), wanted)
        merged = start.merge_and_unload()
        assert close(outputs(merged), trained)
        assert not any(isinstance(m, PackedExperts) for m in merged.modules())
        merged.save_pretrained(tmp_path / "merged")
        assert close(outputs(type(model).from_pretrained(tmp_path / "merged")), trained)
        assert close(outputs(model.dequantize()), wanted, 1e-6)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MIXTURES)
def test_in_memory_the_same_model_is_made(made, name, tmp_path):
    checkpoint = made(name, scale_dtype="float32")
    model = type(checkpoint.dense).from_pretrained(checkpoint.source)
    wrapped = loftq.get_peft_model(model, bits=2, rank=4, scale_dtype="float32", progress=False).eval()
    with torch.no_grad():
        assert torch.equal(outputs(wrapped), outputs(checkpoint.start().eval()))
        base = wrapped.unload()
        base.save_pretrained(tmp_path)
        assert torch.equal(outputs(type(base).from_pretrained(tmp_path)), outputs(base))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3"])
def test_the_start_in_every_way_that_there_is(made, name):
    checkpoint = made(name)
    with torch.no_grad():
        wanted = outputs(checkpoint.start().eval())
        assert torch.equal(outputs(loftq.load_start(checkpoint.load(), checkpoint.output).eval()), wanted)
        config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="loftq")
        assert close(outputs(peft.get_peft_model(checkpoint.load(), config).eval()), wanted)
        old = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        for targets in ("all-linear", old) if name == "qwen3-moe" else ():  # PEFT would double the rank of two in one
            config = LoraConfig(r=4, lora_alpha=12, init_lora_weights="loftq", target_modules=targets)
            assert close(outputs(peft.get_peft_model(checkpoint.load(), config).eval()), wanted)
    left = LoraConfig(r=4, init_lora_weights="loftq", target_parameters=["experts.down_proj"])
    with pytest.raises(UsageError, match=r"leaves out \S*experts\.gate_up_proj"):
        peft.get_peft_model(checkpoint.load(), left)
    with pytest.raises(UsageError, match="other ranks"):
        peft.get_peft_model(checkpoint.load(), LoraConfig(r=2, init_lora_weights="loftq"))
    with pytest.raises(UsageError, match=r"target_parameters names \S+gate_up_proj_scale, and its layer is packed"):
        peft.get_peft_model(
            checkpoint.load(), LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj_scale"])
        )


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_a_reader_of_the_documentation_alone_gets_the_same(made, name):
    checkpoint = made(name, bits=3, code="affine", rslora=True)
    for stack, (q, product) in written(checkpoint.output).items():
        theirs = reader.matrices(checkpoint.output)
        for e in range(len(q)) if q.ndim == 3 else ():
            its_q, its_product = theirs[f"{stack}.{e}"]
            assert torch.allclose(q[e].double(), torch.from_numpy(its_q), atol=1e-7)
            assert torch.allclose(product[e].double(), torch.from_numpy(its_product), atol=1e-6)


def test_patterns_choose_widths_and_ranks_of_stacks(tmp_path):
    """Where only some stacks of a converter are packed, the others are written as the model has them."""
    dense = tiny("mixtral")
    dense.save_pretrained(tmp_path / "dense")
    options = {"bits": "layers.0.mlp.experts.down_proj=16,experts=3,4", "rank": "experts=2,4", "min_coverage": 0.0}
    manifest = quantize_checkpoint(tmp_path / "dense", tmp_path / "out", **options)
    matrices = {m["module"]: (m["quant"]["bits"], m["rank"]) for m in manifest["plan"]["matrices"]}
    stacks = {name: found for name, found in matrices.items() if "experts" in name}
    assert len(stacks) == 3
    assert set(stacks.values()) == {(3, 2)}
    assert set(matrices.values()) == {(3, 2), (4, 4)}
    down = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(tensors(tmp_path / "out")[down], dense.get_parameter(down))
    model = type(dense).from_pretrained(tmp_path / "out")
    start = PeftModel.from_pretrained(model, tmp_path / "out", subfolder="loftq_init", is_trainable=True)
    found = substituted(dense, {name: q + ba for name, (q, ba) in written(tmp_path / "out").items()})
    assert close(outputs(start).detach(), outputs(found).detach())
    outputs(start).square().sum().backward()
    model = start.unload().eval()
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), outputs(model))


def test_one_expert_is_read_at_a_time(tmp_path, monkeypatch):
    tiny("granite-moe").save_pretrained(tmp_path / "dense")
    shapes = []
    read = Checkpoint.read

    def watched(self, name, made=()):
        tensor = read(self, name, made)
        shapes.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert {shape for shape in shapes if len(shape) > 2} == set()
    assert (80, 72) in shapes


def test_a_stopped_run_keeps_every_expert_that_was_solved(tmp_path, monkeypatch):
    from loftq.checkpoint import quantize as module

    tiny("mixtral").save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "whole")
    solve, solved = module.solve_matrix, []

    def stopping(matrix, *args):
        if len(solved) == 9:
            raise KeyboardInterrupt
        solved.append(matrix.name)
        return solve(matrix, *args)

    monkeypatch.setattr(module, "solve_matrix", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out")
    before = set(solved)
    assert any(name.rpartition(".")[2].isdecimal() for name in before)
    solved.extend([""] * 100)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert not before & set(solved[109:])
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "whole"))
    assert same(tensors(tmp_path / "out" / "loftq_init"), tensors(tmp_path / "whole" / "loftq_init"))


def test_a_budget_chooses_for_each_stack(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    manifest = loftq.quantize(tmp_path / "dense", tmp_path / "out", budget=3.3, rank=4, workers=1)
    stacks = [m for m in manifest["plan"]["matrices"] if m.get("experts")]
    assert len(stacks) == 4
    packed = sum(m["bytes"] for m in manifest["matrices"])
    assert 8 * packed / manifest["totals"]["quantized_weights"] <= 3.3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert outputs(model).isfinite().all()


def test_formats_that_hold_no_stacks_are_refused(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    with pytest.raises(UsageError, match=r"format='bnb' holds no stacks of experts.*experts=16,4"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", bits=4, format="bnb", min_coverage=0.0)


class Squared(Llama4TextExperts):
    """Experts of nobody's way."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).square()


def test_experts_of_another_way_of_computing_are_kept_and_missed(tmp_path, monkeypatch):
    tiny("llama4").save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_llama4, "Llama4TextExperts", Squared)
    with pytest.raises(InputError, match=r"gate_up_proj \(Squared computes its experts in a way of its own"):
        loftq.plan(tmp_path, bits=2, rank=4, min_coverage=0.9)


def test_rows_of_zeros_are_left_out_of_batches(monkeypatch):
    """Llama 4 gives every expert all tokens, times zero where they are not sent to it."""
    from loftq.kernels import cpu

    module = next(m for m in tiny("llama4").modules() if isinstance(m, Llama4TextExperts))
    packed = packed_of(module)
    dense, draw = dense_of(packed, module), torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 72, generator=draw)
    x[1], x[2, 1:] = 0, 0
    counted, product = [], cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda x, *args: counted.append(len(x)) or product(x, *args))
    mine, theirs = x.flatten(0, 1).requires_grad_(), x.flatten(0, 1).clone().requires_grad_()
    found, wanted = packed(mine), dense(theirs)
    assert counted == [3, 1, 3, 3, 1, 3]  # of three experts, in two stacks
    assert close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert close(mine.grad, theirs.grad)
    assert packed(torch.zeros(8, 72)).abs().max() == 0


# --- the module alone -----------------------------------------------------------------------------------------------


def experts_of(name: str) -> torch.nn.Module:
    return next(m for m in tiny(name).modules() if hasattr(m, "is_transposed"))


def packed_of(module: torch.nn.Module, bits: int = 3) -> PackedExperts:
    packed = copy.deepcopy(module)
    for name in [n for n in module._parameters if not n.endswith("_bias")]:
        spec, dense = QuantSpec(bits=bits, scale_dtype="float32"), module.get_parameter(name).detach()
        pack_experts(packed, name, spec)
        for e, weight in enumerate(dense):
            oriented = (weight.T if packed.banks[name].transposed else weight).contiguous()
            packed.load_expert(name, e, encode(quantize(oriented, spec), spec))
    return packed


def dense_of(packed: PackedExperts, module: torch.nn.Module) -> torch.nn.Module:
    dense = copy.deepcopy(module)
    for name in packed.stacks:
        dense.get_parameter(name).data.copy_(packed.dense(name, torch.float32))
    return dense


ROUTES = {
    "some": [[0, 2], [2, 3], [0, 3], [2, 0], [3, 2]],  # nothing for expert 1
    "one": [[2, 1]] * 5,
    "none": [],
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "nemotron-h"])
@pytest.mark.parametrize("route", ROUTES)
def test_tokens_that_leave_experts_out(name, route):
    module = experts_of(name)
    packed = packed_of(module)
    dense = dense_of(packed, module)
    index = torch.tensor(ROUTES[route], dtype=torch.long).view(-1, 2)
    x = torch.randn(len(index), 72, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    weights = torch.full(index.shape, 0.5, requires_grad=True)
    found, wanted = packed(x, index, weights), dense(y, index, weights)
    assert found.shape == wanted.shape
    if len(index):
        assert close(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
        assert close(x.grad, y.grad)


def test_what_is_routed_to_no_expert_adds_nothing():
    packed = packed_of(experts_of("gpt-oss"))
    x, weights = torch.randn(3, 72), torch.full((3, 2), 0.5)
    index = torch.tensor([[0, 4], [4, 4], [1, 2]])  # 4 is beyond the last
    alone = packed(x[:1], index[:1, :1], weights[:1, :1])
    assert close(packed(x, index, weights)[0], alone[0])
    assert packed(x, index, weights)[1].abs().max() == 0


def test_only_experts_with_tokens_are_decoded(monkeypatch):
    from loftq.kernels import cpu

    packed, decoded = packed_of(experts_of("mixtral")), []
    linear = cpu.linear

    def counting(x, stored, spec, columns, bias=None):
        decoded.append(len(x))
        return linear(x, stored, spec, columns, bias)

    monkeypatch.setattr(cpu, "linear", counting)
    packed(torch.randn(3, 72), torch.tensor([[0, 2], [2, 0], [2, 0]]), torch.full((3, 2), 0.5))
    assert decoded == [3, 3, 3, 3]  # two experts, two stacks


def test_gradients_of_the_factors_are_those_of_the_sum():
    """Also of an expert without tokens: zeros, so that no process waits for it."""
    module = experts_of("mixtral")
    packed = packed_of(module)
    dense = dense_of(packed, module)
    index = torch.tensor(ROUTES["some"])
    x, weights, draw = torch.randn(5, 72), torch.full((5, 2), 0.5), torch.Generator().manual_seed(1)
    lora, sums = {}, {}
    for name, (_, rows, columns) in {n: dense.get_parameter(n).shape for n in packed.stacks}.items():
        a = torch.randn(4, 3, columns, generator=draw, requires_grad=True)
        b = torch.randn(4, rows, 3, generator=draw, requires_grad=True)
        lora[name] = [StackFactors(a, b, 0.1)]
        sums[name] = dense.get_parameter(name).detach() + 0.1 * b @ a
    found = packed(x, index, weights, lora=lora)
    wanted = torch.func.functional_call(dense, sums, (x, index, weights))
    assert close(found, wanted)
    factors = [factor for (one,) in lora.values() for factor in one[:2]]
    mine = torch.autograd.grad(found.square().sum(), factors, retain_graph=True)
    theirs = torch.autograd.grad(wanted.square().sum(), factors)
    for got, gradient in zip(mine, theirs, strict=True):
        assert close(got, gradient, 1e-4)
        assert got[1].abs().max() == 0


def test_half_precision_keeps_what_is_stored(made):
    checkpoint = made("gpt-oss", scale_dtype="float32")
    model = checkpoint.load(dtype=torch.bfloat16)
    stored, files = dict(model.state_dict()), tensors(checkpoint.output)
    scales = [n for n in files if n.endswith("_proj_scale")]
    assert scales
    assert all(torch.equal(stored[n], files[n]) for n in scales)
    start = checkpoint.start(model)
    with torch.no_grad():
        assert outputs(start).isfinite().all()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(made):
    checkpoint = made("qwen3-moe")
    plain, saving = checkpoint.start(), checkpoint.start()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    saving.enable_input_require_grads()
    wanted, found = gradients(plain.train()), gradients(saving.train())
    assert all(close(found[n], wanted[n], 1e-4) or wanted[n].abs().max() == 0 for n in wanted)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_copies_of_a_whole_model(made, name, tmp_path):
    """Copied, pickled, written by torch: what class of ours a module has is made again."""
    model = made(name).start().eval()
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        wanted = outputs(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), read):
            assert same(twin.state_dict(), model.state_dict())
            assert torch.equal(outputs(twin), wanted)
        merged = copy.deepcopy(model).merge_and_unload()
        assert close(outputs(merged), wanted)
        assert torch.equal(outputs(model), wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_it_computes_and_trains_the_same(made):
    """Where it cannot be one graph: how many tokens an expert gets is data."""
    model = made("qwen3-moe").start()
    eager, wanted = outputs(model).detach(), gradients(model)
    model.zero_grad()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert close(outputs(model).detach(), eager, 1e-6)
    found = gradients(model)
    assert all(close(found[n], wanted[n], 1e-5) or wanted[n].abs().max() == 0 for n in wanted)


@pytest.mark.parametrize("how", ["model", "autocast"])
def test_in_bfloat16_it_computes_the_same_to_its_digits(how):
    """The module alone: in a whole model, rounding may send a token to another expert."""
    packed, draw = packed_of(experts_of("gpt-oss")), torch.Generator().manual_seed(0)
    index, weights, x = torch.tensor(ROUTES["some"]), torch.full((5, 2), 0.5), torch.randn(5, 72, generator=draw)
    a, b = 0.1 * torch.randn(4, 3, 72, generator=draw), 0.1 * torch.randn(4, 80, 3, generator=draw)
    lora = {"gate_up_proj": [StackFactors(a, b, 0.5)]}
    with torch.no_grad():
        wanted = packed(x, index, weights, lora=lora)
        if how == "model":
            found = packed.to(torch.bfloat16)(x.bfloat16(), index, weights.bfloat16(), lora=lora)
            assert found.dtype == torch.bfloat16
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = packed(x, index, weights, lora=lora)
    assert close(found.float(), wanted, 0.03)  # bfloat16 has 8 bits; some ten roundings


def test_counts_are_of_the_weights(made):
    checkpoint = made("mixtral")
    assert checkpoint.load().num_parameters() == checkpoint.dense.num_parameters()


def test_dropout_is_refused_where_a_stack_cannot_have_it(made):
    checkpoint = made("mixtral")
    with pytest.raises(UsageError, match="lora_dropout"):
        loftq.load_start(checkpoint.load(), checkpoint.output, lora_dropout=0.1)


def test_another_class_over_the_same_experts(made):
    checkpoint = made("mixtral")
    backbone = transformers.MixtralModel.from_pretrained(checkpoint.output)
    assert not backbone.hf_quantizer.new_modules
    start = loftq.load_start(backbone, checkpoint.output).eval()
    with torch.no_grad():
        hidden = start(**inputs(backbone)).last_hidden_state
        logits = functional.linear(hidden, checkpoint.dense.lm_head.weight)
        assert close(logits, outputs(checkpoint.started()))
