"""``loftq plan --estimate``: what it counts is exact, what it forecasts of training is near what is measured."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import loftq
from harness import cli
from loftq.checkpoint.estimate import _wall
from loftq.errors import UsageError
from loftq.solver.cost import constants, seconds
from loftq.spec import SolveSpec
from models import tiny

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # behind everything else: some names are also tests'
from constants import peak

TOKENS = 192
SIZES = {
    "vocab_size": 1500,
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32}
MODELS = {"Llama": SIZES, "Qwen3Moe": {**SIZES, **EXPERTS}}


def measured(model: torch.nn.Module, checkpointing: bool) -> dict[str, int]:
    """Bytes of a model that is trained: of what it holds, and at the peak of a step after the first."""
    lora = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora)
    ids = torch.randint(1500, (2, TOKENS // 2))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()

    def step() -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    adapter = sum(p.nbytes for p in lora)
    base = sum(p.nbytes for p in model.parameters()) - adapter
    return {"base": base, "adapter": adapter, "total": base + 4 * adapter + peak(step)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10's advice for several cycles
@pytest.mark.parametrize(
    ("name", "checkpointing", "dtype"),
    [*((name, saving, "float32") for name in MODELS for saving in (False, True)), ("Llama", False, "bfloat16")],
)
def test_memory_of_training_is_near_what_is_measured(tmp_path, name, checkpointing, dtype):
    """Of other sizes, of another family and in another dtype than the constants are of. Within 20 %."""
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**MODELS[name]))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    options = {"bits": 4, "rank": 8, "preset": "qlora"}
    told = loftq.plan(tmp_path, estimate=True, tokens=TOKENS, dtype="source", **options).estimate["train"]
    found = measured(loftq.get_peft_model(model, progress=False, **options), checkpointing)
    assert told["weights"] + told["scales"] + told["kept"] == found["base"]
    assert told["adapter"] == told["gradients"] == told["optimizer"] / 2 == found["adapter"]
    total = told["total_with_checkpointing" if checkpointing else "total"]
    assert 0.8 < total / found["total"] < 1.2, (told, found)


def test_counts_are_those_of_the_result(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "dense")
    options = {"bits": 2, "rank": 4}
    told = loftq.plan(tmp_path / "dense", estimate=True, workers=3, **options).estimate["quantize"]
    manifest = loftq.quantize(tmp_path / "dense", tmp_path / "out", workers=1, progress=False, **options)
    sizes = {name: (tmp_path / "out" / name).stat().st_size for name in manifest["files"]}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    assert abs(told["output"] - weights) < 30_000  # headers
    assert told["source"] == (tmp_path / "dense" / "model.safetensors").stat().st_size
    assert told["workers"] == 3
    assert set(told["seconds"]) == {1, 3, 8, 64, 1024}
    assert told["seconds"][1] == pytest.approx(told["cpu_seconds"])
    assert told["seconds"][1024] == pytest.approx(told["largest_matrix_seconds"])
    experts = sum(len(m["experts"]) for m in manifest["matrices"] if "experts" in m)
    assert experts == 16


def test_each_worker_takes_the_next():
    assert _wall([3.0, 1.0, 1.0, 1.0], 2) == 3
    assert _wall([1.0, 1.0, 1.0, 3.0], 2) == 4
    assert _wall([1.0], 8) == 1


def test_time_grows_with_the_weights_or_with_in_squared():
    plain, descent = SolveSpec(steps=5), SolveSpec(steps=5, rounding="descent", metric="weights")
    assert seconds(64, 128, plain) == pytest.approx(5 * 64 * 128 * constants()["seconds_per_weight"])
    narrow, wide = (seconds(64, columns, descent, calibrated=True) for columns in (128, 256))
    assert wide > 2 * narrow
    assert seconds(64, 256, descent) == 2 * seconds(64, 128, descent)  # its H is a diagonal without a calibration


def test_the_command_tells_it(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    asked = ("plan", tmp_path, "--bits", "2", "--rank", "4", "--estimate", "--tokens", "64")
    told = json.loads(cli(*asked, "--json").out)["estimate"]
    assert told["train"]["tokens"] == 64
    text = cli(*asked).out
    assert "memory to train, 64 tokens a batch" in text
    assert "CPU time of the largest matrix" in text
    assert "estimate" not in json.loads(cli(*asked[:6], "--json").out)
    with pytest.raises(UsageError, match="tokens"):
        loftq.plan(tmp_path, bits=2, rank=4, estimate=True, tokens=0)
