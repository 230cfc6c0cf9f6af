"""``loftq export --to compressed-tensors``: what that package, and transformers with it, get is what we decode."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import PeftModel

import loftq
from harness import EXACT
from loftq.adapters.origins import identity
from loftq.errors import InputError
from loftq.planning import fused
from loftq.planning.containers import CONTAINERS
from models import BERT, LLAMA, quantize, same, tensors

AUTO = transformers.AutoModelForCausalLM
IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.fixture
def place(tmp_path):
    """Matrices of four widths; the rows of 96 do not fill blocks of 64."""
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "source")
    bits = "q_proj=2,k_proj=3,v_proj=8,4"
    options = {"serve": "compressed-tensors", "bits": bits, "rank": 4, "workers": 1, **EXACT}
    made = loftq.quantize(tmp_path / "source", tmp_path / "base", **options)
    assert {m["quant"]["bits"] for m in made["plan"]["matrices"]} == {2, 3, 4, 8}
    assert [k["reason"] for k in made["plan"]["kept"] if "down_proj" in k["name"]] == [
        "rows of 96 are no multiple of compressed-tensors's block of 64"
    ] * 2
    return tmp_path


SEPARATE = """
import sys
import peft, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(3, 19).reshape(2, 8)
with torch.no_grad():
    alone = model(ids).logits
    adapted = peft.PeftModel.from_pretrained(model, sys.argv[1] + "/adapter").eval()(ids).logits
torch.save((alone, adapted), sys.argv[2])
assert "loftq" not in sys.modules
"""


@pytest.mark.slow
def test_transformers_computes_the_same_without_us(place):
    pytest.importorskip("compressed_tensors")
    made = loftq.export(place / "base", place / "out", to="compressed-tensors")
    subprocess.run([sys.executable, "-c", SEPARATE, place / "out", place / "found"], check=True, timeout=250)
    alone, adapted = torch.load(place / "found")
    base = AUTO.from_pretrained(place / "base").dequantize().eval()
    with torch.no_grad():
        assert torch.equal(alone, base(IDS).logits)
        wanted = PeftModel.from_pretrained(base, place / "base", subfolder="loftq_init").eval()(IDS).logits
    torch.testing.assert_close(adapted, wanted, rtol=1e-5, atol=1e-6)
    (told,) = made["commands"]
    assert told.startswith("# not for vLLM, where model.layers.0.self_attn.k_proj, ")


def test_what_is_written(place):
    loftq.export(place / "base", place / "out", to="compressed-tensors")
    config = json.loads((place / "out" / "config.json").read_text())["quantization_config"]
    groups = {(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in config["config_groups"].values()}
    assert groups == {(2, 64), (3, 64), (4, 64), (8, 64)}
    assert config["ignore"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head"]
    assert identity(place / "out") == identity(place / "base") is not None
    loftq.quantize(place / "source", place / "even", serve="compressed-tensors", rank=9, workers=1, **EXACT)
    made = loftq.export(place / "even", place / "served", to="compressed-tensors")
    assert made["commands"] == ["vllm serve . --enable-lora --max-lora-rank 16 --lora-modules tuned=./adapter"]
    loftq.export(place / "base", place / "alone", to="compressed-tensors", adapter="none")
    assert not (place / "alone" / "adapter").exists()


def test_a_budget_gives_one_width_to_what_vllm_has_in_one_layer(place):
    options = {"serve": "compressed-tensors", "budget": 3.4, "rank": 20, "rank_policy": "clamp", "workers": 1}
    made = loftq.quantize(place / "source", place / "spent", **options)
    assert made["budget"]["chosen"]["bits_per_weight"] <= 3.4
    found = {m["module"]: (m["quant"]["bits"], m["quant"]["block_size"]) for m in made["plan"]["matrices"]}
    assert len(set(found.values())) > 1
    for layer in (f"model.layers.{i}" for i in range(2)):
        assert len({found[f"{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({found[f"{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1


def test_what_it_cannot_hold(place, made):
    with pytest.raises(InputError, match="compressed-tensors holds code int on linear layers, and not lloyd"):
        loftq.export(made("llama").output, place / "out", to="compressed-tensors")
    options = {"serve": "compressed-tensors", "scale_dtype": "float16", "rank": 4, "workers": 1, **EXACT}
    loftq.quantize(place / "source", place / "half", **options)
    config = json.loads((place / "half" / "config.json").read_text())
    (place / "half" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    with pytest.raises(InputError, match="does not fit the model's type BF16"):
        loftq.export(place / "half", place / "out", to="compressed-tensors")


def test_layers_that_transformers_reads_while_it_loads_stay_dense(made, tmp_path, monkeypatch):
    """T5's initialization reads the weights of its layers: packed by compressed-tensors, they have none."""
    t5 = made("t5")
    with pytest.raises(InputError, match=r"nothing to quantize: .*transformers reads its weight while it loads"):
        loftq.plan(t5.source, serve="compressed-tensors", rank=4, min_coverage=0.0)
    options = {"bits": 4, "code": "int", "block_size": 8, "rank": 4, "workers": 1, "min_coverage": 0.0}
    loftq.quantize(t5.source, tmp_path / "base", **options)
    monkeypatch.setitem(CONTAINERS, "compressed-tensors", (("int", 4, 8),))  # of the sizes of this model
    with pytest.raises(InputError, match=r"SelfAttention.*: transformers reads its weight.*, or merge"):
        loftq.export(tmp_path / "base", tmp_path / "out", to="compressed-tensors")

    def reads(self, module):
        if isinstance(module, transformers.models.llama.modeling_llama.LlamaMLP):
            module.gate_proj.weight.normal_()

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", reads)
    given = {"serve": "compressed-tensors", "block_size": 8, "rank": 4, "min_coverage": 0.0}
    plan = loftq.plan(made("llama").source, **given)
    assert {kept.name for kept in plan.kept if "while it loads" in kept.reason} == {
        f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)
    }


