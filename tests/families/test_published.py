"""Models that are published in FP8 or MXFP4: read as the dense ones that transformers dequantizes them to."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config, Mxfp4Config

import loftq
from loftq.calibration.blocks import load_offloaded
from loftq.errors import InputError
from loftq.formats import dequantized
from loftq.formats.source import open_checkpoint
from loftq.sources.checkpoint import open_dense
from models import FAMILIES, outputs, quantize, same, tensors, tiny, written

E4M3 = torch.float8_e4m3fn
Files = dict[str, Tensor]


def in_tiles(weight: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """8-bit floats, and the scale of each tile: the last ones may be cut off."""
    rows, columns = weight.shape[-2:]
    down, across = math.ceil(rows / tile[0]), math.ceil(columns / tile[1])
    padded = torch.zeros(*weight.shape[:-2], down * tile[0], across * tile[1])
    padded[..., :rows, :columns] = weight
    tiles = padded.unflatten(-1, (across, tile[1])).unflatten(-3, (down, tile[0]))
    scales = tiles.abs().amax((-3, -1)) / 448
    whole = (tiles / scales[..., None, :, None]).flatten(-4, -3).flatten(-2)
    return whole[..., :rows, :columns].contiguous().to(E4M3), scales


def in_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and exponents of a stack ``(experts, in, out)``, as gpt-oss is published."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil().int() + 127
    values = groups / torch.exp2(exponents - 127.0)[..., None]
    nibbles = (values[..., None] - torch.tensor(dequantized.FP4)).abs().argmin(-1)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).to(torch.uint8), exponents.to(torch.uint8)


def published(directory: Path, files: Files, config: dict[str, Any]) -> Path:
    """A model's directory with other tensors, and a ``quantization_config``."""
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    save_file(files, directory / "model.safetensors", {"format": "pt"})
    return directory


