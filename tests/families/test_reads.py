"""Modules whose weight other code reads stay dense, with the reader as the reason; no other family loses a matrix."""

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from torch.nn import functional

import loftq
from loftq.architecture import skeleton
from loftq.architecture.adapter import refusal
from loftq.architecture.reads import holders, readers
from loftq.planning import Policy, make
from models import LLAMA, VOCAB, close, packed, quantize, substituted, written

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
ENCODER = {**SIZES, "num_attention_heads": 4, "intermediate_size": 48}
MAMBA = {**SIZES, "state_size": 8, "time_step_rank": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}
WAVLM = {**ENCODER, "conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
REFORMER = {
    **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
    "feed_forward_size": 48,
    "attn_layers": ["local", "lsh"],
    "axial_pos_embds": False,
}
DETR = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
ROWS = [
    # architecture, options, endings of the layers that are read directly, as far as they could be packed
    ("MambaForCausalLM", MAMBA, {"mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"}),
    ("FalconMambaForCausalLM", MAMBA, {"mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"}),
    ("BambaForCausalLM", {**LLAMA, **MAMBA2, "hidden_size": 64, "attn_layer_indices": [1]}, {"mamba.out_proj"}),
    ("JambaForCausalLM", {**ENCODER, "num_experts": 2, "mamba_dt_rank": 8}, {"mamba.dt_proj"}),
    ("WavLMModel", WAVLM, {f"attention.{p}_proj" for p in ("q", "k", "v", "out")}),
    ("RwkvModel", SIZES, {"attention.output", "feed_forward.value"}),
    ("RwkvModel", {**SIZES, "rescale_every": 0}, set()),
    ("BloomModel", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 1, "n_head": 4}, set()),
    (
        "BloomModel",
        {"hidden_size": 64, "n_layer": 1, "n_head": 4, "pretraining_tp": 2, "slow_but_exact": True},
        {"self_attention.dense", "mlp.dense_4h_to_h"},
    ),
    ("ReformerModel", REFORMER, {"self_attention.query_key", "self_attention.value"}),
    ("DebertaModel", {**ENCODER, "relative_attention": True}, {"encoder.rel_embeddings"}),
    ("DebertaV2Model", {**ENCODER, "relative_attention": True}, {"encoder.rel_embeddings"}),
    ("SiglipVisionModel", {k: v for k, v in ENCODER.items() if k != "vocab_size"}, {"attention.out_proj"}),
    ("OpenAIGPTModel", {"n_layer": 1, "n_embd": 64, "n_head": 4}, {"tokens_embed"}),
    (
        "Swinv2Model",  # while loading, it makes a buffer in the dtype of a weight
        {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4},
        {"continuous_position_bias_mlp.0"},
    ),
    ("SwitchTransformersModel", {"d_model": 64, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 2}, set()),
]


def skeleton_of(architecture, options):
    config = next(c for c in (architecture.removesuffix(e) for e in ("ForCausalLM", "Model")) if c != architecture)
    with torch.device("meta"):
        return getattr(transformers, architecture)(getattr(transformers, f"{config}Config")(**options))


def layers_read(model):
    could = {name for name in readers(model) if skeleton._layer(model.get_submodule(name))[0]}
    return {".".join(name.split(".")[-2:]) for name in could if not name.endswith(("lm_head", "position_embedding"))}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("architecture", "options", "expected"), ROWS)
def test_layers_that_are_read_directly(architecture, options, expected):
    assert layers_read(skeleton_of(architecture, options)) == expected


def scaled(layer, x):
    return times(x, layer)


def times(x, module):
    return x @ module.weight.T


def started_well(module):
    module.weight.data.zero_()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)


