"""``from_pretrained`` on a LoftQ checkpoint: what is refused, what is found, and where the layers go."""

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer

import loftq
from loftq.errors import InputError, LoftqError, UsageError
from loftq.formats.config import read_groups
from loftq.nn.hf import LoftQHfQuantizer, LoftQQuantizationConfig
from models import close, inputs, outputs, packed, same, tensors

WEIGHTS = "model.safetensors"
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def copied(made, tmp_path):
    """A Llama checkpoint that a test may spoil."""
    shutil.copytree(made("llama").output, tmp_path / "copy")
    return tmp_path / "copy"


def respelled(directory, change):
    """Rewrite ``config.json`` after ``change`` of its quantization_config."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (f"{LAYER}.weight", None, "found nothing"),
        (f"{LAYER}.weight_scale", None, "found nothing"),
        (f"{LAYER}.weight", lambda t: t.view(torch.uint8), r"wanted \('I8', .*found \('U8'"),
        (f"{LAYER}.weight", lambda t: t.float(), r"wanted \('I8', .*found \('F32'"),
        (f"{LAYER}.weight", lambda t: t[:-1], r"found \('I8', \(71, 10\)\)"),
        (f"{LAYER}.weight_scale", lambda t: t.float(), r"wanted \('BF16', .*found \('F32'"),
        (f"{LAYER}.weight_scale", lambda t: t.T.contiguous(), r"found \('BF16', \(1, 72\)\)"),
    ],
)
def test_a_packed_tensor_that_is_missing_or_odd_is_named(copied, name, change, found):
    stored = load_file(copied / WEIGHTS)
    tensor = stored.pop(name)
    if change:
        stored[name] = change(tensor)
    save_file(stored, copied / WEIGHTS, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name}: .*{found}.*`loftq verify`"):
        AutoModelForCausalLM.from_pretrained(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=3), "format_version is 3, this loftq reads 1 to 2; upgrade loftq"),
        (lambda c: c.pop("format_version"), "format_version is None, this loftq reads 1"),
        (lambda c: c.pop("groups"), "'groups' must be a list that is not empty, got None"),
        (lambda c: c.update(groups="all"), "'groups' must be a list that is not empty, got 'all'"),
        (lambda c: c.update(groups=[]), "'groups' must be a list that is not empty"),
        (lambda c: c.update(groups=["all"]), "list of module names under 'modules'"),
        (lambda c: c.update(rotation="hadamard"), r"unknown field.*rotation"),
        (lambda c: c["groups"][0].update(rotation=1), r"unknown field.*rotation"),
        (lambda c: c["groups"][0].update(bits=5), "bits must be one of 2, 3, 4, 8, or a multiple of .*, got 5"),
        (lambda c: c["groups"][0].update(block_size=0), "block_size must be a whole number of at least 1"),
        (lambda c: c["groups"][0].pop("bits"), "a group cannot be read: .*'bits'"),
        (lambda c: c["groups"][0].update(modules="model"), "list of module names under 'modules'"),
        (lambda c: c["groups"][0]["modules"].append("model.norm"), r"no Linear, Conv1D or Embedding: model.norm"),
        (
            lambda c: c["groups"].append({**c["groups"][0], "bits": 4}),
            r"in two groups: model.layers.0.mlp.down_proj, .* and 4 more",
        ),
    ],
    ids=range(14),
)
def test_a_config_that_cannot_be_meant_is_refused(copied, change, message):
    respelled(copied, change)
    with pytest.raises(LoftqError, match=message) as refused:
        AutoModelForCausalLM.from_pretrained(copied)
    assert isinstance(refused.value, InputError)


def test_many_modules_in_two_groups():
    """The time grows with their number, not with its square."""
    group = {"bits": 2, "modules": [f"layers.{i}" for i in range(100_000)]}
    with pytest.raises(InputError, match=r"in two groups: layers\.0, .* and 99990 more"):
        read_groups({"format_version": 1, "groups": [group, {**group, "bits": 4}]})


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{"scale_dtype": "float32"}, {"double_quant": True}, {"code": "affine"}], ids=str)
def test_scales_keep_the_dtype_of_the_file(made, dtype, options):
    """Rounded to the dtype of the model, they would decode to another backbone."""
    checkpoint = made("llama", **options)
    stored = {n: t for n, t in tensors(checkpoint.output).items() if ".weight_" in n}
    loaded = {n: t for n, t in checkpoint.load(dtype=dtype).state_dict().items() if ".weight_" in n}
    assert stored
    assert same(loaded, stored)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_absmax", "weight_scale_mean", "weight_zero"])
def test_transformers_is_told_to_leave_the_dtype_of_scales(suffix):
    """The hook that casts what is loaded: other float tensors take the model's dtype."""
    if not hasattr(HfQuantizer, "get_new_dtype"):
        pytest.skip("this transformers has no such hook")
    quantizer = LoftQHfQuantizer(LoftQQuantizationConfig())
    for name, wanted in ((f"{LAYER}.{suffix}", None), ("model.norm.weight", torch.float16)):
        converter = types.SimpleNamespace(source_patterns=[name], operations=[])
        assert quantizer.get_new_dtype(converter, torch.ones(1), torch.float16) == wanted


