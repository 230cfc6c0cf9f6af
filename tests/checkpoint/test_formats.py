"""What other software gets from the files: plain transformers, bitsandbytes; and what they weigh."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import reader
from harness import EXACT, cli, refused, run, tiny_source
from loftq.planning import Policy
from loftq.spec import SolveSpec
from models import GPT2, LLAMA

pytestmark = pytest.mark.usefixtures("quick")

IDS = torch.arange(3, 19).reshape(2, 8)
EVEN = {  # in_features are multiples of a block of 64
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "hidden_size": 64, "intermediate_size": 128}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "n_embd": 64, "n_inner": 128}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directories = {}
    for key, (name, config, sizes) in EVEN.items():
        directories[key] = tmp_path_factory.mktemp("formats") / key
        torch.manual_seed(0)
        getattr(transformers, name)(getattr(transformers, config)(**sizes)).save_pretrained(directories[key])
    return directories


@pytest.fixture(params=EVEN)
def source(request, sources):
    return sources[request.param]


def policy(bits=4, **changes):
    return Policy(bits=str(bits), rank="4", scale_dtype="float32", solve=SolveSpec(steps=2), **EXACT, **changes)


def reference(source, packed):
    """The dense model that a packed checkpoint stands for, by the second reader: backbone, and with the start added."""
    values = reader.matrices(packed)
    models = []
    for with_start in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        for module, (backbone, product) in values.items():
            weight = torch.from_numpy(backbone + with_start * product).float()
            target = model.get_submodule(module).weight
            target.data.copy_(weight if isinstance(model.get_submodule(module), torch.nn.Linear) else weight.T)
        models.append(model.eval()(IDS).logits.detach())
    return models


SEPARATE = """
import sys
import bitsandbytes, peft, torch, transformers
ids, found = torch.arange(3, 19).reshape(2, 8), {}
for directory in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    here = found[directory] = {"as loaded": model(ids).logits.detach()}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            here["codes " + name] = module.weight.data.flatten().clone()
            state = module.weight.quant_state
            here["values " + name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            module.compute_dtype = torch.float32
    here["backbone"] = model(ids).logits.detach()
    model = peft.PeftModel.from_pretrained(model, directory, subfolder="loftq_init").eval()
    model.enable_input_require_grads()  # without gradients bitsandbytes computes in bfloat16 on a CPU
    here["start"] = model(ids).logits.detach()
torch.save(found, sys.argv[1])
assert "loftq" not in sys.modules
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bits", [2, 3])
def test_transformers_load_the_dense_format_alone(source, tmp_path, bits):
    """Plain transformers load it; Conv1D keeps its orientation."""
    run(source, tmp_path / "packed", policy=policy(bits))
    run(source, tmp_path / "dense", policy=policy(bits), format="dense")
    backbone, started = reference(source, tmp_path / "packed")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not any("loftq" in type(m).__module__ for m in model.modules())
    torch.testing.assert_close(model(IDS).logits, backbone, rtol=1e-5, atol=1e-5)
    import peft

    model = peft.PeftModel.from_pretrained(model, tmp_path / "dense", subfolder="loftq_init").eval()
    torch.testing.assert_close(model(IDS).logits, started, rtol=1e-5, atol=1e-5)
    original = load_file(source / "model.safetensors")
    assert {n: t.shape for n, t in load_all(tmp_path / "dense").items()} == {n: t.shape for n, t in original.items()}


def load_all(directory):
    return {n: t for f in sorted(directory.glob("*.safetensors")) for n, t in load_file(f).items()}


@pytest.fixture(scope="module")
def elsewhere(sources, tmp_path_factory):
    """Packed and bitsandbytes checkpoints, and what a process that never imports loftq gets from the latter."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("elsewhere")
    cases = [("llama", 2), ("llama", 4), ("gpt2", 2)]
    for name, bits in cases:
        run(sources[name], root / f"{name}-{bits}", policy=policy(bits))
        run(sources[name], root / f"{name}-{bits}-bnb", policy=policy(bits), format="bnb")
    directories = [str(root / f"{name}-{bits}-bnb") for name, bits in cases]
    command = [sys.executable, "-c", SEPARATE, str(root / "found.pt"), *directories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "fan_in_fan_out is set to" not in done.stderr
    return root, torch.load(root / "found.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("llama", 2), ("llama", 4), ("gpt2", 2)])
def test_bitsandbytes(sources, elsewhere, name, bits):
    """transformers with bitsandbytes load it; codes are ours to the bit, NF2 inside NF4."""
    root, everything = elsewhere
    packed, found = root / f"{name}-{bits}", everything[str(root / f"{name}-{bits}-bnb")]
    stored = reader.tensors(packed)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    modules = [(m, g) for g in config["groups"] for m in g["modules"]]
    assert len(modules) == sum(key.startswith("codes ") for key in found)
    to_nf4 = torch.tensor({2: [0, 7, 11, 15], 4: list(range(16))}[bits])
    for module, group in modules:
        values = found[f"values {module}"]
        ours = torch.from_numpy(reader.codes(stored[f"{module}.weight"], bits, values.shape[1])).flatten()
        theirs = found[f"codes {module}"]
        assert torch.equal(torch.stack([theirs >> 4, theirs & 15], 1).flatten().long(), to_nf4[ours])
        wanted = torch.from_numpy(reader.backbone(stored, module, group, values.shape[1]))
        torch.testing.assert_close(values.double(), wanted, rtol=1e-6, atol=1e-8)
    backbone, started = reference(sources[name], packed)
    torch.testing.assert_close(found["backbone"], backbone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["start"], started, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["as loaded"], backbone, rtol=0, atol=0.02)  # it computes in bfloat16


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["in_features are a multiple of the block size 64", "72"]),
        (("--block-size", "8", "--code", "uniform"), ["--code nf"]),
        (("--block-size", "8", "--bits", "3"), ["--bits 4"]),
        (("--block-size", "8", "--double-quant"), ["without --double-quant"]),
        (("--block-size", "8", "--scale-dtype", "float16"), ["--scale-dtype float32"]),
        (("--block-size", "8", "--embeddings"), ["embedding"]),
    ],
    ids=["ragged", "code", "width", "double", "scales", "embedding"],
)
def test_what_bitsandbytes_cannot_hold(tmp_path, flags, words):
    source = tiny_source(tmp_path / "source")
    ended = cli("quantize", source, "-o", tmp_path / "out", "--rank", "4", "--format", "bnb", *flags)
    refused(ended, 2, "--format bnb", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scales", ["float16", "bfloat16"])
def test_two_bits_take_two_and_a_quarter(source, tmp_path, scales):
    """2 bits a code and 16 for the scale of 64 of them: 2.25 bits a weight, within 1 % on disk."""
    changed = Policy(bits="2", rank="4", scale_dtype=scales, solve=SolveSpec(steps=0), **EXACT)
    manifest = run(source, tmp_path / "out", policy=changed, max_shard_bytes=1 << 30)
    dense = load_file(source / "model.safetensors")
    weights = sum(dense[m["name"]].numel() for m in manifest["matrices"])
    kept = sum(t.numel() * t.itemsize for n, t in dense.items() if n not in {m["name"] for m in manifest["matrices"]})
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little") + 8
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 8 * (size - kept - header) / weights == pytest.approx(2.25, rel=0.01)
    assert manifest["totals"]["bits_per_weight"] == pytest.approx(2.25, rel=0.01)


def test_headers_are_small_beside_real_weights(tmp_path):
    """The whole file of a layer of ordinary width, header and all."""
    torch.manual_seed(0)
    sizes = {**LLAMA, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.float16).save_pretrained(
        tmp_path / "source"
    )
    options = Policy(bits="2", rank="4", scale_dtype="float16", solve=SolveSpec(steps=0), **EXACT)
    manifest = run(tmp_path / "source", tmp_path / "out", policy=options, max_shard_bytes=1 << 30)
    dense = load_file(tmp_path / "source" / "model.safetensors")
    names = {m["name"] for m in manifest["matrices"]}
    weights = sum(dense[n].numel() for n in names)
    kept = sum(t.numel() * t.itemsize for n, t in dense.items() if n not in names)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 8 * (size - kept) / weights == pytest.approx(2.25, rel=0.01)


def test_disk_bytes_are_the_files(source, tmp_path):
    manifest = run(source, tmp_path / "out", policy=policy())
    sizes = {p.relative_to(tmp_path / "out").as_posix(): p.stat().st_size for p in (tmp_path / "out").rglob("*")}
    files = manifest["files"]
    assert {n: sizes[n] for n in files} == {n: d["size"] for n, d in files.items()}
    assert manifest["totals"]["disk_bytes"] == sum(sizes[n] for n in files if n != "README.md")


def test_no_place_of_the_source_is_kept(source, tmp_path):
    """transformers 4 wrote into every configuration where it had loaded it from."""
    shutil.copytree(source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    old = {**config, "_name_or_path": "/home/me/model", "vision": {"_name_or_path": "/home/me/model/vision"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(old))
    run(tmp_path / "source", tmp_path / "out", policy=policy())
    assert "/home/me" not in (tmp_path / "out" / "config.json").read_text()


def test_the_card_loads_the_model(source, tmp_path, monkeypatch):
    """The commands of README.md work as they stand."""
    run(source, tmp_path / "mine", policy=policy())
    card = Path(tmp_path / "mine" / "README.md").read_text()
    assert "base_model:" not in card, "a local directory is no hub id"
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "mine")
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].print_trainable_parameters() is None
    shutil.rmtree(tmp_path / "mine")