class Odd(nn.Module):
    """Reads of every spelling, and uses that are none."""

    use_wide = False

    def __init__(self):
        super().__init__()
        for name in "abcdefghijklmnopq":
            setattr(self, name, nn.Linear(4, 4))
        self.items = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.heads = nn.ModuleList(Head() for _ in range(2))
        self.deep = Head()
        started_well(self.p)

    def _init_weights(self, module):
        self.p.weight.data.normal_()
        self.table()

    def table(self):
        return torch.arange(4).to(self.q.weight.dtype)

    def forward(self, x, extra=None):
        x = x @ self.a.weight.T + functional.linear(x, weight=self.b.weight)
        other = self.c
        x = x + other.weight + getattr(self.d, "weight") + getattr(self, "e").weight  # noqa: B009
        for i, item in enumerate(self.items):
            x = x + item.weight * i
        for head in reversed(self.heads):
            head.out.weight.mul_(2)
        x = self._deeper(scaled(self.f, x), layer=self.g)
        x = x.to(self.h.weight.dtype).to(next(self.deep.parameters()).dtype)
        if self.i.weight.dtype == torch.float32 and isinstance(self.j.weight, torch.Tensor):
            x = x.to(self.k.weight.device)
        if self.l.weight.dtype != torch.int8:
            x = x.to(self.l.weight.dtype)
        if self.use_wide and x.ndim == 3:
            x = x @ self.m.weight
        if extra is not None:
            x = x @ self.n.weight
        return self.o(x) + self.i(x) + self.j(x) + self.k(x)

    def _deeper(self, x, layer):
        return x @ layer.weight

    def never_called(self, x):
        return x @ self.o.weight


class Base(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.odd = Odd()

    def forward(self, x):
        return self.odd(x)


class Gives(Base):
    def forward(self, x):
        return self.odd(x, extra=x)


READ = {f"odd.{name}" for name in ("a", "b", "c", "d", "e", "f", "g", "h", "q", "deep.out")}
READ |= {f"odd.{name}" for name in ("items.0", "items.1", "heads.0.out", "heads.1.out")}


def test_reads_are_followed_through_names_lists_and_functions():
    found = readers(Base(transformers.LlamaConfig(**LLAMA)))
    assert set(found) == READ
    assert found.pop("odd.q") == "Odd.table"
    assert set(found.values()) == {"Odd.forward"}


def test_branches_count_once_settings_or_arguments_open_them(monkeypatch):
    monkeypatch.setattr(Odd, "use_wide", True)
    found = readers(Gives(transformers.LlamaConfig(**LLAMA)))
    assert set(found) == READ | {"odd.m", "odd.n"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("architecture", "options"), [ROWS[0][:2], ROWS[1][:2], ROWS[5][:2]])
def test_a_checkpoint_of_such_a_family_computes_and_takes_its_start(architecture, options, tmp_path):
    torch.manual_seed(0)
    config = architecture.removesuffix("ForCausalLM").removesuffix("Model")
    cls = getattr(transformers, architecture.replace("RwkvModel", "RwkvForCausalLM"))
    dense = cls(getattr(transformers, f"{config}Config")(**options)).eval()
    dense.save_pretrained(tmp_path / "dense")
    manifest = quantize(tmp_path / "dense", tmp_path / "quantized")
    reasons = {k["name"].split(".")[-2]: k["reason"] for k in manifest["plan"]["kept"]}
    kept = {e.split(".")[1] for e in next(row[2] for row in ROWS if row[0] == architecture)}
    assert all("reads its weight directly" in reasons[leaf] for leaf in kept)
    ids = torch.tensor([[5, 9, 33, 77, 4, 8]])
    values = written(tmp_path / "quantized")
    model = cls.from_pretrained(tmp_path / "quantized").eval()
    with torch.no_grad():
        wanted = substituted(dense, {name: q for name, (q, _) in values.items()})(ids).logits
        assert close(model(ids).logits, wanted)
    start = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "quantized"), tmp_path / "quantized/loftq_init")
    with torch.no_grad():
        wanted = substituted(dense, {name: q + ba for name, (q, ba) in values.items()})(ids).logits
        assert close(start.eval()(ids).logits, wanted)


