"""Convert, then quantize: tensors that transformers fuses or splits as it loads them are followed, by running it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter

import loftq
from loftq.architecture import conversion, skeleton
from loftq.formats.source import open_checkpoint
from loftq.planning import Piece
from models import HIDDEN, INNER, LLAMA, MOE, VOCAB, close, quantize, same, tensors

ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
SIZES = {**LLAMA, **MOE}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "nomic": ("NomicBert", ENCODER),  # one tensor becomes three
    "gte": ("Gte", ENCODER),  # up before gate; biases too
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 12}),  # more than ten: experts are counted, not spelled
    "qwen3-moe": ("Qwen3Moe", {**SIZES, "num_experts": 4, "moe_intermediate_size": INNER}),
}


def built(name: str) -> Any:
    cls, options = MODELS[name]
    if not hasattr(transformers, f"{cls}Model"):
        pytest.skip(f"this transformers has no {cls}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{cls}Model")(getattr(transformers, f"{cls}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_put_together_is_what_transformers_makes(tmp_path, name):
    model = built(name)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    headers = {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}
    seen, roles = conversion.converted_roles(skeleton.build(tmp_path), headers)
    followed = {n: role.made for n, role in roles.items() if role.made}
    assert followed
    assert {n for n, role in roles.items() if role.module} == set(seen) == set(roles)
    for n, made in followed.items():
        assert n not in checkpoint.tensors
        assert torch.equal(checkpoint.read(n, made), model.get_parameter(n)), n


@pytest.mark.parametrize("name", MODELS)
def test_no_parameter_is_new_that_a_part_of_a_tensor_fills(tmp_path, name):
    """Biases too: a module that seems to have none in the files would be trained whole, without its initialization."""
    built(name).save_pretrained(tmp_path)
    headers = {n: (t.dtype, t.shape) for n, t in open_checkpoint(tmp_path).tensors.items()}
    model = skeleton.build(tmp_path)
    rename = skeleton.renamer(model)
    there = {rename(n)[0] for n in headers} | conversion.split_parameters(model, headers)
    assert {n for n, _ in model.named_parameters()} <= there


def test_rows_of_every_kind_are_read_alone(tmp_path):
    """Of a tensor that interleaves, one that is transposed, and vectors: the pieces say which bytes are read."""
    loftq_tensors = {"stack": torch.arange(24.0).view(2, 3, 4), "vector": torch.arange(5.0)}

    save_file(loftq_tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    stack = loftq_tensors["stack"]
    odd = Piece("stack", (2, 3, 4), 1, 6, 2)
    assert torch.equal(checkpoint.read("", ((odd,),)), stack.view(-1, 4)[1:6:2])
    turned = Piece("stack", (2, 3, 4), 5, 8, 2, transposed=True)
    assert torch.equal(checkpoint.read("", ((turned,),)), stack.transpose(1, 2).reshape(-1, 3)[5:8:2])
    halves = tuple((Piece("vector", (5,), i, i + 2),) for i in (0, 2))
    assert torch.equal(checkpoint.read("", halves), torch.tensor([[0.0, 1.0], [2.0, 3.0]]))


@dataclass
class Scaled(Concatenate):
    """An operation that changes values: what numbers of rows cannot follow."""

    dim: int = 0
    num_shards_attribute: None = None

    def convert(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        return {name: 2 * value for name, value in super().convert(*args, **kwargs).items()}


@pytest.mark.parametrize("operation", [Scaled(), Concatenate(1)])
def test_what_computes_or_does_not_fit_is_kept_by_name(tmp_path, monkeypatch, operation):
    model = built("gte")
    model.save_pretrained(tmp_path)
    renamings, _ = skeleton.converters(model)
    odd = WeightConverter(["attention.qkv_proj"], ["self_attn.q_proj"], [operation])
    monkeypatch.setattr(skeleton, "converters", lambda _: (renamings, [odd]))
    headers = {n: (t.dtype, t.shape) for n, t in open_checkpoint(tmp_path).tensors.items()}
    _, roles = conversion.converted_roles(model, headers)
    assert not any(role.made for role in roles.values())
    kept = roles["encoder.layer.0.attention.qkv_proj.weight"]
    assert kept.keep.startswith("converted by transformers on loading into")
    assert kept.kind in ("linear", "parameter")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Any, Path]:
    model, directory = built("gte"), tmp_path_factory.mktemp("gte")
    model.save_pretrained(directory)
    return model, directory


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 11)[None]).last_hidden_state


def test_split_matrices_are_quantized_loaded_trained_and_saved(source, tmp_path):
    _, directory = source
    manifest = quantize(directory, tmp_path / "out")
    assert manifest["totals"]["coverage"] == 1
    assert len(manifest["plan"]["matrices"]) == 14
    assert loftq.verify(tmp_path / "out")
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    quantize(directory, tmp_path / "dense", format="dense")
    assert close(output(model), output(transformers.AutoModel.from_pretrained(tmp_path / "dense")), 1e-6)
    wanted = output(model)
    start = loftq.load_start(model, tmp_path / "out")
    start(input_ids=torch.arange(3, 11)[None]).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None for n, p in start.named_parameters() if "lora_" in n)
    start.unload().eval().save_pretrained(tmp_path / "again")
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path / "again")), wanted)
    assert close(output(model.dequantize()), wanted, 1e-6)


def test_where_one_part_is_quantized_the_others_are_written_as_the_model_has_them(source, tmp_path):
    dense, directory = source
    quantize(directory, tmp_path / "out", bits="q_proj=16,gate_proj=16,up_proj=16,2", min_coverage=0)
    written, given = tensors(tmp_path / "out"), load_file(directory / "model.safetensors")
    layer = dense.layers[0].self_attn
    assert torch.equal(written["layers.0.self_attn.q_proj.weight"], layer.q_proj.weight)
    assert torch.equal(written["layers.0.self_attn.k_proj.bias"], layer.k_proj.bias)
    assert "encoder.layer.0.attention.qkv_proj.weight" not in written
    name = "encoder.layer.0.mlp.up_gate_proj.weight"
    assert torch.equal(written[name], given[name])
    model = transformers.AutoModel.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_in_memory_what_was_split_on_loading_is_not_joined_on_saving(source, tmp_path):
    _, directory = source
    model = transformers.AutoModel.from_pretrained(directory)
    wrapped = loftq.get_peft_model(model, bits=3, rank=2)
    base = wrapped.unload()
    wanted = output(base)
    base.save_pretrained(tmp_path)
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path)), wanted)


def vision(directory: Path, turned: bool) -> Any:
    """A mixture whose published files have ``(experts, in, out)``, which transformers turns unless it fits already."""
    text = {**SIZES, "num_experts": 4, "moe_intermediate_size": INNER}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN}
    eyes |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=eyes)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    model.save_pretrained(directory)
    if turned:
        found = load_file(directory / "model.safetensors")
        found = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in found.items()}
        save_file(found, directory / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("turned", [True, False])
def test_a_converter_that_looks_at_shapes_first(tmp_path, turned):
    model = vision(tmp_path / "dense", turned)
    manifest = quantize(tmp_path / "dense", tmp_path / "out", bits=8)
    if WeightConverter("proj", "proj", [Transpose()]).rename_source_key("proj_scale")[1]:
        assert {k["reason"] for k in manifest["plan"]["kept"] if ".experts." in k["name"]} == {skeleton.RENAMED}
        pytest.skip("this transformers takes the scales of a stack for its weight")
    stacks = [m["name"] for m in manifest["plan"]["matrices"] if m.get("experts")]
    assert len(stacks) == 4
    packed, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(3, 10)[None]
    packed.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    loftq.merge(tmp_path / "out", tmp_path / "merged", adapter="none", dtype="float32")
    shapes = {n: t.shape for n, t in tensors(tmp_path / "dense").items()}
    assert {n: t.shape for n, t in tensors(tmp_path / "merged").items()} == shapes
    merged = type(model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted, found = model(input_ids=ids).logits, packed(input_ids=ids).logits
        assert close(found, wanted, 0.05)  # 8 bits
        assert torch.equal(again(input_ids=ids).logits, found)
        assert close(merged(input_ids=ids).logits, found, 1e-5)