def fp8(directory: Path, name: str = "deepseek-v3", tile: tuple[int, int] = (8, 8), scales: str = "F32") -> Path:
    tiny(name).save_pretrained(directory)
    files: Files = {}
    for tensor, weight in load_file(directory / "model.safetensors").items():
        files[tensor] = weight
        if "_proj" in tensor and tensor.endswith(".weight") and not tensor.endswith("eh_proj.weight"):
            files[tensor], files[f"{tensor}_scale_inv"] = in_tiles(weight, tile)
            if scales == "BF16":
                files[f"{tensor}_scale_inv"] = files[f"{tensor}_scale_inv"].bfloat16()
    config = {"quant_method": "fp8", "weight_block_size": [*tile], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return published(directory, files, config)


def mxfp4(directory: Path) -> Path:
    options = {**FAMILIES["gpt-oss"].options, "hidden_size": 64, "intermediate_size": 96}
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**options)).save_pretrained(directory)
    files: Files = {}
    for tensor, weight in load_file(directory / "model.safetensors").items():
        if weight.ndim == 3:
            files[f"{tensor}_blocks"], files[f"{tensor}_scales"] = in_fp4(weight)
        else:
            files[tensor] = weight
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return published(directory, files, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def theirs(directory: Path) -> Any:
    """What transformers dequantizes it to."""
    method = json.loads((directory / "config.json").read_text())["quantization_config"]
    tile = method.get("weight_block_size")
    config: Any = (
        FineGrainedFP8Config(weight_block_size=tile, dequantize=True) if tile else Mxfp4Config(dequantize=True)
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    values = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    dense = type(loaded)(type(loaded.config).from_dict(values))  # not the one that would be saved as it was published
    dense.load_state_dict(loaded.state_dict())
    return dense.eval()


PUBLISHED = {
    "deepseek-v3": fp8,
    "qwen3-moe": lambda directory: fp8(directory, "qwen3-moe", (4, 8), "BF16"),
    "gpt-oss": mxfp4,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_model_that_transformers_dequantizes(tmp_path, name):
    """Bit for bit: the same weights, so the same checkpoint at every width, of the same rows read at a time."""
    source = PUBLISHED[name](tmp_path / "source")
    dense = theirs(source)
    checkpoint, _ = open_dense(source)
    assert isinstance(checkpoint, dequantized.Dequantized)
    dense.save_pretrained(tmp_path / "dense")
    wanted = open_checkpoint(tmp_path / "dense")
    assert {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.tensors.items()
    }
    assert all(torch.equal(checkpoint.read(n), wanted.read(n)) for n in wanted.tensors)
    assert all(b"".join(checkpoint.chunks(n)) == b"".join(wanted.chunks(n)) for n in wanted.tensors)
    for bits in (2, 3, 4):
        quantize(tmp_path / "dense", tmp_path / f"dense{bits}", bits=bits)
        manifest = quantize(source, tmp_path / f"source{bits}", bits=bits)
        assert manifest["totals"]["coverage"] == 1
        for part in ("", "loftq_init"):
            assert same(tensors(tmp_path / f"source{bits}" / part), tensors(tmp_path / f"dense{bits}" / part))
    config = json.loads((tmp_path / "source2" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "loftq"
    assert loftq.verify(tmp_path / "source2")
    model = type(dense).from_pretrained(tmp_path / "source2")
    again = type(dense).from_pretrained(tmp_path / "dense2")
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(again))
        quantize(source, tmp_path / "plain", bits=4, format="dense")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_experts_in_fp4_stay_as_they_are_published(tmp_path):
    """Codes and exponents: nothing is left for an adapter, which begins as LoRA does."""
    source = mxfp4(tmp_path / "source")
    manifest = quantize(source, tmp_path / "out", bits=4, code="fp4", block_size=32)
    dense, found = open_dense(source)[0], written(tmp_path / "out")
    stacks = [m["name"] for m in manifest["matrices"] if "experts" in m]
    assert len(stacks) == 4
    for name in stacks:
        weight, product = found[name]
        assert torch.equal(weight, dense.read(name).float().transpose(1, 2))
        assert not product.any()
        assert (torch.frexp(tensors(tmp_path / "out")[f"{name}_scale"].float()).mantissa == 0.5).all()
    factors = {n: t for n, t in tensors(tmp_path / "out" / "loftq_init").items() if "experts" in n}
    assert all(t.any() == ("lora_A" in n) for n, t in factors.items())
    assert loftq.verify(tmp_path / "out")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_calibration_runs_the_dequantized_model(tmp_path, name):
    source = PUBLISHED[name](tmp_path / "source")
    with torch.no_grad():
        assert torch.equal(outputs(load_offloaded(source, tmp_path / "offload")), outputs(theirs(source)))


def test_a_calibration_of_other_methods_is_refused(tmp_path):
    source = fp8(tmp_path / "source", "qwen3-moe")
    written = json.loads((source / "config.json").read_text())
    written["quantization_config"]["quant_method"] = "modelopt"
    (source / "config.json").write_text(json.dumps(written))
    assert loftq.plan(source, bits=2, rank=4).coverage == 1
    with pytest.raises(InputError, match="already quantized with modelopt"):
        load_offloaded(source, tmp_path / "offload")


def test_a_calibration_of_a_nested_quantization_is_refused(tmp_path):
    """transformers looks for one in the outer configuration alone, and would run the codes as weights."""
    tiny("llama").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    nested = {**config, "language": {"quantization_config": {"quant_method": "fp8"}}}
    (tmp_path / "model/config.json").write_text(json.dumps(nested))
    with pytest.raises(InputError, match="already quantized with fp8"):
        load_offloaded(tmp_path / "model", tmp_path / "offload")


# --- the rules alone -------------------------------------------------------------------------------------------------

WEIGHT = torch.linspace(-3, 3, 6 * 20).view(6, 20)
STACK = torch.linspace(-3, 3, 3 * 6 * 20).view(3, 6, 20)


def opened(directory: Path, files: Files, **config: Any) -> Any:
    save_file(files, directory / "model.safetensors")
    return dequantized.dense(open_checkpoint(directory), config, "F32")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of", ["tensor", "vector of one", "row", "row alone", "tile", "cut tile", "exponents"])
@pytest.mark.parametrize("weight", [WEIGHT, STACK], ids=["matrix", "stack"])
def test_scales_of_every_grain(tmp_path, of, weight):
    tile = {"row": (1, 20), "row alone": (1, 20), "tile": (2, 5), "cut tile": (4, 16)}.get(of, (6, 20))
    codes, scales = in_tiles(weight, tile)
    config: dict[str, Any] = {"weight_block_size": [4, 16]} if of == "cut tile" else {}
    if of == "exponents":
        scales = (scales.log2().ceil() + 127).to(torch.uint8)
    elif of == "row alone":
        scales = scales[..., 0]
    elif of == "vector of one" and weight.ndim == 2:
        scales = scales.reshape(1)
    factors = torch.exp2(scales - 127.0) if of == "exponents" else scales
    grid = factors.view(*weight.shape[:-2], -(-6 // tile[0]), -(-20 // tile[1]))
    every = grid.repeat_interleave(tile[0], -2)[..., :6, :].repeat_interleave(tile[1], -1)[..., :20]
    wanted = codes.float() * every
    input_scale = torch.ones(())
    checkpoint = opened(tmp_path, {"w": codes, "w_scale": scales, "m.input_scale": input_scale}, **config)
    assert list(checkpoint.tensors) == ["w"]
    assert torch.equal(checkpoint.read("w"), wanted)
    rows = wanted.reshape(-1, 20)
    assert torch.equal(checkpoint.rows("w", 1, 5), rows[1:5])
    assert torch.equal(checkpoint.rows("w", len(rows) - 3, len(rows)), rows[-3:])
    if of != "exponents":
        assert (wanted - weight).abs().max() < 0.07 * weight.abs().max()  # 3 bits of mantissa: half of 2^-3


def test_rows_of_fp4_experts(tmp_path):
    stack = torch.randn(3, 64, 5)
    blocks, scales = in_fp4(stack)
    checkpoint = opened(tmp_path, {"e.w_blocks": blocks, "e.w_scales": scales, "e.w_bias": torch.ones(5)})
    whole = checkpoint.read("e.w")
    assert list(checkpoint.tensors) == ["e.w", "e.w_bias"]
    assert whole.shape == stack.shape
    assert (whole - stack).abs().max() < 0.26 * stack.abs().max()  # steps of FP4: from 4 to 6
    assert torch.equal(checkpoint.rows("e.w", 70, 140), whole.reshape(-1, 5)[70:140])
    assert torch.equal(checkpoint.read("e.w_bias"), torch.ones(5))


FLOATS = WEIGHT.to(E4M3)
BLOCKS, EXPONENTS = in_fp4(torch.randn(2, 64, 5))
WRONG = {
    "no scale": (
        {"w": FLOATS, "v": FLOATS.clone(), "v_scale_inv": torch.ones(())},
        {},
        "w is of F8_E4M3.*scales are missing",
    ),
    "scale alone": (
        {"w": WEIGHT, "w_scale_inv": torch.ones(())},
        {},
        "w_scale_inv is beside w of F32; wanted one of F8",
    ),
    "shape": (
        {"w": FLOATS, "w_scale": torch.ones(4, 5)},
        {},
        r"w_scale is \[4, 5\] for w of \[6, 20\]; wanted one for",
    ),
    "tile": (
        {"w": FLOATS, "w_scale_inv": torch.ones(3, 4)},
        {"weight_block_size": [4, 16]},
        r"w_scale_inv is \[3, 4\] for w of \[6, 20\]; wanted \[2, 2\], tiles of \[4, 16\]",
    ),
    "dtype": ({"w": FLOATS, "w_scale": torch.ones(1).double()}, {}, "w_scale is of F64; wanted one of F32"),
    "blocks alone": ({"w_blocks": BLOCKS}, {}, "w_blocks has no w_scales beside it"),
    "blocks": ({"w_blocks": BLOCKS[..., :8].clone(), "w_scales": EXPONENTS}, {}, "wanted blocks of 16 bytes"),
    "exponents": ({"w_blocks": BLOCKS, "w_scales": EXPONENTS[:1].clone()}, {}, r"wanted \[2, 5, 2\] for w_blocks"),
    "rotated": ({"w": FLOATS, "w_scale": torch.ones(1)}, {"transform_config": {"a": 1}}, "weights are rotated"),
}


@pytest.mark.parametrize("case", WRONG)
def test_scales_that_do_not_fit_are_named(tmp_path, case):
    files, config, message = WRONG[case]
    with pytest.raises(InputError, match=f"{message}.*full-precision checkpoint") as caught:
        opened(tmp_path, files, **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scales_that_are_no_factors_are_named(tmp_path, bad):
    checkpoint = opened(tmp_path, {"w": FLOATS, "w_scale": torch.tensor([1, 1, bad, 1, 1, 1])[:, None]})
    with pytest.raises(
        InputError, match=f"safetensors: 1 of 6 scales of w are unusable, such as {bad:g}; wanted finite"
    ):
        checkpoint.read("w")
    bad_exponents = EXPONENTS.clone()
    bad_exponents[1, 0, 0] = 255
    checkpoint = opened(tmp_path, {"w_blocks": BLOCKS, "w_scales": bad_exponents})
    checkpoint.rows("w", 0, 64)  # the first expert's are right
    with pytest.raises(InputError, match="1 of 10 scales of w are unusable, such as NaN"):
        checkpoint.read("w")


def test_files_without_any_scale_are_left_as_they_are(tmp_path):
    save_file({"w": FLOATS}, tmp_path / "model.safetensors")
    stored = open_checkpoint(tmp_path)
    assert dequantized.dense(stored, None, "F32") is stored


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "already quantized with gptq"),
        ("fp8", "already quantized with 'fp8'"),
    ],
)
def test_other_methods_are_refused_as_before(tmp_path, config, message):
    directory = fp8(tmp_path / "source", "qwen3-moe")
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    with pytest.raises(InputError, match=message):
        loftq.plan(directory, bits=2, rank=4)