def test_a_head_that_was_trained_on_a_model_without_one(tmp_path):
    """Its class has the packed layers under other names."""
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**BERT, "hidden_size": 64, "intermediate_size": 96})
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "base", serve="compressed-tensors", bits=4, block_size=32, **EXACT)
    auto = transformers.AutoModelForSequenceClassification
    tuned = loftq.load_start(auto.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "base").eval()
    tuned.save_pretrained(tmp_path / "adapter")
    made = loftq.export(tmp_path / "base", tmp_path / "out", to="compressed-tensors", adapter=tmp_path / "adapter")
    (told,) = made["commands"]
    assert told.startswith("# not for vLLM, whose adapters are LoRA alone, and not classifier.")
    alone = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    wanted = transformers.AutoModel.from_pretrained(tmp_path / "base").dequantize().eval()
    headed = auto.from_pretrained(tmp_path / "out", num_labels=3)
    with torch.no_grad():
        assert torch.equal(alone(IDS).last_hidden_state, wanted(IDS).last_hidden_state)
        headed(IDS)  # which unpacks it
        found = PeftModel.from_pretrained(headed, tmp_path / "out" / "adapter").eval()
        torch.testing.assert_close(found(IDS).logits, tuned(IDS).logits, rtol=1e-5, atol=1e-6)


MIXTURE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "head_dim": 16}


def mixture(place, split=True, **options):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**{**LLAMA, **MIXTURE})
    transformers.MixtralForCausalLM(config).save_pretrained(place / "source", save_original_format=split)
    options = {"serve": "compressed-tensors", "rank": 4, "workers": 1, "min_coverage": 0.0, **EXACT, **options}
    loftq.quantize(place / "source", place / "base", **options)
    return place / "base"


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # of its own making
def test_transformers_loads_packed_experts(tmp_path):
    """One layer for each expert, by the names of the source; the adapter too, as vLLM reads it."""
    pytest.importorskip("compressed_tensors")
    base = mixture(tmp_path, bits="experts=2,4")
    made = loftq.export(base, tmp_path / "out", to="compressed-tensors")
    assert made["commands"] == ["# not for vLLM, whose experts have 4 or 8 bits; transformers loads it"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = {g["weights"]["num_bits"]: g["targets"] for g in config["config_groups"].values()}
    assert targets[2][0] == r"re:model\.layers\.0\.block_sparse_moe\.experts\.\d+\..+"
    assert config["ignore"] == ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]
    found, wanted = AUTO.from_pretrained(tmp_path / "out").eval(), AUTO.from_pretrained(base).dequantize().eval()
    for name in ("gate_up_proj", "down_proj"):
        ours, theirs = (model.model.layers[1].mlp.experts.get_parameter(name) for model in (wanted, found))
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    tuned = [PeftModel.from_pretrained(found, tmp_path / "out" / "adapter").eval()]
    tuned.append(PeftModel.from_pretrained(wanted, base, subfolder="loftq_init").eval())
    with torch.no_grad():
        torch.testing.assert_close(*(model(IDS).logits for model in tuned), rtol=1e-5, atol=1e-5)
        with tuned[1].disable_adapter():
            assert not torch.allclose(tuned[0](IDS).logits, tuned[1](IDS).logits, atol=1e-4)


def test_a_source_with_the_models_stacks_is_written_as_the_familys_files(tmp_path):
    """Its names are those of transformers' modules, which other software does not know."""
    for split in (True, False):
        base = mixture(tmp_path / str(split), split, bits=4)
        loftq.export(base, tmp_path / str(split) / "out", to="compressed-tensors")
    for part in (".", "adapter"):
        mine, theirs = (tensors(tmp_path / str(split) / "out" / part) for split in (False, True))
        assert same(mine, theirs)
        assert any(".block_sparse_moe.experts.3.w2." in name for name in mine)
    configs = [json.loads((tmp_path / str(split) / "out" / "config.json").read_text()) for split in (True, False)]
    assert configs[0] == configs[1]


def test_experts_of_one_width(tmp_path):
    base = mixture(tmp_path, bits="experts=16,4")
    made = loftq.export(base, tmp_path / "out", to="compressed-tensors")
    assert made["commands"][0] == "# not for transformers, which loads no dense experts beside packed layers"
    assert "vllm serve" in made["commands"][1]
    plan = loftq.plan(tmp_path / "source", serve="compressed-tensors", rank=4, progress=False)
    assert [len(group) for group in fused(plan.matrices, "compressed-tensors") if "experts" in group[0]] == [4]
    base = mixture(tmp_path / "other", bits="layers.0.mlp.experts=8,4", serve=None, code="int")
    with pytest.raises(InputError, match="experts of several widths or blocks, or dense in part"):
        loftq.export(base, tmp_path / "other" / "out", to="compressed-tensors")
    for bits in ("layers.0.mlp.experts=8,4", "layers.0.mlp.experts=16,4"):
        with pytest.raises(InputError, match="experts of several widths or blocks, or dense in part"):
            loftq.plan(tmp_path / "source", serve="compressed-tensors", bits=bits, rank=4, min_coverage=0.0)
