"""The plan: every tensor quantized or kept with a reason, widths and ranks by rule, nothing half-meant."""

import dataclasses

import pytest
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from loftq.errors import InputError, UsageError
from loftq.planning import Policy, Role, Stack, make, natural, nominal_bits, target_suffixes
from loftq.spec import QuantSpec, SolveSpec, stored_bytes

PROJECTIONS = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (16, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def model(layers=2, stacks=("model.layers",), dtype="BF16"):
    """Tensors and roles of a small decoder with norms, a table, a head and a router."""
    tensors, roles = {}, {}

    def add(name, shape, role):
        tensors[name], roles[name] = (dtype, shape), role

    for stack in stacks:
        for i in range(layers):
            for projection, shape in PROJECTIONS.items():
                module = f"{stack}.{i}.{projection}"
                add(f"{module}.weight", shape, Role(module, "linear", True, Stack(stack, i, layers)))
            norm = f"{stack}.{i}.norm"
            add(f"{norm}.weight", (64,), Role(norm, "other", True, Stack(stack, i, layers)))
    add("model.embed_tokens.weight", (100, 64), Role("model.embed_tokens", "embedding", True))
    add("lm_head.weight", (100, 64), Role("lm_head", "linear", False))
    return tensors, roles


def policy(**options):
    return Policy(**{"bits": "2", "rank": "4", "dtype": "source", "adapter_dtype": "float32", **options})


def planned(*args, **options):
    return make(*model(), policy(*args, **options))


def widths(plan):
    return {m.module: m.quant.bits for m in plan.matrices}


def test_layers_are_quantized_and_all_else_is_kept_with_its_reason():
    plan = planned()
    assert [m.module for m in plan.matrices] == [f"model.layers.{i}.{p}" for i in range(2) for p in sorted(PROJECTIONS)]
    assert {k.name: k.reason for k in plan.kept} == {
        "model.layers.0.norm.weight": "a vector (norm or bias)",
        "model.layers.1.norm.weight": "a vector (norm or bias)",
        "model.embed_tokens.weight": "an embedding (--embeddings quantizes it)",
        "lm_head.weight": "a head or pooler",
    }
    assert plan.coverage == 1.0
    assert {k.bytes for k in plan.kept} == {128, 12800}
    assert plan.matrices[0].numel == 96 * 64
    assert plan.matrices[0].bytes == stored_bytes(QuantSpec(bits=2), 64, 96)


@pytest.mark.parametrize(
    ("role", "shape", "reason"),
    [
        (Role(), (8, 8), "not a parameter of the model"),
        (Role("a.b", "linear", True, keep="too odd"), (8, 8), "too odd"),
        (Role("a.experts", "experts", True, keep="in a way of its own"), (4, 8, 8), "in a way of its own"),
        (Role("a.b", "linear", True), (0, 8), "empty"),
        (Role("a.b", "linear", True), (8,), "a vector"),
        (Role("a.conv", "other", True), (8, 8, 3), "not a Linear, Conv1D or Embedding weight"),
        (Role("a.b", "linear", True, tied=("c.weight",)), (8, 8), "tied to c.weight"),
        (Role("a.pooler.dense", "linear", True), (8, 8), "a head or pooler"),
        (Role("head", "linear", False), (8, 8), "outside the backbone"),
        (Role("a.mlp.gate", "linear", True), (8, 8), "a router of experts"),
        (Role("a.b", "linear", True), (1, 8), "one row or column"),
        (Role("a.types", "embedding", True), (2, 64), "an embedding smaller than the rank"),
    ],
)
def test_a_kept_tensor_has_its_reason(role, shape, reason):
    tensors, roles = model()
    tensors["odd"], roles["odd"] = ("F32", shape), role
    plan = make(tensors, roles, policy(embeddings=role.kind == "embedding", min_coverage=0.0))
    kept = next(k for k in plan.kept if k.name == "odd")
    assert kept.reason.startswith(reason)


def test_a_gate_projection_is_no_router():
    tensors, roles = model()
    for name in ("model.layers.0.mlp.gate_proj", "model.layers.0.gate.up"):
        tensors[f"{name}.weight"], roles[f"{name}.weight"] = ("F32", (8, 64)), Role(name, "linear", True)
    chosen = {m.module for m in make(tensors, roles, policy()).matrices}
    assert {"model.layers.0.mlp.gate_proj", "model.layers.0.gate.up"} <= chosen


def test_routers_at_any_depth_are_kept_and_not_missed():
    tensors, roles = model()
    for name in ("layers.0.ffn.router.layer", "layers.0.mlp.gate.wg", "layers.0.mlp.gate", "layers.0.router"):
        tensors[f"{name}.weight"], roles[f"{name}.weight"] = ("F32", (8, 64)), Role(name, "linear", True)
    roles["layers.0.mlp.experts.up"] = Role("layers.0.mlp.experts.up", "experts", True, keep="in another way")
    tensors["layers.0.mlp.experts.up"] = ("F32", (8, 8, 8))
    kept = {k.name: k for k in make(tensors, roles, policy()).kept if k.reason == "a router of experts"}
    assert len(kept) == 4
    assert not any(k.missed for k in kept.values())


def test_one_row_is_kept_and_not_missed():
    tensors, roles = model()
    name = "model.layers.0.mlp.shared_expert_gate"
    tensors[name], roles[name] = ("F32", (1, 64)), Role(name, "linear", True)
    assert make(tensors, roles, policy()).coverage == 1.0


def test_a_conv1d_is_solved_transposed():
    role = Role("h.0.c_attn", "conv1d", True)
    plan = make({"h.0.c_attn.weight": ("F32", (64, 192))}, {"h.0.c_attn.weight": role}, policy())
    assert plan.matrices[0].shape == (192, 64)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "I64"])
