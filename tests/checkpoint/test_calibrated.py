"""Calibrated starts as a user makes them: every preset, from text to files, in memory, and into bitsandbytes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loftq
from harness import EXACT, cli, tree
from loftq.calibration.calibrate import open_statistics
from loftq.errors import ConflictError, UsageError
from loftq.numerics import Metric
from loftq.spec import PRESETS, solve_spec, statistics_kind

EXACTLY = ("--dtype", "source", "--adapter-dtype", "float32")  # nothing else is rounded
FLAGS = ("--bits", "2", "--rank", "4", "--block-size", "16", "--workers", "1", *EXACTLY)


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory):
    """A random Llama with a tokenizer of bytes, so that texts can be read."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    ByT5Tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)[:3]))
    return path


@pytest.fixture(scope="session")
def statistics(small_llama, text, tmp_path_factory):
    """Kind -> directory."""
    made = {}
    for kind in ("full", "fisher"):
        made[kind] = tmp_path_factory.mktemp("statistics") / kind
        ended = cli(
            "calibrate",
            small_llama,
            "-o",
            made[kind],
            "--data",
            text,
            "--samples",
            "16",
            "--kind",
            kind,
            "--max-length",
            "64",
        )
        assert ended.code == 0, ended.err
    return made


def left_over(directory, source):
    """Of every matrix: what the manifest says, the original, and what files of backbone and adapter leave of it."""
    manifest = json.loads((directory / "loftq_manifest.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory)
    start = load_file(directory / "loftq_init" / "adapter_model.safetensors")
    originals = load_file(source / "model.safetensors")
    assert len(manifest["matrices"]) == 14
    for m in manifest["matrices"]:
        module = m["name"].removesuffix(".weight")
        b, a = (start[f"base_model.model.{module}.lora_{factor}.weight"].float() for factor in "BA")
        product = b @ a
        product = product * (m["alpha"] / m["rank"])
        original = originals[m["name"]]
        rest = original - model.get_submodule(module).dequantize() - product
        assert m["errors"][m["kept"]] == pytest.approx(Metric().norm(rest) / Metric().norm(original), rel=1e-4)
        yield m, original, rest


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[] if p in ("descent", "lq-lora") else pytest.mark.slow) for p in PRESETS]
)
def test_every_preset_from_text_to_files(small_llama, statistics, tmp_path, preset):
    place = statistics["fisher" if preset == "lq-lora" else "full"]
    ended = cli("quantize", small_llama, "-o", tmp_path / "out", *FLAGS, "--preset", preset, "--calibrate", place)
    assert ended.code == 0, ended.err
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    assert manifest["identity"]["statistics"]["sha256"] == open_statistics(place).identity["sha256"]
    moments = open_statistics(place)
    for m, original, rest in left_over(tmp_path / "out", small_llama):
        known = moments.moments(m["name"].removesuffix(".weight"))
        written = known.held.norm(rest) / known.held.norm(original)
        assert m["output_errors"][m["kept"]] == pytest.approx(written, rel=1e-4)
        assert m["output_errors"][m["kept"]] == min(m["output_errors"])
    shown = cli("inspect", tmp_path / "out")
    assert "outputs" in shown.out
    assert "relative output error of Q + s·BA (held-out)" in shown.out
    assert cli("verify", tmp_path / "out").code == 0