@pytest.mark.parametrize("config", [LoftQQuantizationConfig(bits=2), {"quant_method": "loftq"}], ids=["object", "dict"])
def test_a_dense_checkpoint_is_not_quantized_while_it_loads(made, config):
    with pytest.raises(UsageError, match=r"`loftq.quantize\(MODEL, output=DIR\)`.*or .*loftq.get_peft_model"):
        AutoModelForCausalLM.from_pretrained(made("llama").source, quantization_config=config)


def test_the_checkpoints_own_config_wins(made):
    checkpoint = made("llama")
    config = LoftQQuantizationConfig()
    with pytest.warns(UserWarning, match="the model you're loading already has a `quantization_config`"):
        model = checkpoint.load(quantization_config=config)
    assert len(packed(model)) == checkpoint.family.matrices


UNREGISTERED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
from transformers.quantizers.base import HfQuantizer
outcomes = []
for directory in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(directory)
        outcomes.append("loaded")
    except RuntimeError as e:
        outcomes.append(str(e))
import loftq
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
outcomes.append(type(model.model.layers[0].mlp.up_proj).__name__)
print(json.dumps(outcomes))
"""


@pytest.mark.slow
def test_without_our_import_nothing_loads_as_garbage_and_a_late_import_helps(made):
    directories = [str(made("llama", bits=bits).output) for bits in (2, 3, 8)]
    directories.append(str(made("llama", bits=8, block_size=72, scale_dtype="float32").output))
    command = [sys.executable, "-c", UNREGISTERED, *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *refused, late = json.loads(done.stdout.splitlines()[-1])
    assert len(refused) == 4
    assert all("ignore_mismatched_sizes" in outcome for outcome in refused)
    assert late == "LoftQLinear"


def test_a_checkpoint_behind_links_loads(made, tmp_path):
    """The hub's cache: ``snapshots/<commit>/<name>`` are links into ``blobs``."""
    checkpoint = made("llama")
    snapshot = tmp_path / "snapshots" / "abc"
    for file in checkpoint.output.rglob("*"):
        if file.is_file():
            blob = tmp_path / "blobs" / str(abs(hash(file)))
            link = snapshot / file.relative_to(checkpoint.output)
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(blob)
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    assert same(model.state_dict(), checkpoint.load().state_dict())


def test_a_sharded_checkpoint_loads_and_saves(made, tmp_path):
    checkpoint = made("llama", max_shard_bytes=20_000)
    assert len(list(checkpoint.output.glob("model-*.safetensors"))) > 2
    model = checkpoint.load()
    assert same(model.state_dict(), made("llama").load().state_dict())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert same(tensors(tmp_path), tensors(checkpoint.output))


def test_loading_does_not_draw_weights_for_packed_layers(made):
    checkpoint = made("llama")
    before = torch.get_rng_state()
    checkpoint.load()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(made, device_map):
    checkpoint = made("llama")
    model = checkpoint.load(device_map=device_map)
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(checkpoint.load()))
    start = checkpoint.start(model)
    assert close(outputs(start).detach(), outputs(checkpoint.started()).detach())
    outputs(start).sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("embeddings", [False, True])
def test_layers_offloaded_to_disk(made, embeddings, tmp_path):
    checkpoint = made("llama", embeddings=embeddings)
    where = "disk" if embeddings else "cpu"
    device_map = {"model.embed_tokens": where, "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = checkpoint.load(device_map=device_map, offload_folder=tmp_path)
    assert model.get_submodule(LAYER).weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(checkpoint.load()))
        assert torch.equal(model(**inputs(model)).logits, outputs(checkpoint.load()))  # and again
    with pytest.raises(UsageError, match="a part of the model is offloaded"):
        loftq.load_start(model, checkpoint.output)


def test_auto_config_reads_the_quantization(made):
    config = transformers.AutoConfig.from_pretrained(made("llama").output)
    config = LoftQQuantizationConfig(**config.quantization_config)
    assert config.bits == 2
    assert len(config.specs) == 14
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert LoftQQuantizationConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert '"block_size": 64' in repr(config)


@pytest.mark.parametrize("asked", [{"tp_plan": "auto"}, {"tp_plan": {"model.layers.*.mlp.up_proj": "colwise"}}])
@pytest.mark.filterwarnings("ignore:Passing `tp_plan` directly:FutureWarning")
def test_tensor_parallel_loading_is_refused(made, asked):
    with pytest.raises(UsageError, match=r"tp_plan, tp_size, ep_size\) do not work on packed layers; load without"):
        AutoModelForCausalLM.from_pretrained(made("llama").output, **asked)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_packed_tensors_stay_in_the_mapped_file(made):
    """So the processes of a node share one copy in the page cache."""
    model = AutoModelForCausalLM.from_pretrained(made("llama").output)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines if line[-1].endswith(WEIGHTS)]
    stored = [tensor for layer in packed(model).values() for tensor in layer.stored]
    assert stored
    assert all(any(first <= tensor.data_ptr() < end for first, end in mapped) for tensor in stored)


def test_a_directory_without_a_start_is_named(made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made("llama").output)
    for place in (made("llama").source, tmp_path / "nowhere"):
        with pytest.raises(
            InputError, match=rf"{place}/loftq_init: no adapter is there; name the directory that `loftq q"
        ):
            loftq.load_start(model, place)