def test_weights_that_are_no_plain_floats_are_refused(dtype):
    with pytest.raises(InputError, match=rf"q_proj.weight: dtype {dtype} cannot be quantized .*full-precision"):
        make(*model(dtype=dtype), policy())


@pytest.mark.parametrize(
    ("average", "first"), [("3.0", 16), ("2.5", 8), ("2.25", 4), ("2.0", 0), ("4.0", 32), ("2.75", 12)]
)
def test_an_average_gives_the_first_layers_4_bits(average, first):
    plan = make(*model(layers=32), policy(bits=average))
    found = {int(m.module.split(".")[2]): m.quant.bits for m in plan.matrices}
    assert found == {i: 4 if i < first else 2 for i in range(32)}
    assert nominal_bits(average, plan) == float(average)


def test_every_stack_has_its_own_average():
    plan = make(*model(layers=4, stacks=("encoder.block", "decoder.block")), policy(bits="3.0"))
    assert {m.module[:15]: m.quant.bits for m in plan.matrices} == {
        f"{stack}.block.{i}": 4 if i < 2 else 2 for stack in ("encoder", "decoder") for i in range(4)
    }


def test_three_bits_are_normalfloat_3_not_an_average():
    plan = planned(bits="3")
    assert set(widths(plan).values()) == {3}
    assert plan.matrices[0].quant == QuantSpec(bits=3)


def test_patterns_of_bits():
    plan = planned(bits="layers.1=16,down_proj=8,self_attn.[qk]_proj=4,2")
    assert widths(plan) == {
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.0.self_attn.k_proj": 4,
        "model.layers.0.self_attn.q_proj": 4,
    }
    dense = [k for k in plan.kept if k.reason == "left dense by --bits"]
    assert len(dense) == 4
    assert all(k.missed for k in dense)
    assert plan.coverage == 0.5
    assert nominal_bits("layers.0=4,2", plan) == 4


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ("5", "bits: 5 is not a width; wanted 2, 3, 4, 8, 16"),
        ("nf4", "bits: nf4 is not a width"),
        ("1.3", r"bits 1.3: an average must lie between 2.0 and 4.0"),
        ("4.5", "an average must lie between 2.0 and 4.0"),
        ("2.x", "an average must lie between 2.0 and 4.0"),
        ("nan", "bits: nan is not a width"),
        ("2.25", r"bits 2.25: an average gives .*, and with the 2 of model.layers it is 2 or at least 3.0; give that"),
        ("", "bits: '' is not a width"),
        ("layers.0=4", "needs exactly one value without a pattern"),
        ("layers.0=2.55,2", "bits: 2.55 is not a width"),
        ("layer.0=4,2", "bits: layer.0 matches no module; the nearest are model.layers.0"),
        ("lm_head=4,2", "bits: lm_head matches no module"),
    ],
)
def test_bits_that_cannot_be_meant(bits, message):
    with pytest.raises(UsageError, match=message):
        planned(bits=bits)