@pytest.mark.sampled(4)
@pytest.mark.parametrize("preset", ["svd", "loftq", "fitted", "descent"])
def test_presets_that_need_the_weights_alone(small_llama, tmp_path, preset):
    ended = cli("quantize", small_llama, "-o", tmp_path / "out", *FLAGS, "--preset", preset)
    assert ended.code == 0, ended.err
    for m, *_ in left_over(tmp_path / "out", small_llama):
        assert not m.get("output_errors")
        assert m["errors"][m["kept"]] == min(m["errors"]) < m["errors"][0]


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=[] if p in ("descent", "lq-lora") else pytest.mark.slow) for p in PRESETS]
)
def test_straight_from_texts_and_again(small_llama, text, tmp_path, preset):
    """Block by block, what is made is what the statistics of all blocks make; nothing is left beside it."""
    command = ("quantize", small_llama, *FLAGS, "--preset", preset, "--max-shard-size", "6KB", "--calibrate")
    ended = cli(*command, text, "--samples", "16", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    before = tree(tmp_path)
    assert "already done" in cli(*command, text, "--samples", "16", "-o", tmp_path / "out").out
    assert tree(tmp_path) == before
    kind = "diagonal" if preset == "qera-diag" else "fisher" if preset == "lq-lora" else "full"
    stats = ("--data", text, "--samples", "16", "--kind", kind)
    assert cli("calibrate", small_llama, "-o", tmp_path / "stats", *stats).code == 0
    again = cli(*command, tmp_path / "stats", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    ours, theirs = tree(tmp_path / "out"), tree(tmp_path / "again")
    manifests = [json.loads(each.pop("loftq_manifest.json")) for each in (ours, theirs)]
    assert ours == theirs
    assert manifests[0]["matrices"] == manifests[1]["matrices"]
    del manifests[1]["identity"]["statistics"]["sha256"]
    assert manifests[0]["identity"] == manifests[1]["identity"]


def test_in_memory_it_is_the_same(small_llama, text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_llama)
    model = AutoModelForCausalLM.from_pretrained(small_llama)
    found = loftq.calibrate(model, text, tokenizer, samples=8, progress=False)
    options = {"bits": 2, "rank": 4, "block_size": 16}
    wrapped = loftq.get_peft_model(model, calibration=found, progress=False, workers=1, **options)
    made = loftq.quantize(
        small_llama, tmp_path / "out", calibrate=str(text), calibration_samples=8, workers=1, **options, **EXACT
    )
    assert {m["name"] for m in made["matrices"]} >= {"model.layers.0.self_attn.q_proj.weight"}
    start = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    state = wrapped.state_dict()
    for name, tensor in start.items():
        ours = state[name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")]
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            theirs = start[b] @ tensor
            torch.testing.assert_close(
                state[b.replace("lora_B.", "lora_B.default.")] @ ours, theirs, rtol=1e-2, atol=2e-3
            )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("preset", ["cloq", "descent"])
def test_nf4_with_feedback_is_loaded_by_bitsandbytes_alone(small_llama, statistics, tmp_path, preset):
    """GPTQ's codes and fitted scales, in the tensors that stock bitsandbytes reads."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    options = ("--rank", "4", "--block-size", "32", "--format", "bnb", "--bits", "mlp.down_proj=16,4")
    ended = cli(
        *("quantize", small_llama, "-o", tmp_path / "out", *options, "--preset", preset),
        *("--calibrate", statistics["full"], "--workers", "1"),
    )
    assert ended.code == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu", dtype=torch.float32)
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    start = load_file(tmp_path / "out" / "loftq_init" / "adapter_model.safetensors")
    for m in manifest["matrices"]:
        module = m["name"].removesuffix(".weight")
        layer, original = model.get_submodule(module), load_file(small_llama / "model.safetensors")[m["name"]]
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        state = layer.weight.quant_state
        backbone = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state).float()
        b, a = (start[f"base_model.model.{module}.lora_{factor}.weight"].float() for factor in "BA")
        product = b @ a
        left = torch.linalg.norm(original - backbone - product) / torch.linalg.norm(original)
        assert m["errors"][m["kept"]] == pytest.approx(left.item(), rel=1e-3)


def test_statistics_of_another_model_or_kind_are_refused(small_llama, statistics, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(small_llama)
    torch.nn.init.normal_(other.lm_head.weight)
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConflictError, match="statistics of another model"):
        loftq.quantize(tmp_path / "other", tmp_path / "out", rank=4, calibrate=str(statistics["full"]))
    with pytest.raises(UsageError, match="needs statistics of kind full, and these are fisher"):
        loftq.quantize(small_llama, tmp_path / "out", rank=4, calibrate=str(statistics["fisher"]))
    with pytest.raises(UsageError, match="needs statistics of the matrices' inputs"):
        loftq.quantize(small_llama, tmp_path / "out", rank=4, preset="qera-full")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_budget_by_outputs(small_llama, statistics, tmp_path):
    command = ("quantize", small_llama, "--rank", "4", "--block-size", "16", "--budget", "4", "--workers", "1")
    ended = cli(*command, "-o", tmp_path / "out", "--calibrate", statistics["full"])
    assert ended.code == 0, ended.err
    manifest = json.loads((tmp_path / "out" / "loftq_manifest.json").read_text())
    assert manifest["totals"]["bits_per_weight"] <= 4
    assert len({m["bits"] for m in manifest["matrices"]}) > 1
    shown = cli("plan", small_llama, *command[2:], "--calibrate", statistics["full"])
    assert shown.code == 0, shown.err


def test_kinds_of_presets():
    assert {statistics_kind(solve_spec(preset)) for preset in PRESETS} == {"full", "diagonal", "fisher"}
