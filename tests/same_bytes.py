"""Does this tree write the same bytes as another commit? ``make same BASE=HEAD~1``

Runs the same commands, over all presets, formats and codes, a budget, a calibration and a recipe, with the source of
both commits on the same small models, and compares every file that they write. For changes that must change nothing:
moved modules, joined code paths, faster kernels.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The quick brown fox jumps over the lazy dog while seven wizards mix a very big potion of jade. "
NOT_COMPARED = {"metrics.json", "trainer_state.json", "training_args.bin"}  # they hold times
FORKED = r"""
import json, os, sys
import loftq.cli, peft, torch, transformers
torch.set_num_threads(1)
for name, command in json.load(open(sys.argv[1])).items():
    pid = os.fork()
    if not pid:
        log = os.open(name + ".log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["loftq", *command]
        try:
            loftq.cli.main()
        except SystemExit as e:
            os._exit(e.code if isinstance(e.code, int) else 1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit(f"{name} failed: loftq {' '.join(command)}\n{open(name + '.log').read()}")
"""


def commands(inputs: Path) -> dict[str, list[str]]:
    """Name of the output -> command, without ``--output``. All are run in one directory, with relative names."""
    llama, bert, gpt2, texts = (str(inputs / name) for name in ("llama", "bert", "gpt2", "texts.txt"))
    quantize = ["quantize", llama, "--rank", "4", "--workers", "1", "--task-type", "CAUSAL_LM"]
    found = {f"preset-{p}": [*quantize, "--bits", "2", "--preset", p] for p in ("qlora", "svd", "loftq", "fitted")}
    for preset in ("qera-diag", "qera-full", "eora", "cloq", "projq", "srr", "lq-lora", "descent"):
        found[f"preset-{preset}"] = [
            *quantize,
            "--bits",
            "2",
            "--preset",
            preset,
            "--calibrate",
            f"statistics-{kind(preset)}",
        ]
    for code in ("nf", "lloyd", "uniform", "uniform-tensor", "affine"):
        for bits in (2, 3, 4, 8):
            if (code, bits) != ("lloyd", 8):
                double = ["--double-quant"] if bits == 3 and code != "uniform-tensor" else []
                found[f"code-{code}-{bits}"] = [*quantize, "--bits", str(bits), "--code", code, *double]
    found |= {
        "format-dense": [*quantize, "--bits", "2", "--format", "dense"],
        "format-bnb": [*quantize, "--bits", "down_proj=16,4", "--format", "bnb", "--preset", "loftq"],
        "mixed": [*quantize, "--bits", "layers.0=4,2", "--rank", "mlp=8,4", "--rslora", "--alpha", "3"],
        "budget": [*quantize, "--budget", "3.1", "--budget-ranks", "2,8"],
        "embeddings": [*quantize, "--bits", "4", "--embeddings", "--max-shard-size", "20KB"],
        "bert": ["quantize", bert, "--rank", "4", "--bits", "3", "--workers", "1"],
        "gpt2": ["quantize", gpt2, "--rank", "4", "--bits", "2", "--workers", "1", "--format", "dense"],
    }
    for kind_ in ("full", "diagonal", "fisher"):
        line = ["calibrate", llama, "--data", texts, "--kind", kind_, "--samples", "8", "--max-length", "16"]
        found = {f"statistics-{kind_}": line, **found}
    recipe = inputs / "recipe.yaml"
    return {**{name: [*line, "--output", name] for name, line in found.items()}, "run": ["train", str(recipe)]}


def kind(preset: str) -> str:
    return {"qera-diag": "diagonal", "lq-lora": "fisher"}.get(preset, "full")


def make_inputs(inputs: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
    more = {"intermediate_size": 72, "max_position_embeddings": 64, "pad_token_id": 0}
    configs = {
        "llama": transformers.LlamaConfig(**shape, **more),
        "bert": transformers.BertConfig(**shape, **more),
        "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=64),
    }
    words = ["<pad>", "<unk>", "</s>", *sorted(set(TEXT.split()))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    for name, config in configs.items():
        torch.manual_seed(0)
        made = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        made.from_config(config).save_pretrained(inputs / name)
        fast.save_pretrained(inputs / name)
    (inputs / "texts.txt").write_text("\n\n".join([TEXT * 4] * 40), "utf-8")
    (inputs / "recipe.yaml").write_text(
        f"model: {inputs / 'llama'}\ntask: wikitext2\nmethod: loftq\n"
        f"data: {{train: {inputs / 'texts.txt'}, validation: {inputs / 'texts.txt'}}}\n"
        "quantization: {bits: 2}\nlora: {rank: 4}\nmax_length: 16\noutput: run\n"
        "training: {max_steps: 2, per_device_train_batch_size: 2, save_strategy: 'no', learning_rate: 1.0e-3}\n",
        "utf-8",
    )


def run(source: Path, place: Path, inputs: Path) -> dict[str, str]:
    """Run all commands with one tree's source in ``place``; the hash of every file, by its path."""
    import json

    place.mkdir()
    (place.parent / "commands.json").write_text(json.dumps(commands(inputs)), "utf-8")
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}  # PEFT writes sets as they come
    environ = {**os.environ, **fixed, "PYTHONPATH": str(source)}
    subprocess.run(
        [sys.executable, "-c", FORKED, str(place.parent / "commands.json")], cwd=place, env=environ, check=True
    )
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in NOT_COMPARED and path.suffix != ".log" and not {"runs", "logs"} & {*path.parts}
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the commit to compare with")
    base = parser.parse_args().base
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as name:
        work = Path(name)
        make_inputs(work / "inputs")
        archive = subprocess.run(["git", "archive", base, "src"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        (work / "base").mkdir()
        subprocess.run(["tar", "-x"], cwd=work / "base", input=archive, check=True)
        found = {}
        for side, source in {"before": work / "base" / "src", "after": ROOT / "src"}.items():
            found[side] = run(source, work / side, work / "inputs")
        before, after = found["before"], found["after"]
        odd = [path for path in sorted(before.keys() | after.keys()) if before.get(path) != after.get(path)]
        for path in odd:
            state = "only before" if path not in after else "only after" if path not in before else "differs"
            print(f"{path}: {state}")
        print(f"{len(before)} files before, {len(after)} after, {len(odd)} differ")
        return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