def test_jamba_in_memory_is_marked_as_quantized():
    torch.manual_seed(0)
    options = {**ENCODER, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    config = transformers.JambaConfig(**options, mamba_d_state=8, mamba_dt_rank=8)
    wrapped = loftq.get_peft_model(
        transformers.JambaForCausalLM(config), bits=4, rank=4, min_coverage=0.0, progress=False, workers=1
    )
    assert wrapped.get_base_model().config._is_quantized
    wrapped(torch.tensor([[5, 9, 33]])).logits.sum().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert trained == {n for n, _ in wrapped.named_parameters() if "lora_" in n}


def test_what_peft_refuses_is_asked_of_peft():
    model = skeleton_of("FalconMambaForCausalLM", MAMBA)
    assert refusal(model, "in_proj") == ""
    assert refusal(model, "out_proj").endswith(
        "Module 'out_proj' is incompatible with Mamba-based models (model_type='falcon_mamba')"
    )
    assert refusal(skeleton_of("RwkvModel", SIZES), "out_proj") == ""


class Times(nn.Linear):
    def forward(self, input):
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Clamped(nn.Linear):
    def forward(self, input):
        return super().forward(input).clamp(max=3)


class Untransposed(nn.Linear):
    def forward(self, input):
        return input @ self.weight


class OnlyInTraining(nn.Linear):
    def forward(self, input):
        return super().forward(input * 2 if self.training else input)


class Grouped(Times):
    def __init__(self, *args):
        super().__init__(*args)
        self.groups = 2


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (nn.Linear, True),
        (transformers.models.falcon.modeling_falcon.FalconLinear, True),
        (Times, True),
        (Clamped, False),
        (Untransposed, False),
        (OnlyInTraining, False),
        (Grouped, False),
    ],
)
def test_a_linear_of_its_own_is_taken_if_it_computes_the_product(cls, expected):
    assert skeleton.is_product(cls(4, 4)) is expected


def test_falcon_is_quantized(tmp_path):
    torch.manual_seed(0)
    config = transformers.FalconConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    dense = transformers.FalconForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "quantized")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert len(packed(model)) == 8
    ids = torch.tensor([[5, 9, 33, 77, 4, 8]])
    values = {name: q for name, (q, _) in written(tmp_path / "quantized").items()}
    with torch.no_grad():
        assert close(model(ids).logits, substituted(dense, values)(ids).logits)


def plan_of(architecture, options):
    model = skeleton_of(architecture, options)
    shapes = {name: ("F32", tuple(p.shape)) for name, p in model.named_parameters()}
    return make(
        shapes, skeleton.parameter_roles(model), Policy(bits="4", rank="2", rank_policy="clamp", min_coverage=0.0)
    )


DBRX = {
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 1,
    "vocab_size": VOCAB,
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
}
XLNET = {"vocab_size": VOCAB, "d_model": 64, "n_layer": 1, "n_head": 4, "d_inner": 96}
FUNNEL = {"vocab_size": VOCAB, "block_sizes": [1], "num_decoder_layers": 1, "d_model": 64, "n_head": 4, "d_head": 16}
GRANITE = {**ENCODER, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("architecture", "options", "missed"),
    [
        ("DbrxModel", DBRX, {"w1", "v1", "w2"}),
        ("XLNetModel", XLNET, {"q", "k", "v", "o", "r"}),
        ("FunnelModel", {**FUNNEL, "d_inner": 96}, {"r_kernel"}),
        ("SiglipVisionModel", ROWS[12][1], {"in_proj_weight", "out_proj.weight"}),
        ("MambaModel", MAMBA, {"dt_proj.weight", "x_proj.weight", "out_proj.weight"}),
        ("GraniteMoeModel", GRANITE, set()),
        ("Swinv2Model", {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "image_size": 32}, {"0.weight"}),
        ("T5Model", {"d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 4}, set()),
    ],
)
def test_every_matrix_of_the_layers_counts_as_missed(architecture, options, missed):
    plan = plan_of(architecture, options)
    leaves = {
        ".".join(k.name.split(".")[-2:]) if k.name.endswith(".weight") else k.name.split(".")[-1]
        for k in plan.kept
        if k.missed
    }
    assert leaves == missed
    assert plan.coverage == 1.0 or missed


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("DbrxModel", DBRX),
        ("GraniteMoeModel", GRANITE),
        ("MixtralModel", {**GRANITE, "head_dim": 16}),
        ("HunYuanMoEV1Model", {**GRANITE, "head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    ],
)
def test_a_router_is_never_quantized_nor_missed(architecture, options):
    plan = plan_of(architecture, options)
    routers = [k for k in plan.kept if k.shape == (4, 64)]
    assert {k.reason for k in routers} == {"a router of experts"}
    assert not any(k.missed for k in routers)
    assert not any(4 in m.shape for m in plan.matrices)


def test_what_a_plain_list_holds_too_is_found():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4), nn.ReLU()]
            for i, layer in enumerate(self.layers):
                self.add_module(str(i), layer)
            self.last = nn.Linear(4, 4)

    assert holders(nn.Sequential(Head())) == {"0.0": "Head.layers", "0.1": "Head.layers"}