def test_patterns_of_ranks():
    plan = planned(rank="mlp=32,layers.0=3,8")
    assert {m.module: m.rank for m in plan.matrices if m.module.startswith("model.layers.0")} == {
        "model.layers.0.mlp.down_proj": 32,
        "model.layers.0.mlp.up_proj": 32,
        "model.layers.0.self_attn.k_proj": 3,
        "model.layers.0.self_attn.q_proj": 3,
    }
    assert plan.rank == 8
    assert plan.lora_alpha == 8
    assert plan.scaling(plan.matrices[0]) == 8 / 32
    rooted = planned(rank="mlp=32,8", alpha=6, rslora=True)
    assert rooted.scaling(rooted.matrices[0]) == 6 / 32**0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": "0"}, "rank: 0 is not a whole number of at least 1"),
        ({"rank": "-4"}, "rank: -4 is not"),
        ({"rank": "4.0"}, "rank: 4.0 is not"),
        ({"rank": "many"}, "rank: many is not"),
        ({"rank": "9" * 6000}, "rank: 9{119}… is not a whole number of at least 1, or too large"),
        ({"rank": f"layers.0-{'9' * 6000}=4,8"}, "rank: layers.0-9+… matches no module"),
        ({"rank": "mlpp=4,8"}, "rank: mlpp matches no module; the nearest are"),
        ({"rank": "16"}, r"below the shorter side .* model.layers.0.self_attn.k_proj.weight 16x64 with rank 16.*clamp"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": -1.0}, "alpha must be positive"),
        ({"rank_policy": "shrink"}, "rank_policy must be one of refuse, clamp, got 'shrink'"),
        ({"min_coverage": 1.5}, "min_coverage must lie between 0 and 1, got 1.5"),
        ({"min_coverage": float("nan")}, "min_coverage must lie between 0 and 1, got nan"),
        ({"code": "nf5"}, "code must be one of nf, lloyd, uniform"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(UsageError, match=message):
        planned(**options)


def test_a_rank_that_does_not_fit_is_refused_for_all_matrices_at_once():
    with pytest.raises(UsageError, match=r"k_proj.weight 16x64 with rank 64, .*q_proj.weight 64x64 with rank 64"):
        planned(rank="64")


def test_a_rank_that_does_not_fit_is_clamped_if_asked():
    plan = planned(rank="64", rank_policy="clamp")
    assert {m.module.split(".")[-1]: m.rank for m in plan.matrices} == {
        "down_proj": 63,
        "up_proj": 63,
        "k_proj": 15,
        "q_proj": 63,
    }
    assert plan.rank == 64


def test_coverage_names_what_is_missed():
    tensors, roles = model()
    for i in range(5):
        name = f"model.layers.0.experts.{i}"
        tensors[name], roles[name] = ("F32", (4, 64, 64)), Role(name, "experts", True, keep="in another way")
    message = r"only \d+% of the layers' weights .* less than min_coverage 50%; kept: model.layers.0.experts.0 \(in an"
    with pytest.raises(InputError, match=message + r".* and 2 more; lower min_coverage"):
        make(tensors, roles, policy())
    plan = make(tensors, roles, policy(min_coverage=0.1))
    assert 0.1 < plan.coverage < 0.5
    with pytest.raises(
        InputError,
        match=r"nothing to quantize: every matrix is kept \(a head or pooler, an embedding.*, in another way",
    ):
        make(tensors, roles, policy(bits="16", min_coverage=0.0))


@pytest.mark.parametrize(
    ("shape", "missed"), [((64, 4, 16), True), ((96, 64), True), ((4, 16), False), ((120, 8), False)]
)
def test_a_parameter_counts_from_the_size_of_a_matrix_on(shape, missed):
    tensors, roles = model()
    tensors["odd"], roles["odd"] = ("F32", shape), Role("model.layers.0.attn", "parameter", True)
    plan = make(tensors, roles, policy())
    assert next(k.missed for k in plan.kept if k.name == "odd") is missed
    assert (plan.coverage < 1.0) is missed


def test_heads_and_embeddings_do_not_count_as_missed():
    assert planned(min_coverage=1.0).coverage == 1.0


def test_the_digest_is_that_of_the_decisions():
    digest = planned().digest()
    assert digest == planned().digest()
    tensors, roles = model()
    shuffled = dict(reversed(tensors.items()))
    assert make(shuffled, roles, policy()).digest() == digest
    assert make(*model(), policy(rank="lay*=4,9")).digest() != digest
    for options in (
        {"bits": "3"},
        {"rank": "5"},
        {"alpha": 5},
        {"rslora": True},
        {"block_size": 32},
        {"embeddings": True},
        {"adapter_dtype": "float16"},
    ):
        assert planned(**options).digest() != digest, options
    assert planned(solve=SolveSpec(seed=1)).digest() != digest
    assert planned(solve=SolveSpec(scales="fitted")).digest() != digest


def test_the_digest_is_frozen():
    """It is in every manifest: a run continues only where it is equal."""
    assert planned().digest() == "1eca191a5bc2fc86b4d46459b2cd19d570fcf6b6e1edca13cfb1cabc4baf2cce"


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned().rank = 3


@pytest.mark.parametrize(
    ("chosen", "others", "expected"),
    [
        (["layers.0.attn.q", "layers.1.attn.q"], ["lm_head"], ["attn.q"]),
        (["layers.0.attn.q"], ["layers.1.attn.q"], ["0.attn.q"]),
        (["layers.0.q", "layers.10.q", "layers.2.q"], ["layers.1.q"], ["0.q", "2.q", "10.q"]),
        (["decoder.fc"], ["encoder.fc"], ["decoder.fc"]),
        (["fc"], ["head"], ["fc"]),
        (["h.0.mlp.c_proj", "h.0.attn.c_proj"], ["h.0.cross.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        (["layer.0.out_proj"], ["classification_head.out_proj"], ["0.out_proj"]),
        (["mask_decoder.head.layers.0"], ["vision.layers.0", "mask_decoder.head"], ["head.layers.0"]),  # a block
    ],
)
def test_target_suffixes_select_the_chosen_and_no_other(chosen, others, expected):
    suffixes, excluded = target_suffixes(chosen, others)
    assert (suffixes, excluded) == (expected, [])
    for name in chosen:
        assert any(f".{name}".endswith(f".{s}") for s in suffixes)
    for name in others:
        assert not any(f".{name}".endswith(f".{s}") for s in suffixes)


def test_a_module_named_like_the_end_of_kept_ones_excludes_these():
    """``a.fc`` is packed and ``head.a.fc`` is not: no ending tells them apart."""
    others = ["head.a.fc", "b.head.a.fc", "b.fc", "head.a"]
    assert target_suffixes(["a.fc"], others) == (["a.fc"], ["b.head.a.fc", "head.a.fc"])


def test_peft_leaves_alone_what_is_excluded():
    toy = nn.Module()
    toy.a, toy.head = nn.Module(), nn.Module()
    toy.head.a = nn.Module()
    toy.a.fc, toy.head.a.fc = nn.Linear(4, 4), nn.Linear(4, 4)
    targets, excluded = target_suffixes(["a.fc"], ["head.a.fc"])
    names = LoraModel(
        toy, LoraConfig(target_modules=targets, exclude_modules=excluded), "default"
    ).targeted_module_names
    assert names == ["a.fc"]


def test_natural_order():
    names = ["layer.10.a", "layer.2.a", "layer.2", "embed", "layer.2.10", "layer.2.b", "layer.2.9"]
    assert sorted(names, key=natural) == [
        "embed", "layer.2", "layer.2.9", "layer.2.10", "layer.2.a", "layer.2.b", "layer.10.a"
    ]  # fmt: skip


# What is not quantized


def mixed(dtype):
    """The model, its matrices and vectors of one dtype, with a tensor of no module and a matrix of integers."""
    tensors, roles = model()
    tensors = {name: (dtype, shape) for name, (_, shape) in tensors.items()}
    tensors |= {"mask": ("F32", (4, 4)), "model.ids": ("I64", (4, 4))}
    return tensors, {**roles, "mask": Role(), "model.ids": Role("model", "other", True)}


@pytest.mark.parametrize(
    ("source", "dtype", "kept"),
    [
        ("F32", "auto", "BF16"),
        ("F64", "auto", "BF16"),
        ("F16", "auto", "F16"),
        ("BF16", "auto", "BF16"),
        ("F32", "float16", "F16"),
        ("BF16", "float16", "BF16"),
        ("F32", "source", "F32"),
    ],
)
def test_what_is_kept_has_sixteen_bits(source, dtype, kept):
    """Matrices of the model do. Vectors take no room, integers are no weights, and a mask may be anything."""
    plan = make(*mixed(source), policy(dtype=dtype, min_coverage=0.0))
    found = {k.name: k for k in plan.kept}
    assert {found[n].dtype for n in ("model.embed_tokens.weight", "lm_head.weight")} == {kept}
    assert found["lm_head.weight"].bytes == 100 * 64 * (2 if "16" in kept else 4)
    assert {k.dtype for k in plan.kept if k.name.endswith("norm.weight")} == {source}
    assert (found["mask"].dtype, found["model.ids"].dtype) == ("F32", "I64")
    assert {m.dtype for m in plan.matrices} == {kept}


def test_a_wide_matrix_among_narrow_ones_is_wide_on_purpose():
    tensors, roles = mixed("BF16")
    tensors["lm_head.weight"] = ("F32", (100, 64))
    for dtype, kept in (("auto", "F32"), ("bfloat16", "BF16")):
        plan = make(tensors, roles, policy(dtype=dtype, min_coverage=0.0))
        assert {k.name: k.dtype for k in plan.kept}["lm_head.weight"] == kept


def test_factors_have_a_dtype_of_their_own():
    assert {m.factors for m in make(*model(), Policy(bits="2", rank="4")).matrices} == {"BF16"}
    for option in ("dtype", "adapter_dtype"):
        with pytest.raises(UsageError, match=f"{option} must be one of .*bfloat16"):
            Policy(**{option: "float8"})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"bits": 1.5}, {"up_proj": (1.5, "trellis"), "k_proj": (2, "nf")}),
        ({"bits": 1.5, "code": "trellis"}, {"up_proj": (1.5, "trellis"), "k_proj": (2, "nf")}),
        ({"bits": 2.5, "code": "trellis"}, {"up_proj": (2.5, "trellis"), "k_proj": (2, "nf")}),
        ({"bits": "3", "code": "trellis"}, {"up_proj": (3, "trellis"), "k_proj": (3, "nf")}),
        ({"bits": 2.1875, "code": "trellis"}, {"up_proj": (2.1875, "trellis"), "k_proj": (2, "nf")}),
        ({"bits": "up_proj=2.25,4"}, {"up_proj": (2.25, "trellis"), "k_proj": (4, "nf"), "q_proj": (4, "nf")}),
        ({"bits": "up_proj=4,1.5"}, {"up_proj": (4, "nf"), "q_proj": (1.5, "trellis"), "k_proj": (2, "nf")}),
    ],
)
def test_widths_of_a_trellis(options, wanted):
    plan = planned(**options)
    found = {m.module.rpartition(".")[2]: (m.quant.bits, m.quant.code) for m in plan.matrices}
    assert {name: found[name] for name in wanted} == wanted


def test_what_a_trellis_cannot_hold_says_why_it_is_scalar():
    plan = planned(bits=1.5, embeddings=True)
    why = {m.module: m.instead for m in plan.matrices}
    assert why["model.layers.0.self_attn.k_proj"] == (
        "no trellis of 1.5 bits: 16 rows are too few for a trellis, which needs 32"
    )
    assert (
        why["model.embed_tokens"]
        == "no trellis of 1.5 bits: the rows of an embedding are read alone, those of a trellis together"
    )
    assert why["model.layers.0.mlp.up_proj"] == ""
    assert "instead" not in plan.to_dict()["matrices"][-1] or plan.matrices[-1].instead
    assert plan.digest() != planned(bits=2, embeddings=True).digest()


def test_a_code_in_blocks_has_no_width_of_a_trellis():
    with pytest.raises(UsageError, match=r"code nf has 2, 3, 4 or 8 bits; use code trellis for 1\.5"):
        planned(bits=1.5, code="nf")
    with pytest.raises(UsageError, match="code trellis has multiples of 1/16 up to 4 bits; use code nf for 8"):
        planned(bits=8, code="trellis")
